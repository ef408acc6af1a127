"""The command line of `trimode generate`: its options are the fields of one trimode.v1 message,
whoever answers it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from google.protobuf.json_format import ParseDict, ParseError

from trimode.cluster.option_values import (
    MODEL,
    biases,
    file_text,
    ids,
    one_of,
    parsed,
    text_or_file,
)
from trimode.proto import inference_pb2 as pb
from trimode.replicas.errors import InvalidRequest
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model.source import parse_source

MODES = {
    "auto": "MODE_AUTO",
    "ar": "MODE_AUTOREGRESSIVE",
    "diffusion": "MODE_BLOCK_DIFFUSION",
    "speculation": "MODE_SELF_SPECULATION",
}
PRIORITIES = {"interactive": "PRIORITY_INTERACTIVE", "batch": "PRIORITY_BATCH"}

# None where it is not given; proto/inference.proto says what that means.
OptInt = int | None
OptFloat = float | None
OptStr = str | None


def to_message(fields: dict[str, Any]) -> pb.GenerateRequest:
    """Fields by name; None is unset. Raises BadParameter."""
    try:
        return ParseDict(fields, pb.GenerateRequest())
    except ParseError as error:
        raise typer.BadParameter(str(error).rstrip(".")) from None


def generate(
    prompt: Annotated[OptStr, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[OptStr, parsed(file_text, "FILE", "File with the text.")] = None,
    prompt_ids: Annotated[Sequence[int] | None, parsed(ids, "1,2,3", "Its token ids.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The text is a user's turn.")] = False,
    thinking: Annotated[
        bool, typer.Option("--thinking", help="With --chat: think before answering.")
    ] = False,
    model: Annotated[str, MODEL] = str(BUNDLED_CHECKPOINT),
    mode: Annotated[str, parsed(one_of(MODES), "NAME", f"{', '.join(MODES)}.")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[OptInt, typer.Option(help="Of the sampling noise.")] = None,
    n: Annotated[OptInt, typer.Option("--n", help="Samples of the prompt.")] = None,
    top_k: Annotated[OptInt, typer.Option(help="Only so many likeliest tokens.")] = None,
    top_p: Annotated[OptFloat, typer.Option(help="Only the likeliest of this sum.")] = None,
    min_p: Annotated[OptFloat, typer.Option(help="Only this share of the likeliest.")] = None,
    repetition_penalty: Annotated[
        OptFloat, typer.Option(help="Prompt and output; 1: none.")
    ] = None,
    presence_penalty: Annotated[OptFloat, typer.Option(help="Output; 0: none.")] = None,
    frequency_penalty: Annotated[OptFloat, typer.Option(help="Output, by count; 0: none.")] = None,
    logit_bias: Annotated[
        Mapping[int, float] | None, parsed(biases, "5=-100,7=2.5", "By token id.")
    ] = None,
    logprobs: Annotated[
        OptInt, typer.Option(help="With --json: log-probabilities, and of so many others.")
    ] = None,
    min_tokens: Annotated[OptInt, typer.Option(help="No end before so many.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="It ends nothing.")] = False,
    stop_ids: Annotated[Sequence[int] | None, parsed(ids, "1,2,3", "Ids that end it.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends it; repeatable.")] = None,
    thinking_budget: Annotated[OptInt, typer.Option(help="Most tokens after <think>.")] = None,
    json_schema: Annotated[OptStr, parsed(text_or_file, "TEXT|@FILE", "Of the output.")] = None,
    regex: Annotated[OptStr, parsed(text_or_file, "TEXT|@FILE", "Of the output.")] = None,
    lark: Annotated[OptStr, parsed(text_or_file, "TEXT|@FILE", "Its grammar.")] = None,
    block_size: Annotated[OptInt, typer.Option(help="Pins the block size.")] = None,
    threshold: Annotated[
        OptFloat, typer.Option(help="Default: 0.9 in diffusion, 0 (one-pass drafts) else.")
    ] = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Draft without it.")] = False,
    no_governor: Annotated[
        bool, typer.Option("--no-governor", help="Largest block always; so it is in process.")
    ] = False,
    priority: Annotated[
        str, parsed(one_of(PRIORITIES), "NAME", f"{', '.join(PRIORITIES)}.")
    ] = "interactive",
    cache_salt: Annotated[OptStr, typer.Option(help="Shares cached pages under it only.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    quantization: Annotated[OptStr, typer.Option(help="fp8. Default: none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    address: Annotated[OptStr, typer.Option(help="HOST:PORT of a served cluster.")] = None,
) -> None:
    """Continue a prompt, in this process or (with --address) on a cluster."""
    from trimode.cluster import generate as command

    if (prompt, prompt_file, prompt_ids).count(None) != 2:
        raise InvalidRequest("prompt", "give exactly one of --prompt, --prompt-file, --prompt-ids")
    if chat and prompt_ids is not None:
        raise typer.BadParameter("--chat needs --prompt or --prompt-file")
    if thinking and not chat:
        raise typer.BadParameter("--thinking needs --chat")
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs needs --json")
    text = prompt if prompt_file is None else prompt_file
    turns = [{"role": "user", "content": text}]
    fields = {
        "text": None if chat else text,
        "chat": {"messages": turns, "enable_thinking": thinking} if chat else None,
        "token_ids": None if prompt_ids is None else {"ids": prompt_ids},
        "mode": mode,
        "sampling": {
            "temperature": temperature,
            "seed": seed,
            "n": n,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "logit_bias": logit_bias,
            "logprobs": logprobs,
        },
        "stop": {
            "max_tokens": max_tokens,
            "min_tokens": min_tokens,
            "ignore_eos": ignore_eos,
            "stop_token_ids": stop_ids,
            "stop_strings": stop,
        },
        "thinking_budget": thinking_budget,
        "json_schema": json_schema,
        "regex": regex,
        "lark": lark,
        "block_size": block_size,
        "threshold": threshold,
        "use_draft_adapter": not no_adapter,
        "governed": not no_governor,
        "priority": priority,
        "cache_salt": cache_salt,
    }
    command.run(
        to_message(fields),
        model=parse_source(model),
        dtype=dtype,
        quantization=quantization,
        address=address,
        as_json=as_json,
    )
