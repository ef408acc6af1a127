from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trimode.kernels.choice import Draws
from trimode.kernels.logit_edits import LogitEdits
from trimode.kernels.noise import gumbel
from trimode.kernels.sampling import SamplingInputs, sample_reference

MASK = 3


def inputs(
    temperatures: SequenceOf[float],
    seeds: SequenceOf[int] = (),
    positions: SequenceOf[int] = (),
    confidence: dict[int, float] | None = None,
) -> SamplingInputs:
    """SamplingInputs of one row a temperature; confidence: row -> confidence temperature."""
    rows = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    confidence = confidence or {}
    draws = Draws(
        rows=torch.tensor(rows),
        temperatures=torch.tensor([temperatures[row] for row in rows]),
        seeds=torch.tensor([seeds[row] for row in rows], dtype=torch.int64),
        positions=torch.tensor([positions[row] for row in rows], dtype=torch.int64),
    )
    return SamplingInputs(
        mask_id=MASK,
        draws=draws if rows else None,
        confident_rows=torch.tensor(list(confidence)) if confidence else None,
        confidence_temperatures=torch.tensor(list(confidence.values())),
    )


def answers(logits: Tensor, settings: SamplingInputs) -> tuple[Tensor, Tensor]:
    """Ids and confidences."""
    sampled = sample_reference(logits, settings)
    return sampled.token_ids, sampled.confidences


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(5)) * 2


def test_temperature_0_takes_the_arg_max(logits: Tensor) -> None:
    logits[:, MASK] = -5
    ids, confidences = answers(logits.clone(), inputs([0.0] * 6))
    assert torch.equal(ids, logits.argmax(-1))
    assert confidences.shape == (0,)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 10.0])
def test_the_mask_id_is_never_chosen(logits: Tensor, temperature: float) -> None:
    logits[:, MASK] = 50
    ids, _ = answers(logits, inputs([temperature] * 6, range(6), range(6)))
    assert MASK not in ids.tolist()


def test_a_sampled_id_is_the_arg_max_of_logits_and_scaled_noise(logits: Tensor) -> None:
    logits[:, MASK] = -torch.inf
    seeds, positions = [4, 4, 9, 2**40, 0, 1], [0, 1, 1, 77, 500, 3]
    wanted = logits + 0.7 * gumbel(torch.tensor(seeds), torch.tensor(positions), 20)
    ids, _ = answers(logits.clone(), inputs([0.7] * 6, seeds, positions))
    assert torch.equal(ids, wanted.argmax(-1))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_frequencies_are_those_of_the_softmax(logits: Tensor, temperature: float) -> None:
    num_draws, row = 20_000, logits[:1]
    settings = inputs([temperature] * num_draws, [11] * num_draws, range(num_draws))
    ids, _ = answers(row.repeat(num_draws, 1), settings)
    row[:, MASK] = -torch.inf
    wanted = num_draws * (row[0] / temperature).softmax(-1)
    seen = torch.bincount(ids, minlength=20)
    possible = wanted > 0
    surprise = ((seen - wanted)[possible] ** 2 / wanted[possible]).sum()
    assert seen[MASK] == 0
    assert surprise < 45  # chi square with 18 degrees of freedom: beyond 45 once in 2000 draws


def test_frequencies_over_seeds_are_those_of_the_softmax(logits: Tensor) -> None:
    num_draws = 20_000
    settings = inputs([1.0] * num_draws, range(num_draws), [8] * num_draws)
    ids, _ = answers(logits[:1].repeat(num_draws, 1), settings)
    logits[0, MASK] = -torch.inf
    wanted = logits[0].softmax(-1)
    share = torch.bincount(ids, minlength=20) / num_draws
    assert torch.allclose(share, wanted, atol=0.012)


@pytest.mark.parametrize("softness", [0.5, 1.0, 2.0])
def test_confidence_is_the_probability_of_the_id_at_its_own_temperature(
    logits: Tensor, softness: float
) -> None:
    settings = inputs([0.0, 0.9, 0.0, 0.9, 0.0, 0.0], range(6), range(6), {1: softness, 4: 1.0})
    clean = logits.clone()
    clean[:, MASK] = -torch.inf
    ids, confidences = answers(logits, settings)
    wanted = [(clean[1] / softness).softmax(-1)[ids[1]], clean[4].softmax(-1)[ids[4]]]
    assert confidences.tolist() == pytest.approx([float(value) for value in wanted])


def test_an_answer_does_not_depend_on_its_batch_mates(logits: Tensor) -> None:
    temperatures, everyone = [0.0, 0.7, 1.3, 0.0, 0.2, 2.0], dict.fromkeys(range(6), 1.0)
    settings = inputs(temperatures, range(6), range(10, 16), everyone)
    ids, confidences = answers(logits.clone(), settings)
    for row in range(6):
        single = inputs([temperatures[row]], [row], [10 + row], {0: 1.0})
        one_id, one_confidence = answers(logits[row : row + 1].clone(), single)
        assert one_id[0] == ids[row]
        assert one_confidence[0] == confidences[row]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_logits_are_widened_before_noise_and_softmax(
    logits: Tensor, dtype: torch.dtype
) -> None:
    narrow = logits.to(dtype)
    settings = inputs([0.7] * 6, range(6), range(6), {0: 1.0})
    ids, confidences = answers(narrow.clone(), settings)
    wanted, wanted_confidences = answers(narrow.double(), settings)
    assert torch.equal(ids, wanted)
    assert confidences.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert confidences.double().tolist() == pytest.approx(wanted_confidences.tolist(), rel=1e-5)


def edits(**own: list[tuple[int, int, float]]) -> LogitEdits:
    """penalised, added: (row, id, value); forced: (row, id, 0)."""

    def columns(name: str) -> tuple[Tensor, Tensor, Tensor]:
        rows, ids, values = zip(*own.get(name, []), strict=True) if own.get(name) else ((), (), ())
        return (
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(values, dtype=torch.float64),
        )

    forced = columns("forced")
    nothing = torch.empty(0, dtype=torch.int64)
    rows = torch.tensor(sorted({row for changes in own.values() for row, _, _ in changes}))
    return LogitEdits(
        rows, *columns("penalised"), *columns("added"), forced[0], forced[1], nothing, None
    )


def test_logprobs_are_the_models_own_whatever_is_asked(logits: Tensor) -> None:
    settings = inputs([0.0] * 6)
    settings = replace(
        settings, edits=edits(forced=[(1, 7, 0.0)]), logprob_rows=torch.tensor([1, 4]), num_top=2
    )
    clean = logits.clone()
    clean[:, MASK] = -torch.inf
    wanted = clean.log_softmax(-1)
    sampled = sample_reference(logits, settings)
    assert sampled.logprobs is not None and sampled.top_ids is not None
    assert sampled.logprobs.tolist() == [float(wanted[1, 7]), float(wanted[4].max())]
    assert sampled.top_ids.tolist() == wanted[[1, 4]].topk(2).indices.tolist()


def test_samples_of_one_request_draw_different_noise() -> None:
    seeds, positions = torch.tensor([4, 4]), torch.tensor([9, 9])
    noise = gumbel(seeds, positions, 20, torch.tensor([0, 1]))
    assert torch.equal(noise[0], gumbel(seeds[:1], positions[:1], 20)[0])
    assert not torch.equal(noise[0], noise[1])
