"""Sequence: the progress of one request. Only the scheduler changes it."""

from dataclasses import dataclass, field

from trimode.replicas.decoding.strategy import Strategy
from trimode.replicas.types import Finish, FinishReason, Request, Timings


@dataclass(slots=True, eq=False)  # identity, not value: two sequences are never the same one
class Sequence:
    """Invariant once prefilled: every token but those a block still holds has its KV, except the
    last one.
    """

    request: Request
    strategy: Strategy
    stop_ids: frozenset[int]
    arrived_at: float  # time.monotonic()
    token_ids: list[int]  # prompt and output
    num_pages: int = 0  # that it will own once admitted
    page_table: list[int] = field(default_factory=list)
    num_committed: int = 0  # slots that hold final, causal KV
    num_forwards: int = 0
    accepted: list[int] = field(default_factory=list)
    scheduled_at: float | None = None
    first_token_at: float | None = None
    finish_reason: FinishReason | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_prefilling(self) -> bool:
        return self.num_committed < self.num_prompt_tokens

    def append(self, emitted: list[int]) -> list[int]:
        """Take emitted tokens up to a stop token or max_tokens, whichever is first; returns those
        taken.
        """
        room = self.request.max_tokens - self.num_output_tokens
        taken = emitted[:room]
        for index, token_id in enumerate(taken):
            if token_id in self.stop_ids:
                taken = taken[: index + 1]
                self.finish_reason = FinishReason.STOP
                break
        else:
            if len(taken) == room:
                self.finish_reason = FinishReason.LENGTH
        self.token_ids += taken
        return taken

    def account(self, now: float) -> Finish:
        """The closing account; the sequence must have a finish reason."""
        assert self.finish_reason is not None
        start = self.arrived_at

        def since(moment: float | None) -> float:
            return (now if moment is None else moment) - start

        return Finish(
            reason=self.finish_reason,
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_output_tokens,
            forwards=self.num_forwards,
            accepted=tuple(self.accepted),
            timings=Timings(
                queue_s=since(self.scheduled_at),
                first_token_s=since(self.first_token_at),
                total_s=since(now),
            ),
        )
