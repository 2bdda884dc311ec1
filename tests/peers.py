"""The original packages as test requirements: requirements/test-peers.txt, with --no-deps."""

import importlib.util
import sys
import types

import pytest

REASON = "pip install --no-deps -r requirements/test-peers.txt"


def info_nce_pytorch() -> types.ModuleType:
    return pytest.importorskip("info_nce", reason=REASON)


def pytorch_metric_learning() -> types.ModuleType:
    """Its `losses`. They import scipy for functions that no test here calls, so where scipy is
    missing an empty module stands in for it, during the import only.
    """
    stand_ins = ["scipy", "scipy.stats", "scipy.special"]
    if importlib.util.find_spec("scipy") is not None:
        stand_ins = []
    for name in stand_ins:
        sys.modules[name] = types.ModuleType(name)
    try:
        return pytest.importorskip("pytorch_metric_learning.losses", reason=REASON)
    finally:
        for name in stand_ins:
            del sys.modules[name]
