"""The governor against every fixed block size, on populations of sequences whose drafts are kept
with known probabilities, in simulated time.

    python tests/benchmarks/governor.py

Writes docs/measurements/governor.json: the governor's goodput as a part of the best fixed size's,
for each text, prior and number of sequences, on the CPU of profile_cpu.json and on a machine that
is bound by memory up to 256 rows.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from trimode.replicas.acceptance import BLOCK_SIZES, DEFAULT_PRIOR, GROUP_ENDS, Acceptance
from trimode.replicas.governor import Governor
from trimode.replicas.round_sizes import set_block_sizes
from trimode.replicas.step_profile import StepProfile

Probabilities = tuple[float, float, float, float]  # by position group
OUT = Path(__file__).parents[2] / "docs" / "measurements"
TOKENS = 5000  # of a run, and so many times more as there are sequences by the square root
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
STRETCH = 64  # tokens after which a text changes its character


def flat(probability: float) -> Probabilities:
    return (probability,) * 4


@dataclass(frozen=True)
class Text:
    """What sequences are made of: each takes one of the lists at random, and goes round in it."""

    name: str
    characters: tuple[tuple[Probabilities, ...], ...]


TEXTS = (
    *(Text(f"{p:.2f} kept", ((flat(p),),)) for p in (0.0, 0.3, 0.6, 0.8, 0.9, 0.97)),
    Text("prose", (((0.5, 0.45, 0.4, 0.4),),)),
    Text("mixed", tuple((flat(p),) for p in (0.2, 0.6, 0.8, 0.95))),
    Text("changing", ((flat(0.3), flat(0.95)), (flat(0.95), flat(0.3)))),
)


@dataclass(eq=False)
class SimulatedSequence:
    """What set_block_sizes asks of a Sequence, and the coins that decide on its drafts."""

    characters: tuple[Probabilities, ...]
    max_tokens: int
    coins: np.ndarray  # one a position: the same drafts are right whoever picks the sizes
    acceptance: Acceptance | None = None
    block_size: int | None = None
    num_output_tokens: int = 0
    num_committed: int = 100
    has_drafts: bool = False
    is_prefilling: bool = False
    is_governed: bool = True
    max_block_size: int = BLOCK_SIZES[-1]

    @property
    def request(self) -> "SimulatedSequence":
        return self

    @property
    def strategy(self) -> "SimulatedSequence":
        return self

    @property
    def starts_round(self) -> bool:
        return not self.has_drafts

    @property
    def rows(self) -> int:
        return self.block_size or self.max_block_size

    def verify(self) -> int:
        """Tokens that the round keeps."""
        here = self.characters[self.num_output_tokens // STRETCH % len(self.characters)]
        size = self.rows
        if size == 1:
            return 1
        chances = np.repeat(here, np.diff((0, *GROUP_ENDS)))[: size - 1]
        here_on = self.num_output_tokens
        wrong = self.coins[here_on : here_on + size - 1] >= chances
        return int(wrong.argmax()) + 1 if wrong.any() else size


@dataclass
class Result:
    """Of one run."""

    tokens: int = 0
    seconds: float = 0.0
    rounds: Counter[int] = field(default_factory=Counter)
    changes: int = 0

    @property
    def goodput(self) -> float:
        return self.tokens / self.seconds


def simulate(
    profile: StepProfile,
    text: Text,
    concurrency: int,
    policy: Governor | int,
    num_tokens: int,
    lengths: tuple[int, int] = (64, 512),
) -> Result:
    """A closed loop: a sequence that ends makes way for a new one. policy: a governor, or the block
    size of all.
    """
    num_arrived = 0

    def arrive() -> SimulatedSequence:
        nonlocal num_arrived
        random = np.random.default_rng(num_arrived)
        num_arrived += 1
        characters = text.characters[random.integers(len(text.characters))]
        length = int(random.integers(*lengths))
        return SimulatedSequence(characters, length, random.random(length + BLOCK_SIZES[-1]))

    running = [arrive() for _ in range(concurrency)]
    result = Result()
    while result.tokens < num_tokens:
        before = [s.block_size for s in running]
        if isinstance(policy, Governor):
            set_block_sizes(policy, running)  # type: ignore[arg-type]
        else:
            for sequence in running:
                sequence.block_size = policy
        result.changes += sum(
            old is not None and old != s.block_size for old, s in zip(before, running, strict=True)
        )
        result.seconds += _pass_seconds(profile, running)
        for index, sequence in enumerate(running):
            if not sequence.has_drafts and sequence.rows > 1:
                sequence.has_drafts = True
                continue
            sequence.has_drafts = False
            accepted = sequence.verify()
            result.rounds[sequence.rows] += 1
            if isinstance(policy, Governor) and sequence.acceptance is not None:
                policy.observe(sequence.acceptance, sequence.rows, accepted)
            taken = min(accepted, sequence.max_tokens - sequence.num_output_tokens)
            sequence.num_output_tokens += taken
            sequence.num_committed += taken
            result.tokens += taken
            if sequence.num_output_tokens == sequence.max_tokens:
                running[index] = arrive()
    return result


def _pass_seconds(profile: StepProfile, running: Sequence[SimulatedSequence]) -> float:
    """Draft rows cost what they cost, the others what causal ones do."""
    rows = sum(s.rows for s in running)
    drafting = sum(s.rows for s in running if not s.has_drafts and s.rows > 1)
    curve = profile.row_curve(len(running), sum(s.num_committed for s in running))
    causal, draft = (np.interp(rows, curve.rows, y) for y in (curve.causal_s, curve.draft_s))
    return float(causal + (draft - causal) * drafting / rows)


def memory_bound(knee: int = 256, draft_factor: float = 1.05) -> StepProfile:
    """As a GPU: reading the weights takes 8 ms, more than `knee` rows take longer."""
    counts, rows, contexts = (1, 4, 16, 64, 256), (1, 4, 8, 16, 32), (64, 512, 2048)

    def grid(factor: float) -> Any:
        return tuple(
            tuple(
                tuple(8e-3 * factor * max(1.0, n * r / knee) + 2e-8 * n * c for c in contexts)
                for r in rows
            )
            for n in counts
        )

    return StepProfile(counts, rows, contexts, grid(1.0), grid(draft_factor))


def best_fixed(
    profile: StepProfile, text: Text, concurrency: int, tokens: int = TOKENS
) -> tuple[float, int]:
    """Goodput of the block size that suits this load best, and the size."""
    wanted = int(tokens * concurrency**0.5)
    return max(
        (simulate(profile, text, concurrency, size, wanted).goodput, size) for size in BLOCK_SIZES
    )


def governed(
    profile: StepProfile,
    text: Text,
    concurrency: int,
    prior: Sequence[float] = DEFAULT_PRIOR,
    tokens: int = TOKENS,
) -> Result:
    """The same load under a new governor: what it must learn first is part of the run."""
    governor = Governor(profile, prior=prior)
    return simulate(profile, text, concurrency, governor, int(tokens * concurrency**0.5))


def main() -> None:
    machines = {"cpu": StepProfile.load(OUT / "profile_cpu.json"), "memory_bound": memory_bound()}
    priors = {"default": DEFAULT_PRIOR, "too_low": flat(0.1), "too_high": flat(0.95)}
    document: dict[str, Any] = {
        "command": "python tests/benchmarks/governor.py",
        "meaning": "governor's goodput / the best fixed block size's; [that, the size]",
        "tokens": f"{TOKENS} x sqrt(sequences)",
        "ratios": {},
    }
    cases = list(product(machines, TEXTS, CONCURRENCIES))
    for machine, text, concurrency in track(cases, description="simulating"):
        best, size = best_fixed(machines[machine], text, concurrency)
        for name, prior in priors.items():
            result = governed(machines[machine], text, concurrency, prior)
            table = document["ratios"].setdefault(machine, {}).setdefault(f"prior {name}", {})
            table.setdefault(text.name, {})[concurrency] = [round(result.goodput / best, 3), size]
    (OUT / "governor.json").write_text(dump(document))


def dump(document: dict[str, Any]) -> str:
    """JSON, one line a text."""
    lines = json.dumps(document, indent=1)
    return re.sub(r"\[\s+([\d.]+),\s+(\d+)\s+\]", r"[\1, \2]", lines) + "\n"


if __name__ == "__main__":
    main()
