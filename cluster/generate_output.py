"""How `trimode generate` shows the replies to one request: streamed for people, JSON for
programs.
"""

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from trimode.cluster.messages import FINISH_REASONS
from trimode.proto import inference_pb2 as pb

MODE_NAMES = {
    pb.MODE_AUTOREGRESSIVE: "ar",
    pb.MODE_BLOCK_DIFFUSION: "diffusion",
    pb.MODE_SELF_SPECULATION: "speculation",
}
REASON_NAMES = {message: reason.value for reason, message in FINISH_REASONS.items()}
COLOURS = ("cyan", "green", "yellow", "magenta")


@dataclass(frozen=True, slots=True)
class Output:
    """The replies to one request, wherever they come from."""

    replies: Generator[pb.GenerateResponse]
    num_samples: int
    has_text: bool  # whether the model has a tokenizer


def print_json(output: Output) -> None:
    """One object; of several samples a list of such."""
    samples: list[list[pb.GenerateResponse]] = [[] for _ in range(output.num_samples)]
    for reply in output.replies:
        samples[reply.index].append(reply)
    documents = [_document(replies, output.has_text) for replies in samples]
    typer.echo(json.dumps(documents[0] if len(documents) == 1 else {"samples": documents}))


def print_stream(output: Output) -> None:
    """What stands in one colour was committed together; neighbouring steps differ in colour. What a
    chat thinks is dim.
    """
    console = Console(highlight=False, soft_wrap=True)
    for step, reply in enumerate(_by_sample(output.replies)):
        shown = reply.text
        if not output.has_text:
            shown = "".join(f"{token_id} " for token_id in reply.token_ids)
        console.print(Text(reply.thinking, style="dim"), end="")
        console.print(Text(shown, style=COLOURS[step % len(COLOURS)]), end="")
        if reply.HasField("finish"):
            console.print()
            sample = f"sample {reply.index}, " if output.num_samples > 1 else ""
            console.print(Text(sample + _summary(reply), style="dim"))


def _by_sample(replies: Iterator[pb.GenerateResponse]) -> Iterator[pb.GenerateResponse]:
    """One sample after the other: the first that has not finished as it comes, later ones when it
    is their turn.
    """
    turn, held = 0, dict[int, list[pb.GenerateResponse]]()
    for reply in replies:
        held.setdefault(reply.index, []).append(reply)
        while ready := held.pop(turn, []):
            yield from ready
            turn += ready[-1].HasField("finish")


def _document(replies: list[pb.GenerateResponse], has_text: bool) -> dict[str, Any]:
    last = replies[-1]
    assert last.HasField("finish"), "the stream ended without its last message"
    finish, timings = last.finish, last.finish.timings
    document: dict[str, Any] = {
        "token_ids": [token_id for reply in replies for token_id in reply.token_ids],
        "text": "".join(reply.text for reply in replies) if has_text else None,
        "finish_reason": REASON_NAMES[finish.reason],
        "mode": MODE_NAMES[last.mode],
        "forwards": finish.forwards,
        "accepted": list(finish.accepted),
        "timings": {
            "queue_s": timings.queue_seconds,
            "first_token_s": timings.first_token_seconds,
            "total_s": timings.total_seconds,
        },
    }
    thinking = "".join(reply.thinking for reply in replies)
    document |= {"thinking": thinking} if thinking else {}
    logprobs = [_logprobs(token) for reply in replies for token in reply.logprobs]
    return document | ({"logprobs": logprobs} if logprobs else {})


def _logprobs(token: pb.TokenLogprobs) -> dict[str, Any]:
    top = [{"token_id": other.token_id, "logprob": other.logprob} for other in token.top]
    return {"logprob": token.logprob, "top": top}


def _summary(reply: pb.GenerateResponse) -> str:
    finish, timings = reply.finish, reply.finish.timings
    num_tokens = finish.usage.completion_tokens
    decoding = max(timings.total_seconds - timings.first_token_seconds, 1e-9)
    line = (
        f"{MODE_NAMES[reply.mode]}: {num_tokens} tokens ({REASON_NAMES[finish.reason]}), "
        f"{finish.forwards} forwards, first token {timings.first_token_seconds * 1000:.0f} ms, "
        f"total {timings.total_seconds * 1000:.0f} ms, "
        f"{(num_tokens - 1) / decoding:.0f} tokens/s"
    )
    if finish.accepted:
        line += f", {sum(finish.accepted) / len(finish.accepted):.1f} accepted per round"
    return line
