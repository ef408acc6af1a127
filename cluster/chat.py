"""`trimode chat`: a conversation in the terminal, with a served cluster or with a model in this
process.
"""

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from rich.console import Console

from trimode.cluster.client import Client
from trimode.cluster.generate_output import Output, print_stream
from trimode.cluster.local_model import LocalModel
from trimode.cluster.model_folder import fetch
from trimode.proto import inference_pb2 as pb
from trimode.replicas.errors import InvalidRequest, TrimodeError
from trimode.replicas.model.source import ModelSource, label

Generate = Callable[[pb.GenerateRequest], Generator[pb.GenerateResponse]]

HELP = "/clear forgets what was said; /exit or Ctrl-D leaves; Ctrl-C ends an answer."


def run(
    request: pb.GenerateRequest,
    *,
    model: ModelSource,
    dtype: str,
    quantization: str | None = None,
    address: str | None,
    max_context: int,
) -> None:
    """Read turns from standard input and answer them until it ends.

    request: all but the turns; its chat may begin with a system message. On a terminal a turn that
    fails is told and the conversation goes on; elsewhere it raises TrimodeError.
    """
    is_terminal = sys.stdin.isatty()
    if address:
        source = _remote(address)
    else:
        source = _local(request, fetch(model), dtype, quantization, max_context)
    with source as (name, generate):
        dialogue = Dialogue(generate, request)
        if is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 # input() then edits lines and recalls them
            print(f"This is {name}. {HELP}")
        while (line := _read_line("> " if is_terminal else "")) is not None:
            match line.strip():
                case "":
                    pass
                case "/exit":
                    return
                case "/clear":
                    dialogue.clear()
                case _:
                    try:
                        dialogue.say(line)
                    except TrimodeError as error:
                        if not is_terminal:
                            raise
                        Console(highlight=False).print(f"trimode: {error}", markup=False)


class Dialogue:
    """What was said so far; `say` adds a turn and its answer."""

    def __init__(self, generate: Generate, request: pb.GenerateRequest) -> None:
        self._generate = generate
        self._request = request
        self._messages = request.chat.messages
        self._num_first = len(self._messages)

    def clear(self) -> None:
        """Forget all but the system message."""
        del self._messages[self._num_first :]

    def say(self, text: str) -> None:
        """Print the answer while it comes. ^C ends it; what was shown of it counts as said.

        Raises TrimodeError; the turn is forgotten then.
        """
        heard: list[str] = []
        self._messages.add(role="user", content=text)
        is_answered = False
        try:
            with closing(self._generate(self._request)) as replies:
                print_stream(Output(_overheard(replies, heard), num_samples=1, has_text=True))
            is_answered = True
        except KeyboardInterrupt:
            is_answered = bool(heard)
            print()
        finally:
            if is_answered:
                self._messages.add(role="assistant", content="".join(heard))
            else:
                del self._messages[-1]


def _overheard(
    replies: Generator[pb.GenerateResponse], heard: list[str]
) -> Generator[pb.GenerateResponse]:
    for reply in replies:
        heard.append(reply.text)
        yield reply


def _read_line(prompt: str) -> str | None:
    """The next line; None where there is none. ^C drops what was typed."""
    while True:
        try:
            line = input(prompt)
            line.encode()
            return line
        except EOFError:
            if prompt:
                print()
            return None
        except UnicodeError:
            raise InvalidRequest("chat", "the input is not UTF-8 text") from None
        except KeyboardInterrupt:
            print()


@contextmanager
def _remote(address: str) -> Iterator[tuple[str, Generate]]:
    with Client(address) as client:
        model = client.get_model()
        _check_template(model.has_chat_template, model.name)
        yield model.name, client.generate


@contextmanager
def _local(
    request: pb.GenerateRequest,
    folder: Path,
    dtype: str,
    quantization: str | None,
    max_context: int,
) -> Iterator[tuple[str, Generate]]:
    model, name = LocalModel(folder, max_context), label(folder)
    _check_template(model.has_chat_template, name)
    model.load(
        dtype=dtype,
        quantization=quantization,
        adapter=request.use_draft_adapter,
        quiet=not sys.stderr.isatty(),
    )
    yield name, model.generate


def _check_template(has_chat_template: bool, name: str) -> None:
    if not has_chat_template:
        raise InvalidRequest(
            "chat",
            f"{name} has no chat template. It can continue text: trimode generate --prompt TEXT. "
            "A template is chat_template.jinja in the model folder",
        )
