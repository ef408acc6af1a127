import pytest


@pytest.fixture(autouse=True, scope="module")
def poisoned(poisoned_memory: None) -> None:
    """Every test of this folder runs with poisoned memory."""
