"""Cached prefixes save work and change nothing; preemption likewise."""

from typing import Any

import pytest

from trimode.replicas.engine import Engine
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.page_hash import page_bytes, page_hash, root_hash
from trimode.replicas.prefix_cache import CachedPage, PrefixCache
from trimode.replicas.types import Mode, Priority, Request

MODES = [Mode.AUTOREGRESSIVE, Mode.BLOCK_DIFFUSION, Mode.SELF_SPECULATION]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(scope="module")
def make_engine(tiny_model: Any, small_engine: Any) -> Any:
    def make(**own: Any) -> Engine:
        config = small_engine(**own)
        return Engine(TorchModelRunner(tiny_model(), config), config)

    return make


def converse(engine: Engine, drain: Any, mode: Mode, salt: str = "") -> tuple[list[Any], list[int]]:
    """Three turns, each with all that came before as its prompt: outputs, and cached tokens."""
    text: tuple[int, ...] = tuple(range(10, 31))
    outputs, cached = [], []
    for turn in range(3):
        request = Request(
            f"turn{turn}", text, mode, 11, temperature=0.7, seed=turn, block_size=8, cache_salt=salt
        )
        decoded = drain(engine, [request])[request.request_id]
        outputs.append(decoded.token_ids)
        cached.append(decoded.finish.cached_tokens)
        text += (*decoded.token_ids, 40 + turn, 50 + turn)
    return outputs, cached


@pytest.mark.parametrize("mode", MODES)
def test_turns_hit_the_pages_of_earlier_prompts_and_answers(
    make_engine: Any, drain: Any, mode: Mode
) -> None:
    outputs, cached = converse(make_engine(), drain, mode)
    # 21 tokens, 11 of answer, 2 new: what is known of a turn is all but its answer's last token.
    assert cached[0] == 0
    assert cached[1] >= 28 and cached[2] >= 40
    assert converse(make_engine(prefix_cache=False), drain, mode) == (outputs, [0, 0, 0])


def test_modes_share_pages(make_engine: Any, drain: Any) -> None:
    engine = make_engine()
    converse(engine, drain, Mode.SELF_SPECULATION)
    assert converse(engine, drain, Mode.AUTOREGRESSIVE)[1] == [20, 32, 44]


def test_another_salt_hits_nothing(make_engine: Any, drain: Any) -> None:
    engine = make_engine()
    converse(engine, drain, Mode.AUTOREGRESSIVE, "a")
    assert converse(engine, drain, Mode.AUTOREGRESSIVE, "b")[1][0] == 0


def test_a_prompts_last_token_is_always_computed(make_engine: Any, drain: Any) -> None:
    engine = make_engine()
    prompt = tuple(range(10, 26))  # four whole pages
    for name, cached in (("first", 0), ("second", 12)):
        request = Request(name, prompt, Mode.AUTOREGRESSIVE, 4)
        assert drain(engine, [request])[name].finish.cached_tokens == cached


@pytest.mark.parametrize("mode", MODES)
def test_no_page_of_a_rejected_draft_is_published(
    make_engine: Any, make_request: Any, drain: Any, mode: Mode
) -> None:
    """Whatever is cached holds what a causal pass over its own text would write."""
    engine = make_engine()
    request = make_request(mode, 9, 40, temperature=1.5, block_size=8)
    text = [*request.prompt_ids]
    text += drain(engine, [request])["r"].token_ids
    pool = engine._scheduler._tables._pool
    hits = pool.match(root_hash("", ""), "", text, len(text) // 4)
    assert len(pool.cache) == len(hits) >= (len(text) - 9) // 4
    cache, clean = engine._runner._rank._cache, make_engine()
    drain(clean, [Request("r", tuple(text), Mode.AUTOREGRESSIVE, 1)])
    other = clean._scheduler._tables._pool.match(root_hash("", ""), "", text, len(hits))
    for (page, _), (wanted, _) in zip(hits, other, strict=False):
        got = cache.keys[:, page * 4 : page * 4 + 4]
        want = clean._runner._rank._cache.keys[:, wanted * 4 : wanted * 4 + 4]
        assert (got - want).abs().max() < 1e-9


def test_a_collision_is_a_miss() -> None:
    cache = PrefixCache()
    cache.add(CachedPage(0, page_hash=99, parent_hash=1, salt="", text=b"12"))
    assert cache.find(99, 1, "", b"12") == 0
    assert cache.find(99, 1, "", b"13") is None
    assert cache.find(99, 1, "tenant", b"12") is None
    assert cache.find(99, 2, "", b"12") is None


def test_hashes_depend_on_every_token_and_on_all_that_came_before() -> None:
    root = root_hash("model", "salt")
    one, two, next_page = page_bytes((1, 2)), page_bytes((1, 3)), page_bytes((5,))
    assert page_hash(root, one) != page_hash(root, two)
    assert page_hash(page_hash(root, one), next_page) != page_hash(page_hash(root, two), next_page)
    assert root_hash("ab", "c") != root_hash("a", "bc")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_changes_no_token(
    make_engine: Any, make_request: Any, drain: Any, mode: Mode, prefix_cache: bool
) -> None:
    own = {"prefix_cache": prefix_cache, "max_block_size": 8}
    requests = [
        make_request(mode, 9 + i, 40, f"r{i}", temperature=0.9, seed=i, block_size=8)
        for i in range(5)
    ]
    small = make_engine(num_pages=26, **own)
    crowd = drain(small, requests)
    assert small.load().num_preemptions > 0
    for request in requests:
        alone = drain(make_engine(**own), [request])[request.request_id]
        got = crowd[request.request_id]
        assert got.token_ids == alone.token_ids
        assert got.finish.forwards == alone.finish.forwards


def test_the_youngest_of_the_lowest_class_is_preempted_first(
    make_engine: Any, make_request: Any
) -> None:
    engine = make_engine(num_pages=16, max_block_size=1)
    for num_prompt, (name, priority) in enumerate((("b0", 1), ("b1", 1), ("i0", 0)), 7):
        priority_class = Priority(priority)
        engine.add(make_request(Mode.AUTOREGRESSIVE, num_prompt, 50, name, priority=priority_class))
    order = []
    while engine.has_work:
        order += [name for name, chunk in engine.step() if chunk.finish is not None]
    assert order == ["i0", "b0", "b1"]


def test_an_interactive_request_takes_the_seat_of_a_batch_request(
    make_engine: Any, make_request: Any
) -> None:
    engine = make_engine(max_sequences=1)
    engine.add(make_request(Mode.AUTOREGRESSIVE, 5, 20, "batch", priority=Priority.BATCH))
    engine.step()
    engine.add(make_request(Mode.AUTOREGRESSIVE, 5, 20, "interactive"))
    order = []
    while engine.has_work:
        order += [name for name, chunk in engine.step() if chunk.finish is not None]
        engine.check_integrity()
    assert order == ["interactive", "batch"]
