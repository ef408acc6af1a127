"""The gateway's own gRPC server: trimode.v1, grpc.health.v1 and reflection on one port."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trimode.cluster.config import GatewaySettings
from trimode.cluster.dispatcher import Dispatcher
from trimode.cluster.messages import Defaults, is_chat, to_request, to_response
from trimode.cluster.text_stream import RequestText
from trimode.cluster.tokenizer import Tokenizer
from trimode.proto import inference_pb2 as pb
from trimode.proto import inference_pb2_grpc as pb_grpc
from trimode.replicas.errors import InvalidRequest, Overloaded, Unavailable
from trimode.replicas.types import Request

logger = structlog.get_logger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

STATUS_CODES: dict[type[Exception], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    TimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """trimode.v1.InferenceService over a dispatcher."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer | None,
        defaults: Defaults,
        describe: Callable[[], pb.GetModelResponse],
    ) -> None:
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._describe = describe

    async def Generate(
        self,
        message: pb.GenerateRequest,
        context: "grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]",
    ) -> None:
        try:
            request = to_request(message, self._tokenizer, self._defaults, context.time_remaining())
            request = self._dispatcher.place(request)
            text = RequestText(self._tokenizer, request, is_chat=is_chat(message))
            async with aclosing(self._replies(request, text)) as replies:
                async for reply in replies:
                    await context.write(reply)
        except tuple(STATUS_CODES) as error:
            await context.abort(_status(error), str(error) or "the deadline passed")
        except Exception:
            logger.exception("request failed", request_id=message.request_id)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has it")

    async def GetModel(
        self,
        message: pb.GetModelRequest,
        context: "grpc.aio.ServicerContext[pb.GetModelRequest, pb.GetModelResponse]",
    ) -> pb.GetModelResponse:
        return self._describe()

    async def _replies(
        self, request: Request, text: RequestText
    ) -> AsyncGenerator[pb.GenerateResponse]:
        async with aclosing(self._dispatcher.stream(request)) as chunks:
            async for chunk in chunks:
                yield to_response(request, chunk, text.push(chunk))


def _status(error: Exception) -> grpc.StatusCode:
    return next(code for kind, code in STATUS_CODES.items() if isinstance(error, kind))


class GrpcServer:
    """Starts not serving; `serve` and `stop` change what health checks hear."""

    def __init__(self, settings: GatewaySettings, servicer: InferenceServicer) -> None:
        self._settings = settings
        keepalive_ms = int(settings.keepalive_s * 1000)
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.max_concurrent_streams", settings.max_streams),
                ("grpc.keepalive_time_ms", keepalive_ms),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.so_reuseport", 1),  # gateways of one node share the port
            ]
        )
        self._health = health.aio.HealthServicer()
        pb_grpc.add_InferenceServiceServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> None:
        """Listen; raises OSError where the address is taken."""
        address = f"{self._settings.host}:{self._settings.port}"
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise OSError(f"cannot listen on {address}: is the port in use?")
        await self._server.start()

    async def serve(self) -> None:
        """Tell health checks that requests are welcome."""
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """Refuse new calls, let running ones go on for drain_s, then cut them."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(self._settings.drain_s)

    async def _set_health(self, status: int) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)
