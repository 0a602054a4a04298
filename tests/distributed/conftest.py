"""What the tests of several ranks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gkd_dist.storage import Storage
from tests.distributed.cases import uneven_world
from tests.distributed.groups import Ranks


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A graph in uneven parts with a teacher's knowledge."""
    return uneven_world(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Groups of ranks for all cases of a module."""
    started = Ranks()
    yield started
    started.close()
