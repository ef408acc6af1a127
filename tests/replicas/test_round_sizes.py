"""Who is given a block size, seen in the passes that an engine makes."""

from collections.abc import Callable
from typing import Any

import pytest

from trimode.replicas.decoding.strategy import Stage
from trimode.replicas.engine import Engine, StepRecord
from trimode.replicas.governor import Governor
from trimode.replicas.size_problem import Companions
from trimode.replicas.step_profile import StepProfile
from trimode.replicas.types import Mode, Request

AR, DIFFUSION, SPECULATION = Mode.AUTOREGRESSIVE, Mode.BLOCK_DIFFUSION, Mode.SELF_SPECULATION


def governor(row_s: float) -> Governor:
    """On a machine where a pass takes a second and so much more for each row."""
    counts, rows = (1, 8), (1, 4, 8, 16, 32)
    grid = tuple(tuple((1 + row_s * n * r,) for r in rows) for n in counts)
    return Governor(StepProfile(counts, rows, (0,), grid, grid), explored=0.0)


@pytest.fixture
def run(
    scripted_runner: Any, small_engine: Any, drain: Any
) -> Callable[..., tuple[dict[str, Any], list[tuple[str, Stage, int]]]]:
    """run(governor, *requests) -> outputs, and (request, stage, rows) of every query."""

    def decode(
        chooser: Governor | None, *requests: Request
    ) -> tuple[dict[str, Any], list[tuple[str, Stage, int]]]:
        records: list[StepRecord] = []
        runner = scripted_runner(drafts_right=lambda seed, position: position % 13 != 0)
        engine = Engine(
            runner, small_engine(num_pages=1024), governor=chooser, on_step=records.append
        )
        outputs = drain(engine, requests)
        return outputs, [query for record in records for query in record.stages]

    return decode


def drafted(queries: list[tuple[str, Stage, int]], request_id: str = "r") -> set[int]:
    return {rows for name, stage, rows in queries if name == request_id and stage is Stage.DRAFT}


def test_where_rows_are_free_a_round_takes_the_largest_block(run: Any, make_request: Any) -> None:
    _, queries = run(governor(0.0), make_request(SPECULATION, max_tokens=100))
    assert max(drafted(queries)) == 32


def test_where_rows_are_dear_a_round_is_plain_ar(run: Any, make_request: Any) -> None:
    outputs, queries = run(governor(10.0), make_request(SPECULATION, max_tokens=40))
    assert drafted(queries) == set()
    plain, _ = run(None, make_request(AR, max_tokens=40))
    assert outputs["r"].token_ids == plain["r"].token_ids
    assert outputs["r"].finish.forwards == plain["r"].finish.forwards


@pytest.mark.parametrize("row_s", [0.0, 10.0])
def test_a_pinned_block_size_is_never_touched(run: Any, make_request: Any, row_s: float) -> None:
    chooser = governor(row_s)
    _, queries = run(chooser, make_request(SPECULATION, max_tokens=60, block_size=5))
    assert drafted(queries) == {5}
    assert chooser.stats().rounds_by_size == {}


def test_a_request_may_do_without_a_governor(run: Any, make_request: Any) -> None:
    chooser = governor(10.0)
    _, queries = run(chooser, make_request(SPECULATION, max_tokens=60, governed=False))
    assert drafted(queries) == {32}
    assert chooser.stats().rounds_by_size == {}


def test_other_modes_are_never_asked_about(
    run: Any, make_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Governor, "choose", lambda *_: pytest.fail("asked"))
    _, queries = run(
        governor(0.0), make_request(AR, request_id="a"), make_request(DIFFUSION, request_id="d")
    )
    assert {rows for name, stage, rows in queries if stage is Stage.DECODE} == {1}
    assert {rows for name, stage, rows in queries if stage is Stage.DENOISE} == {32}


def test_each_request_of_a_mixed_batch_keeps_its_own(run: Any, make_request: Any) -> None:
    chooser = governor(0.0)
    _, queries = run(
        chooser,
        make_request(SPECULATION, max_tokens=60, request_id="pinned", block_size=3),
        make_request(SPECULATION, max_tokens=60, request_id="free"),
        make_request(DIFFUSION, max_tokens=60, request_id="diffusion"),
        make_request(AR, max_tokens=60, request_id="plain"),
    )
    assert drafted(queries, "pinned") == {3} and max(drafted(queries, "free")) == 32
    assert sum(chooser.stats().rounds_by_size.values()) > 0


def test_a_companion_counts_with_what_it_keeps(
    run: Any, make_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Companions] = []
    choose = Governor.choose

    def record(self: Governor, starting: Any, companions: Companions) -> list[int]:
        seen.append(companions)
        return choose(self, starting, companions)

    monkeypatch.setattr(Governor, "choose", record)
    outputs, _ = run(
        governor(0.0),
        make_request(SPECULATION, max_tokens=100, request_id="free"),
        make_request(SPECULATION, max_tokens=100, request_id="pinned", block_size=16),
    )
    finish = outputs["pinned"].finish
    together = [each for each in seen if each.block_sequences]
    assert {each.block_rows for each in together} == {16}
    assert together[-1].block_tokens == pytest.approx(100 / finish.forwards, 0.3)


@pytest.mark.parametrize("row_s", [0.0, 0.05, 10.0])
def test_the_governor_never_changes_a_token(run: Any, make_request: Any, row_s: float) -> None:
    ask = [make_request(SPECULATION, n, 50, request_id=str(n)) for n in (3, 9, 20)]
    governed, _ = run(governor(row_s), *ask)
    plain, _ = run(None, *[make_request(AR, n, 50, request_id=str(n)) for n in (3, 9, 20)])
    assert {k: v.token_ids for k, v in governed.items()} == {
        k: v.token_ids for k, v in plain.items()
    }
