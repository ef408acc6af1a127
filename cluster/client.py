"""The Python client: trimode.v1 over gRPC, with a server's status turned into one exception."""

from collections.abc import AsyncGenerator, Generator, Iterable
from types import TracebackType
from typing import Self

import grpc

from trimode.proto import inference_pb2 as pb
from trimode.proto import inference_pb2_grpc as pb_grpc
from trimode.replicas.errors import TrimodeError


class CallFailed(TrimodeError):
    """The server refused or ended a call. status: the gRPC code's name, as 'INVALID_ARGUMENT'."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


def chat_request(
    messages: Iterable[tuple[str, str]],
    *,
    thinking: bool = False,
    request: pb.GenerateRequest | None = None,
) -> pb.GenerateRequest:
    """A request to answer a conversation.

    messages: (role, content), as ("user", "What is a page?"). request: all but the prompt.
    """
    message = pb.GenerateRequest()
    if request is not None:
        message.CopyFrom(request)
    turns = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    message.chat.CopyFrom(pb.Chat(messages=turns, enable_thinking=thinking))
    return message


class Client:
    """One connection; use it as a context manager."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = pb_grpc.InferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def generate(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> Generator[pb.GenerateResponse]:
        """Stream a request's messages. Closing the iterator cancels the call.

        Raises CallFailed.
        """
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError:
            raise CallFailed(call.code().name, call.details() or "") from None
        finally:
            call.cancel()

    def get_model(self, timeout_s: float | None = 10) -> pb.GetModelResponse:
        """Describe the model and its pools. Raises CallFailed."""
        try:
            model: pb.GetModelResponse = self._stub.GetModel(
                pb.GetModelRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            raise CallFailed(code.name, details or "") from None
        return model


class AsyncClient:
    """The same for an event loop, where many streams share the connection; use it as an async
    context manager.
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = pb_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def generate(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """Stream a request's messages. Closing the iterator cancels the call.

        Raises CallFailed.
        """
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise CallFailed(error.code().name, error.details() or "") from None
        finally:
            call.cancel()

    async def get_model(self, timeout_s: float | None = 10) -> pb.GetModelResponse:
        """Describe the model and its pools. Raises CallFailed."""
        try:
            model: pb.GetModelResponse = await self._stub.GetModel(
                pb.GetModelRequest(), timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise CallFailed(error.code().name, error.details() or "") from None
        return model
