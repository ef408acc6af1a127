from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimode.kernels.attention_inputs import AttentionInputs, max_num_tiles, tile_len

LENS = st.lists(st.integers(1, 80), min_size=1, max_size=12)


def build(lens: list[int], num_padding: int = 0, **own: int | bool) -> AttentionInputs:
    query_start = np.concatenate(([0], np.cumsum(lens)))
    visible = np.concatenate((np.ones(query_start[-1]), np.zeros(num_padding))).astype(np.int64)
    table = np.arange(len(lens) * 3).reshape(-1, 3)
    return AttentionInputs.build(query_start, visible, table, 4, torch.from_numpy, **own)


@given(lens=LENS, num_padding=st.integers(0, 40), batch_invariant=st.booleans())
def test_every_row_is_in_one_tile_of_its_own_sequence(
    lens: list[int], num_padding: int, batch_invariant: bool
) -> None:
    inputs = build(lens, num_padding, batch_invariant=batch_invariant)
    owners = np.repeat(np.arange(len(lens)), lens).tolist() + [0] * num_padding
    covered = []
    for sequence, first, end in inputs.tiles.tolist():
        assert 0 < end - first <= inputs.tile_len
        assert set(owners[first:end]) == {sequence}
        covered += range(first, end)
    assert covered == list(range(len(owners)))


@given(lens=LENS, more_tokens=st.integers(0, 90), more_sequences=st.integers(0, 6))
def test_filled_up_inputs_have_shapes_of_the_sizes_alone(
    lens: list[int], more_tokens: int, more_sequences: int
) -> None:
    num_tokens, num_sequences = sum(lens) + more_tokens, len(lens) + more_sequences
    sizes = {"num_tokens": num_tokens, "num_sequences": num_sequences, "num_pages": 7}
    inputs, plain = build(lens, **sizes), build(lens)
    assert inputs.visible.shape == (num_tokens,)
    assert inputs.page_table.shape == (num_sequences, 7)
    assert inputs.tiles.shape == (max_num_tiles(num_tokens, num_sequences), 3)
    assert inputs.tile_len == tile_len(num_tokens, num_sequences)
    assert (inputs.visible[sum(lens) :] == 0).all()
    assert torch.equal(inputs.page_table[: len(lens), :3], plain.page_table)
    rows = [row for _, first, end in inputs.tiles.tolist() for row in range(first, end)]
    assert rows == list(range(num_tokens))


@pytest.mark.parametrize(
    ("num_tokens", "num_sequences", "wanted"),
    [(64, 64, 4), (1, 1, 4), (40, 8, 8), (128, 8, 16), (256, 8, 32), (4096, 3, 32), (552, 41, 16)],
)
def test_tiles_are_as_long_as_the_average_query(
    num_tokens: int, num_sequences: int, wanted: int
) -> None:
    assert tile_len(num_tokens, num_sequences) == wanted


def test_batch_invariant_tiles_are_the_same_for_all_passes() -> None:
    sizes = [(1, 1), (4096, 3), (256, 8)]
    assert len({tile_len(*size, batch_invariant=True) for size in sizes}) == 1


@pytest.mark.parametrize("num_tokens", [None, 12])
def test_what_is_on_the_device_is_not_read(num_tokens: int | None) -> None:
    # A meta tensor has no values.
    visible = torch.empty(9, dtype=torch.int64, device="meta")
    table = torch.empty(3, 5, dtype=torch.int32, device="meta")
    inputs = AttentionInputs.build(
        np.array([0, 1, 5, 9]), visible, table, 16, partial(torch.asarray, device="meta"),
        num_tokens=num_tokens,
    )  # fmt: skip
    assert inputs.visible.shape == (num_tokens or 9,)


def test_other_visible_lengths_are_laid_out_anew() -> None:
    inputs = build([3, 1])
    before = inputs.reference_tiles()
    after = inputs.seeing(torch.full((4,), 2))
    assert after.visible.dtype == inputs.visible.dtype
    assert after.reference_tiles()[0].slots.shape != before[0].slots.shape


def test_the_reference_is_laid_out_once_a_pass() -> None:
    inputs = build([3, 1])
    first = inputs.reference_tiles()
    assert all(a is b for a, b in zip(first, inputs.reference_tiles(), strict=True))
