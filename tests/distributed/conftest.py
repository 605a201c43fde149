"""The processes of a test module; `processes.py` has the rules."""

import pytest

from tests.distributed.processes import Ranks


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks
