import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimode.kernels.attention_inputs import AttentionInputs
from trimode.kernels.attention_layout import MAX_SPLITS, DeviceFacts, Layout, choose_num_splits

NUM_PLACES = 264  # two programs on each of 132 multiprocessors


def choose(num_rows: int, count: int, **own: bool | int) -> Layout:
    """For as many sequences of so many rows and 4096 slots, heads of the published models, and a
    Hopper GPU.
    """
    num_tokens = num_rows * count
    start = np.arange(count + 1) * num_rows
    table = np.zeros((count, 256), dtype=np.int64)
    visible = np.ones(num_tokens)
    inputs = AttentionInputs.build(start, visible, table, 16, torch.from_numpy, **own)
    query = torch.empty(num_tokens, 32, 128, dtype=torch.bfloat16, device="meta")
    return Layout.choose(query, 8, inputs, DeviceFacts(132, True))


@pytest.mark.parametrize(
    ("num_rows", "wanted"), [(1, 16), (4, 16), (8, 32), (16, 64), (32, 128), (500, 128)]
)
def test_products_are_as_large_as_queries(num_rows: int, wanted: int) -> None:
    assert choose(num_rows, 2).block_m == wanted


@pytest.mark.parametrize("num_rows", [1, 8, 16, 32])
def test_one_sequence_of_any_query_fills_the_device(num_rows: int) -> None:
    layout = choose(num_rows, 1)
    assert 8 * layout.num_splits >= 100
    assert layout.min_split_len % layout.block_n == 0


def test_room_for_padding_does_not_count_as_work() -> None:
    plain = choose(32, 1)
    assert choose(32, 1, num_tokens=32, num_sequences=1) == plain


def test_batch_invariant_layouts_do_not_depend_on_the_batch() -> None:
    sizes = [(1, 1), (1, 64), (32, 3), (700, 1)]
    layouts = {choose(*size, batch_invariant=True) for size in sizes}
    assert len(layouts) == 1
    assert layouts.pop().num_splits == 1


def test_a_launch_that_fills_the_device_is_not_split() -> None:
    assert choose_num_splits(NUM_PLACES, NUM_PLACES, 64) == 1
    assert choose_num_splits(10 * NUM_PLACES, NUM_PLACES, 64) == 1


def test_one_long_sequence_is_spread_over_the_device() -> None:
    num_splits = choose_num_splits(8, NUM_PLACES, 64)
    assert 0.8 * NUM_PLACES <= 8 * num_splits <= NUM_PLACES


def test_a_half_empty_second_wave_is_avoided() -> None:
    assert choose_num_splits(160, NUM_PLACES, 64) == 3  # 480 of 528 places, not 160 of 264


@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 600))
def test_splits_are_never_more_than_can_be_had(
    num_programs: int, num_places: int, most: int
) -> None:
    assert 1 <= choose_num_splits(num_programs, num_places, most) <= min(most, MAX_SPLITS)
