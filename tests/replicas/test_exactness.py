"""What the engine promises: every mode writes what its naive decoder writes, alone or in company.

In float64, where the arithmetic is batch-invariant for all that matters.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.strategy import Stage
from trimode.replicas.engine import Engine, StepRecord
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.types import FinishReason, Mode, Request

AR, DIFFUSION, SPECULATION = Mode.AUTOREGRESSIVE, Mode.BLOCK_DIFFUSION, Mode.SELF_SPECULATION
GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 2**40 + 17}
SAMPLING = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])

few_examples = settings(max_examples=8, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., NemotronLabsDiffusionModel]) -> NemotronLabsDiffusionModel:
    return tiny_model(torch.float64)


@pytest.fixture(scope="module")
def make_engine(model: NemotronLabsDiffusionModel) -> Callable[..., Engine]:
    """make_engine(on_step=None, **settings) over the tiny model with a fresh, poisoned cache."""

    def make(on_step: Callable[[StepRecord], None] | None = None, **settings: int) -> Engine:
        config = EngineConfig(**({"page_size": 16, "num_pages": 512} | settings))
        return Engine(TorchModelRunner(model, config), config, on_step=on_step)

    return make


@pytest.fixture(scope="module")
def run(make_engine: Callable[..., Engine], drain: Callable[..., Any]) -> Callable[..., Any]:
    """run(request, **engine settings): the request alone in a fresh engine."""

    def alone(request: Request, **settings: int) -> Any:
        return drain(make_engine(**settings), [request])[request.request_id]

    return alone


@pytest.fixture(scope="module")
def naive(model: NemotronLabsDiffusionModel, reference: ModuleType) -> Callable[[Request], Any]:
    """naive(request): what the decoder without a cache makes of it."""

    @torch.inference_mode()
    def decode(request: Request) -> Any:
        config = model.config
        output = reference.Output(request.max_tokens, {config.eos_id, *request.stop_ids})
        sampler = reference.Sampler(config.mask_id, request.temperature, request.seed)
        arguments = (model, list(request.prompt_ids), output, sampler)
        if request.mode is AR:
            return reference.autoregressive(*arguments)
        own: dict[str, Any] = {"block_size": request.block_size or config.block_size}
        if request.threshold is not None:
            own["threshold"] = request.threshold
        if request.mode is DIFFUSION:
            return reference.block_diffusion(*arguments, **own)
        return reference.self_speculation(*arguments, **own, adapter=request.use_adapter)

    return decode


def assert_same(got: Any, wanted: Any) -> None:
    assert list(got.token_ids) == wanted.token_ids
    assert got.finish.forwards == wanted.forwards
    assert list(got.finish.accepted) == wanted.accepted


@SAMPLING
def test_autoregressive_equals_naive_decoding(
    run: Any, naive: Any, make_request: Any, sampling: dict[str, Any]
) -> None:
    request = make_request(AR, num_prompt=21, max_tokens=30, **sampling)
    assert_same(run(request), naive(request))


@SAMPLING
@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9, None])
@pytest.mark.parametrize("block_size", [1, 4, 8, 32])
def test_block_diffusion_equals_naive_decoding(
    run: Any,
    naive: Any,
    make_request: Any,
    block_size: int,
    threshold: float | None,
    sampling: dict[str, Any],
) -> None:
    own = {"block_size": block_size, "threshold": threshold}
    request = make_request(DIFFUSION, num_prompt=13, max_tokens=18, **own, **sampling)
    assert_same(run(request), naive(request))


@SAMPLING
@pytest.mark.parametrize("use_adapter", [True, False], ids=["adapter", "bare"])
@pytest.mark.parametrize("threshold", [None, 0.6])
@pytest.mark.parametrize("block_size", [1, 4, 8, 32])
def test_self_speculation_equals_naive_decoding(
    run: Any,
    naive: Any,
    make_request: Any,
    block_size: int,
    threshold: float | None,
    use_adapter: bool,
    sampling: dict[str, Any],
) -> None:
    own = {"block_size": block_size, "threshold": threshold, "use_adapter": use_adapter}
    request = make_request(SPECULATION, num_prompt=18, max_tokens=16, **own, **sampling)
    assert_same(run(request), naive(request))


@pytest.mark.parametrize("mode", [AR, DIFFUSION, SPECULATION])
@pytest.mark.parametrize("page_size", [1, 3, 7, 64])
def test_page_size_does_not_matter(
    run: Any, naive: Any, make_request: Any, mode: Mode, page_size: int
) -> None:
    request = make_request(mode, num_prompt=10, max_tokens=14, block_size=8, **SAMPLED)
    assert_same(run(request, page_size=page_size), naive(request))


@pytest.mark.parametrize("mode", [AR, DIFFUSION, SPECULATION])
@pytest.mark.parametrize("max_step_tokens", [6, 11, 100])
def test_prefill_in_chunks_does_not_matter(
    run: Any, naive: Any, make_request: Any, mode: Mode, max_step_tokens: int
) -> None:
    request = make_request(mode, num_prompt=45, max_tokens=10, block_size=4)
    small = run(request, max_step_tokens=max_step_tokens, max_block_size=4)
    assert_same(small, naive(request))


@pytest.mark.parametrize("mode", [AR, DIFFUSION, SPECULATION])
def test_a_stop_token_ends_the_output_inside_a_block(
    run: Any, naive: Any, make_request: Any, mode: Mode
) -> None:
    whole = run(make_request(mode, num_prompt=5, max_tokens=30, block_size=8, **SAMPLED))
    stop = next(i for i, t in enumerate(whole.token_ids) if i > 5 and t not in whole.token_ids[:i])
    own = {"block_size": 8, "stop_ids": (whole.token_ids[stop],)}
    request = make_request(mode, num_prompt=5, max_tokens=30, **own, **SAMPLED)
    cut = run(request)
    assert cut.finish.reason is FinishReason.STOP
    assert cut.token_ids == whole.token_ids[: stop + 1]
    assert_same(cut, naive(request))


def test_a_stop_token_ends_a_diffusion_block_that_has_masks_behind_it(
    run: Any, naive: Any, make_request: Any
) -> None:
    own = {"block_size": 8, "threshold": 1.0, **SAMPLED}
    first_block = run(make_request(DIFFUSION, max_tokens=8, **own)).token_ids
    forwards = []
    for token_id in first_block[1:]:
        request = make_request(DIFFUSION, max_tokens=8, stop_ids=(token_id,), **own)
        cut = run(request)
        assert_same(cut, naive(request))
        forwards.append(cut.finish.forwards)
    assert min(forwards) < 8  # a prefill and 7 denoise passes


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 8, 9])
def test_self_speculation_stops_at_max_tokens_wherever_it_falls_in_a_block(
    run: Any, naive: Any, make_request: Any, max_tokens: int
) -> None:
    request = make_request(SPECULATION, num_prompt=6, max_tokens=max_tokens, block_size=8)
    assert len(run(request).token_ids) == max_tokens
    assert_same(run(request), naive(request))


@few_examples
@given(
    num_prompt=st.integers(1, 50),
    max_tokens=st.integers(1, 24),
    block_size=st.integers(1, 32),
    threshold=st.sampled_from([None, 0.6, 0.9, 1.0]),
    use_adapter=st.booleans(),
)
def test_greedy_self_speculation_equals_greedy_autoregressive(
    run: Any, make_request: Any, num_prompt: int, max_tokens: int, **own: Any
) -> None:
    wanted = run(make_request(AR, num_prompt, max_tokens)).token_ids
    assert run(make_request(SPECULATION, num_prompt, max_tokens, **own)).token_ids == wanted


@few_examples
@given(
    num_prompt=st.integers(1, 50),
    max_tokens=st.integers(1, 24),
    block_size=st.integers(1, 32),
    threshold=st.sampled_from([None, 0.6, 0.9]),
    temperature=st.floats(0.05, 2.0),
    seed=st.integers(0, 2**63 - 1),
)
def test_seeded_self_speculation_equals_seeded_autoregressive(
    run: Any,
    make_request: Any,
    num_prompt: int,
    max_tokens: int,
    block_size: int,
    threshold: float | None,
    **sampling: Any,
) -> None:
    wanted = run(make_request(AR, num_prompt, max_tokens, **sampling)).token_ids
    own = {"block_size": block_size, "threshold": threshold}
    got = run(make_request(SPECULATION, num_prompt, max_tokens, **own, **sampling)).token_ids
    assert got == wanted


def test_another_seed_writes_another_text(run: Any, make_request: Any) -> None:
    texts = {
        run(make_request(AR, max_tokens=12, temperature=1.0, seed=seed)).token_ids
        for seed in (0, 1, 2**32, 2**62)
    }
    assert len(texts) == 4


def test_drafts_are_often_right(run: Any, make_request: Any) -> None:
    """The tests above would show little if this model rejected every draft, or none."""
    accepted = run(make_request(SPECULATION, 5, 40, block_size=8)).finish.accepted
    assert 1 < sum(accepted) / len(accepted) < 8
    assert len(set(accepted)) > 2


class Crowd:
    """32 requests of all modes, lengths and settings, and the step at which each arrives."""

    def __init__(self, make_request: Callable[..., Request]) -> None:
        self.requests: dict[int, list[Request]] = {}
        for i in range(32):
            mode = (AR, DIFFUSION, SPECULATION, SPECULATION)[i % 4]
            own: dict[str, Any] = {"temperature": 0.9, "seed": i} if i % 3 == 0 else {}
            if mode is not AR:
                own["block_size"] = (4, 8, 32)[i % 3]
                own["threshold"] = (None, 0.6)[i % 2]
                own["use_adapter"] = i % 5 != 0
            arrival = (0, 0, 1, 2, 3)[i % 5]
            request = make_request(mode, 3 + i * 2 % 41, 16 + i * 5 % 23, f"r{i}", **own)
            self.requests.setdefault(arrival, []).append(request)

    @property
    def everybody(self) -> list[Request]:
        return [request for group in self.requests.values() for request in group]


@pytest.fixture(scope="module")
def crowd(make_request: Callable[..., Request]) -> Crowd:
    return Crowd(make_request)


@pytest.fixture(scope="module")
def alone(crowd: Crowd, run: Any) -> dict[str, Any]:
    """Each of the crowd in an engine of its own."""
    return {request.request_id: run(request) for request in crowd.everybody}


def run_crowd(crowd: Crowd, engine: Engine) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """-> tokens and finish by id, (first step after its arrival, step of its last chunk) by id."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in crowd.everybody}
    finishes: dict[str, Any] = {}
    lifetime: dict[str, tuple[int, int]] = {}
    step = 0
    while engine.has_work or step <= max(crowd.requests):
        for request in crowd.requests.get(step, ()):
            engine.add(request)
            lifetime[request.request_id] = (step, -1)
        for request_id, chunk in engine.step():
            tokens[request_id] += chunk.token_ids
            if chunk.finish is not None:
                finishes[request_id] = chunk.finish
                lifetime[request_id] = (lifetime[request_id][0], step)
        engine.check_integrity()
        step += 1
    return {i: (tuple(tokens[i]), finishes[i]) for i in tokens}, lifetime


@pytest.fixture(scope="module")
def together(
    crowd: Crowd, make_engine: Callable[..., Engine]
) -> tuple[dict[str, Any], dict[str, tuple[int, int]], list[StepRecord]]:
    """The crowd in one engine with room for all: outputs, lifetimes, step log."""
    log: list[StepRecord] = []
    outputs, lifetimes = run_crowd(crowd, make_engine(log.append, max_step_tokens=4096))
    return outputs, lifetimes, log


def test_company_does_not_change_any_output(together: Any, alone: dict[str, Any]) -> None:
    for request_id, (token_ids, finish) in together[0].items():
        single = alone[request_id]
        assert token_ids == single.token_ids, request_id
        assert finish.forwards == single.finish.forwards, request_id
        assert finish.accepted == single.finish.accepted, request_id
        assert finish.reason is single.finish.reason, request_id


@pytest.mark.parametrize(
    "settings",
    [
        {"max_step_tokens": 48},
        {"max_step_tokens": 64, "page_size": 3, "num_pages": 150},
        {"max_sequences": 5, "max_step_tokens": 300},
    ],
    ids=["few tokens", "few pages", "few sequences"],
)
def test_scarcity_does_not_change_any_output(
    crowd: Crowd, make_engine: Any, alone: dict[str, Any], settings: dict[str, int]
) -> None:
    outputs, _ = run_crowd(crowd, make_engine(**settings))
    wanted = {request_id: single.token_ids for request_id, single in alone.items()}
    assert {request_id: ids for request_id, (ids, _) in outputs.items()} == wanted


def test_one_pass_holds_rows_of_every_stage(together: Any) -> None:
    wanted = {Stage.PREFILL, Stage.DECODE, Stage.DENOISE, Stage.DRAFT, Stage.VERIFY}
    mixes = [{stage for _, stage, _ in record.stages} for record in together[2]]
    assert any(wanted <= mix for mix in mixes)


def test_a_crowd_takes_hardly_more_passes_than_its_longest_member(
    together: Any, alone: dict[str, Any]
) -> None:
    longest = max(single.finish.forwards for single in alone.values())
    assert len(together[2]) <= 1.3 * longest


def test_every_request_takes_part_in_every_pass_of_its_life(together: Any) -> None:
    _, lifetimes, log = together
    for request_id, (first, last) in lifetimes.items():
        taken = [
            step
            for step, record in enumerate(log)
            if request_id in {member for member, _, _ in record.stages}
        ]
        assert taken == list(range(first, last + 1)), request_id


def test_no_request_takes_more_passes_in_company_than_alone(
    together: Any, alone: dict[str, Any]
) -> None:
    for request_id, (first, last) in together[1].items():
        assert last - first + 1 == alone[request_id].finish.forwards, request_id
