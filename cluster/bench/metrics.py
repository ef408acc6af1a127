"""From what was seen of each request to the figures of a run: pure functions."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One chunk as the client saw it."""

    at_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Record:
    """One request that is over. Times are seconds of one clock."""

    sent_s: float
    arrivals: tuple[Arrival, ...] = ()  # none: it was refused
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    forwards: int = 0
    accepted: tuple[int, ...] = ()  # tokens of each verify round; empty in other modes
    cached_tokens: int = 0

    @property
    def tokens(self) -> int:
        return sum(arrival.num_tokens for arrival in self.arrivals)

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0].at_s - self.sent_s

    @property
    def total_s(self) -> float:
        return self.arrivals[-1].at_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first chunk; None where that was all."""
        later = self.tokens - self.arrivals[0].num_tokens
        return (self.total_s - self.ttft_s) / later if later else None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to count as good; None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def hold(self, record: Record) -> bool:
        tpot_s = record.tpot_s
        return (self.ttft_s is None or record.ttft_s <= self.ttft_s) and (
            self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s
        )


@dataclass(frozen=True, slots=True)
class Percentiles:
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of two things that were measured in turns: quartiles over the turns."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        return cls(statistics.median(ratios), percentile(ratios, 0.25), percentile(ratios, 0.75))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.lower:.3f} to {self.upper:.3f})"


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run. A share or percentile of nothing is None."""

    requests: int
    refused: int  # of them; all other figures are of the rest
    tokens: int
    seconds: float
    tokens_per_s: float
    tokens_per_s_per_user: float  # mean over requests of tokens / (last chunk - sent)
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    chunk_gap_ms: Percentiles | None
    tokens_per_chunk: Percentiles | None
    tokens_per_forward: float
    accepted_per_round: float | None
    prefix_hit_rate: float
    good_share: float  # of all requests
    goodput_tokens_per_s: float  # of the requests that kept the limits

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def percentiles(values: Iterable[float]) -> Percentiles | None:
    held = list(values)
    if not held:
        return None
    return Percentiles(*(percentile(held, share) for share in (0.5, 0.9, 0.99)))


def summarise(records: Sequence[Record], limits: Limits) -> Summary:
    """The figures of one run, of which at least one request was answered, from the first send to
    the last chunk.
    """
    num_requests = len(records)
    records = [record for record in records if record.arrivals]
    seconds = max(r.arrivals[-1].at_s for r in records) - min(r.sent_s for r in records)
    good = [record for record in records if limits.hold(record)]
    rounds = [count for record in records for count in record.accepted]
    tokens = sum(record.tokens for record in records)
    gaps = [
        1000 * (later.at_s - before.at_s)
        for record in records
        for before, later in zip(record.arrivals, record.arrivals[1:], strict=False)
    ]
    chunks = [float(a.num_tokens) for record in records for a in record.arrivals if a.num_tokens]
    return Summary(
        requests=num_requests,
        refused=num_requests - len(records),
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        tokens_per_s_per_user=sum(r.tokens / r.total_s for r in records) / len(records),
        ttft_ms=percentiles(1000 * record.ttft_s for record in records),
        tpot_ms=percentiles(1000 * r.tpot_s for r in records if r.tpot_s is not None),
        chunk_gap_ms=percentiles(gaps),
        tokens_per_chunk=percentiles(chunks),
        tokens_per_forward=tokens / max(1, sum(record.forwards for record in records)),
        accepted_per_round=sum(rounds) / len(rounds) if rounds else None,
        prefix_hit_rate=sum(r.cached_tokens for r in records)
        / sum(r.prompt_tokens for r in records),
        good_share=len(good) / num_requests,
        goodput_tokens_per_s=sum(record.tokens for record in good) / seconds,
    )
