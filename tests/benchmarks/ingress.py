"""Our own gRPC server in a Serve replica against Serve's gRPC ingress, with the same no-op handler.

    python tests/benchmarks/ingress.py    # each in its own Ray -> docs/measurements/ingress.json

The figures say what the way in costs; nothing is generated behind it.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import ray
from ray import serve
from ray.serve.config import gRPCOptions

from trimode.proto import inference_pb2 as pb
from trimode.proto import inference_pb2_grpc as pb_grpc
from trimode.replicas.machine import describe_machine

PORT, NUM_MESSAGES = 50999, 64
OUT = Path(__file__).parents[2] / "docs" / "measurements" / "ingress.json"
KINDS = {
    "own grpc.aio server in the replica": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    "Serve gRPC, Python proxy": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    "Serve gRPC, HAProxy": {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
    },
}
REPLY = pb.GenerateResponse(text=" token", token_ids=[7], mode=pb.MODE_AUTOREGRESSIVE)
MODEL = pb.GetModelResponse(name="nothing")


class Handler:
    """The same answers whatever brings the questions."""

    async def GetModel(self, message: pb.GetModelRequest) -> pb.GetModelResponse:
        return MODEL

    async def Generate(self, message: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        for _ in range(NUM_MESSAGES):
            yield REPLY


class OwnServer(Handler):
    """The handler behind a server of its own, as the gateway has it."""

    async def __init__(self) -> None:  # type: ignore[misc] # Serve awaits constructors
        handler = Handler()

        class Servicer(pb_grpc.InferenceServiceServicer):
            async def GetModel(self, message: Any, context: Any) -> Any:
                return await handler.GetModel(message)

            async def Generate(self, message: Any, context: Any) -> Any:
                async for reply in handler.Generate(message):
                    await context.write(reply)

        self._server = grpc.aio.server()
        pb_grpc.add_InferenceServiceServicer_to_server(Servicer(), self._server)
        self._server.add_insecure_port(f"127.0.0.1:{PORT}")
        await self._server.start()


def start(kind: str) -> None:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    if kind.startswith("own"):
        serve.start(proxy_location="Disabled")
        serve.run(serve.deployment(OwnServer).bind(), route_prefix="/")
        return
    adder = "trimode.proto.inference_pb2_grpc.add_InferenceServiceServicer_to_server"
    serve.start(grpc_options=gRPCOptions(port=PORT, grpc_servicer_functions=[adder]))
    serve.run(serve.deployment(Handler, max_ongoing_requests=256).bind(), route_prefix="/")


async def timed(times: int, call: Callable[[], Awaitable[Any]]) -> list[float]:
    """Milliseconds of each of so many calls, one after the other."""
    spans = []
    for _ in range(times):
        begun = time.perf_counter()
        await call()
        spans.append((time.perf_counter() - begun) * 1000)
    return sorted(spans)


async def rate(clients: int, seconds: float, call: Callable[[], Awaitable[Any]]) -> float:
    """Calls a second of so many clients in a closed loop."""
    end, done = time.perf_counter() + seconds, 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await call()
            done += 1

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return done / (time.perf_counter() - begun)


async def measure() -> dict[str, float]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{PORT}") as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        metadata = (("application", "default"),)
        firsts: list[float] = []

        async def unary() -> None:
            await stub.GetModel(pb.GetModelRequest(), metadata=metadata, wait_for_ready=True)

        async def stream() -> None:
            begun, first = time.perf_counter(), True
            async for _ in stub.Generate(pb.GenerateRequest(text="x"), metadata=metadata):
                if first:
                    firsts.append((time.perf_counter() - begun) * 1000)
                    first = False

        await timed(100, unary)
        await timed(20, stream)
        firsts.clear()
        single, streams = await timed(500, unary), await timed(100, stream)
        return {
            "unary_p50_ms": single[250],
            "unary_p99_ms": single[495],
            "unary_rate_32_clients": await rate(32, 4, unary),
            "first_message_p50_ms": statistics.median(firsts),
            "stream_of_64_p50_ms": streams[50],
            "messages_per_s_8_streams": await rate(8, 4, stream) * NUM_MESSAGES,
        }


def child(kind: str) -> None:
    """Measure one ingress in this process; prints its row."""
    start(kind)
    print("RESULT " + json.dumps(asyncio.run(measure())), flush=True)
    ray.shutdown()
    os._exit(0)  # without Serve's own shut-down, which waits half a minute for HAProxy


def main() -> None:
    rows = {}
    for kind, environment in KINDS.items():
        done = subprocess.run(
            # By name, so that Ray's workers import the handlers instead of unpickling them.
            [sys.executable, "-c", f"import ingress; ingress.child({kind!r})"],
            env=os.environ | environment | {"PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(f"{kind}: no result\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        rows[kind] = json.loads(lines[0].removeprefix("RESULT "))
        print(kind, json.dumps({name: round(value, 2) for name, value in rows[kind].items()}))
    document = {
        "command": "python tests/benchmarks/ingress.py",
        "machine": describe_machine("ray", "grpcio", "protobuf"),
        "ingress": rows,
    }
    OUT.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
