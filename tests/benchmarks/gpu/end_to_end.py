"""Tokens a second of the real engine: closed loops of users, by setting; the governor beside them.

Verify passes keep as many drafts as a published distribution says (published_acceptance.py); all
else is what serves requests. The whole run counts, prompts and the last users' tail included.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from documents import Document, Facts
from drawn_runner import DrawnRunner
from gpu_time import busy_seconds, synchronize
from published_acceptance import BLOCK_SIZES, LABEL, mean_kept, prior, survival
from workbench import MAX_USERS, Spec, Workbench

from trimode.cluster.bench.local import LocalTarget
from trimode.cluster.bench.metrics import Limits, Summary, summarise
from trimode.cluster.bench.settings import AR, GOVERNOR, SPECULATION, Setting
from trimode.cluster.bench.workload import Load, Sampling, closed_load, jobs_of
from trimode.replicas.calibration import measure
from trimode.replicas.engine import Engine
from trimode.replicas.governor import Governor
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.step_profile import StepProfile
from trimode.replicas.types import Request

SETTINGS = (AR, *SPECULATION, GOVERNOR)
USERS = tuple(1 << exponent for exponent in range(MAX_USERS.bit_length()))
PROMPT_LEN, NEW_TOKENS = 512, 256
MIN_REQUESTS = 4
CALIBRATION_SECONDS = 15.0
SHARE_STEPS = 30  # that the share of the device's time is read off


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the users ask."""

    users: tuple[int, ...] = USERS
    settings: tuple[Setting, ...] = SETTINGS
    prompt_len: int = PROMPT_LEN
    new_tokens: int = NEW_TOKENS
    acceptance: str = "measured"

    def small(self) -> "Traffic":
        """For a trial of this script."""
        return replace(
            self, users=tuple(n for n in self.users if n <= 2), prompt_len=24, new_tokens=8
        )

    def load(self, users: int) -> Load:
        sampling = Sampling(self.new_tokens, ignore_eos=True)
        return closed_load([str(seed) for seed in range(MAX_USERS)], users, MIN_REQUESTS, sampling)


@dataclass(frozen=True, slots=True)
class Bench:
    """One runner with its engines."""

    runner: TorchModelRunner
    rank: DrawnRunner
    traffic: Traffic
    profile: StepProfile | None = None  # where a governor decides by it

    def encode(self, prompt: str) -> list[int]:
        """A prompt is the seed of its random ids."""
        rng = np.random.default_rng(int(prompt))
        return list(rng.integers(0, self.runner.info.vocab_size, self.traffic.prompt_len).tolist())

    def engine(self, setting: Setting) -> Engine:
        """With a governor where the setting asks for it, as it starts on a known checkpoint."""
        governor = None
        if setting.is_governed:
            assert self.profile is not None
            size = self.runner.config.max_block_size
            governor = Governor(self.profile, size, prior(self.traffic.acceptance))
        return Engine(self.runner, self.runner.config, governor=governor)


def measure_end_to_end(
    bench: Workbench, document: Document, spec: Spec, traffic: Traffic, shares_at: tuple[int, ...]
) -> None:
    """A row a run; shares_at: numbers of users where the share of the device's time is read."""
    traffic = traffic.small() if bench.is_tiny else traffic
    runner, rank = bench.runner(spec)
    rank.draw(None)
    begun = time.perf_counter()
    profile = measure(runner, runner.config, 0.2 if bench.is_tiny else CALIBRATION_SECONDS)
    document.write(
        model=spec.size,
        quantization=spec.quantization,
        label=LABEL,
        acceptance=traffic.acceptance,
        mean_kept={size: mean_kept(traffic.acceptance, size) for size in BLOCK_SIZES},
        prompt_len=traffic.prompt_len,
        new_tokens=traffic.new_tokens,
        calibration_s=time.perf_counter() - begun,
        profile={
            name: getattr(profile, name)
            for name in (
                "num_sequences", "rows_per_sequence", "context_lens", "causal_s", "draft_s"
            )
        },
        **bench.start_facts,
    )  # fmt: skip
    rank.draw({size: survival(traffic.acceptance, size) for size in BLOCK_SIZES})
    tried = Bench(runner, rank, traffic, profile)
    warm_up(tried)
    # Ends first: what is best for one user and for a full machine are the figures that matter.
    for users in sorted(traffic.users, key=lambda n: (n not in (1, traffic.users[-1]), n)):
        for setting in traffic.settings:
            found = run(tried, setting, users)
            if users in shares_at or bench.is_tiny:
                found |= device_share(bench, tried, setting, users)
            document.append("rows", found)


def warm_up(tried: Bench) -> None:
    """Kernels of every kind of pass are compiled."""
    for setting in tried.traffic.settings:
        users = min(2, tried.traffic.users[-1])
        short = replace(tried, traffic=replace(tried.traffic, new_tokens=8))
        run(short, setting, users)


def run(tried: Bench, setting: Setting, users: int) -> Facts:
    load = tried.traffic.load(users)
    engine = tried.engine(setting)
    tried.rank.restart()
    target = LocalTarget(engine, tried.encode)
    records = target.run(jobs_of("run", setting, load), users, lambda: None)
    summary = summarise(records, Limits())
    stats = engine.governor_stats()
    governed = {} if stats is None else {"rounds_by_size": dict(stats.rounds_by_size)}
    return {"setting": setting.name, "users": users, **_figures(summary), **governed}


def _figures(summary: Summary) -> Facts:
    ttft, tpot = summary.ttft_ms, summary.tpot_ms
    return {
        "tokens_per_s": summary.tokens_per_s,
        "tokens_per_s_per_user": summary.tokens_per_s_per_user,
        "tokens_per_forward": summary.tokens_per_forward,
        "accepted_per_round": summary.accepted_per_round,
        "ttft_ms_p50": None if ttft is None else ttft.p50,
        "tpot_ms_p50": None if tpot is None else tpot.p50,
        "requests": summary.requests,
        "run_s": summary.seconds,
    }


def device_share(bench: Workbench, tried: Bench, setting: Setting, users: int) -> Facts:
    """Of steps while all users decode: kernels and copies, by the profiler's trace, over the wall
    time of as many steps without it.
    """
    engine = tried.engine(setting)
    steps = 2 if bench.is_tiny else SHARE_STEPS
    # Long enough for whole blocks at every step of both halves.
    room = tried.runner.info.max_positions - tried.traffic.prompt_len
    tokens = min(room, 32 * (2 * steps + 32))
    names = [f"share/{index}" for index in range(users)]
    for index, name in enumerate(names):
        engine.add(_request(tried, setting, name, index, tokens))
    waiting = set(names)
    while waiting:  # until each has its first token
        waiting -= {name for name, chunk in engine.step() if chunk.token_ids}
    _steps(engine, 4)
    synchronize(bench.device)
    begun = time.perf_counter()
    _steps(engine, steps)
    wall = time.perf_counter() - begun
    busy = busy_seconds(lambda: _steps(engine, steps), bench.device)
    for name in names:
        engine.abort(name)
    _steps(engine, 2)
    return {"step_ms": 1e3 * wall / steps, "busy_share": busy / wall}


def _request(tried: Bench, setting: Setting, name: str, seed: int, tokens: int) -> Request:
    return Request(
        name,
        tuple(tried.encode(str(seed))),
        setting.mode,
        tokens,
        ignore_eos=True,
        block_size=setting.block_size,
    )


def _steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


def governor_ratios(rows: Sequence[Facts]) -> dict[int, tuple[float, str]]:
    """By users: the governor's tokens a second over those of the best fixed setting, and which."""
    ratios = {}
    for users in sorted({row["users"] for row in rows}):
        speeds = {row["setting"]: row["tokens_per_s"] for row in rows if row["users"] == users}
        governed = speeds.pop(GOVERNOR.name, None)
        if governed is not None and speeds:
            best = max(speeds, key=lambda name: speeds[name])
            ratios[users] = (governed / speeds[best], best)
    return ratios
