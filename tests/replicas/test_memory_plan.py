from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode.replicas.errors import ConfigError
from trimode.replicas.memory_plan import GIB, MIB, MemoryPlan

# The 8B in bfloat16 on a card of 80 GiB.
PLAN = MemoryPlan(
    total_bytes=80 * GIB,
    utilization=0.9,
    others_bytes=GIB,
    weight_bytes=16 * GIB,
    activation_bytes=2 * GIB,
    graph_bytes=GIB,
    page_bytes=16 * 139_264,
)


def test_pages_fill_what_the_model_leaves() -> None:
    assert PLAN.kv_bytes == 52 * GIB
    assert PLAN.num_pages(least=1) == 52 * GIB // (16 * 139_264)


def test_the_arithmetic_is_told() -> None:
    assert PLAN.describe() == (
        "80.00 GiB x 0.9 - 1.00 GiB others - 16.00 GiB weights - 2.00 GiB activations "
        "- 1.00 GiB graphs = 52.00 GiB; / 2.12 MiB a page"
    )


def test_too_little_memory_is_an_error_with_the_numbers_and_what_helps() -> None:
    small = replace(PLAN, total_bytes=22 * GIB)
    with pytest.raises(ConfigError, match=r"room for 0 pages and needs 3.*tensor_parallel"):
        small.num_pages(least=3)


@given(
    sizes=st.lists(st.integers(0, 100 * GIB), min_size=5, max_size=5),
    utilization=st.floats(0.05, 1),
    page_bytes=st.integers(1, 64 * MIB),
)
def test_a_plan_never_promises_more_than_there_is(
    sizes: list[int], utilization: float, page_bytes: int
) -> None:
    plan = MemoryPlan(sizes[0], utilization, *sizes[1:], page_bytes)
    pages = plan.num_pages(least=0)
    assert pages >= 0
    assert pages == 0 or pages * page_bytes + sum(sizes[1:]) <= sizes[0] * utilization
