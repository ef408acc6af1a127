"""The kernels behind `sample` together, against its reference and over shards of the vocabulary."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.kernels import choice
from trimode.kernels.choice import Draws
from trimode.kernels.logit_edits import LogitEdits
from trimode.kernels.sampling import Sampled, SamplingInputs, sample_reference, sample_triton
from trimode.kernels.truncation import Truncation
from trimode.kernels.vocabulary import VocabularyShard

MASK = 3
KINDS = [sample_reference, sample_triton]
# Confidences and log-probabilities of float32 against the reference's, whose own rounding is in it.
RATIO = 1e-5


def everything(vocab_size: int) -> SamplingInputs:
    """Inputs of eight rows in which every parameter acts on some: 0 greedy, 1 and 2 drawn, 3 and 4
    drawn and truncated, 5 and 6 edited, 6 also drawn and truncated, 7 forced.
    """
    last = vocab_size - 1
    allowed = torch.rand(1, vocab_size, generator=torch.Generator().manual_seed(2)) < 0.5
    double = torch.float64
    draws = Draws(
        rows=torch.tensor([1, 2, 3, 4, 6]),
        temperatures=torch.tensor([0.7, 1.5, 1.0, 0.8, 1.2]),
        seeds=torch.tensor([5, -6, 2**60, 8, 9]),
        positions=torch.tensor([0, 100, 2**32, 7, 9]),
        samples=torch.tensor([0, 1, 0, 2, 0]),
        truncation=Truncation(
            torch.tensor([2, 3, 4]),
            torch.tensor([5, vocab_size, 9]),
            torch.tensor([0.9, 0.8, 1.0]),
            torch.tensor([0.0, 0.0, 0.05]),
        ),
    )
    changes = LogitEdits(
        rows=torch.tensor([5, 6, 7]),
        penalised_rows=torch.tensor([5, 5, 6, 6]),
        penalised_ids=torch.tensor([0, last, 1, last - 1]),
        penalties=torch.tensor([1.2, 1.3, 1.4, 1.5], dtype=double),
        added_rows=torch.tensor([5, 5, 6, 7]),
        added_ids=torch.tensor([0, 2, last, 1]),
        additions=torch.tensor([0.3, 0.001, -torch.inf, 50.0], dtype=double),
        forced_rows=torch.tensor([7]),
        forced_ids=torch.tensor([last - 2]),
        masked_rows=torch.tensor([6]),
        allowed=allowed,
    )
    return SamplingInputs(
        mask_id=MASK,
        draws=draws,
        edits=changes,
        confident_rows=torch.tensor([0, 2, 5, 6]),
        confidence_temperatures=torch.tensor([1.0, 0.5, 2.0, 1.0]),
        candidate_rows=torch.tensor([0, 3, 6]),
        num_candidates=4,
        logprob_rows=torch.tensor([1, 5, 6, 7]),
        num_top=3,
    )


def _on(value: Any, device: str) -> Any:
    """The same with all its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: _on(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **own)
    return value


def assert_equal_answers(got: Sampled, wanted: Sampled, ratio: float) -> None:
    assert got.token_ids.tolist() == wanted.token_ids.tolist()
    for name in ("candidates", "top_ids"):
        mine, theirs = getattr(got, name), getattr(wanted, name)
        assert mine.tolist() == theirs.tolist(), name
    for name in ("confidences", "logprobs", "top_logprobs"):
        mine, theirs = getattr(got, name).cpu().double(), getattr(wanted, name).cpu().double()
        assert mine.shape == theirs.shape
        assert (mine - theirs).square().mean() <= ratio**2 * theirs.square().mean(), name


def rows_of(vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Eight rows without two equal logits."""
    generator = torch.Generator().manual_seed(vocab_size)
    steps = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(8)])
    return ((steps - vocab_size / 2) * (16 / vocab_size)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [32, 4096])
def test_the_kernels_answer_as_the_reference(
    dtype: torch.dtype, chunk: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "CHUNK", chunk)
    logits, settings = rows_of(127, dtype), everything(127)
    wanted = sample_reference(logits.clone(), settings)
    got = sample_triton(logits.to(device), _on(settings, device))
    assert_equal_answers(got, wanted, RATIO)


def test_the_kernels_answer_rows_that_ask_for_nothing(device: str) -> None:
    logits = rows_of(127, torch.bfloat16).to(device)
    logits[2, MASK] = 99
    sampled = sample_triton(logits, SamplingInputs(MASK))
    logits[:, MASK] = -torch.inf
    assert sampled.token_ids.tolist() == logits.float().argmax(-1).tolist()
    assert sampled.confidences.shape == (0,)


@pytest.mark.parametrize("sample", KINDS)
def test_of_equal_candidates_the_chosen_one_is_first(
    sample: Callable[..., Sampled], device: str
) -> None:
    where = device if sample is sample_triton else "cpu"
    logits = torch.zeros(1, 500, device=where)
    rows = torch.zeros(1, dtype=torch.int64, device=where)
    sampled = sample(logits, SamplingInputs(MASK, candidate_rows=rows, num_candidates=5))
    assert sampled.candidates is not None
    assert sampled.candidates[0, 0] == sampled.token_ids[0] == 0


class Ranks:
    """Ranks of a group as threads, of which one runs at a time: Triton's interpreter is not made
    for two.
    """

    def __init__(self, num_ranks: int) -> None:
        self._parts: list[Tensor | None] = [None] * num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=60)
        self._baton = threading.Lock()

    def gather(self, rank: int, part: Tensor) -> Tensor:
        self._parts[rank] = part
        self._meet()
        together = torch.stack([part for part in self._parts if part is not None])
        self._meet()  # before the next round overwrites the parts
        return together

    def _meet(self) -> None:
        self._baton.release()
        self._barrier.wait()
        self._baton.acquire()

    def run(self, work: Callable[[int], Sampled]) -> list[Sampled]:
        def one(rank: int) -> Sampled:
            with self._baton:
                return work(rank)

        with ThreadPoolExecutor(len(self._parts)) as pool:
            return list(pool.map(one, range(len(self._parts))))


def sample_sharded(
    sample: Callable[..., Sampled], logits: Tensor, settings: SamplingInputs, num_ranks: int
) -> list[Sampled]:
    """What each of `num_ranks` ranks answers, each of which holds a part of the logits: equal ones,
    multiples of 32, the last with NaN where the vocabulary ends.
    """
    vocab_size = logits.shape[1]
    part_size = -(-vocab_size // num_ranks // 32) * 32
    padded = torch.full((len(logits), part_size * num_ranks), torch.nan, device=logits.device)
    padded[:, :vocab_size] = logits
    padded = padded.to(logits.dtype)
    ranks = Ranks(num_ranks)

    def work(rank: int) -> Sampled:
        start = rank * part_size
        shard = VocabularyShard(start, vocab_size, lambda part: ranks.gather(rank, part))
        return sample(padded[:, start : start + part_size].clone(), settings, shard)

    return ranks.run(work)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("sample", KINDS)
def test_a_sharded_vocabulary_gives_the_same_answers_on_every_rank(
    sample: Callable[..., Sampled],
    num_ranks: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, as parts are whole chunks: what is summed, and in which order, stays."""
    monkeypatch.setattr(choice, "CHUNK", 32)
    where = device if sample is sample_triton else "cpu"
    logits, settings = rows_of(127, torch.bfloat16).to(where), _on(everything(127), where)
    wanted = sample(logits.clone(), settings)
    for got in sample_sharded(sample, logits, settings, num_ranks):
        assert_equal_answers(got, wanted, 0.0)


def test_a_rank_may_hold_nothing_but_padding(device: str) -> None:
    logits, settings = rows_of(31, torch.float32).to(device), _on(everything(31), device)
    wanted = sample_triton(logits.clone(), settings)
    for got in sample_sharded(sample_triton, logits, settings, 2):
        assert_equal_answers(got, wanted, RATIO)


def test_a_shard_starts_where_four_ids_share_their_noise() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        VocabularyShard(6, 20, lambda part: part[None])
