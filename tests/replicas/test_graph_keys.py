from hypothesis import given
from hypothesis import strategies as st

from trimode.replicas.graph_keys import MAX_GRAPH_TOKENS, GraphKey, GraphKeys

keys = st.builds(
    GraphKeys.of, st.integers(1, 300), st.sampled_from([1, 2, 6, 8, 32]), st.integers(44, 4096),
    st.booleans(),
)  # fmt: skip


def test_a_pass_gets_the_smallest_size_that_holds_it() -> None:
    sizes = GraphKeys.of(128, 32, 2048, has_adapter=True)
    assert sizes.find(1, 1, drafts=False) == GraphKey(1, 1, False)
    assert sizes.find(32, 1, drafts=True) == GraphKey(32, 1, True)
    assert sizes.find(3 * 32, 3, drafts=True) == GraphKey(96, 4, True)
    assert sizes.find(100, 100, drafts=False) == GraphKey(128, 128, False)
    assert sizes.find(17, 17, drafts=False) == GraphKey(32, 64, False)
    assert sizes.find(300, 2, drafts=False) == GraphKey(384, 4, False)


def test_a_wide_pass_has_no_size() -> None:
    sizes = GraphKeys.of(128, 32, 2048, has_adapter=True)
    assert sizes.find(MAX_GRAPH_TOKENS + 1, 1, drafts=False) is None
    assert sizes.find(129, 129, drafts=False) is None


def test_an_engine_that_never_drafts_has_no_size_with_an_adapter() -> None:
    for sizes in (GraphKeys.of(48, 1, 2048, True), GraphKeys.of(48, 32, 2048, False)):
        assert not any(key.drafts for key in sizes.all())
        assert sizes.find(4, 2, drafts=True) == GraphKey(4, 4, False)


@given(keys, st.data())
def test_whatever_is_found_is_captured_and_large_enough(
    sizes: GraphKeys, data: st.DataObject
) -> None:
    num_sequences = data.draw(st.integers(1, sizes.sequence_buckets[-1] + 1))
    num_tokens = num_sequences + data.draw(st.integers(0, sizes.token_buckets[-1]))
    key = sizes.find(num_tokens, num_sequences, num_tokens > 1 and data.draw(st.booleans()))
    if key is None:
        assert num_tokens > sizes.token_buckets[-1] or num_sequences > sizes.sequence_buckets[-1]
    else:
        assert key in sizes.all()
        assert key.num_tokens >= num_tokens and key.num_sequences >= num_sequences


@given(keys)
def test_captures_begin_with_the_largest_go_on_from_the_smallest_and_are_few(
    sizes: GraphKeys,
) -> None:
    captured = sizes.all()
    *others, largest = sizes.token_buckets
    assert list(dict.fromkeys(key.num_tokens for key in captured)) == [largest, *others]
    assert len(captured) == len(set(captured)) <= 130
