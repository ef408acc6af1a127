from dataclasses import fields
from typing import Any

import pytest
import torch

from trimode.kernels.sampling import SamplingInputs
from trimode.replicas.engine import Engine
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.rank_runner import RankRunner
from trimode.replicas.types import Mode
from trimode.replicas.warm_up import largest_pass, samplings, warm_up

AR, DIFFUSION, SPECULATION = Mode.AUTOREGRESSIVE, Mode.BLOCK_DIFFUSION, Mode.SELF_SPECULATION
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def kind(sampling: SamplingInputs) -> tuple[str, ...]:
    """What of a pass's sampling is asked at all: each of these is compiled apart."""
    asked = [one.name for one in fields(sampling) if getattr(sampling, one.name) is not None]
    truncated = sampling.draws is not None and sampling.draws.truncation is not None
    return (*asked, "truncation") if truncated else tuple(asked)


DRAWN = {"temperature": 0.7}
PART = DRAWN | {"top_p": 0.9, "top_k": 20}
CHANGED = ({"repetition_penalty": 1.1}, {"num_logprobs": 1}, PART | {"presence_penalty": 0.5})


@pytest.mark.parametrize(
    ("mode", "own"),
    [(mode, own) for mode in (AR, SPECULATION, DIFFUSION) for own in ({}, DRAWN, PART)]
    + [(mode, own) for mode in (AR, SPECULATION) for own in CHANGED],
)
def test_what_requests_usually_ask_has_been_run_before(
    tiny_model: Any, make_request: Any, small_engine: Any, drain: Any, mode: Mode,
    own: dict[str, Any],
) -> None:  # fmt: skip
    known = {kind(sampling) for sampling in samplings(3, 64, 4)}
    config = small_engine(max_block_size=4, max_step_tokens=32)
    rank = RankRunner(tiny_model(torch.float32), config)
    launch, seen = rank.launch, []

    def listen(inputs: Any, before: Any = None) -> Any:
        if len(inputs.answer_rows):
            seen.append(kind(inputs.sampling))
        return launch(inputs, before)

    rank.launch = listen  # type: ignore[method-assign]
    engine = Engine(TorchModelRunner(tiny_model(torch.float32), config, rank), config)
    drain(engine, [make_request(mode, block_size=4, max_tokens=6, **own)])
    assert seen and set(seen) <= known


@pytest.mark.parametrize("max_block_size", [1, 6])
def test_it_leaves_the_cache_as_it_is(
    tiny_model: Any, small_engine: Any, max_block_size: int
) -> None:
    config = small_engine(max_block_size=max_block_size, launch_ahead=True)
    model = tiny_model(torch.float32)
    rank = RankRunner(model, config)
    warm_up(rank, model, config)
    assert rank._cache.entries.isnan().all()


def test_the_largest_pass_has_no_more_answers_than_sequences_can_ask_for(
    tiny_model: Any, small_engine: Any
) -> None:
    for block_size, answers in ((1, 3), (8, 24), (32, 64)):
        config = small_engine(max_block_size=block_size, max_sequences=3, max_step_tokens=64)
        assert len(largest_pass(tiny_model(), config).answer_rows) == answers
