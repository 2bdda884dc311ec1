"""The processes that tests share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def _pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Pool]]:
    pools: list[Pool] = []
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def on_ranks(
    _pools: list[Pool], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Any]]:
    """on_ranks(function, R, **options): what function(group, **options) returns on each rank."""
    if not _pools or not _pools[-1].is_open:
        _pools.append(Pool(tmp_path_factory.mktemp("group")))
    return _pools[-1].run
