"""Anything that may happen to a scheduler, in any order, with all its rules checked after each:
pages, classes, deadlines, turns, outputs.
"""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.modes import ALL_MODES
from trimode.replicas.decoding.strategy import DecodingContext
from trimode.replicas.errors import Overloaded
from trimode.replicas.prefix_cache import KVEventKind
from trimode.replicas.scheduled import Scheduled
from trimode.replicas.scheduler import Scheduler
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import FinishReason, Mode, Priority, Request

MAX_WAITING = 4
PAGE_SIZE = 3
VOCABULARY = 2  # so that prompts share prefixes


class SchedulerMachine(RuleBasedStateMachine):
    """The real scheduler, a scripted runner, a clock that the rules move."""

    runner_class: Any
    token_at: Any

    @initialize(
        num_pages=st.integers(18, 40),
        max_sequences=st.integers(1, 6),
        max_step_tokens=st.integers(11, 40),
        prefix_cache=st.booleans(),
        launch_ahead=st.booleans(),
    )
    def start(self, launch_ahead: bool, **own: Any) -> None:
        self.config = EngineConfig(
            page_size=PAGE_SIZE, max_waiting=MAX_WAITING, max_block_size=8, **own
        )
        self.ahead = launch_ahead
        self.now = 0.0
        self.scheduler = Scheduler(self.config, clock=lambda: self.now)
        self.runner = self.runner_class()
        self.in_flight: tuple[list[Scheduled], Any] | None = None
        self.sequences: list[Sequence] = []
        self.outputs: dict[Sequence, list[int]] = {}
        self.left_out: dict[Sequence, int] = {}
        self.cached: set[int] = set()
        self.next_event = 0

    @rule(
        mode=st.sampled_from([Mode.AUTOREGRESSIVE, Mode.SELF_SPECULATION, Mode.BLOCK_DIFFUSION]),
        prompt=st.lists(st.integers(10, 9 + VOCABULARY), min_size=1, max_size=24),
        max_tokens=st.integers(1, 16),
        block_size=st.integers(1, 8),
        priority=st.sampled_from(Priority),
        timeout_s=st.sampled_from([None, None, 3.0, 12.0]),
    )
    def arrive(self, prompt: list[int], mode: Mode, block_size: int, **own: Any) -> None:
        number = len(self.sequences)
        request = Request(
            f"r{number}", tuple(prompt), mode, seed=number, block_size=block_size, **own
        )
        block_size = 1 if mode is Mode.AUTOREGRESSIVE else block_size
        context = DecodingContext(request, 3, frozenset((2,)), block_size)
        strategy = ALL_MODES[mode](context)
        sequence = Sequence(request, strategy, context.stop_ids, self.now)
        full = self.scheduler.load().waiting == MAX_WAITING
        try:
            self.scheduler.add(sequence, block_size)
        except Overloaded:
            assert full
            return
        self.sequences.append(sequence)
        self.outputs[sequence] = []
        self.left_out[sequence] = 0

    @rule()
    def step(self) -> None:
        for sequence, chunk in self.scheduler.expire():
            assert chunk.finish is not None
            assert sequence.finish_reason is FinishReason.DEADLINE
        assert all(s.deadline > self.now for s in self.alive)
        if self.in_flight is not None and not (self.ahead and self.scheduler.can_look_ahead):
            self.read()
        scheduled = self.scheduler.schedule()
        self.check_turns(scheduled)
        launched = None
        if scheduled:
            before = None if self.in_flight is None else self.in_flight[1]
            copies = self.scheduler.drain_copies()
            launched = (scheduled, self.runner.launch(scheduled, before, copies))
        self.read()
        if launched is not None and self.ahead:
            self.scheduler.expect(scheduled)
        self.in_flight = launched

    def read(self) -> None:
        if self.in_flight is None:
            return
        (scheduled, launched), self.in_flight = self.in_flight, None
        for sequence, chunk in self.scheduler.update(scheduled, self.runner.read(launched)):
            self.outputs[sequence] += chunk.token_ids

    def check_turns(self, scheduled: list[Scheduled]) -> None:
        assert sum(len(item.query.token_ids) for item in scheduled) <= self.config.max_step_tokens
        present = {item.sequence for item in scheduled}
        assert len(present) == len(scheduled)
        running = [s for s in self.alive if s.page_table]
        waiting = [s for s in self.alive if not s.page_table]
        # An interactive request takes seat and pages of any batch request.
        if any(s.request.priority is Priority.INTERACTIVE for s in waiting):
            assert all(s.request.priority is Priority.INTERACTIVE for s in running)
        for sequence in running:
            decodes = not sequence.is_prefilling and sequence not in present
            # With passes unread it may also be left out because it may have ended, or for pages.
            counts = decodes and not sequence.awaits_answers
            self.left_out[sequence] = self.left_out[sequence] + 1 if counts else 0
            assert self.left_out[sequence] < max(2, len(running))
        prefilled = sum(
            len(item.query.token_ids) for item in scheduled if item.query.stage.value == "prefill"
        )
        left = sum(s.prefill_end - s.num_launched for s in running if s.is_prefilling)
        assert prefilled >= min(left, self.config.prefill_tokens)

    @property
    def alive(self) -> list[Sequence]:
        return [s for s in self.sequences if s.finish_reason is None]

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.abort(data.draw(st.sampled_from(self.alive)))

    @rule(seconds=st.sampled_from([1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def clear_cache(self) -> None:
        self.scheduler.clear_cache()

    @invariant()
    def pages_are_where_they_belong(self) -> None:
        self.scheduler.check_integrity()

    @invariant()
    def events_tell_what_is_cached(self) -> None:
        for event in self.scheduler.drain_events():
            assert event.number == self.next_event
            self.next_event += 1
            if event.kind is KVEventKind.CLEARED:
                self.cached.clear()
            elif event.kind is KVEventKind.STORED:
                self.cached.add(event.page_hash)
            else:
                self.cached.remove(event.page_hash)
        assert len(self.cached) == self.scheduler.load().cached_pages

    @invariant()
    def nobody_waits_beyond_the_bound(self) -> None:
        load = self.scheduler.load()
        # Preempted sequences wait, too; they were counted when they came.
        assert load.waiting <= MAX_WAITING + self.config.max_sequences
        assert load.running <= self.config.max_sequences

    @invariant()
    def what_was_written_is_right(self) -> None:
        for sequence, output in self.outputs.items():
            if sequence.request.mode is Mode.BLOCK_DIFFUSION:
                continue
            start, seed = sequence.num_prompt_tokens, sequence.request.seed
            wanted = [self.token_at(seed, start + i) for i in range(len(output))]
            assert output == wanted

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        assert self.scheduler.load().free_pages == self.config.num_pages
        for sequence in self.sequences:
            if sequence.finish_reason is FinishReason.LENGTH:
                assert len(self.outputs[sequence]) == sequence.request.max_tokens


@pytest.fixture
def machine(scripted_runner: Any, token_at: Any) -> type[SchedulerMachine]:
    return type(
        "Machine",
        (SchedulerMachine,),
        {"runner_class": scripted_runner, "token_at": staticmethod(token_at)},
    )


def test_whatever_happens_every_rule_holds(machine: type[SchedulerMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
        ),
    )
