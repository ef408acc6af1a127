"""A gateway's gRPC server over a real engine of the bundled checkpoint, without Ray."""

import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch

from trimode.cluster.config import ClusterConfig
from trimode.cluster.dispatcher import Dispatcher
from trimode.cluster.grpc_server import GrpcServer, InferenceServicer
from trimode.cluster.messages import Defaults
from trimode.cluster.tokenizer import Tokenizer
from trimode.proto import inference_pb2 as pb
from trimode.proto import inference_pb2_grpc as pb_grpc
from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.engine_loop import EngineLoop
from trimode.replicas.loading import build_engine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.types import Chunk, Request
from trimode.router.load_board import LoadBoard


@dataclass
class LoopPool:
    """A pool of one engine in this process."""

    loop: EngineLoop

    def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        return self.loop.generate(request)


@dataclass
class Served:
    """A running server, how to call it, and the engine behind it."""

    address: str
    stub: pb_grpc.InferenceServiceStub
    channel: grpc.aio.Channel
    loop: EngineLoop
    board: LoadBoard
    server: GrpcServer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A loopback port that nobody listens on."""
    return _free_port


@pytest.fixture(scope="session")
def engine() -> Engine:
    torch.set_num_threads(1)
    return build_engine(
        BUNDLED_CHECKPOINT, EngineConfig(num_pages=512, max_sequences=8, max_waiting=2)
    )


@pytest.fixture
async def served(engine: Engine, chat_folder: Path) -> AsyncIterator[Served]:
    loop = EngineLoop(engine)
    loop.start()
    config = ClusterConfig.parse(
        {"gateway": {"port": _free_port(), "max_message_bytes": 64 * 1024, "drain_s": 5}}
    )
    board = LoadBoard()
    pools = {pool.name: LoopPool(loop) for pool in config.pools}
    servicer = InferenceServicer(
        Dispatcher(pools, config.pools, board, auto_concurrency=4, max_streams=64),
        Tokenizer.load(chat_folder, bos_id=1),
        Defaults(max_tokens=32, max_positions=engine.info.max_positions),
        describe=lambda: pb.GetModelResponse(
            name="bundled", has_tokenizer=True, has_chat_template=True
        ),
    )
    server = GrpcServer(config.gateway, servicer)
    await server.start()
    await server.serve()
    address = f"127.0.0.1:{config.gateway.port}"
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        yield Served(address, stub, channel, loop, board, server)
    await server.stop()
    loop.stop()


# The family's form: a system turn always, no beginning of sequence, thinking switched off by
# a pair of tokens, and what was thought before is left out.
FAMILY_TEMPLATE = """\
{%- macro turn(role, content) -%}
<|im_start|>{{ role }}
{{ content }}<|im_end|>
{% endmacro -%}
{%- if messages[0].role != 'system' -%}
  {{ turn('system', '') }}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{ turn('assistant', '<think></think>' ~ message.content.split('</think>')[-1] | trim) }}
  {%- elif message.role in ('system', 'user') -%}
    {{ turn(message.role, message['content']) }}
  {%- else -%}
    {{ raise_exception('no turn of ' ~ message.role ~ ' is known here') }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  <|im_start|>assistant
  {{- '\\n<think>' ~ ('\\n' if enable_thinking else '</think>') }}
{%- endif -%}
"""


@pytest.fixture(scope="session")
def family_template() -> str:
    return FAMILY_TEMPLATE


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint with a chat template beside it."""
    folder = tmp_path_factory.mktemp("models") / "chatting"
    folder.mkdir()
    for path in BUNDLED_CHECKPOINT.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(FAMILY_TEMPLATE)
    return folder
