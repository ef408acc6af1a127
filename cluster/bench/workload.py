"""What a benchmark asks, and when: loads, and the jobs that a run of a load is made of."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from trimode.cluster.bench.prompt_files import TraceLine
from trimode.cluster.bench.settings import Setting

# Two of each domain that the bundled checkpoint was trained on: code, tests, prose, tables.
DEFAULT_PROMPTS = (
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n",
    "import os\nimport sys\n\ndef main():\n    if len(sys.argv) != 2:\n",
    "class TestParser(unittest.TestCase):\n    def test_empty(self):\n        self.assertEqual(",
    "    def test_repr(self):\n        self.assertRaises(TypeError, ",
    "To the Senate and House of Representatives: In my last annual message I",
    "The expenditures of the Government for the fiscal year ending June 30",
    "### Codec APIs\n\nclass Codec(codecs.Codec):\n\n    def encode(self,input,errors='strict'):\n",
    "    '\\x00'     #  0x00 -> NULL\n    '\\x01'     #  0x01 -> START OF HEADING\n",
)
MAX_OPEN_CONCURRENCY = 256  # requests at once in an open loop; more of them wait, on the clock
WARM_UP_TOKENS = 16
MAX_WARM_UP_REQUESTS = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the requests of a benchmark choose their tokens; request i has seed + i."""

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a load, whoever answers it and however."""

    prompt: str
    sampling: Sampling
    arrival_s: float | None = None  # after the start of its run; None: once a user is free


@dataclass(frozen=True, slots=True)
class Load:
    """So many users at once, or arrivals by the clock, in order."""

    label: str
    concurrency: int  # at most so many at once
    asks: tuple[Ask, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send."""

    job_id: str
    ask: Ask
    setting: Setting
    cache_salt: str


def closed_load(prompts: Sequence[str], users: int, requests: int, sampling: Sampling) -> Load:
    """`users` who each send when they have their answer; at least two requests for each."""
    wanted = islice(cycle(prompts), max(requests, 2 * users))
    return Load(str(users), users, _asks(((prompt, None) for prompt in wanted), sampling))


def poisson_load(prompts: Sequence[str], rate: float, requests: int, sampling: Sampling) -> Load:
    """Independent users, `rate` a second on average, the same for the same seed."""
    arrivals = poisson_arrivals(rate, requests, sampling.seed)
    pairs = zip(cycle(prompts), arrivals, strict=False)
    return Load(f"{rate:g}/s", MAX_OPEN_CONCURRENCY, _asks(pairs, sampling))


def trace_load(lines: Sequence[TraceLine], system: str, sampling: Sampling) -> Load:
    """The requests of a trace when they came then."""
    asks = tuple(
        Ask(system + line.prompt, _numbered(sampling, index, line.max_tokens), line.at_s)
        for index, line in enumerate(lines)
    )
    return Load("trace", MAX_OPEN_CONCURRENCY, asks)


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` independent users arrive, `rate` a second on average, ascending."""
    noise, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        now += noise.expovariate(rate)
        arrivals.append(now)
    return arrivals


def jobs_of(run: str, setting: Setting, load: Load) -> list[Job]:
    """The requests of one run, which finds nothing in the prefix cache but what it put there."""
    return [
        Job(f"{run}/{index}", ask, setting, cache_salt=run) for index, ask in enumerate(load.asks)
    ]


def warm_up_jobs(setting: Setting, load: Load) -> list[Job]:
    """The beginning of the load's different prompts, at once."""
    asks: dict[str, Ask] = {}
    for ask in load.asks:
        short = replace(ask.sampling, max_tokens=min(WARM_UP_TOKENS, ask.sampling.max_tokens))
        asks.setdefault(ask.prompt, Ask(ask.prompt, short))
    some = islice(asks.values(), MAX_WARM_UP_REQUESTS)
    return [Job(f"warm-up/{index}", ask, setting, "warm-up") for index, ask in enumerate(some)]


def _asks(pairs: Iterable[tuple[str, float | None]], sampling: Sampling) -> tuple[Ask, ...]:
    return tuple(
        Ask(prompt, _numbered(sampling, index), arrival_s)
        for index, (prompt, arrival_s) in enumerate(pairs)
    )


def _numbered(sampling: Sampling, index: int, max_tokens: int | None = None) -> Sampling:
    return replace(
        sampling, seed=sampling.seed + index, max_tokens=max_tokens or sampling.max_tokens
    )
