from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimode.kernels.accept import accept, accept_reference, accept_triton

Sequences = list[tuple[list[int], list[int]]]  # (drafts, answers) of each
sequences = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=5), st.lists(st.integers(0, 1), min_size=6)),
    min_size=1,
    max_size=5,
)


def batch(sequences: Sequences, before: int = 0) -> tuple[list[list[int]], int]:
    """What a pass over these sequences holds, and the most answers of one."""
    rows, answers = [7] * before, []
    first_rows, first_answers, counts = [], [], []
    for drafts, own in sequences:
        first_rows.append(len(rows))
        first_answers.append(len(answers))
        counts.append(len(drafts) + 1)
        rows += [9, *drafts]
        answers += own[: len(drafts) + 1]
    return [rows, answers, first_rows, first_answers, counts], max(counts)


def agreeing(drafts: list[int], answers: list[int]) -> int:
    kept = 1
    while kept <= len(drafts) and drafts[kept - 1] == answers[kept - 1]:
        kept += 1
    return kept


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sequences=sequences, before=st.integers(0, 3))
def test_drafts_count_up_to_the_first_that_its_answer_contradicts(
    sequences: Sequences, before: int
) -> None:
    columns, max_count = batch(sequences, before)
    tensors = [torch.tensor(values) for values in columns]
    wanted = [agreeing(*sequence) for sequence in sequences]
    kept, last_ids = accept(*tensors, max_count=max_count)
    assert kept.tolist() == wanted
    assert last_ids.tolist() == [
        own[count - 1] for (_, own), count in zip(sequences, wanted, strict=True)
    ]


def test_one_answer_is_always_kept() -> None:
    rows, answers = torch.tensor([4, 5, 6]), torch.tensor([5])
    first = torch.tensor([0])
    kept, last_ids = accept(rows, answers, first, first, torch.tensor([1]), 1)
    assert (kept.tolist(), last_ids.tolist()) == ([1], [5])


def random_batch(dtype: torch.dtype, device: str) -> tuple[list[Tensor], int]:
    generator = torch.Generator().manual_seed(3)
    made: Sequences = []
    for num_drafts in (0, 31, 1, 7, 8, 15, 3, 31):
        drafts = torch.randint(0, 131072, (num_drafts,), generator=generator).tolist()
        wrong = int(torch.randint(0, num_drafts + 1, (1,), generator=generator))
        made.append((drafts, [*drafts[:wrong], *[5] * (num_drafts + 1 - wrong)]))
    made.append((list(range(31)), [*range(31), 99]))
    columns, max_count = batch(made, before=2)
    return [torch.tensor(values, dtype=dtype, device=device) for values in columns], max_count


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_the_kernel_equals_the_reference(dtype: torch.dtype, device: str) -> None:
    tensors, max_count = random_batch(dtype, device)
    for got, wanted in zip(
        accept_triton(*tensors, max_count), accept_reference(*tensors, max_count), strict=True
    ):
        assert got.dtype == dtype
        assert got.tolist() == wanted.tolist()


def test_it_compiles_for_every_target_without_a_spill(
    compile_launches: Callable[..., list[dict[str, Any]]],
) -> None:
    def launch() -> None:
        for dtype in (torch.int32, torch.int64):
            tensors = [torch.empty(64, dtype=dtype, device="meta") for _ in range(5)]
            accept_triton(*tensors, 32)

    for found in compile_launches("trimode.kernels.accept", launch):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
