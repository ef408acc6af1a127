"""Whatever a request asks of its sampling, the same seed gives the same ids in every company.

In float64, where the arithmetic is batch-invariant for all that matters.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.kernels.noise import gumbel
from trimode.replicas.engine import Engine
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.types import FinishReason, Mode, Request, ThinkingBudget

AR, DIFFUSION, SPECULATION = (
    Mode.AUTOREGRESSIVE,
    Mode.BLOCK_DIFFUSION,
    Mode.SELF_SPECULATION,
)
START, END = 7, 9
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(scope="module")
def make_engine(tiny_model: Any, small_engine: Any) -> Callable[..., Engine]:
    def make(**own: Any) -> Engine:
        config = small_engine(**own)
        return Engine(TorchModelRunner(tiny_model(), config), config)

    return make


parameters = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.05, 2.0),
        "top_k": st.integers(0, 70),
        "top_p": st.floats(0.1, 1.0),
        "min_p": st.floats(0.0, 0.5),
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.just(((5, 3.0), (START, 2.5), (11, -100.0))),
        "seed": st.integers(0, 2**63 - 1),
        "min_tokens": st.integers(0, 12),
        "stop_ids": st.just((5, 12, 30)),
        "ignore_eos": st.booleans(),
        "num_logprobs": st.sampled_from([0, 3]),
        "thinking": st.builds(
            ThinkingBudget, st.integers(0, 6), start_id=st.just(START), end_id=st.just(END)
        ),
    },
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    asked=st.lists(
        st.tuples(parameters, st.integers(1, 30), st.integers(1, 20), st.integers(1, 32)),
        min_size=1,
        max_size=5,
    ),
    page_size=st.integers(1, 9),
    max_step_tokens=st.integers(43, 90),
    num_pages=st.sampled_from([1, 2]),
    prefix_cache=st.booleans(),
    launch_ahead=st.booleans(),
)
def test_self_speculation_equals_autoregressive_for_any_parameters_in_any_company(
    make_engine: Any,
    make_request: Any,
    drain: Any,
    asked: list[Any],
    page_size: int,
    num_pages: int,
    **own: Any,
) -> None:
    requests = [
        make_request(
            SPECULATION,
            num_prompt,
            max(max_tokens, fields.get("min_tokens", 0)),
            f"r{i}",
            block_size=block_size,
            **fields,
        )
        for i, (fields, num_prompt, max_tokens, block_size) in enumerate(asked)
    ]
    # Pages for one or two of the largest: the others are preempted, or wait.
    pool = num_pages * -(-81 // page_size)
    crowd = drain(make_engine(page_size=page_size, num_pages=pool, **own), requests)
    for request in requests:
        fields = {name: getattr(request, name) for name in request.__slots__}
        alone = Request(**(fields | {"mode": AR, "block_size": None}))
        wanted = drain(make_engine(), [alone])[request.request_id]
        assert crowd[request.request_id].token_ids == wanted.token_ids


def naive(engine_model: Any, request: Request) -> list[int]:
    """One token at a time over the whole text, every rule written down as it is told."""
    ids, out = list(request.prompt_ids), []
    while len(out) < request.max_tokens:
        logits = engine_model(ids)
        logits[3] = -torch.inf
        for token_id in set(ids):
            value = logits[token_id]
            penalty = request.repetition_penalty
            logits[token_id] = value / penalty if value > 0 else value * penalty
        for token_id in set(out):
            logits[token_id] -= request.presence_penalty
            logits[token_id] -= request.frequency_penalty * out.count(token_id)
        for token_id, bias in request.logit_bias:
            logits[token_id] += bias
        if len(out) < request.min_tokens:
            logits[[2, *request.stop_ids]] = -torch.inf
        noise = gumbel(torch.tensor([request.seed]), torch.tensor([len(ids)]), 64)[0]
        token_id = int((logits + request.temperature * noise).argmax())
        ids.append(token_id)
        out.append(token_id)
        if token_id in (2, *request.stop_ids):
            break
    return out


@pytest.mark.parametrize("mode", [AR, SPECULATION])
def test_penalties_bias_and_min_tokens_are_what_they_are_told_to_be(
    make_engine: Any, make_request: Any, drain: Any, reference: Any, tiny_model: Any, mode: Mode
) -> None:
    def last(ids: list[int]) -> Any:
        return reference.causal_pass(tiny_model(), ids)[-1].clone()

    for seed in range(6):
        request = make_request(
            mode, 12, 25, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
            logit_bias=((5, 2.0), (8, -3.0)), min_tokens=10, stop_ids=(5, 6, 17), seed=seed,
            temperature=0.2 * seed,
        )  # fmt: skip
        assert list(drain(make_engine(), [request])["r"].token_ids) == naive(last, request)


@pytest.mark.parametrize("mode", [AR, DIFFUSION, SPECULATION])
@pytest.mark.parametrize("budget", [0, 1, 3, 6])
def test_thinking_ends_after_its_budget_once_and_the_text_goes_on(
    make_engine: Any, drain: Any, mode: Mode, budget: int
) -> None:
    thinking = ThinkingBudget(budget, START, END)
    request = Request(
        "r", (20, 21, START), mode, 20, thinking=thinking, block_size=8,
        logit_bias=((START, -100.0), (END, -100.0)), ignore_eos=True,
    )  # fmt: skip
    ids = drain(make_engine(), [request])["r"].token_ids
    assert len(ids) == 20
    assert [i for i, token_id in enumerate(ids) if token_id == END] == [budget]


@pytest.mark.parametrize("mode", [AR, DIFFUSION, SPECULATION])
def test_thinking_that_the_prompt_has_overdrawn_ends_at_once(
    make_engine: Any, drain: Any, mode: Mode
) -> None:
    request = Request(
        "r", (20, START, 21, 22, 23), mode, 12, thinking=ThinkingBudget(2, START, END),
        block_size=8, logit_bias=((START, -100.0), (END, -100.0)), ignore_eos=True,
    )  # fmt: skip
    ids = drain(make_engine(), [request])["r"].token_ids
    assert [i for i, token_id in enumerate(ids) if token_id == END] == [0]


@pytest.mark.parametrize("mode", [AR, DIFFUSION, SPECULATION])
def test_every_token_has_a_logprob_where_they_are_asked_for(
    make_engine: Any, make_request: Any, mode: Mode
) -> None:
    engine = make_engine()
    engine.add(make_request(mode, 9, 15, num_logprobs=2, block_size=8, temperature=0.8))
    engine.add(make_request(mode, 9, 15, "mate", block_size=8))
    tokens, logprobs = [], []
    while engine.has_work:
        for name, chunk in engine.step():
            if name == "mate":
                assert chunk.logprobs is None
                continue
            tokens += chunk.token_ids
            logprobs += chunk.logprobs
    assert len(logprobs) == len(tokens) == 15
    for token_id, own in zip(tokens, logprobs, strict=True):
        assert own.logprob <= own.top[0][1] <= 0
        assert len(own.top) == 2
        assert dict(own.top).get(token_id, own.logprob) == own.logprob


@pytest.mark.parametrize("mode", [AR, DIFFUSION, SPECULATION])
def test_samples_share_the_prompts_pages_and_equal_requests_of_their_own_noise(
    make_engine: Any, make_request: Any, mode: Mode
) -> None:
    engine = make_engine()
    engine.add(make_request(mode, 23, 10, n=3, temperature=1.0, block_size=8))
    outputs: dict[int, list[int]] = {0: [], 1: [], 2: []}
    cached = {}
    while engine.has_work:
        for _, chunk in engine.step():
            outputs[chunk.index] += chunk.token_ids
            if chunk.finish is not None:
                cached[chunk.index] = chunk.finish.cached_tokens
        engine.check_integrity()
    # All but the last token, whose logits are needed: five full pages shared, half a page copied.
    assert cached == {0: 0, 1: 22, 2: 22}
    assert len({tuple(ids) for ids in outputs.values()}) == 3


def test_a_request_ends_at_its_deadline_with_what_it_has(
    scripted_runner: Any, make_request: Any, small_engine: Any
) -> None:
    now = 0.0
    engine = Engine(scripted_runner(), small_engine(max_sequences=1), clock=lambda: now)
    engine.add(make_request(request_id="late", timeout_s=2.5))
    engine.add(make_request(request_id="never", timeout_s=1.5))
    finishes = {}
    while engine.has_work:
        for name, chunk in engine.step():
            finishes[name] = chunk.finish
        engine.check_integrity()
        now += 1.0
    assert {f.reason for f in finishes.values()} == {FinishReason.DEADLINE}
    assert finishes["late"].completion_tokens == 3
    assert finishes["never"].completion_tokens == 0
