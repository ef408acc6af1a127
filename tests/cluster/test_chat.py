"""`trimode chat`: turns in, answers out, and the conversation is remembered."""

import asyncio
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trimode.cluster import chat
from trimode.cluster.__main__ import app
from trimode.cluster.chat import Dialogue
from trimode.cluster.local_model import _uninterrupted
from trimode.proto import inference_pb2 as pb
from trimode.replicas.errors import InvalidRequest, Unavailable

FINISH = pb.Finish(reason=pb.FINISH_REASON_STOP, usage=pb.Usage(completion_tokens=2))


class Parrot:
    """A model that says what it is told: pieces of text or errors, a list a turn."""

    def __init__(self, *answers: list[str | BaseException]) -> None:
        self.asked: list[pb.GenerateRequest] = []
        self.num_closed = 0
        self._answers = list(answers)

    def __call__(self, request: pb.GenerateRequest) -> Generator[pb.GenerateResponse]:
        self.asked.append(pb.GenerateRequest.FromString(request.SerializeToString()))
        try:
            for piece in self._answers.pop(0):
                if isinstance(piece, BaseException):
                    raise piece
                yield pb.GenerateResponse(text=piece, mode=pb.MODE_SELF_SPECULATION)
            yield pb.GenerateResponse(finish=FINISH, mode=pb.MODE_SELF_SPECULATION)
        finally:
            self.num_closed += 1

    @property
    def turns(self) -> list[list[tuple[str, str]]]:
        """The messages of every request."""
        return [[(turn.role, turn.content) for turn in ask.chat.messages] for ask in self.asked]


def talk(parrot: Parrot, *turns: str, system: str | None = None) -> Dialogue:
    first = [] if system is None else [pb.ChatMessage(role="system", content=system)]
    dialogue = Dialogue(parrot, pb.GenerateRequest(chat=pb.Chat(messages=first)))
    for turn in turns:
        dialogue.say(turn)
    return dialogue


def test_every_turn_is_asked_with_all_that_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    parrot = Parrot(["Hel", "lo."], ["Bye."])
    talk(parrot, "hi", "bye", system="Be brief.")
    system = ("system", "Be brief.")
    assert parrot.turns[0] == [system, ("user", "hi")]
    assert parrot.turns[1] == [system, ("user", "hi"), ("assistant", "Hello."), ("user", "bye")]
    assert "Hello." in capsys.readouterr().out


def test_clearing_leaves_the_system_message() -> None:
    parrot = Parrot(["Hello."], ["Hello."])
    dialogue = talk(parrot, "hi", system="Be brief.")
    dialogue.clear()
    dialogue.say("hi")
    assert parrot.turns[1] == parrot.turns[0]


def test_an_interrupted_answer_is_kept_as_far_as_it_was_shown() -> None:
    parrot = Parrot(["Hel", KeyboardInterrupt()], ["Yes?"])
    talk(parrot, "hi", "you there?")
    assert parrot.turns[1] == [("user", "hi"), ("assistant", "Hel"), ("user", "you there?")]
    assert parrot.num_closed == 2


def test_a_turn_interrupted_before_its_answer_is_forgotten() -> None:
    parrot = Parrot([KeyboardInterrupt()], ["Yes?"])
    talk(parrot, "hi", "you there?")
    assert parrot.turns[1] == [("user", "you there?")]


def test_a_turn_that_fails_is_forgotten() -> None:
    parrot = Parrot([Unavailable("no replica")], ["Yes?"])
    dialogue = talk(parrot)
    with pytest.raises(Unavailable):
        dialogue.say("hi")
    dialogue.say("you there?")
    assert parrot.turns[1] == [("user", "you there?")]


def test_thoughts_are_shown_and_not_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    def generate(request: pb.GenerateRequest) -> Generator[pb.GenerateResponse]:
        asked.append(len(request.chat.messages))
        mode = pb.MODE_SELF_SPECULATION
        yield pb.GenerateResponse(thinking="Hm. ", text="Yes", mode=mode, finish=FINISH)

    asked: list[int] = []
    request = pb.GenerateRequest(chat=pb.Chat(enable_thinking=True))
    Dialogue(generate, request).say("hi")
    assert "Hm. Yes" in capsys.readouterr().out
    assert [turn.content for turn in request.chat.messages] == ["hi", "Yes"]


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_an_engine_s_step_is_not_cut_by_an_interrupt(seconds: float) -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), _uninterrupted():
        signal.raise_signal(signal.SIGINT)
        time.sleep(seconds)
        steps.append("done")
    assert steps == ["done"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def invoke(*options: str, lines: str = "") -> Any:
    return CliRunner().invoke(app, ["chat", *options], input=lines)


def test_options_are_fields_of_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[pb.GenerateRequest] = []
    monkeypatch.setattr(chat, "run", lambda request, **_: asked.append(request))
    options = "--system Brief. --thinking --thinking-budget 9 --mode ar --max-tokens 7 "
    invoke(*(options + "--temperature 0.5 --top-p 0.9 --seed 3 --no-adapter").split())
    invoke()
    turns = [pb.ChatMessage(role="system", content="Brief.")]
    assert asked[0] == pb.GenerateRequest(
        chat=pb.Chat(messages=turns, enable_thinking=True),
        thinking_budget=9,
        mode=pb.MODE_AUTOREGRESSIVE,
        sampling=pb.Sampling(temperature=0.5, top_p=0.9, seed=3),
        stop=pb.StopConditions(max_tokens=7),
        use_draft_adapter=False,
    )
    assert not asked[1].stop.HasField("max_tokens")


def test_a_model_without_a_template_is_told_with_what_to_do_instead() -> None:
    error = invoke(lines="hi\n").exception
    assert isinstance(error, InvalidRequest)
    assert "checkpoint has no chat template" in str(error)
    assert "trimode generate --prompt" in str(error)


def answers(output: str) -> list[str]:
    """The text before each account of an answer."""
    return re.split(r"^speculation: .*\n", output, flags=re.MULTILINE)


LINES = "def main(\n\n/clear\nclass A:\n/clear\ndef main(\n/exit\nnever\n"
OPTIONS = ["--max-tokens", "9", "--dtype", "float32"]


def test_piped_lines_are_answered_in_turn(chat_folder: Path) -> None:
    result = invoke("--model", str(chat_folder), *OPTIONS, lines=LINES)
    assert result.exit_code == 0
    first, second, third, rest = answers(result.output)
    assert first == third
    assert first.strip() and second.strip()
    assert rest == ""


async def test_a_cluster_answers_as_this_process_does(served: Any, chat_folder: Path) -> None:
    local, remote = ("--model", str(chat_folder)), ("--address", served.address)
    here = await asyncio.to_thread(invoke, *local, *OPTIONS, lines=LINES)
    there = await asyncio.to_thread(invoke, *remote, *OPTIONS, lines=LINES)
    assert answers(here.output) == answers(there.output)


def test_a_conversation_that_has_no_room_left_is_an_error(chat_folder: Path) -> None:
    lines = "def main(\n" * 9
    error = invoke("--model", str(chat_folder), "--max-context", "90", lines=lines).exception
    assert isinstance(error, InvalidRequest)
    assert "leave no room for output; the model has 90 positions" in str(error)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"


def test_at_a_terminal_an_interrupt_ends_the_answer_and_the_end_of_input_the_program(
    chat_folder: Path,
) -> None:
    command = [sys.executable, "-m", "trimode.cluster", "chat", "--model", str(chat_folder)]
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [*command, "--mode", "ar"], stdin=its, stdout=its, stderr=its, start_new_session=True
    )
    shown = ""

    def shows(pattern: str) -> bool:
        nonlocal shown
        shown += os.read(ours, 4096).decode(errors="replace")
        return re.search(pattern, shown) is not None

    until(lambda: shows(r"Ctrl-C ends an answer\.[\s\S]*> "))
    for _ in range(2):
        shown = ""
        os.write(ours, b"class Queue:\n")
        until(lambda: shows(r"class Queue:\s+[\s\S]*\w{3,}[\s\S]*\w{3,}"))
        process.send_signal(signal.SIGINT)
        until(lambda: shows(r"\n> "))
        assert "forwards" not in shown, "it was cut"
    os.write(ours, b"\x04")
    assert process.wait(timeout=20) == 0
    os.close(ours)
    os.close(its)
