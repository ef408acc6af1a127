"""Between the wire and the core: trimode.v1 messages to Request, Chunk to messages. Nothing else
knows both.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from trimode.cluster.chat_template import ChatMessage, Conversation
from trimode.cluster.text_stream import TextPiece
from trimode.cluster.tokenizer import Tokenizer
from trimode.proto import inference_pb2 as pb
from trimode.replicas.errors import InvalidRequest
from trimode.replicas.types import (
    MAX_SEED,
    Chunk,
    Finish,
    FinishReason,
    Grammar,
    GrammarKind,
    Mode,
    Priority,
    Request,
    ThinkingBudget,
    TokenLogprobs,
)

Number = TypeVar("Number")
Value = TypeVar("Value")

MAX_NAME_CHARS = 128  # of a request id, of a cache salt

MODES: dict[pb.Mode, Mode] = {
    pb.MODE_UNSPECIFIED: Mode.AUTO,
    pb.MODE_AUTO: Mode.AUTO,
    pb.MODE_AUTOREGRESSIVE: Mode.AUTOREGRESSIVE,
    pb.MODE_BLOCK_DIFFUSION: Mode.BLOCK_DIFFUSION,
    pb.MODE_SELF_SPECULATION: Mode.SELF_SPECULATION,
}
MODE_MESSAGES = {mode: message for message, mode in MODES.items()}
FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: pb.FINISH_REASON_ABORTED,
    FinishReason.GRAMMAR: pb.FINISH_REASON_GRAMMAR,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}
PRIORITIES: dict[pb.Priority, Priority] = {
    pb.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_BATCH: Priority.BATCH,
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What unset fields of a request mean."""

    max_tokens: int
    max_positions: int  # prompt and output together


def is_chat(message: pb.GenerateRequest) -> bool:
    """Whether thinking and answer are told apart in the replies."""
    return message.HasField("chat")


def to_request(
    message: pb.GenerateRequest,
    tokenizer: Tokenizer | None,
    defaults: Defaults,
    timeout_s: float | None,
) -> Request:
    """Check and convert a message; raises InvalidRequest that names the field."""
    prompt_ids = _prompt_ids(message, tokenizer)
    room = defaults.max_positions - len(prompt_ids)
    if room < 1:
        raise InvalidRequest(
            "prompt",
            f"{len(prompt_ids)} tokens leave no room for output; the model has "
            f"{defaults.max_positions} positions",
        )
    sampling, stop = message.sampling, message.stop
    return Request(
        request_id=_name("request_id", message.request_id) or f"req-{secrets.token_hex(8)}",
        prompt_ids=tuple(prompt_ids),
        mode=_known("mode", message.mode, MODES),
        max_tokens=(
            stop.max_tokens if stop.HasField("max_tokens") else min(defaults.max_tokens, room)
        ),
        repetition_penalty=_or(sampling, "repetition_penalty", 1.0),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=_or(sampling, "top_p", 1.0),
        min_p=sampling.min_p,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbelow(MAX_SEED),
        n=sampling.n if sampling.HasField("n") else 1,
        num_logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        grammar=_grammar(message),
        thinking=_thinking(message, tokenizer),
        stop_ids=tuple(stop.stop_token_ids),
        stop_strings=tuple(stop.stop_strings),
        min_tokens=stop.min_tokens,
        ignore_eos=stop.ignore_eos,
        block_size=message.block_size if message.HasField("block_size") else None,
        threshold=message.threshold if message.HasField("threshold") else None,
        use_adapter=message.use_draft_adapter if message.HasField("use_draft_adapter") else True,
        governed=message.governed if message.HasField("governed") else True,
        priority=_known("priority", message.priority, PRIORITIES),
        cache_salt=_name("cache_salt", message.cache_salt),
        timeout_s=timeout_s,
    )


def _known(field: str, number: Number, values: Mapping[Number, Value]) -> Value:
    """What a number of an enum means; a newer client may send one that is not known here."""
    if number not in values:
        raise InvalidRequest(field, f"{number} is not a value of trimode.v1.{field.capitalize()}")
    return values[number]


def _grammar(message: pb.GenerateRequest) -> Grammar | None:
    kind = message.WhichOneof("grammar")
    return None if kind is None else Grammar(GrammarKind(kind), getattr(message, kind))


def _thinking(message: pb.GenerateRequest, tokenizer: Tokenizer | None) -> ThinkingBudget | None:
    if not message.HasField("thinking_budget"):
        return None
    ids = tokenizer.thinking_ids if tokenizer else None
    if ids is None:
        raise InvalidRequest("thinking_budget", "the model has no <think> and </think> tokens")
    return ThinkingBudget(message.thinking_budget, *ids)


def _or(
    sampling: pb.Sampling, field: Literal["repetition_penalty", "top_p"], unset: float
) -> float:
    value: float = getattr(sampling, field)
    return value if sampling.HasField(field) else unset


def to_response(request: Request, chunk: Chunk, piece: TextPiece) -> pb.GenerateResponse:
    """One message for one chunk of a routed request."""
    message = pb.GenerateResponse(
        request_id=request.request_id,
        text=piece.text,
        thinking=piece.thinking,
        token_ids=chunk.token_ids,
        mode=MODE_MESSAGES[request.mode],
        logprobs=map(_logprobs, chunk.logprobs or ()),
        index=chunk.index,
    )
    if chunk.finish is not None:
        message.finish.CopyFrom(_finish(request, chunk.finish))
    return message


def _logprobs(token: TokenLogprobs) -> pb.TokenLogprobs:
    top = [pb.TokenLogprob(token_id=i, logprob=value) for i, value in token.top]
    return pb.TokenLogprobs(logprob=token.logprob, top=top)


def _finish(request: Request, finish: Finish) -> pb.Finish:
    timings = finish.timings
    ranking = request.ranking
    return pb.Finish(
        reason=FINISH_REASONS[finish.reason],
        usage=pb.Usage(
            prompt_tokens=finish.prompt_tokens,
            completion_tokens=finish.completion_tokens,
            cached_tokens=finish.cached_tokens,
        ),
        forwards=finish.forwards,
        accepted=finish.accepted,
        timings=pb.Timings(
            queue_seconds=timings.queue_s,
            first_token_seconds=timings.first_token_s,
            total_seconds=timings.total_s,
        ),
        pool=ranking.pool if ranking else "",
        routing_reason=ranking.reason if ranking else "",
    )


def _prompt_ids(message: pb.GenerateRequest, tokenizer: Tokenizer | None) -> list[int]:
    match message.WhichOneof("prompt"):
        case "token_ids":
            return list(message.token_ids.ids)
        case "text":
            if tokenizer is None:
                raise InvalidRequest("text", "the model has no tokenizer; send token_ids")
            return tokenizer.encode(message.text)
        case "chat":
            if tokenizer is None:
                raise InvalidRequest("chat", "the model has no tokenizer; send token_ids")
            return tokenizer.encode_chat(_conversation(message.chat))
        case _:
            raise InvalidRequest("prompt", "is required: set text, token_ids or chat")


def _conversation(chat: pb.Chat) -> Conversation:
    return Conversation(
        tuple(ChatMessage(message.role, message.content) for message in chat.messages),
        add_generation_prompt=(
            chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        ),
        enable_thinking=chat.enable_thinking,
    )


def _name(field: str, given: str) -> str:
    if len(given) > MAX_NAME_CHARS:
        raise InvalidRequest(field, f"at most {MAX_NAME_CHARS} characters, got {len(given)}")
    return given
