"""The governor against every fixed block size, on populations of sequences whose drafts are kept
with known probabilities, in simulated time.

    python tests/benchmarks/governor.py [PROFILE.json]

Prints the governor's goodput as a part of the best fixed size's, for each text and each number of
sequences. Without a profile: a machine that is bound by memory up to 256 rows.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimode.replicas.acceptance import BLOCK_SIZES, DEFAULT_PRIOR, GROUP_ENDS, Acceptance
from trimode.replicas.governor import Governor
from trimode.replicas.round_sizes import set_block_sizes
from trimode.replicas.step_profile import StepProfile

Probabilities = tuple[float, float, float, float]  # by position group
TOKENS = 8000  # of a run, and so many times more as there are sequences by the square root
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

    @property
    def expected_tokens(self) -> float:
        if self.acceptance is None or self.rows == 1:
            return 1.0
        return self.acceptance.expected(self.rows) / 2

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


def ratio(
    profile: StepProfile,
    text: Text,
    concurrency: int,
    prior: Sequence[float] = DEFAULT_PRIOR,
    tokens: int = TOKENS,
) -> tuple[float, int, Result]:
    """The governor's goodput over the best fixed size's, that size, and the governor's run."""
    wanted = int(tokens * concurrency**0.5)
    fixed = {
        size: simulate(profile, text, concurrency, size, wanted).goodput for size in BLOCK_SIZES
    }
    best = max(fixed, key=fixed.__getitem__)
    governed = simulate(profile, text, concurrency, Governor(profile, prior=prior), wanted)
    return governed.goodput / fixed[best], best, governed


def main() -> None:
    profile = StepProfile.load(Path(sys.argv[1])) if len(sys.argv) > 1 else memory_bound()
    for name, prior in (
        ("default", DEFAULT_PRIOR),
        ("too low", flat(0.1)),
        ("too high", flat(0.95)),
    ):
        print(f"prior {name}: governor / best fixed size (that size)")
        print(" " * 10, *(f"{n:>11}" for n in CONCURRENCIES))
        for text in TEXTS:
            cells = []
            for concurrency in CONCURRENCIES:
                value, best, _ = ratio(profile, text, concurrency, prior)
                cells.append(f"{value:.3f} ({best})")
            print(f"{text.name:10}", *(f"{cell:>11}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
