"""What `trimode bench` was asked, checked before anything slow starts."""

import math
from dataclasses import dataclass
from pathlib import Path

from trimode.cluster.bench.metrics import Limits
from trimode.cluster.bench.prompt_files import TraceLine
from trimode.cluster.bench.settings import AR, AUTO, CLUSTER_SETTINGS, ENGINE_SETTINGS, Setting
from trimode.cluster.bench.workload import (
    DEFAULT_PROMPTS,
    Load,
    Sampling,
    closed_load,
    poisson_load,
    trace_load,
)
from trimode.replicas.errors import ConfigError
from trimode.replicas.model.source import ModelSource
from trimode.replicas.types import MAX_SEED

MAX_CONCURRENCY = 1024
MAX_REQUESTS = 1_000_000
MAX_THREADS = 1024
USERS = (1, 2, 4, 8, 16, 32)
USERS_AGAINST = (1, 32)


@dataclass(frozen=True, slots=True)
class Options:
    """The command's options. Raises ConfigError that names the option and its limit.

    At most one of concurrencies, rates and trace says when requests come; none of them: USERS.
    """

    model: ModelSource
    out: Path  # the JSON; the picture stands beside it
    sampling: Sampling
    address: str | None = None  # of a served cluster; None: an engine in this process
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    system: str = ""  # in front of every prompt
    settings: tuple[Setting, ...] = ()  # none: all that can be measured there
    concurrencies: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    trace: tuple[TraceLine, ...] = ()
    requests: int = 16  # of one run; a closed loop has at least two for each user
    repeats: int = 1
    goodput_ttft_ms: float | None = None  # what a request must keep to be good; None: no limit
    goodput_tpot_ms: float | None = None
    dtype: str = "auto"
    quantization: str | None = None  # of the decoder's projections
    threads: int | None = None  # of torch; None: as many as it likes
    profile: Path | None = None  # step times for the governor; None: it measures them
    against: str | None = None  # the library to compare with

    def __post_init__(self) -> None:
        _check("--concurrency", self.concurrencies, MAX_CONCURRENCY)
        _check("--rate", self.rates, math.inf)
        _check("--requests", (self.requests,), MAX_REQUESTS)
        _check("--repeats", (self.repeats,), MAX_REQUESTS)
        _check("--max-tokens", (self.sampling.max_tokens,), math.inf)
        _check("--threads", (self.threads,), MAX_THREADS)
        _check("--goodput-ttft-ms", (self.goodput_ttft_ms,), math.inf)
        _check("--goodput-tpot-ms", (self.goodput_tpot_ms,), math.inf)
        if not 0 <= self.sampling.temperature <= 10:
            raise ConfigError(f"--temperature must be in [0, 10], is {self.sampling.temperature}")
        if not 0 <= self.sampling.seed <= MAX_SEED - MAX_REQUESTS:
            raise ConfigError(
                f"--seed must be in [0, {MAX_SEED - MAX_REQUESTS}], is {self.sampling.seed}"
            )
        if self.out.suffix != ".json":
            raise ConfigError(f"--out must end in .json, is {self.out.name}")
        if (bool(self.concurrencies), bool(self.rates), bool(self.trace)).count(True) > 1:
            raise ConfigError("give one of --concurrency, --rate and --trace")
        self._check_place()

    def _check_place(self) -> None:
        """What only an engine here or only a served cluster can do."""
        if self.address is None:
            if AUTO in self.settings:
                raise ConfigError("--settings: auto is a router's to resolve; give --address")
        else:
            for name in ("quantization", "threads", "profile", "against"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"--{name} is for an engine in this process, not --address")
        if self.against is not None:
            if self.quantization is not None:
                raise ConfigError("--against compares the weights as they are: no --quantization")
            if self.against != "transformers":
                raise ConfigError(f"--against: {self.against!r} is not transformers")
            if self.rates or self.trace or self.settings or self.sampling.temperature:
                raise ConfigError(
                    "--against compares greedy ar in a closed loop: "
                    "no --rate, --trace, --settings or --temperature"
                )

    @property
    def limits(self) -> Limits:
        ttft_ms, tpot_ms = self.goodput_ttft_ms, self.goodput_tpot_ms
        return Limits(
            None if ttft_ms is None else ttft_ms / 1000, None if tpot_ms is None else tpot_ms / 1000
        )

    @property
    def loop(self) -> str:
        """Who decides when a request comes: 'closed' the answer before, 'open' the clock."""
        return "open" if self.rates or self.trace else "closed"

    def settings_for(self, max_block_size: float) -> tuple[Setting, ...]:
        """The settings named, or all that can be measured where blocks have at most this size.

        Raises ConfigError where one that was named cannot.
        """
        if self.against is not None:
            return (AR,)
        for setting in self.settings:
            if setting.largest_block > max_block_size:
                raise ConfigError(
                    f"--settings: {setting.name} needs blocks of {setting.largest_block}; "
                    f"here they have at most {max_block_size}"
                )
        known = ENGINE_SETTINGS if self.address is None else CLUSTER_SETTINGS
        return self.settings or tuple(
            setting for setting in known if setting.largest_block <= max_block_size
        )

    def loads(self) -> list[Load]:
        """The sweep, lightest first."""
        prompts = [self.system + prompt for prompt in self.prompts]
        if self.trace:
            return [trace_load(self.trace, self.system, self.sampling)]
        if self.rates:
            return [
                poisson_load(prompts, rate, self.requests, self.sampling)
                for rate in sorted(set(self.rates))
            ]
        users = self.concurrencies or (USERS if self.against is None else USERS_AGAINST)
        return [
            closed_load(prompts, count, self.requests, self.sampling)
            for count in sorted(set(users))
        ]


def _check(option: str, values: tuple[float | None, ...], highest: float) -> None:
    for value in values:
        # Written so that NaN is refused, too.
        if value is not None and not (0 < value <= highest and math.isfinite(value)):
            limit = "" if highest == math.inf else f", at most {highest:.0f}"
            raise ConfigError(f"{option} must be a finite number above 0{limit}, is {value:g}")
