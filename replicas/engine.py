"""Engine: add, abort, step. One step is one forward pass; the caller owns loop and thread."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.modes import ALL_MODES, Registry
from trimode.replicas.decoding.strategy import DecodingContext, Stage
from trimode.replicas.errors import InvalidRequest
from trimode.replicas.model_runner import ModelRunner
from trimode.replicas.scheduler import Scheduler
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import Chunk, EngineLoad, Mode, ModelInfo, Request


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one pass held; for logs, metrics and tests."""

    stages: tuple[tuple[str, Stage, int], ...]  # (request id, stage, query tokens)
    duration_s: float


class Engine:
    """Decodes many requests of any mode together, each as if it were alone."""

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        *,
        modes: Registry = ALL_MODES,
        clock: Callable[[], float] = time.monotonic,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self._runner = runner
        self._config = config
        self._modes = modes
        self._clock = clock
        self._on_step = on_step
        self._scheduler = Scheduler(config, clock)
        self._sequences: dict[str, Sequence] = {}

    @property
    def info(self) -> ModelInfo:
        return self._runner.info

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest or Overloaded; nothing is kept then."""
        block_size = self._check(request)
        context = DecodingContext(
            request,
            mask_id=self.info.mask_id,
            stop_ids=frozenset((self.info.eos_id, *request.stop_ids)),
            block_size=block_size,
        )
        sequence = Sequence(
            request=request,
            strategy=self._modes[request.mode](context),
            stop_ids=context.stop_ids,
            arrived_at=self._clock(),
            token_ids=list(request.prompt_ids),
        )
        self._scheduler.add(sequence, block_size)
        self._sequences[request.request_id] = sequence

    def abort(self, request_id: str) -> None:
        """Drop a request and free all it holds at once; unknown or finished ones are no error."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._scheduler.abort(sequence)

    def step(self) -> list[tuple[str, Chunk]]:
        """One forward pass over whatever is ready; the chunks that it brought, by request id."""
        started = self._clock()
        scheduled = self._scheduler.schedule()
        if not scheduled:
            return []
        answers = self._runner.run(scheduled)
        chunks = self._scheduler.update(scheduled, answers)
        if self._on_step is not None:
            stages = tuple(
                (item.sequence.request.request_id, item.query.stage, len(item.query.token_ids))
                for item in scheduled
            )
            self._on_step(StepRecord(stages, self._clock() - started))
        for sequence, chunk in chunks:
            if chunk.finish is not None:
                del self._sequences[sequence.request.request_id]
        return [(sequence.request.request_id, chunk) for sequence, chunk in chunks]

    def check_integrity(self) -> None:
        """Assert that no page is lost or shared."""
        self._scheduler.check_integrity()

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
        limit = min(info.block_size, config.max_block_size)
        if request.block_size is not None and request.block_size > limit:
            raise InvalidRequest("block_size", f"at most {limit} here, is {request.block_size}")
        return 1 if request.mode is Mode.AUTOREGRESSIVE else request.block_size or limit
