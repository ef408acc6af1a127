"""The scheduler under a ScriptedRunner: who takes part in which pass, and on which pages."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.modes import ALL_MODES
from trimode.replicas.decoding.strategy import DecodingContext, Stage
from trimode.replicas.errors import InvalidRequest, Overloaded
from trimode.replicas.model_runner import run_pass
from trimode.replicas.scheduled import Scheduled
from trimode.replicas.scheduler import Scheduler
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import Chunk, FinishReason, Mode, Request

AR, DIFFUSION, SPECULATION = Mode.AUTOREGRESSIVE, Mode.BLOCK_DIFFUSION, Mode.SELF_SPECULATION


class Driver:
    """A scheduler, a runner, and shorthand for what tests do with them."""

    def __init__(self, config: EngineConfig, runner: Any, make_request: Any) -> None:
        self.config = config
        self.runner = runner
        self.make_request = make_request
        ticks = itertools.count(1)
        self.scheduler = Scheduler(config, clock=lambda: float(next(ticks)))
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.names = (f"r{i}" for i in itertools.count())

    def add(
        self, mode: Mode = AR, num_prompt: int = 4, max_tokens: int = 8, **own: Any
    ) -> Sequence:
        own = {"seed": num_prompt, "block_size": 8} | own
        request: Request = self.make_request(mode, num_prompt, max_tokens, next(self.names), **own)
        block_size = request.block_size or 1
        stop_ids = frozenset((2, *request.stop_ids))
        strategy = ALL_MODES[mode](DecodingContext(request, 3, stop_ids, block_size))
        sequence = Sequence(request, strategy, stop_ids, 0.5)
        self.scheduler.add(sequence, block_size)
        return sequence

    def step(self) -> list[Scheduled]:
        scheduled = self.scheduler.schedule()
        assert sum(len(item.query.token_ids) for item in scheduled) <= self.config.max_step_tokens
        assert len({id(item.sequence) for item in scheduled}) == len(scheduled)
        for item in scheduled:
            slots = len(item.sequence.page_table) * self.config.page_size
            assert item.query.start + len(item.query.token_ids) <= slots
            assert item.query.start == item.sequence.num_committed
        self.take(self.scheduler.update(scheduled, run_pass(self.runner, scheduled)))
        self.scheduler.check_integrity()
        return scheduled

    def take(self, chunks: list[tuple[Sequence, Chunk]]) -> None:
        for sequence, chunk in chunks:
            name = sequence.request.request_id
            self.outputs.setdefault(name, []).extend(chunk.token_ids)
            if chunk.finish is not None:
                self.finished[name] = chunk.finish.reason

    def steps(self, count: int) -> list[list[Scheduled]]:
        return [self.step() for _ in range(count)]

    def drain(self) -> list[list[Scheduled]]:
        passes = []
        while self.scheduler.has_work:
            passes.append(self.step())
            assert passes[-1], "work, but nobody was scheduled"
        return passes

    @property
    def free_pages(self) -> int:
        return self.scheduler.load().free_pages


@pytest.fixture(scope="module")
def drive(scripted_runner: Any, make_request: Any) -> Callable[..., Driver]:
    """drive(**engine settings) -> Driver"""

    def make(runner: Any = None, **own: int) -> Driver:
        config = EngineConfig(**({"page_size": 4, "num_pages": 100, "max_block_size": 8} | own))
        return Driver(config, runner or scripted_runner(), make_request)

    return make


def stages(scheduled: list[Scheduled]) -> list[tuple[str, Stage, int]]:
    return [
        (item.sequence.request.request_id, item.query.stage, len(item.query.token_ids))
        for item in scheduled
    ]


def members(scheduled: list[Scheduled]) -> list[Sequence]:
    return [item.sequence for item in scheduled]


def test_an_idle_scheduler_schedules_nothing(drive: Any) -> None:
    driver = drive()
    assert driver.scheduler.schedule() == []
    assert not driver.scheduler.has_work


def test_a_prompt_that_fits_is_prefilled_in_one_pass_and_then_decoded(drive: Any) -> None:
    driver = drive()
    driver.add(AR, num_prompt=20)
    assert stages(driver.step()) == [("r0", Stage.PREFILL, 20)]
    assert stages(driver.step()) == [("r0", Stage.DECODE, 1)]


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget(drive: Any) -> None:
    driver = drive(max_step_tokens=16)
    driver.add(AR, num_prompt=40)
    assert [stages(step)[0][1:] for step in driver.steps(3)] == [
        (Stage.PREFILL, 16), (Stage.PREFILL, 16), (Stage.PREFILL, 8),
    ]  # fmt: skip


def test_only_the_last_chunk_of_a_prompt_is_answered(drive: Any) -> None:
    driver = drive(max_step_tokens=16)
    sequence = driver.add(AR, num_prompt=40)
    answers = [step[0].query.answers for step in driver.steps(3)]
    assert [tuple(rows) for rows in answers] == [(), (), (7,)]
    assert sequence.num_output_tokens == 1
    assert sequence.num_forwards == 1


def test_prefill_leaves_room_for_decoding_and_decoding_for_prefill(drive: Any) -> None:
    driver = drive(max_step_tokens=16)
    for _ in range(4):
        driver.add(SPECULATION, num_prompt=4, max_tokens=60)
    driver.steps(2)
    driver.add(AR, num_prompt=30)
    step = stages(driver.step())
    assert ("r4", Stage.PREFILL, 8) in step  # its quarter, and what no whole block could use
    assert sum(1 for _, stage, _ in step if stage is Stage.DRAFT) == 1


def test_a_prefill_takes_what_decoding_leaves(drive: Any) -> None:
    driver = drive(max_step_tokens=16)
    driver.add(AR, num_prompt=4, max_tokens=60)
    driver.step()
    driver.add(AR, num_prompt=40)
    assert stages(driver.step()) == [("r0", Stage.DECODE, 1), ("r1", Stage.PREFILL, 15)]


def test_prefills_go_oldest_first(drive: Any) -> None:
    driver = drive(max_step_tokens=16)
    for num_prompt in (10, 10, 10):
        driver.add(AR, num_prompt=num_prompt)
    assert stages(driver.step()) == [("r0", Stage.PREFILL, 10), ("r1", Stage.PREFILL, 6)]
    assert stages(driver.step())[1:] == [("r1", Stage.PREFILL, 4), ("r2", Stage.PREFILL, 10)]


def test_who_did_not_fit_is_first_in_the_next_pass(drive: Any) -> None:
    driver = drive(max_step_tokens=20)
    crowd = [driver.add(SPECULATION, num_prompt=3, max_tokens=40) for _ in range(5)]
    while any(sequence.is_prefilling for sequence in crowd):
        driver.step()
    waited: set[Sequence] = set()
    for _ in range(12):
        present = members(driver.step())
        expected = min(2, len(waited))
        assert len(set(present[:2]) & waited) >= expected
        waited = {s for s in crowd if s not in present and s.finish_reason is None}


@pytest.mark.parametrize("max_step_tokens", [12, 16, 33])
def test_nobody_waits_longer_than_the_crowd_takes_to_pass(drive: Any, max_step_tokens: int) -> None:
    driver = drive(max_step_tokens=max_step_tokens)
    crowd = [driver.add(SPECULATION, 3, 30), driver.add(AR, 3, 30), driver.add(DIFFUSION, 3, 30)]
    crowd += [driver.add(AR, 30, 10), driver.add(SPECULATION, 25, 10)]
    absent = dict.fromkeys(crowd, 0)
    while driver.scheduler.has_work:
        present = members(driver.step())
        for sequence in crowd:
            done = sequence in present or sequence.finish_reason is not None
            absent[sequence] = 0 if done else absent[sequence] + 1
        assert max(absent.values()) <= 10


def test_decoding_goes_on_while_prompts_keep_coming(drive: Any) -> None:
    driver = drive(max_step_tokens=16, num_pages=400)
    decoding = driver.add(AR, num_prompt=4, max_tokens=30)
    driver.step()
    for count in range(29):
        driver.add(AR, num_prompt=40, max_tokens=1)
        assert decoding in members(driver.step()), count
    assert decoding.finish_reason is FinishReason.LENGTH


def test_prefill_goes_on_while_decoding_fills_every_pass(drive: Any) -> None:
    driver = drive(max_step_tokens=16, num_pages=200)
    for _ in range(6):
        driver.add(SPECULATION, num_prompt=2, max_tokens=50)
    driver.steps(2)
    late = driver.add(AR, num_prompt=40, max_tokens=5)
    driver.steps(10)  # 4 tokens a pass are kept for it
    assert not late.is_prefilling


def test_admission_waits_for_pages(drive: Any) -> None:
    driver = drive(num_pages=8)
    first = driver.add(AR, num_prompt=18, max_tokens=9, block_size=1)
    second = driver.add(AR, num_prompt=17, max_tokens=8, block_size=1)
    assert members(driver.step()) == [first]
    assert driver.scheduler.load().waiting == 1
    while first.finish_reason is None:
        driver.step()
    assert members(driver.step()) == [second]


def test_a_large_request_is_not_overtaken(drive: Any) -> None:
    driver = drive(num_pages=10)
    first = driver.add(AR, num_prompt=8, max_tokens=12, block_size=1)
    driver.add(AR, num_prompt=24, max_tokens=12, block_size=1)
    small = driver.add(AR, num_prompt=2, max_tokens=2, block_size=1)
    while first.finish_reason is None:
        assert small not in members(driver.step())
    assert stages(driver.step())[0][:2] == ("r1", Stage.PREFILL)


def test_no_more_than_max_sequences_run(drive: Any) -> None:
    driver = drive(max_sequences=2)
    for _ in range(5):
        driver.add(AR, num_prompt=4, max_tokens=3)
    passes = driver.drain()
    assert max(len(step) for step in passes) == 2
    assert len(driver.finished) == 5


def test_a_full_queue_refuses_with_overloaded(drive: Any) -> None:
    driver = drive(max_sequences=1, max_waiting=3)
    running = driver.add()
    driver.step()
    for _ in range(3):
        driver.add()
    with pytest.raises(Overloaded, match=r"3 requests are waiting.*max_waiting"):
        driver.add()
    driver.scheduler.abort(running)
    driver.step()
    driver.add()


def test_a_burst_on_an_idle_engine_is_not_a_queue(drive: Any) -> None:
    driver = drive(max_sequences=5, max_waiting=1)
    for _ in range(6):
        driver.add()
    assert (driver.scheduler.load().running, driver.scheduler.load().waiting) == (5, 1)


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(drive: Any) -> None:
    driver = drive(num_pages=8)
    with pytest.raises(InvalidRequest, match=r"prompt of 20 and 30 new.*15 pages of 4.*has 8") as e:
        driver.add(AR, num_prompt=20, max_tokens=30)
    assert e.value.field == "max_tokens"
    assert not driver.scheduler.has_work


def test_a_request_that_just_fits_is_taken(drive: Any) -> None:
    driver = drive(num_pages=8)
    driver.add(SPECULATION, num_prompt=10, max_tokens=15)
    driver.drain()
    assert driver.finished == {"r0": FinishReason.LENGTH}
    with pytest.raises(InvalidRequest):
        driver.add(SPECULATION, num_prompt=10, max_tokens=16)


def test_a_request_too_large_is_refused_even_when_the_queue_is_full(drive: Any) -> None:
    driver = drive(num_pages=8, max_sequences=1, max_waiting=1)
    driver.add()
    driver.step()
    driver.add()
    with pytest.raises(InvalidRequest):
        driver.add(AR, num_prompt=20, max_tokens=30)


@pytest.mark.parametrize("mode", [AR, DIFFUSION, SPECULATION])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4, 5, 6])
def test_abort_at_any_stage_frees_all_pages(drive: Any, mode: Mode, num_steps: int) -> None:
    driver = drive(max_step_tokens=16)
    sequence = driver.add(mode, num_prompt=30, max_tokens=40)
    driver.steps(num_steps)
    assert num_steps == 0 or driver.free_pages < 100
    driver.scheduler.abort(sequence)
    driver.scheduler.check_integrity()
    assert driver.free_pages == 100
    assert not driver.scheduler.has_work
    assert sequence.finish_reason is FinishReason.ABORTED


def test_aborting_twice_or_after_the_end_does_nothing(drive: Any) -> None:
    driver = drive()
    aborted, ended = driver.add(), driver.add(max_tokens=1)
    driver.step()
    driver.scheduler.abort(aborted)
    driver.scheduler.abort(aborted)
    driver.scheduler.abort(ended)
    assert ended.finish_reason is FinishReason.LENGTH
    assert driver.free_pages == 100


def test_an_abort_does_not_disturb_the_others(drive: Any, token_at: Any) -> None:
    driver = drive(max_step_tokens=16)
    doomed, kept = driver.add(SPECULATION, 4, 30), driver.add(SPECULATION, 5, 30)
    driver.steps(3)
    driver.scheduler.abort(doomed)
    driver.drain()
    name = kept.request.request_id
    assert driver.outputs[name] == [token_at(5, position) for position in range(5, 35)]


@pytest.mark.parametrize("mode", [AR, DIFFUSION, SPECULATION])
def test_the_end_frees_all_pages(drive: Any, mode: Mode) -> None:
    driver = drive()
    driver.add(mode, max_tokens=17)
    driver.drain()
    assert driver.free_pages == 100


def test_a_stop_token_ends_a_sequence_and_frees_its_pages(drive: Any, token_at: Any) -> None:
    driver = drive()
    stop = token_at(4, 9)
    driver.add(SPECULATION, num_prompt=4, max_tokens=30, stop_ids=(stop,))
    driver.drain()
    assert driver.finished == {"r0": FinishReason.STOP}
    assert driver.outputs["r0"][-1] == stop
    assert driver.free_pages == 100


def test_rejected_drafts_leave_no_kv_behind(drive: Any, scripted_runner: Any) -> None:
    wrong_from = 9
    runner = scripted_runner(drafts_right=lambda seed, position: position < wrong_from)
    driver = drive(runner=runner)
    sequence = driver.add(SPECULATION, num_prompt=4, max_tokens=30)
    driver.steps(3)  # prefill, draft, verify
    assert sequence.accepted == [5]  # drafts of positions 5..8 and the bonus token
    assert sequence.num_committed == 9
    assert sequence.num_output_tokens == 6
    assert driver.step()[0].query.start == 9


def test_load_tells_who_waits_who_runs_and_what_is_free(drive: Any) -> None:
    driver = drive(max_sequences=2, num_pages=50)
    for mode in (AR, SPECULATION, AR):
        driver.add(mode, num_prompt=4, max_tokens=9, block_size=4)
    driver.step()
    load = driver.scheduler.load()
    assert (load.waiting, load.running, load.free_pages, load.total_pages) == (1, 2, 47, 50)
    assert load.running_by_mode == {"autoregressive": 1, "self_speculation": 1}


def test_queue_time_ends_with_the_first_pass(drive: Any) -> None:
    driver = drive(max_sequences=1)
    driver.add(max_tokens=3)
    waiting = driver.add(max_tokens=3)
    driver.steps(3)
    assert waiting.scheduled_at is None
    driver.step()
    first = waiting.scheduled_at
    driver.step()
    assert first is not None
    assert waiting.scheduled_at == first


arrivals = st.lists(
    st.tuples(
        st.sampled_from([AR, DIFFUSION, SPECULATION]),
        st.integers(1, 30),  # prompt
        st.integers(1, 20),  # max_tokens
        st.sampled_from([1, 3, 8]),  # block size
        st.sampled_from([None, 0.0, 0.5, 1.0]),  # threshold
        st.integers(0, 3),  # steps until the next arrival
        st.booleans(),  # abort somebody then
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    traffic=arrivals,
    max_step_tokens=st.integers(11, 70),
    page_size=st.integers(1, 9),
    max_sequences=st.integers(1, 8),
)
def test_any_traffic_ends_with_every_output_right_and_every_page_free(
    drive: Any, token_at: Any, traffic: list[Any], page_size: int, **own: int
) -> None:
    driver = drive(page_size=page_size, num_pages=-(-150 // page_size), **own)
    added: list[Sequence] = []
    for mode, num_prompt, max_tokens, block_size, threshold, pause, abort in traffic:
        shape = {"block_size": block_size, "threshold": threshold}
        added.append(driver.add(mode, num_prompt, max_tokens, **shape))
        driver.steps(pause)
        if abort:
            driver.scheduler.abort(added[len(added) // 2])
            driver.scheduler.check_integrity()
    driver.drain()
    assert driver.free_pages == driver.config.num_pages
    for sequence in added:
        request = sequence.request
        if sequence.finish_reason is FinishReason.ABORTED:
            continue
        assert len(driver.outputs[request.request_id]) == request.max_tokens
        if request.mode is DIFFUSION:
            continue
        start, end = len(request.prompt_ids), len(request.prompt_ids) + request.max_tokens
        wanted = [token_at(request.seed, position) for position in range(start, end)]
        assert driver.outputs[request.request_id] == wanted
