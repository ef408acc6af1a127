"""The client for event loops; the other one is what the tests of the whole path use."""

import asyncio
import time
from contextlib import aclosing
from typing import Any

import pytest

from trimode.cluster.client import AsyncClient, CallFailed, chat_request
from trimode.proto import inference_pb2 as pb


def message(max_tokens: int = 6) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="def main(",
        mode=pb.MODE_AUTOREGRESSIVE,
        stop=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
    )


async def test_a_stream_ends_with_its_account(served: Any) -> None:
    async with AsyncClient(served.address) as client:
        replies = [reply async for reply in client.generate(message())]
        assert (await client.get_model()).name == "bundled"
    assert sum(len(reply.token_ids) for reply in replies) == 6
    assert replies[-1].finish.usage.completion_tokens == 6


def test_a_conversation_makes_a_request_beside_what_else_is_asked() -> None:
    turns = [("system", "Be brief."), ("user", "What is a page?")]
    rest = message(max_tokens=9)
    made = chat_request(turns, thinking=True, request=rest)
    assert [(turn.role, turn.content) for turn in made.chat.messages] == turns
    assert made.chat.enable_thinking
    assert (made.stop, made.mode) == (rest.stop, rest.mode)
    assert rest.WhichOneof("prompt") == "text", "the caller's message is its own"


async def test_streams_share_a_connection(served: Any) -> None:
    async def ids(client: AsyncClient) -> list[int]:
        replies = [reply async for reply in client.generate(message())]
        return [token_id for reply in replies for token_id in reply.token_ids]

    async with AsyncClient(served.address) as client:
        first, *others = await asyncio.gather(*(ids(client) for _ in range(4)))
    assert others == [first] * 3


async def test_what_the_server_refuses_names_the_status_and_the_reason(served: Any) -> None:
    async with AsyncClient(served.address) as client:
        with pytest.raises(CallFailed, match=r"^INVALID_ARGUMENT: max_tokens") as caught:
            await anext(client.generate(message(max_tokens=0)))
    assert caught.value.status == "INVALID_ARGUMENT"


async def test_a_deadline_that_passes_is_told(served: Any) -> None:
    replies = []
    async with AsyncClient(served.address) as client:
        try:
            async for reply in client.generate(message(max_tokens=1900), timeout_s=0.2):
                replies.append(reply)
        except CallFailed as error:
            assert error.status == "DEADLINE_EXCEEDED"
        else:  # the server was quicker to see it
            assert replies[-1].finish.reason == pb.FINISH_REASON_DEADLINE


async def test_closing_the_iterator_frees_what_the_call_holds(served: Any) -> None:
    async with AsyncClient(served.address) as client:
        async with aclosing(client.generate(message(max_tokens=1900))) as replies:
            await anext(replies)
        deadline = time.monotonic() + 10
        while served.board.num_in_flight or served.loop.load.running:
            assert time.monotonic() < deadline, "it did not end"
            await asyncio.sleep(0.01)
