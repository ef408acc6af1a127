"""How often the company of a request changes its tokens, and what `batch_invariant` costs.

Greedy requests are decoded a few at a time, then all at once, then all at once by speculation.
Counted is the first token of a completion that differs, over the tokens up to there: what follows
it is another text. Random weights have more near-ties than trained ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from documents import Document, Facts
from floors import Card, Floors
from steps import Point, row
from workbench import Spec, Workbench

from trimode.replicas.engine import Engine
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.types import Mode, Request

REQUESTS, NEW_TOKENS, PROMPT_LEN = 64, 192, 64
PRICED = ((1, 1), (1, 32), (32, 1), (32, 8), (128, 1))  # sequences, block size
Outputs = dict[str, list[int]]


@dataclass(slots=True)
class Divergences:
    """Of completions that should be the same."""

    tokens: int = 0  # up to the first that differs, with it
    divergences: int = 0

    def add(self, got: Sequence[int], wanted: Sequence[int]) -> None:
        pairs = zip(got, wanted, strict=True)
        first = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        self.tokens += len(wanted) if first is None else first + 1
        self.divergences += first is not None

    def to_dict(self) -> Facts:
        rate = 1e4 * self.divergences / max(1, self.tokens)
        return {
            "tokens": self.tokens,
            "divergences": self.divergences,
            "per_10000_tokens": round(rate, 3),
        }


def measure_invariance(bench: Workbench, document: Document, size: str, card: Card) -> None:
    """Without it, then with it; prices are ratios of step times."""
    times: dict[tuple[int, int], float] = {}
    for invariant in (False, True):
        spec = Spec(size, batch_invariant=invariant)
        runner, rank = bench.runner(spec)
        rank.draw(None)
        document.append("divergences", {"batch_invariant": invariant, **_compare(bench, runner)})
        floors = Floors(bench.config(size), card)
        for sequences, block in PRICED[:2] if bench.is_tiny else PRICED:
            point = Point(sequences, 8 if bench.is_tiny and block > 1 else block, 512)
            if bench.is_tiny:
                point = replace(point, context_len=24)
            ms = row(bench, runner, floors, point)["ms"]
            if not invariant:
                times[sequences, block] = ms
                continue
            before = times[sequences, block]
            document.append(
                "prices",
                {"sequences": sequences, "block": block, "ms": ms, "without_ms": before,
                 "price": ms / before},
            )  # fmt: skip


def _compare(bench: Workbench, runner: TorchModelRunner) -> Facts:
    """By what is compared with all at once in AR."""
    requests = _requests(
        runner, 3 if bench.is_tiny else REQUESTS, 6 if bench.is_tiny else NEW_TOKENS
    )
    together = decode(runner, requests, len(requests))
    drafted = [replace(request, mode=Mode.SELF_SPECULATION, block_size=8) for request in requests]
    found: Facts = {}
    few = requests[: 4 if len(requests) > 4 else 1]
    for name, some, users in (
        ("alone", few, 1),
        ("eight at once", requests, 8),
        ("by speculation", drafted, len(requests)),
    ):
        counts, outputs = Divergences(), decode(runner, some, users)
        for request in some:
            counts.add(outputs[request.request_id], together[request.request_id])
        found[name] = counts.to_dict()
    return found


def decode(runner: TorchModelRunner, requests: Sequence[Request], users: int) -> Outputs:
    """So many at a time; what each wrote."""
    engine = Engine(runner, runner.config)
    ahead = list(requests)
    outputs: Outputs = {request.request_id: [] for request in requests}
    running = 0
    while ahead or engine.has_work:
        while ahead and running < users:
            engine.add(ahead.pop(0))
            running += 1
        for request_id, chunk in engine.step():
            outputs[request_id] += chunk.token_ids
            running -= chunk.finish is not None
    return outputs


def _requests(runner: TorchModelRunner, count: int, new_tokens: int) -> list[Request]:
    """Prompts of different lengths."""
    vocab_size = runner.info.vocab_size
    return [
        Request(
            str(seed),
            tuple((seed * 7919 + at * 104729) % vocab_size for at in range(PROMPT_LEN + seed)),
            Mode.AUTOREGRESSIVE,
            new_tokens,
            ignore_eos=True,
        )
        for seed in range(count)
    ]
