"""Text keeps the origin of its characters, or forgets it; it never gains one."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.cluster.traced_text import MAX_TEXT_CHARS, TextTooLong, TracedText

# A character, and whether the template wrote it.
Traced = list[tuple[str, bool]]

CHARS = st.lists(st.tuples(st.sampled_from("ab "), st.booleans()), max_size=12)


def build(chars: Traced) -> TracedText:
    return TracedText.concat(
        TracedText.written(char) if written else char for char, written in chars
    )


def read(text: str) -> Traced:
    spans = text.spans if isinstance(text, TracedText) else ()
    written = {at for start, end in spans for at in range(start, end)}
    return [(char, at in written) for at, char in enumerate(text)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(CHARS, CHARS, st.integers(-14, 14), st.integers(-14, 14))
def test_joined_cut_and_stripped_text_keeps_the_origin_of_every_character(
    left: Traced, right: Traced, start: int, stop: int
) -> None:
    a, b = build(left), build(right)
    assert read(a + b) == left + right
    assert read("ab" + b) == [("a", False), ("b", False), *right]
    assert read(a * 2) == left + left
    assert read(a[start:stop]) == left[start:stop]
    assert read(a.join((b, "a", b))) == [*right, *left, ("a", False), *left, *right]
    plain = "".join(char for char, _ in left)
    begin = len(plain) - len(plain.lstrip(" a"))
    assert read(a.lstrip(" a")) == left[begin:]
    assert read(a.rstrip()) == left[: len(plain.rstrip())]
    assert str.__str__(a.strip()) == plain.strip()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(CHARS, CHARS, st.integers(-1, 3))
def test_replaced_text_has_the_origin_of_what_replaces_it(
    chars: Traced, new: Traced, count: int
) -> None:
    expected, left = Traced(), count
    for char, written in chars:
        if char == "a" and left:
            expected += new
            left -= 1
        else:
            expected.append((char, written))
    assert read(build(chars).replace("a", build(new), count)) == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(CHARS)
def test_spans_that_touch_are_one(chars: Traced) -> None:
    spans = build(chars).spans
    assert all(start < end for start, end in spans)
    assert all(one[1] < other[0] for one, other in pairwise(spans))


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda text: f"{text:>20}",
        lambda text: "".join((text, text)),
        lambda text: text.split("t")[0],
        lambda text: text[::-1],
    ],
)
def test_what_is_not_followed_counts_as_the_request_s(change: Callable[[str], str]) -> None:
    assert not any(written for _, written in read(change(TracedText.written("the template"))))


@pytest.mark.parametrize(
    "make",
    [
        lambda text: text * 10**12,
        lambda text: text * 2000 + text * 2500,
        lambda text: (text * 2000).join(["a"] * 4),
        lambda text: text.replace("a", text * 2000),
        lambda text: TracedText.concat(text for _ in iter(int, 1)),
    ],
)
def test_text_ends_at_the_limit(make: Callable[[TracedText], str]) -> None:
    with pytest.raises(TextTooLong, match=str(MAX_TEXT_CHARS)):
        make(TracedText.written("a" * 1000))
