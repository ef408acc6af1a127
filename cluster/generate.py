"""`trimode generate`: one request, in process or over gRPC. Both answer it with the same
messages.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from trimode.cluster.client import Client
from trimode.cluster.generate_output import Output, print_json, print_stream
from trimode.cluster.local_model import LocalModel
from trimode.cluster.messages import is_chat
from trimode.cluster.model_folder import fetch
from trimode.proto import inference_pb2 as pb
from trimode.replicas.model.source import ModelSource


def run(
    message: pb.GenerateRequest,
    *,
    model: ModelSource,
    dtype: str,
    quantization: str | None = None,
    address: str | None,
    as_json: bool,
) -> None:
    """Generate and print. Raises TrimodeError."""
    if address:
        answer = _remote(message, address)
    else:
        folder = fetch(model, quiet=as_json)
        answer = _local(message, folder, dtype, quantization, quiet=as_json)
    with answer as output:
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
    message: pb.GenerateRequest, folder: Path, dtype: str, quantization: str | None, *, quiet: bool
) -> Iterator[Output]:
    """Load the model into this process, with room for this request alone, and step it."""
    model = LocalModel(folder)
    request = model.request(message)
    num_positions = len(request.prompt_ids) + request.max_tokens
    model.load(
        num_positions,
        request.n,
        dtype=dtype,
        quantization=quantization,
        adapter=request.use_adapter,
        quiet=quiet,
    )
    with closing(model.answer(request, is_chat=is_chat(message))) as replies:
        yield Output(replies, request.n, model.has_tokenizer)
