"""Our autoregressive decoding beside another library's: how much faster, and whether it says the
same.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile

from trimode.cluster.bench.measure import Point
from trimode.cluster.bench.metrics import Ratio


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one library, which answered one request at a time."""

    library: str
    attention: str  # the implementation it chose
    ratios: dict[str, Ratio]  # users of ours -> tokens/s in total, ours over theirs
    new_tokens: int
    equal_tokens: tuple[int, ...]  # of each prompt's greedy output, from its start

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"ar with {users} at once / {self.library} one at a time: {ratio}"
            for users, ratio in self.ratios.items()
        ]
        differing = [count for count in self.equal_tokens if count < self.new_tokens]
        number = len(self.equal_tokens)
        text = f"{number - len(differing)} of {number} greedy outputs are those of {self.library}"
        if differing:
            text += f"; the others are for {', '.join(map(str, sorted(differing)))} tokens"
        return [*lines, text]


def compare(
    library: str, attention: str, ours: Sequence[Point], theirs: Point, num_prompts: int
) -> Comparison:
    """ours: by load; the first has the requests that theirs has. num_prompts: different ones."""
    outputs = list(zip(ours[0].outputs, theirs.outputs, strict=True))[:num_prompts]
    return Comparison(
        library=library,
        attention=attention,
        ratios={point.label: Ratio.of(point.speeds, theirs.speeds) for point in ours},
        new_tokens=max(len(output) for _, output in outputs),
        equal_tokens=tuple(_num_equal(one, other) for one, other in outputs),
    )


def _num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of what both begin with."""
    pairs = zip(one, other, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
