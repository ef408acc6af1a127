"""Passes that are launched before the one before them was read: the same tokens from the same
passes, and nothing of what turns out to be void.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.replicas.array_tree import to_device
from trimode.replicas.batch import Batch, BatchLimits
from trimode.replicas.decoding.self_speculation import SelfSpeculation
from trimode.replicas.decoding.strategy import (
    PENDING,
    DecodingContext,
    PassKind,
    Pending,
    Query,
    Stage,
)
from trimode.replicas.engine import Engine
from trimode.replicas.look_ahead import Outputs, Unread, pending_inputs, resolve
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.scheduled import Scheduled
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import FinishReason, Mode, Priority, Request

AR, DIFFUSION, SPECULATION = Mode.AUTOREGRESSIVE, Mode.BLOCK_DIFFUSION, Mode.SELF_SPECULATION
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(scope="module")
def make_engine(tiny_model: Any, small_engine: Any) -> Callable[..., Engine]:
    """make_engine(**settings): the tiny model in float64 under an engine that launches ahead."""

    def make(**own: Any) -> Engine:
        config = small_engine(**({"launch_ahead": True} | own))
        return Engine(TorchModelRunner(tiny_model(), config), config)

    return make


class Log:
    """A runner's calls: 'launch' and 'read' with the number of the pass."""

    def __init__(self, runner: Any) -> None:
        self.info = runner.info
        self.calls: list[tuple[str, int]] = []
        self._runner = runner
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []

    def launch(self, *given: Any) -> Any:
        launched = self._runner.launch(*given)
        self._kept.append(launched)  # so that no id is used twice
        self._numbers[id(launched)] = len(self._numbers)
        self.calls.append(("launch", self._numbers[id(launched)]))
        return launched

    def read(self, launched: Any) -> Any:
        self.calls.append(("read", self._numbers[id(launched)]))
        return self._runner.read(launched)


requests = st.lists(
    st.tuples(
        st.sampled_from([AR, SPECULATION]),
        st.integers(1, 30),  # prompt
        st.integers(1, 24),  # max_tokens
        st.integers(1, 32),  # block size
        st.sampled_from([0.0, 0.8]),  # temperature
        st.sampled_from([(), (5, 12, 30, 41)]),  # stop ids
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    asked=requests,
    page_size=st.integers(1, 9),
    num_pages=st.sampled_from([1, 3]),
    max_step_tokens=st.integers(43, 90),
    prefix_cache=st.booleans(),
)
def test_launching_ahead_changes_no_token_and_no_number_of_passes(
    make_engine: Any,
    make_request: Any,
    drain: Any,
    asked: list[Any],
    page_size: int,
    num_pages: int,
    **own: Any,
) -> None:
    crowd = [
        make_request(
            mode, num_prompt, max_tokens, f"r{i}", block_size=block_size,
            temperature=temperature, seed=i, stop_ids=stop_ids,
        )
        for i, (mode, num_prompt, max_tokens, block_size, temperature, stop_ids)
        in enumerate(asked)
    ]  # fmt: skip
    pool = num_pages * -(-86 // page_size)
    got = drain(make_engine(page_size=page_size, num_pages=pool, **own), crowd)
    for request in crowd:
        alone = drain(make_engine(launch_ahead=False), [request])[request.request_id]
        ahead = got[request.request_id]
        assert ahead.token_ids == alone.token_ids
        assert ahead.finish.forwards == alone.finish.forwards
        assert ahead.finish.accepted == alone.finish.accepted


@pytest.mark.parametrize("mode", [AR, SPECULATION])
def test_a_pass_is_launched_before_the_one_before_it_is_read(
    scripted_runner: Any, make_request: Any, small_engine: Any, drain: Any, mode: Mode
) -> None:
    runner = Log(scripted_runner())
    engine = Engine(runner, small_engine(launch_ahead=True))
    drain(engine, [make_request(mode, 5, 40, block_size=4)])
    calls = {call: place for place, call in enumerate(runner.calls)}
    last = max(number for _, number in calls)
    assert last > 10
    # Only the very last pass follows nothing that could be launched ahead.
    assert all(calls["launch", n + 1] < calls["read", n] for n in range(last - 1))


@pytest.mark.parametrize(
    "own",
    [
        {"mode": DIFFUSION},
        {"mode": SPECULATION, "threshold": 0.6},
        {"mode": AR, "presence_penalty": 0.5},
        {"mode": SPECULATION, "min_tokens": 30},
    ],
    ids=["denoising", "iterative drafts", "penalties", "min_tokens"],
)
def test_who_needs_the_host_is_read_before_the_next_launch(
    scripted_runner: Any, make_request: Any, small_engine: Any, drain: Any, own: dict[str, Any]
) -> None:
    runner = Log(scripted_runner())
    engine = Engine(runner, small_engine(launch_ahead=True))
    drain(engine, [make_request(**own, num_prompt=5, max_tokens=40, block_size=4)])
    reads = [number for name, number in runner.calls if name == "read"]
    wanted = [call for number in reads for call in (("launch", number), ("read", number))]
    assert runner.calls == wanted


def test_company_that_needs_the_host_changes_no_token(
    make_engine: Any, make_request: Any, drain: Any
) -> None:
    crowd = [
        make_request(AR, 7, 30, "ar"),
        make_request(SPECULATION, 9, 30, "speculation", block_size=8),
        make_request(DIFFUSION, 8, 8, "diffusion", block_size=8),
        make_request(SPECULATION, 6, 20, "penalties", block_size=8, frequency_penalty=0.7),
    ]
    got = drain(make_engine(), crowd)
    for request in crowd:
        alone = drain(make_engine(launch_ahead=False), [request])[request.request_id]
        assert got[request.request_id].token_ids == alone.token_ids


def test_the_pass_behind_a_stop_token_is_void(
    scripted_runner: Any, make_request: Any, small_engine: Any, token_at: Any
) -> None:
    engine = Engine(scripted_runner(), small_engine(launch_ahead=True))
    stop = token_at(0, 9)
    engine.add(make_request(AR, 4, 30, stop_ids=(stop,)))
    chunks = []
    while engine.has_work:
        chunks += engine.step()
        engine.check_integrity()
    tokens = [token_id for _, chunk in chunks for token_id in chunk.token_ids]
    assert tokens == [token_at(0, position) for position in range(4, 10)]
    assert chunks[-1][1].finish.reason is FinishReason.STOP
    # What is still under way belongs to nobody, also not to who comes next.
    engine.add(make_request(AR, 6, 3, "next"))
    later = []
    while engine.has_work:
        later += engine.step()
    assert {name for name, _ in later} == {"next"}


def test_every_pass_is_read_though_nobody_is_left_to_wait_for_it(
    tiny_model: Any, make_request: Any, small_engine: Any, drain: Any
) -> None:
    config = small_engine(launch_ahead=True)
    free = TorchModelRunner(tiny_model(), config)
    text = drain(Engine(free, config), [make_request(AR, ignore_eos=True)])["r"].token_ids
    runner = Log(free)
    drain(Engine(runner, config), [make_request(AR, ignore_eos=True, stop_ids=(text[2],))])
    launched, read = (
        [number for kind, number in runner.calls if kind == wanted] for wanted in ("launch", "read")
    )
    assert read == launched
    assert len(launched) > text.index(text[2]) + 1, "no pass was void"


def test_answers_to_an_earlier_seating_are_void(
    scripted_runner: Any, make_request: Any, small_engine: Any, token_at: Any
) -> None:
    engine = Engine(scripted_runner(), small_engine(max_sequences=1, launch_ahead=True))
    engine.add(make_request(AR, 4, 10, "batch", priority=Priority.BATCH))
    tokens = [chunk.token_ids for _ in range(4) for _, chunk in engine.step()]
    engine.add(make_request(AR, 5, 10, "interactive"))  # takes the seat at once
    engine.abort("interactive")
    while engine.has_work:
        tokens += [chunk.token_ids for _, chunk in engine.step()]
        engine.check_integrity()
    wanted = [token_at(0, position) for position in range(4, 14)]
    assert [token_id for own in tokens for token_id in own] == wanted


def test_pending_ids_and_starts_come_from_the_unread_pass(make_request: Any) -> None:
    def item(name: str, query: Query) -> Scheduled:
        request = make_request(SPECULATION, request_id=name)
        context = DecodingContext(request, 3, frozenset(), 3)
        pages = [6, 3, 7] if name == "block" else [4, 3] if name == "decode" else [2, 5]
        sequence = Sequence(request, SelfSpeculation(context), frozenset(), 0.0, page_table=pages)
        return Scheduled(sequence, query)

    block, decode, draft = (
        item("block", Query(Stage.DRAFT, PassKind.DRAFT, [PENDING, 3, 3], 8, (1, 2),
                            pending=Pending.KNOWN)),
        item("decode", Query(Stage.DECODE, PassKind.CAUSAL, [PENDING], 5, (0,),
                             pending=Pending.KNOWN)),
        item("draft", Query(Stage.VERIFY, PassKind.CAUSAL, [20, PENDING, PENDING], 4, (0, 1, 2),
                            pending=Pending.DRAFTS)),
    )  # fmt: skip
    # The pass before: the decode, the draft, and the block as it was verified.
    unread = Unread(
        answer_start=np.array([0, 1, 3, 6]),
        places={decode.sequence: 0, draft.sequence: 1, block.sequence: 2},
    )
    before = Outputs(
        answers=torch.tensor([50, 30, 31, 12, 41, 42]),
        accepted=torch.tensor([1, 1, 2]),  # of the block's drafts the first was right
        last_ids=torch.tensor([50, 30, 41]),
    )
    scheduled = [block, decode, draft]
    batch = Batch.build(scheduled, BatchLimits(4, 3, 64))
    pending, at_most = pending_inputs(
        scheduled, np.array([0, 3, 4, 7]), np.array([0, 0, 0, 1, 2, 2, 2]), None, unread
    )
    assert at_most.tolist() == [2, 0, 0]
    inputs = to_device(replace(batch.inputs, pending=pending), torch.device("cpu"))
    got = resolve(inputs, before, page_size=4)
    assert got.token_ids.tolist() == [41, 3, 3, 50, 20, 30, 31]
    assert got.positions.tolist() == [9, 10, 11, 5, 4, 5, 6]
    assert got.attention.visible.tolist() == [12, 12, 12, 6, 5, 6, 7]
    assert got.slots.tolist() == [29, 30, 31, 13, 20, 21, 22]


traffic = st.lists(
    st.tuples(
        st.sampled_from([AR, AR, SPECULATION, SPECULATION, DIFFUSION]),
        st.integers(1, 30),  # prompt
        st.integers(1, 20),  # max_tokens
        st.sampled_from([1, 3, 8]),  # block size
        st.integers(0, 3),  # steps until the next arrival
        st.booleans(),  # abort somebody then
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    traffic=traffic,
    page_size=st.integers(1, 9),
    max_sequences=st.integers(1, 8),
    max_step_tokens=st.integers(11, 70),
)
def test_any_traffic_ends_with_every_output_right_and_every_page_free(
    scripted_runner: Any,
    make_request: Any,
    small_engine: Any,
    token_at: Any,
    traffic: list[Any],
    page_size: int,
    **own: int,
) -> None:
    pages = -(-64 // page_size)
    config = small_engine(
        page_size=page_size, num_pages=pages, max_block_size=8, launch_ahead=True, **own
    )
    engine = Engine(scripted_runner(), config)
    outputs: dict[str, list[int]] = {}
    added: list[Request] = []
    aborted = set()

    def step() -> None:
        for name, chunk in engine.step():
            outputs.setdefault(name, []).extend(chunk.token_ids)
        engine.check_integrity()

    for mode, num_prompt, max_tokens, block_size, pause, abort in traffic:
        own_fields = {"seed": num_prompt, "block_size": block_size}
        added.append(make_request(mode, num_prompt, max_tokens, f"r{len(added)}", **own_fields))
        engine.add(added[-1])
        for _ in range(pause):
            step()
        if abort:
            aborted.add(added[len(added) // 2].request_id)
            engine.abort(added[len(added) // 2].request_id)
            engine.check_integrity()
    for _ in range(2000):
        if not engine.has_work:
            break
        step()
    assert not engine.has_work
    assert engine.load().free_pages == pages
    for request in added:
        if request.request_id in aborted:
            continue
        assert len(outputs[request.request_id]) == request.max_tokens
        if request.mode is not DIFFUSION:
            start = len(request.prompt_ids)
            wanted = [token_at(request.seed, start + i) for i in range(request.max_tokens)]
            assert outputs[request.request_id] == wanted
