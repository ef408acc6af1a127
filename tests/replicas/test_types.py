from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from trimode.replicas.errors import InvalidRequest
from trimode.replicas.types import (
    MAX_SEED,
    MAX_STOP_IDS,
    Chunk,
    Mode,
    Request,
    TokenLogprobs,
)


def request(**own: Any) -> Request:
    fields = {"request_id": "r", "prompt_ids": (1,), "mode": Mode.AUTO, "max_tokens": 1} | own
    return Request(**fields)


@pytest.mark.parametrize(
    ("own", "field"),
    [
        ({"prompt_ids": ()}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 10.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"stop_ids": tuple(range(MAX_STOP_IDS + 1))}, "stop_token_ids"),
        ({"block_size": 0}, "block_size"),
        ({"threshold": -0.01}, "threshold"),
        ({"threshold": 1.01}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
    ],
)
def test_a_value_out_of_range_is_refused_by_field(own: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        request(**own)
    assert error.value.field == field


@pytest.mark.parametrize(
    "own",
    [
        {"temperature": 0},
        {"temperature": 10},
        {"seed": MAX_SEED},
        {"stop_ids": tuple(range(MAX_STOP_IDS))},
        {"block_size": 1},
        {"threshold": 0.0},
        {"threshold": 1.0},
    ],
)
def test_values_at_the_limits_are_taken(own: dict[str, Any]) -> None:
    assert request(**own)


def test_a_request_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        request().max_tokens = 2  # type: ignore[misc]


def test_chunks_of_a_sample_join_to_one() -> None:
    probs = [TokenLogprobs(-float(i)) for i in range(3)]
    first, last = Chunk((1, 2), None, 4, tuple(probs[:2])), Chunk((3,), None, 4, (probs[2],))
    assert first.then(last) == Chunk((1, 2, 3), None, 4, tuple(probs))
    assert Chunk((1,)).then(Chunk((2,))) == Chunk((1, 2))
