"""`trimode generate`: one request, in process or over gRPC, streamed to the terminal or printed as
JSON.
"""

import json
import secrets
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.text import Text

from trimode.cluster.client import Client
from trimode.cluster.messages import FINISH_REASONS, MODE_MESSAGES, MODES
from trimode.cluster.tokenizer import Tokenizer
from trimode.proto import inference_pb2 as pb
from trimode.replicas.config import EngineConfig
from trimode.replicas.errors import InvalidRequest
from trimode.replicas.loading import build_engine
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.types import Finish, Mode, Request, Timings

MODE_NAMES = {
    "auto": Mode.AUTO,
    "ar": Mode.AUTOREGRESSIVE,
    "diffusion": Mode.BLOCK_DIFFUSION,
    "speculation": Mode.SELF_SPECULATION,
}
SHORT_NAMES = {mode: name for name, mode in MODE_NAMES.items()}
PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step brought: its tokens were committed together."""

    token_ids: tuple[int, ...]
    text: str | None  # None where the model has no tokenizer
    mode: Mode
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Options:
    """The command's options, parsed."""

    prompt: str | None
    prompt_ids: tuple[int, ...] | None
    model: Path
    mode: Mode
    max_tokens: int
    temperature: float
    seed: int | None
    block_size: int | None
    threshold: float | None
    adapter: bool
    dtype: str
    address: str | None


def run(options: Options, *, as_json: bool) -> None:
    """Generate and print. Raises TrimodeError."""
    if (options.prompt is None) == (options.prompt_ids is None):
        raise InvalidRequest("prompt", "give exactly one of --prompt, --prompt-file, --prompt-ids")
    pieces = _remote(options) if options.address else _local(options, quiet=as_json)
    with closing(pieces):
        if as_json:
            _print_json(list(pieces))
        else:
            _print_stream(pieces)


def _local(options: Options, *, quiet: bool) -> Generator[Piece]:
    """Load the model into this process and step it."""
    config = ModelConfig.load(options.model)
    tokenizer = Tokenizer.load(options.model, config.bos_id)
    prompt_ids = options.prompt_ids or _encode(options, tokenizer)
    slots = len(prompt_ids) + options.max_tokens + config.block_size
    engine_config = EngineConfig(
        page_size=PAGE_SIZE,
        num_pages=slots // PAGE_SIZE + 1,
        max_sequences=1,
        max_waiting=1,
        max_block_size=config.block_size,
    )
    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True, quiet=quiet)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(options.model.resolve().name)
        engine = build_engine(
            options.model,
            engine_config,
            dtype=options.dtype,
            adapter=options.adapter,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    # A lone user is who self-speculation is for.
    mode = Mode.SELF_SPECULATION if options.mode is Mode.AUTO else options.mode
    engine.add(
        Request(
            request_id="generate",
            prompt_ids=tuple(prompt_ids),
            mode=mode,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=secrets.randbits(62) if options.seed is None else options.seed,
            block_size=options.block_size,
            threshold=options.threshold,
            use_adapter=options.adapter,
        )
    )
    stream = tokenizer.stream() if tokenizer else None
    while engine.has_work:
        for _, chunk in engine.step():
            last = chunk.finish is not None
            text = stream.push(chunk.token_ids, last=last) if stream else None
            yield Piece(chunk.token_ids, text, mode, chunk.finish)


def _encode(options: Options, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise InvalidRequest(
            "prompt", f"{options.model} has no tokenizer.json; give --prompt-ids instead"
        )
    return tokenizer.encode(options.prompt or "")


def _remote(options: Options) -> Generator[Piece]:
    """Ask a served cluster."""
    assert options.address is not None
    message = pb.GenerateRequest(
        mode=MODE_MESSAGES[options.mode],
        sampling=pb.Sampling(temperature=options.temperature, seed=options.seed),
        stop=pb.StopConditions(max_tokens=options.max_tokens),
        block_size=options.block_size,
        threshold=options.threshold,
        use_draft_adapter=options.adapter,
    )
    if options.prompt_ids is not None:
        message.token_ids.ids.extend(options.prompt_ids)
    else:
        message.text = options.prompt or ""
    with Client(options.address) as client:
        has_text = client.get_model().has_tokenizer
        with closing(client.generate(message)) as replies:
            for reply in replies:
                finish = _finish(reply.finish) if reply.HasField("finish") else None
                text = reply.text if has_text else None
                yield Piece(tuple(reply.token_ids), text, MODES[reply.mode], finish)


def _finish(message: pb.Finish) -> Finish:
    reasons = {value: reason for reason, value in FINISH_REASONS.items()}
    timings = message.timings
    return Finish(
        reason=reasons[message.reason],
        prompt_tokens=message.usage.prompt_tokens,
        completion_tokens=message.usage.completion_tokens,
        forwards=message.forwards,
        accepted=tuple(message.accepted),
        timings=Timings(timings.queue_seconds, timings.first_token_seconds, timings.total_seconds),
        cached_tokens=message.usage.cached_tokens,
    )


def _print_json(pieces: list[Piece]) -> None:
    finish = pieces[-1].finish
    assert finish is not None, "the stream ended without its last chunk"
    has_text = pieces[-1].text is not None
    document = {
        "token_ids": [token_id for piece in pieces for token_id in piece.token_ids],
        "text": "".join(piece.text or "" for piece in pieces) if has_text else None,
        "finish_reason": finish.reason.value,
        "mode": SHORT_NAMES[pieces[-1].mode],
        "forwards": finish.forwards,
        "accepted": list(finish.accepted),
        "timings": asdict(finish.timings),
    }
    typer.echo(json.dumps(document))


def _print_stream(pieces: Generator[Piece]) -> None:
    """What stands in one colour was committed together; neighbouring steps differ in colour."""
    console = Console(highlight=False, soft_wrap=True)
    colours = ("cyan", "green", "yellow", "magenta")
    for index, piece in enumerate(pieces):
        shown = piece.text
        if shown is None:
            shown = "".join(f"{token_id} " for token_id in piece.token_ids)
        console.print(Text(shown, style=colours[index % len(colours)]), end="")
        if piece.finish is not None:
            console.print()
            console.print(Text(_summary(piece.mode, piece.finish), style="dim"))


def _summary(mode: Mode, finish: Finish) -> str:
    timings = finish.timings
    decoding = max(timings.total_s - timings.first_token_s, 1e-9)
    line = (
        f"{SHORT_NAMES[mode]}: {finish.completion_tokens} tokens ({finish.reason.value}), "
        f"{finish.forwards} forwards, first token {timings.first_token_s * 1000:.0f} ms, "
        f"total {timings.total_s * 1000:.0f} ms, "
        f"{(finish.completion_tokens - 1) / decoding:.0f} tokens/s"
    )
    if finish.accepted:
        line += f", {sum(finish.accepted) / len(finish.accepted):.1f} accepted per round"
    return line
