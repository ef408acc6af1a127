"""Prompts and traces on disk. Every error names the file and the line."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.replicas.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class TraceLine:
    """A request that somebody once sent. max_tokens None: that of the command."""

    at_s: float
    prompt: str
    max_tokens: int | None = None


def load_text(path: Path) -> str:
    """A text as it stands. Raises InvalidRequest."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("prompts", f"{path} cannot be read: {error}") from None


def load_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line; in a .jsonl file each line is a string or {"prompt": string}.

    Raises InvalidRequest.
    """
    if path.suffix != ".jsonl":
        return tuple(line for _, line in _lines(path))
    return tuple(_prompt(value, where) for where, value in _values(path))


def load_trace(path: Path) -> tuple[TraceLine, ...]:
    """Lines of {"at": seconds, "prompt": string, "max_tokens": integer}, the last one optional, in
    order of arrival. Raises InvalidRequest.
    """
    return tuple(
        sorted(
            (_trace_line(value, where) for where, value in _values(path)),
            key=lambda line: line.at_s,
        )
    )


def _lines(path: Path) -> list[tuple[str, str]]:
    """(FILE:LINE, text) of the lines that are not blank."""
    numbered = enumerate(load_text(path).splitlines(), 1)
    lines = [(f"{path}:{number}", line) for number, line in numbered if line.strip()]
    if not lines:
        raise InvalidRequest("prompts", f"{path} holds none")
    return lines


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """(FILE:LINE, what its JSON says)."""
    for where, line in _lines(path):
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise InvalidRequest("prompts", f"{where}: {error}") from None


def _prompt(value: Any, where: str) -> str:
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt:
        raise InvalidRequest("prompts", f'{where} must be a string or {{"prompt": string}}')
    return prompt


def _trace_line(value: Any, where: str) -> TraceLine:
    if not isinstance(value, dict):
        raise InvalidRequest("trace", f'{where} must be {{"at": seconds, "prompt": string}}')
    unknown = sorted(value.keys() - {"at", "prompt", "max_tokens"})
    if unknown:
        raise InvalidRequest("trace", f"{where}: {unknown[0]!r} is not at, prompt or max_tokens")
    at_s, max_tokens = value.get("at"), value.get("max_tokens")
    if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not 0 <= at_s < math.inf:
        raise InvalidRequest("trace", f"{where}: at must be seconds from 0 on, is {at_s!r}")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise InvalidRequest("trace", f"{where}: max_tokens must be at least 1, is {max_tokens!r}")
    return TraceLine(float(at_s), _prompt(value, where), max_tokens)
