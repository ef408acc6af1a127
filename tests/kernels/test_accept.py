import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.kernels.accept import num_accepted

sequences = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=5), st.lists(st.integers(0, 1), min_size=6)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sequences=sequences, before=st.integers(0, 3))
def test_drafts_count_up_to_the_first_that_its_answer_contradicts(
    sequences: list[tuple[list[int], list[int]]], before: int
) -> None:
    rows, answers = [7] * before, []
    first_rows, first_answers, counts, wanted = [], [], [], []
    for drafts, own in sequences:
        first_rows.append(len(rows))
        first_answers.append(len(answers))
        counts.append(len(drafts) + 1)
        rows += [9, *drafts]
        answers += own[: len(drafts) + 1]
        agreeing = 0
        while agreeing < len(drafts) and drafts[agreeing] == own[agreeing]:
            agreeing += 1
        wanted.append(1 + agreeing)
    got = num_accepted(
        *(torch.tensor(values) for values in (rows, answers, first_rows, first_answers, counts)),
        max_count=max(counts),
    )
    assert got.tolist() == wanted


def test_one_answer_is_always_kept() -> None:
    rows, answers = torch.tensor([4, 5, 6]), torch.tensor([5])
    first = torch.tensor([0])
    assert num_accepted(rows, answers, first, first, torch.tensor([1]), 1).tolist() == [1]
