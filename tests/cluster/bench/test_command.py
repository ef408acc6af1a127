"""The command line: what cannot be read is refused before anything is loaded."""

import pytest
import typer
from typer.testing import CliRunner

from trimode.cluster.__main__ import app
from trimode.cluster.option_values import numbers


def test_numbers_are_separated_by_commas() -> None:
    assert numbers(int)("4,1") == [4, 1]
    assert numbers(float)("0.5, 2") == [0.5, 2.0]
    with pytest.raises(typer.BadParameter, match="takes numbers like 1,2,3, got '1,a'"):
        numbers(int)("1,a")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--concurrency", "1.5"), "--concurrency"),
        (("--trace", "t", "--prompts", "p"), "leave --prompts out"),
        (("--system", "a", "--system-file", "b"), "one of --system and --system-file"),
    ],
)
def test_a_mistake_is_named_with_how_to_use_the_command(
    options: tuple[str, ...], reason: str
) -> None:
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 2
    assert reason in result.output
