"""`trimode generate`: one request, in process or over gRPC. Both answer it with the same
messages.
"""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from trimode.cluster.client import Client
from trimode.cluster.generate_output import Output, print_json, print_stream
from trimode.cluster.messages import Defaults, to_request, to_response
from trimode.cluster.text_stream import RequestText
from trimode.cluster.tokenizer import Tokenizer
from trimode.proto import inference_pb2 as pb
from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.loading import build_engine
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.types import Mode, Request

PAGE_SIZE = 16


def run(
    message: pb.GenerateRequest, *, model: Path, dtype: str, address: str | None, as_json: bool
) -> None:
    """Generate and print. Raises TrimodeError."""
    source = _remote(message, address) if address else _local(message, model, dtype, quiet=as_json)
    with source as output:
        if as_json:
            print_json(output)
        else:
            print_stream(output)


@contextmanager
def _remote(message: pb.GenerateRequest, address: str) -> Iterator[Output]:
    """Ask a served cluster."""
    with Client(address) as client:
        has_text = client.get_model().has_tokenizer
        with closing(client.generate(message)) as replies:
            yield Output(replies, message.sampling.n or 1, has_text)


@contextmanager
def _local(
    message: pb.GenerateRequest, folder: Path, dtype: str, *, quiet: bool
) -> Iterator[Output]:
    """Load the model into this process and step it."""
    config = ModelConfig.load(folder)
    tokenizer = Tokenizer.load(folder, config.bos_id)
    defaults = Defaults(message.stop.max_tokens, config.max_positions)
    request = to_request(message, tokenizer, defaults, timeout_s=None)
    if request.mode is Mode.AUTO:  # a lone user is who self-speculation is for
        request = replace(request, mode=Mode.SELF_SPECULATION)
    engine = _load(request, config, folder, dtype, quiet=quiet)
    engine.add(request)
    yield Output(_replies(engine, request, tokenizer), request.n, tokenizer is not None)


def _load(
    request: Request, config: ModelConfig, folder: Path, dtype: str, *, quiet: bool
) -> Engine:
    """An engine with room for this request alone."""
    length = min(len(request.prompt_ids) + request.max_tokens, config.max_positions)
    engine_config = EngineConfig(
        page_size=PAGE_SIZE,
        num_pages=request.n * ((length + config.block_size) // PAGE_SIZE + 1),
        max_sequences=request.n,
        max_waiting=request.n,
        max_block_size=config.block_size,
    )
    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True, quiet=quiet)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(folder.resolve().name)
        return build_engine(
            folder,
            engine_config,
            dtype=dtype,
            adapter=request.use_adapter,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _replies(
    engine: Engine, request: Request, tokenizer: Tokenizer | None
) -> Generator[pb.GenerateResponse]:
    text = RequestText(tokenizer, request)
    while engine.has_work:
        for _, chunk in engine.step():
            yield to_response(request, chunk, text.push(chunk))
