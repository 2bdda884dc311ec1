"""`python -m codir_fast` is `codir-fast`."""

import sys

from codir_fast.cli import main

sys.exit(main())
