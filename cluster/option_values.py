"""Parsers for what one command-line option holds. They raise BadParameter, to which typer adds the
option's name.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer

MODEL_HELP = "Model folder, or org/name or org/name@commit on a hub."
MODEL = typer.Option(help=MODEL_HELP, show_default="the bundled one")

Number = TypeVar("Number", int, float)


def parsed(parser: Any, metavar: str, help: str) -> Any:
    """An option whose text a function turns into its value."""
    return typer.Option(parser=parser, metavar=metavar, help=help)


def numbers(kind: type[Number]) -> Callable[[str], Sequence[Number]]:
    """A parser of '1,2,3'."""

    def parse(text: str) -> Sequence[Number]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise typer.BadParameter(f"takes numbers like 1,2,3, got {text!r}") from None

    return parse


def ids(text: str) -> Sequence[int]:
    """'1,2,3'"""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"takes ids like 1,2,3, got {text!r}") from None


def biases(text: str) -> Mapping[int, float]:
    """'5=-100,7=2.5'"""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(token_id): float(bias) for token_id, bias in pairs}
    except ValueError:
        raise typer.BadParameter(f"takes pairs like 5=-100,7=2.5, got {text!r}") from None


def text_or_file(text: str) -> str:
    """The text itself, or where it is @NAME that of a file, less the newline at its end."""
    return file_text(text[1:]).removesuffix("\n") if text.startswith("@") else text


def file_text(name: str) -> str:
    """The text of a file."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{name} is not UTF-8 text") from None


def one_of(names: Mapping[str, str]) -> Callable[[str], str]:
    """A parser of the keys of a mapping to its values."""

    def parse(name: str) -> str:
        if name not in names:
            raise typer.BadParameter(f"not one of {', '.join(names)}")
        return names[name]

    return parse
