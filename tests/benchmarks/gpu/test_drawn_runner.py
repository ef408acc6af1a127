from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from trimode.kernels.accept import accept_reference
from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.pass_inputs import AcceptInputs
from trimode.replicas.types import Mode, Request

Script = Callable[[str], ModuleType]
VOCAB, MASK = 64, 3


def verify_pass(counts: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Random ids and answers of a causal pass: 1 is a decode row, more a verify query's."""
    rng = np.random.default_rng(seed)
    total = sum(counts)
    starts = torch.tensor(np.cumsum([0, *counts])[:-1])
    accept = AcceptInputs(starts, starts.clone(), torch.tensor(counts), max(counts))
    ids, answers = (torch.tensor(rng.integers(4, VOCAB, total)) for _ in range(2))
    return answers, ids, accept


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("answers_dtype", [torch.int32, torch.int64])
def test_a_verify_query_keeps_as_many_drafts_as_was_drawn(
    script: Script, answers_dtype: torch.dtype, ids_dtype: torch.dtype
) -> None:
    drawn_answers = script("drawn_runner").drawn_answers
    counts = [4, 1, 8, 4, 4]
    survival = torch.zeros(9, 7)
    survival[4, :3] = torch.tensor([0.8, 0.5, 0.2])
    survival[8] = torch.linspace(0.9, 0.3, 7)
    answers, ids, accept = verify_pass(counts)
    answers, ids = answers.to(answers_dtype), ids.to(ids_dtype)
    uniform = torch.tensor([0.6, 0.0, 0.0, 0.1, 0.95])
    got = drawn_answers(answers, ids, accept, survival, uniform, MASK)
    kept, _ = accept_reference(
        ids, got, accept.first_rows, accept.first_answers, accept.counts, accept.max_count
    )
    assert got.dtype == answers_dtype
    assert kept.tolist() == [2, 1, 8, 4, 1]
    assert got[4] == answers[4]  # a decode row's own
    assert (got >= 0).all() and (got < VOCAB).all() and (got != MASK).all()


def test_short_runs_of_draws_are_even(script: Script) -> None:
    runner = script("drawn_runner")
    draws = runner.even_draws(0).view(-1, runner.STRATA)
    strata = (draws * runner.STRATA).floor().sort(dim=1).values
    assert (strata == torch.arange(runner.STRATA)).all()
    assert not torch.equal(draws[0].argsort(), draws[1].argsort())


def test_an_answer_that_contradicts_its_draft_is_never_the_mask(script: Script) -> None:
    drawn_answers = script("drawn_runner").drawn_answers
    answers, ids, accept = verify_pass([2])
    for draft in (0, 1, MASK, MASK + 1, VOCAB - 1):
        ids[1] = draft
        got = drawn_answers(answers, ids, accept, torch.zeros(3, 1), torch.zeros(1), MASK)
        assert got[0] not in (draft, MASK)
        assert 0 <= got[0] < VOCAB


@pytest.mark.parametrize("block_size", [4, 16])
def test_an_engine_keeps_the_published_mean(
    script: Script,
    tiny_model: Callable[..., Any],
    drain: Callable[..., dict[str, Any]],
    block_size: int,
) -> None:
    published = script("published_acceptance")
    config = EngineConfig(page_size=4, num_pages=600, launch_ahead=True, prefix_cache=False)
    rank = script("drawn_runner").DrawnRunner(tiny_model(torch.float32), config)
    rank.draw({size: published.survival("measured", size) for size in published.BLOCK_SIZES})
    runner = TorchModelRunner(tiny_model(torch.float32), config, rank)
    requests = [
        Request(
            str(seed), tuple(range(4, 10 + seed)), Mode.SELF_SPECULATION, 120,
            ignore_eos=True, block_size=block_size,
        )
        for seed in range(12)
    ]  # fmt: skip
    outputs = drain(Engine(runner, config), requests)
    # The last round of each may be cut short by its end.
    rounds = [count for output in outputs.values() for count in output.finish.accepted[:-1]]
    deviation = np.std(rounds) / len(rounds) ** 0.5
    assert np.mean(rounds) == pytest.approx(
        published.mean_kept("measured", block_size), abs=4 * deviation
    )


def test_plain_decoding_is_not_touched(
    script: Script, tiny_model: Callable[..., Any], drain: Callable[..., dict[str, Any]]
) -> None:
    config = EngineConfig(page_size=4, num_pages=64, launch_ahead=True, prefix_cache=False)
    model = tiny_model(torch.float64)
    rank = script("drawn_runner").DrawnRunner(model, config)
    rank.draw({4: [0.9, 0.8, 0.7]})
    request = Request("r", tuple(range(4, 12)), Mode.AUTOREGRESSIVE, 20, ignore_eos=True)
    runners = (TorchModelRunner(model, config, rank), TorchModelRunner(model, config))
    drawn, plain = (drain(Engine(runner, config), [replace(request)])["r"] for runner in runners)
    assert drawn.token_ids == plain.token_ids
