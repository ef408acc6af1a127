"""Which pool and which mode serve a request: a pure function over plain data."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from trimode.replicas.errors import InvalidRequest
from trimode.replicas.types import Mode


@dataclass(frozen=True, slots=True)
class PoolView:
    """What the policy knows of a pool."""

    name: str
    mode: Mode  # what the pool is for; its replicas can run every mode
    max_block_size: int
    num_replicas: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """The decision and the reason in words, for traces and responses."""

    pool: str
    mode: Mode
    reason: str


def choose_mode(
    wanted: Mode, block_size: int | None, pools: SequenceOf[PoolView], auto_concurrency: int
) -> ModeChoice:
    """Pick pool and mode for a request that wants `wanted` and may have pinned a block size.

    AUTO takes the self-speculation pool while it has fewer than auto_concurrency requests a replica
    in progress, else the autoregressive one; it never takes block diffusion, which changes the
    answer. An explicit mode goes to the pool made for it, or else to the least loaded one that can
    run its blocks.

    Raises InvalidRequest where no pool runs blocks as large as the pinned one.
    """
    if wanted is not Mode.AUTO:
        return _explicit(wanted, block_size, pools)
    by_mode = {pool.mode: pool for pool in reversed(pools)}
    speculative = by_mode.get(Mode.SELF_SPECULATION)
    plain = by_mode.get(Mode.AUTOREGRESSIVE)
    if block_size is not None:
        return _explicit(Mode.SELF_SPECULATION, block_size, pools)
    if speculative is None:
        return _explicit(Mode.AUTOREGRESSIVE, None, pools)
    limit = auto_concurrency * max(1, speculative.num_replicas)
    load = f"{speculative.in_flight} in progress in pool {speculative.name}, limit {limit}"
    if speculative.in_flight < limit:
        return ModeChoice(speculative.name, Mode.SELF_SPECULATION, f"auto: {load}")
    if plain is None:
        return ModeChoice(speculative.name, Mode.AUTOREGRESSIVE, f"auto: {load}, no other pool")
    return ModeChoice(plain.name, Mode.AUTOREGRESSIVE, f"auto: {load}")


def _explicit(mode: Mode, block_size: int | None, pools: SequenceOf[PoolView]) -> ModeChoice:
    # Unpinned block modes need a pool that runs blocks at all; one token a block would be AR by
    # another name.
    needed = block_size or (1 if mode is Mode.AUTOREGRESSIVE else 2)
    able = [pool for pool in pools if pool.max_block_size >= needed]
    if not able and block_size is not None:
        largest = max(pool.max_block_size for pool in pools)
        raise InvalidRequest("block_size", f"at most {largest} here, is {block_size}")
    candidates = able or list(pools)
    made_for_it = [pool for pool in candidates if pool.mode is mode]
    chosen = min(made_for_it or candidates, key=lambda pool: pool.in_flight)
    return ModeChoice(chosen.name, mode, f"asked for {mode.value}")
