from collections.abc import Callable
from typing import Any

import pytest

from trimode.replicas.decoding.strategy import DecodingContext
from trimode.replicas.types import Mode, Request


@pytest.fixture(scope="session")
def make_context(make_request: Callable[..., Request]) -> Callable[..., DecodingContext]:
    """make_context(block_size, stop_ids, **request fields); the mask id is 3."""

    def make(block_size: int = 4, stop_ids: tuple[int, ...] = (2,), **own: Any) -> DecodingContext:
        request = make_request(Mode.SELF_SPECULATION, **own)
        return DecodingContext(request, 3, frozenset(stop_ids), block_size)

    return make
