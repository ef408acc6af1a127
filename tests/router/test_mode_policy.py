"""Tables of candidates and picks."""

from dataclasses import replace

import pytest

from trimode.replicas.errors import InvalidRequest
from trimode.replicas.types import Mode
from trimode.router.mode_policy import PoolView, choose_mode

SPECULATION = PoolView("spec", Mode.SELF_SPECULATION, 32, num_replicas=2, in_flight=0)
PLAIN = PoolView("plain", Mode.AUTOREGRESSIVE, 1, num_replicas=1, in_flight=0)
BOTH = (SPECULATION, PLAIN)


@pytest.mark.parametrize(
    ("in_flight", "pool"), [(0, "spec"), (7, "spec"), (8, "plain"), (99, "plain")]
)
def test_auto_leaves_the_speculation_pool_at_the_configured_concurrency_per_replica(
    in_flight: int, pool: str
) -> None:
    pools = (replace(SPECULATION, in_flight=in_flight), PLAIN)
    assert choose_mode(Mode.AUTO, None, pools, auto_concurrency=4).pool == pool


def test_auto_decodes_in_the_mode_of_the_pool_it_picks() -> None:
    busy = (replace(SPECULATION, in_flight=99), PLAIN)
    assert choose_mode(Mode.AUTO, None, BOTH, 4).mode is Mode.SELF_SPECULATION
    assert choose_mode(Mode.AUTO, None, busy, 4).mode is Mode.AUTOREGRESSIVE


def test_auto_turns_to_ar_in_the_only_pool_when_that_is_busy() -> None:
    choice = choose_mode(Mode.AUTO, None, (replace(SPECULATION, in_flight=8),), 4)
    assert (choice.pool, choice.mode) == ("spec", Mode.AUTOREGRESSIVE)


@pytest.mark.parametrize("in_flight", [0, 99])
def test_auto_never_picks_block_diffusion(in_flight: int) -> None:
    diffusion = PoolView("diff", Mode.BLOCK_DIFFUSION, 32, num_replicas=1, in_flight=0)
    choice = choose_mode(Mode.AUTO, None, (diffusion, replace(PLAIN, in_flight=in_flight)), 4)
    assert choice.mode is not Mode.BLOCK_DIFFUSION


def test_an_explicit_mode_goes_to_the_pool_made_for_it() -> None:
    assert choose_mode(Mode.AUTOREGRESSIVE, None, BOTH, 4).pool == "plain"
    assert choose_mode(Mode.SELF_SPECULATION, None, BOTH, 4).pool == "spec"


def test_a_block_mode_without_its_own_pool_goes_where_blocks_are_run() -> None:
    assert choose_mode(Mode.BLOCK_DIFFUSION, None, tuple(reversed(BOTH)), 4).pool == "spec"


def test_among_equals_the_pool_with_less_in_progress_is_taken() -> None:
    other = replace(SPECULATION, name="other")
    pools = (replace(SPECULATION, in_flight=3), other)
    assert choose_mode(Mode.SELF_SPECULATION, None, pools, 4).pool == "other"


def test_a_pinned_block_size_goes_where_it_fits() -> None:
    small = replace(SPECULATION, name="small", max_block_size=8)
    assert choose_mode(Mode.SELF_SPECULATION, 16, (small, SPECULATION), 4).pool == "spec"


def test_a_pinned_block_size_that_fits_nowhere_is_refused_with_the_limit() -> None:
    with pytest.raises(InvalidRequest, match="block_size: at most 32 here, is 64"):
        choose_mode(Mode.SELF_SPECULATION, 64, BOTH, 4)


def test_the_reason_says_what_was_compared() -> None:
    choice = choose_mode(Mode.AUTO, None, BOTH, 4)
    assert choice.reason == "auto: 0 in progress in pool spec, limit 8"
