from collections.abc import Callable
from types import ModuleType

import pytest

from trimode.replicas.acceptance import Acceptance

Script = Callable[[str], ModuleType]


@pytest.fixture
def published(script: Script) -> ModuleType:
    return script("published_acceptance")


def test_every_block_size_keeps_the_published_mean_and_share_of_full_blocks(
    published: ModuleType,
) -> None:
    for block_size, rounds in published.PUBLISHED["measured"].items():
        reached = published.survival("measured", block_size)
        assert len(reached) == block_size - 1
        assert 1 + sum(reached) == pytest.approx(rounds.mean)
        assert reached[-1] == pytest.approx(rounds.full_share)


def test_where_only_a_mean_is_published_every_draft_is_kept_as_often(
    published: ModuleType,
) -> None:
    assert published.mean_kept("hard", 32) == pytest.approx(6.82)
    short, long = published.survival("hard", 4), published.survival("hard", 32)
    assert short == long[:3]
    assert long[1] / long[0] == pytest.approx(long[0])


@pytest.mark.parametrize("name", ["measured", "hard"])
def test_more_drafts_are_kept_less_often(published: ModuleType, name: str) -> None:
    for block_size in published.BLOCK_SIZES:
        reached = [1.0, *published.survival(name, block_size)]
        assert reached == sorted(reached, reverse=True)
        assert reached[-1] > 0


@pytest.mark.parametrize("name", ["measured", "hard"])
def test_a_governor_that_is_told_the_prior_expects_the_mean(
    published: ModuleType, name: str
) -> None:
    acceptance = Acceptance(published.prior(name))
    for block_size in (16, 32):
        expected = published.mean_kept(name, block_size)
        assert acceptance.expected(block_size) == pytest.approx(expected, rel=0.06)
