"""Engine: add, abort, step. One step is one forward pass; the caller owns loop and thread."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.modes import ALL_MODES, Registry
from trimode.replicas.decoding.strategy import DecodingContext, PassKind, Stage
from trimode.replicas.errors import InvalidRequest, RequestError
from trimode.replicas.governor import Governor, GovernorStats
from trimode.replicas.grammar import GrammarState
from trimode.replicas.language import Language
from trimode.replicas.model_runner import ModelRunner
from trimode.replicas.prefix_cache import KVEvent
from trimode.replicas.scheduled import Scheduled
from trimode.replicas.scheduler import Scheduler
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import Chunk, EngineLoad, Mode, ModelInfo, Request


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one pass held; for logs, metrics and tests."""

    stages: tuple[tuple[str, Stage, int], ...]  # (request id, stage, query tokens)
    duration_s: float


@dataclass(frozen=True, slots=True)
class _Launched:
    """A pass whose answers are still to be read."""

    scheduled: list[Scheduled]
    running: Any  # the runner's
    started_at: float


class Engine:
    """Decodes many requests of any mode together, each as if it were alone."""

    def __init__(
        self,
        runner: ModelRunner[Any],
        config: EngineConfig,
        *,
        modes: Registry = ALL_MODES,
        language: Language | None = None,
        governor: Governor | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self._runner = runner
        self._config = config
        self._modes = modes
        self._clock = clock
        self._on_step = on_step
        self._scheduler = Scheduler(config, clock, governor=governor)
        self._language = language
        self._governor = governor
        # The samples of each request that still run.
        self._sequences: dict[str, list[Sequence]] = {}
        self._in_flight: _Launched | None = None
        self._read_at = -math.inf  # when the last pass was read

    @property
    def info(self) -> ModelInfo:
        return self._runner.info

    @property
    def has_work(self) -> bool:
        # A pass that was launched ahead is read though all its sequences have ended.
        return self._scheduler.has_work or self._in_flight is not None

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def governor_stats(self) -> GovernorStats | None:
        """What the governor decided and saw; None where there is none."""
        return None if self._governor is None else self._governor.stats()

    def compile(self, request: Request) -> GrammarState | None:
        """The state before the first token of a request's grammar, where it has one. May take a
        quarter of a second, on any thread. Raises InvalidRequest where the grammar is malformed.
        """
        if request.grammar is None:
            return None
        if self._language is None:
            raise InvalidRequest("grammar", "the model has no tokenizer to read text with")
        return self._language.grammar(request.grammar)

    def add(self, request: Request, grammar: GrammarState | None = None) -> None:
        """Queue a request. grammar: compiled before; else it is compiled here.

        Raises InvalidRequest or Overloaded; nothing is kept then.
        """
        block_size = self._check(request)
        if grammar is None:
            grammar = self.compile(request)
        samples = [
            self._sequence(request, index, block_size, grammar) for index in range(request.n)
        ]
        try:
            for sequence in samples:
                self._scheduler.add(sequence, block_size)
        except RequestError:
            for sequence in samples:
                if sequence.order >= 0:
                    self._scheduler.abort(sequence)
            raise
        self._sequences[request.request_id] = samples

    def abort(self, request_id: str) -> None:
        """Drop a request and free all it holds at once; unknown or finished ones are no error."""
        for sequence in self._sequences.pop(request_id, ()):
            self._scheduler.abort(sequence)

    def step(self) -> list[tuple[str, Chunk]]:
        """Launch one forward pass over whatever is ready and read one; the chunks that it brought,
        by request id.

        That is the same pass or, with launch_ahead, the one before, unless the host needs its
        answers to go on.
        """
        chunks = self._scheduler.expire()
        if not self._scheduler.can_look_ahead:
            chunks += self._read()
        launched = self._launch()
        chunks += self._read()
        if launched is not None and self._config.launch_ahead:
            self._scheduler.expect(launched.scheduled)
        self._in_flight = launched
        if not self._config.launch_ahead:
            chunks += self._read()
        for sequence, chunk in chunks:
            if chunk.finish is not None:
                self._forget(sequence)
        return [(sequence.request.request_id, chunk) for sequence, chunk in chunks]

    def _launch(self) -> "_Launched | None":
        started = self._clock()
        scheduled = self._scheduler.schedule()
        if not scheduled:
            return None
        before = None if self._in_flight is None else self._in_flight.running
        running = self._runner.launch(scheduled, before, self._scheduler.drain_copies())
        return _Launched(scheduled, running, started)

    def _read(self) -> list[tuple[Sequence, Chunk]]:
        """Take the answers of the pass in flight, if there is one."""
        launched, self._in_flight = self._in_flight, None
        if launched is None:
            return []
        answers = self._runner.read(launched.running)
        now = self._clock()
        # A pass that was launched ahead runs once the one before it is done.
        seconds = now - max(launched.started_at, self._read_at)
        self._read_at = now
        if self._governor is not None and self._governor.wants_step_time:
            _observe(self._governor, launched.scheduled, seconds)
        chunks = self._scheduler.update(launched.scheduled, answers)
        if self._on_step is not None:
            stages = tuple(
                (item.sequence.request.request_id, item.query.stage, len(item.query.token_ids))
                for item in launched.scheduled
            )
            self._on_step(StepRecord(stages, seconds))
        return chunks

    def check_integrity(self) -> None:
        """Assert that no page is lost or shared."""
        self._scheduler.check_integrity()

    def clear_cache(self) -> None:
        """Empty the prefix cache of what no running request uses."""
        self._scheduler.clear_cache()

    def drain_events(self) -> list[KVEvent]:
        """What became of cached pages since the last call, numbered."""
        return self._scheduler.drain_events()

    def _forget(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        samples = self._sequences[request_id]
        samples.remove(sequence)
        if not samples:
            del self._sequences[request_id]

    def _sequence(
        self, request: Request, index: int, block_size: int, grammar: GrammarState | None
    ) -> Sequence:
        eos = () if request.ignore_eos else (self.info.eos_id,)
        context = DecodingContext(
            request,
            mask_id=self.info.mask_id,
            stop_ids=frozenset((*eos, *request.stop_ids)),
            block_size=block_size,
        )
        language = self._language
        return Sequence(
            request=request,
            strategy=self._modes[request.mode](context),
            stop_ids=context.stop_ids,
            arrived_at=self._clock(),
            sample_index=index,
            grammar=None if grammar is None else grammar.copy(),
            stop_scanner=(
                language.stop_scanner(request.stop_strings)
                if language and request.stop_strings
                else None
            ),
        )

    def _check(self, request: Request) -> int:
        """Check a request against this model and engine; returns its block size."""
        info, config = self.info, self._config
        if request.request_id in self._sequences:
            raise InvalidRequest("request_id", f"{request.request_id!r} is already running")
        if request.mode not in self._modes:
            known = ", ".join(sorted(mode.value for mode in self._modes))
            raise InvalidRequest("mode", f"{request.mode.value} is not one of {known}")
        for name, ids in (
            ("prompt_token_ids", request.prompt_ids),
            ("stop_token_ids", request.stop_ids),
            ("logit_bias", tuple(token_id for token_id, _ in request.logit_bias)),
        ):
            if max(ids, default=0) >= info.vocab_size or min(ids, default=0) < 0:
                raise InvalidRequest(name, f"ids must be in [0, {info.vocab_size})")
        length = len(request.prompt_ids) + request.max_tokens
        if length > info.max_positions:
            raise InvalidRequest(
                "max_tokens",
                f"prompt of {len(request.prompt_ids)} and {request.max_tokens} new tokens exceed "
                f"the model's {info.max_positions} positions",
            )
        if self._language is None and request.stop_strings:
            raise InvalidRequest("stop_strings", "the model has no tokenizer to read text with")
        limit = min(info.block_size, config.max_block_size)
        if request.block_size is not None and request.block_size > limit:
            raise InvalidRequest("block_size", f"at most {limit} here, is {request.block_size}")
        return 1 if request.mode is Mode.AUTOREGRESSIVE else request.block_size or limit


def _observe(governor: Governor, scheduled: list[Scheduled], seconds: float) -> None:
    """Tell the governor what a pass took that held somebody it governs."""
    if not any(item.sequence.is_governed for item in scheduled):
        return
    queries = [item.query for item in scheduled]
    governor.observe_step(
        num_rows=sum(len(query.token_ids) for query in queries),
        num_sequences=len(queries),
        context_tokens=sum(query.start + len(query.token_ids) for query in queries),
        drafts=any(query.kind is PassKind.DRAFT for query in queries),
        seconds=seconds,
    )
