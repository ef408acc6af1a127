import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.autoregressive import Autoregressive
from trimode.replicas.decoding.strategy import Stage
from trimode.replicas.engine import Engine, StepRecord
from trimode.replicas.errors import InvalidRequest, Overloaded
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.types import FinishReason, Mode, Request

AR, DIFFUSION, SPECULATION = Mode.AUTOREGRESSIVE, Mode.BLOCK_DIFFUSION, Mode.SELF_SPECULATION


@pytest.fixture
def make_engine(
    scripted_runner: Any, small_engine: Callable[..., EngineConfig]
) -> Callable[..., Engine]:
    """make_engine(keywords of Engine, settings={...}) over a ScriptedRunner."""

    def make(settings: dict[str, int] | None = None, **own: Any) -> Engine:
        return Engine(scripted_runner(), small_engine(**(settings or {})), **own)

    return make


def refusal(engine: Engine, request: Request) -> InvalidRequest:
    """The error that adding the request raises; asserts that nothing of it stays."""
    before = engine.load()
    with pytest.raises(InvalidRequest) as error:
        engine.add(request)
    assert engine.load() == before
    return error.value


@pytest.mark.parametrize("mode", [AR, DIFFUSION, SPECULATION])
def test_a_request_runs_to_its_length(
    make_engine: Any, make_request: Any, drain: Any, mode: Mode
) -> None:
    got = drain(make_engine(), [make_request(mode, num_prompt=7, max_tokens=19)])["r"]
    assert len(got.token_ids) == 19
    assert got.finish.reason is FinishReason.LENGTH
    assert (got.finish.prompt_tokens, got.finish.completion_tokens) == (7, 19)


def test_a_chunk_holds_all_that_one_step_committed(make_engine: Any, make_request: Any) -> None:
    engine = make_engine()
    engine.add(make_request(SPECULATION, num_prompt=4, max_tokens=20, block_size=4))
    sizes = [[len(chunk.token_ids) for _, chunk in engine.step()] for _ in range(5)]
    assert sizes == [[1], [], [2], [], [3]]  # drafts fail at multiples of 3; the answer is right


def test_only_the_last_chunk_carries_the_account(make_engine: Any, make_request: Any) -> None:
    engine = make_engine()
    engine.add(make_request(AR, max_tokens=3))
    finishes = [chunk.finish for _ in range(3) for _, chunk in engine.step()]
    assert finishes[:2] == [None, None]
    assert finishes[2] is not None
    assert not engine.has_work


def test_eos_ends_every_request(scripted_runner: Any, small_engine: Any, make_request: Any) -> None:
    runner = scripted_runner(token_at=lambda seed, position: 2 if position == 9 else 30)
    engine = Engine(runner, small_engine())
    engine.add(make_request(AR, num_prompt=5, max_tokens=50))
    chunks = [chunk for _ in range(5) for _, chunk in engine.step()]
    assert [chunk.token_ids for chunk in chunks] == [(30,), (30,), (30,), (30,), (2,)]
    assert chunks[-1].finish is not None
    assert chunks[-1].finish.reason is FinishReason.STOP


def test_a_mode_that_is_not_registered_is_refused(make_engine: Any, make_request: Any) -> None:
    engine = make_engine(modes={AR: Autoregressive})
    error = refusal(engine, make_request(SPECULATION))
    assert error.field == "mode"
    assert error.reason == "self_speculation is not one of autoregressive"


def test_auto_is_not_the_engines_to_resolve(make_engine: Any, make_request: Any) -> None:
    assert refusal(make_engine(), make_request(Mode.AUTO)).field == "mode"


def test_an_id_in_use_is_refused_and_free_again_after_the_end(
    make_engine: Any, make_request: Any, drain: Any
) -> None:
    engine = make_engine()
    engine.add(make_request(request_id="twin"))
    error = refusal(engine, make_request(request_id="twin"))
    assert error.field == "request_id"
    assert "twin" in error.reason
    drain(engine)
    engine.add(make_request(request_id="twin"))


@pytest.mark.parametrize("bad_id", [64, -1])
def test_a_prompt_id_outside_the_vocabulary_is_refused(make_engine: Any, bad_id: int) -> None:
    error = refusal(make_engine(), Request("r", (5, bad_id, 6), AR, 4))
    assert error.field == "prompt_token_ids"
    assert "64" in error.reason


@pytest.mark.parametrize("bad_id", [64, -1])
def test_a_stop_id_outside_the_vocabulary_is_refused(
    make_engine: Any, make_request: Any, bad_id: int
) -> None:
    assert refusal(make_engine(), make_request(stop_ids=(bad_id,))).field == "stop_token_ids"


def test_more_than_the_models_positions_is_refused(make_engine: Any, make_request: Any) -> None:
    engine = make_engine(settings={"num_pages": 1000})
    error = refusal(engine, make_request(num_prompt=100, max_tokens=413))
    assert error.field == "max_tokens"
    assert all(number in error.reason for number in ("100", "413", "512"))
    engine.add(make_request(num_prompt=100, max_tokens=412))


@pytest.mark.parametrize(("max_block_size", "limit"), [(8, 8), (64, 32)])
def test_a_block_larger_than_model_and_engine_allow_is_refused(
    make_engine: Any, make_request: Any, max_block_size: int, limit: int
) -> None:
    engine = make_engine(settings={"max_block_size": max_block_size})
    error = refusal(engine, make_request(SPECULATION, block_size=limit + 1))
    assert error.field == "block_size"
    assert f"at most {limit} here" in error.reason
    engine.add(make_request(SPECULATION, block_size=limit))


def test_a_request_without_block_size_takes_the_engines(
    make_engine: Any, make_request: Any
) -> None:
    log: list[StepRecord] = []
    engine = make_engine(settings={"max_block_size": 8}, on_step=log.append)
    engine.add(make_request(SPECULATION))
    engine.step()
    engine.step()
    assert log[1].stages == (("r", Stage.DRAFT, 8),)


def test_more_pages_than_there_are_is_refused(make_engine: Any, make_request: Any) -> None:
    engine = make_engine(settings={"num_pages": 10})
    error = refusal(engine, make_request(num_prompt=30, max_tokens=30))
    assert error.field == "max_tokens"
    assert "10" in error.reason


def test_a_full_queue_keeps_nothing_of_the_refused_request(
    make_engine: Any, make_request: Any, drain: Any
) -> None:
    engine = make_engine(settings={"max_sequences": 1, "max_waiting": 1})
    engine.add(make_request(request_id="first"))
    engine.step()
    engine.add(make_request(request_id="second"))
    with pytest.raises(Overloaded):
        engine.add(make_request(request_id="third"))
    assert drain(engine).keys() == {"first", "second"}
    engine.add(make_request(request_id="third"))


def test_aborting_an_unknown_request_is_no_error(make_engine: Any) -> None:
    make_engine().abort("nobody")


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_an_aborted_request_is_never_heard_of_again(
    make_engine: Any, make_request: Any, num_steps: int
) -> None:
    engine = make_engine()
    engine.add(make_request(SPECULATION))
    for _ in range(num_steps):
        engine.step()
    engine.abort("r")
    engine.abort("r")
    engine.check_integrity()
    assert engine.step() == []
    assert not engine.has_work
    assert engine.load().free_pages == 256


def test_the_step_log_tells_who_did_what(make_engine: Any, make_request: Any) -> None:
    log: list[StepRecord] = []
    ticks = itertools.count(1)
    engine = make_engine(on_step=log.append, clock=lambda: float(next(ticks)))
    engine.add(make_request(AR, num_prompt=6, request_id="a"))
    engine.step()
    engine.add(make_request(SPECULATION, num_prompt=9, request_id="b", block_size=4))
    engine.step()
    engine.step()
    assert [record.stages for record in log] == [
        (("a", Stage.PREFILL, 6),),
        (("a", Stage.DECODE, 1), ("b", Stage.PREFILL, 9)),
        (("a", Stage.DECODE, 1), ("b", Stage.DRAFT, 4)),
    ]
    assert all(record.duration_s > 0 for record in log)


def test_an_idle_step_is_not_logged(make_engine: Any) -> None:
    log: list[StepRecord] = []
    engine = make_engine(on_step=log.append)
    assert engine.step() == []
    assert log == []


def test_timings_run_from_arrival_over_the_first_token_to_the_end(
    make_engine: Any, make_request: Any, drain: Any
) -> None:
    ticks = itertools.count(100)
    engine = make_engine(clock=lambda: float(next(ticks)))
    timings = drain(engine, [make_request(AR, max_tokens=4)])["r"].finish.timings
    assert 0 < timings.queue_s < timings.first_token_s < timings.total_s


def test_the_runner_tells_what_is_served(make_engine: Any) -> None:
    info = make_engine().info
    assert (info.vocab_size, info.eos_id, info.mask_id) == (64, 2, 3)


def test_512_sequences_of_all_modes_run_at_once(
    tiny_model: Any, make_request: Any, small_engine: Any, drain: Any
) -> None:
    config = small_engine(num_pages=512 * 8, max_sequences=512, max_step_tokens=512 * 8)
    engine = Engine(TorchModelRunner(tiny_model(torch.float32), config), config)
    modes = list(Mode)[1:]
    crowd = [
        make_request(modes[i % 3], 2 + i % 5, 6, f"r{i}", block_size=4, ignore_eos=True)
        for i in range(512)
    ]
    for request in crowd:
        engine.add(request)
    engine.step()
    assert engine.load().running == 512
    assert {got.finish.completion_tokens for got in drain(engine).values()} == {6}
