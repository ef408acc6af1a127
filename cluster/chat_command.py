"""The command line of `trimode chat`."""

from typing import Annotated

import typer

from trimode.cluster.generate_command import MODES, OptFloat, OptInt, OptStr, to_message
from trimode.cluster.option_values import MODEL, one_of, parsed
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model.source import parse_source


def chat(
    model: Annotated[str, MODEL] = str(BUNDLED_CHECKPOINT),
    address: Annotated[OptStr, typer.Option(help="HOST:PORT of a served cluster.")] = None,
    system: Annotated[OptStr, typer.Option(help="What the model is told first.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Think before answering.")] = False,
    thinking_budget: Annotated[OptInt, typer.Option(help="Most tokens of thinking.")] = None,
    mode: Annotated[str, parsed(one_of(MODES), "NAME", f"{', '.join(MODES)}.")] = "auto",
    max_tokens: Annotated[
        OptInt, typer.Option(help="Of an answer. Default: the server's; in process no limit.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[OptFloat, typer.Option(help="Only the likeliest of this sum.")] = None,
    seed: Annotated[OptInt, typer.Option(help="Of the sampling noise.")] = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Draft without it.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="fp8. Default: none.")] = None,
    max_context: Annotated[
        int, typer.Option(min=1, help="Most tokens of the conversation, in process.")
    ] = 8192,
) -> None:
    """Talk to a model, in this process or (with --address) on a cluster."""
    from trimode.cluster import chat as command

    first = [] if system is None else [{"role": "system", "content": system}]
    request = to_message(
        {
            "chat": {"messages": first, "enable_thinking": thinking},
            "thinking_budget": thinking_budget,
            "mode": mode,
            "sampling": {"temperature": temperature, "top_p": top_p, "seed": seed},
            "stop": {"max_tokens": max_tokens},
            "use_draft_adapter": not no_adapter,
        }
    )
    command.run(
        request,
        model=parse_source(model),
        dtype=dtype,
        quantization=quantization,
        address=address,
        max_context=max_context,
    )
