"""Prompt files and traces, and what is said of broken ones."""

from pathlib import Path

import pytest

from trimode.cluster.bench.prompt_files import TraceLine, load_prompts, load_trace
from trimode.replicas.errors import InvalidRequest


def test_prompts_are_lines_or_json_lines(tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("a\n\nb\n")
    lines.write_text('"a\\nb"\n{"prompt": "c"}\n')
    assert load_prompts(text) == ("a", "b")
    assert load_prompts(lines) == ("a\nb", "c")


def test_a_broken_prompt_file_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('"a"\n{"text": "c"}\n')
    with pytest.raises(InvalidRequest, match=r"p\.jsonl:2"):
        load_prompts(path)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n")
    for name, reason in (("p.txt", "holds none"), ("q.txt", "cannot be read")):
        with pytest.raises(InvalidRequest, match=reason):
            load_prompts(tmp_path / name)


def test_a_trace_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"at": 2, "prompt": "b", "max_tokens": 3}\n\n{"at": 0.5, "prompt": "a"}\n')
    assert load_trace(path) == (TraceLine(0.5, "a"), TraceLine(2.0, "b", 3))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "must be"),
        ("{", "Expecting"),
        ('{"prompt": "a"}', "at must be seconds from 0 on, is None"),
        ('{"at": -1, "prompt": "a"}', "is -1"),
        ('{"at": NaN, "prompt": "a"}', "is nan"),
        ('{"at": Infinity, "prompt": "a"}', "is inf"),
        ('{"at": true, "prompt": "a"}', "is True"),
        ('{"at": 1}', "string"),
        ('{"at": 1, "prompt": "a", "max_tokens": 0}', "max_tokens must be at least 1"),
        ('{"at": 1, "prompt": "a", "max_tokens": 1.5}', "max_tokens must be at least 1"),
        ('{"at": 1, "prompt": "a", "tokens": 5}', "'tokens' is not at, prompt or max_tokens"),
    ],
)
def test_a_broken_trace_is_named_with_the_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"at": 0, "prompt": "a"}\n' + line)
    with pytest.raises(InvalidRequest, match=rf"t\.jsonl:2.*{reason}"):
        load_trace(path)
