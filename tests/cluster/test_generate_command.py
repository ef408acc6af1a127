"""The options of `trimode generate` become the fields of one message; a mistake is one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trimode.cluster import generate
from trimode.cluster.__main__ import app
from trimode.proto import inference_pb2 as pb
from trimode.replicas.errors import InvalidRequest

# Options of one command, and what they set.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--mode ar", {"mode": pb.MODE_AUTOREGRESSIVE}),
    ("--temperature 0.5 --seed 0", {"sampling": pb.Sampling(temperature=0.5, seed=0)}),
    ("--n 4", {"sampling": pb.Sampling(n=4)}),
    (
        "--top-k 5 --top-p 0.9 --min-p 0.1",
        {"sampling": pb.Sampling(top_k=5, top_p=0.9, min_p=0.1)},
    ),
    (
        "--repetition-penalty 1.2 --presence-penalty -1 --frequency-penalty 0.5",
        {
            "sampling": pb.Sampling(
                repetition_penalty=1.2, presence_penalty=-1, frequency_penalty=0.5
            )
        },
    ),
    (
        "--logit-bias 5=-100,7=2.5",
        {"sampling": pb.Sampling(logit_bias={5: -100.0, 7: 2.5})},
    ),
    ("--logprobs 0 --json", {"sampling": pb.Sampling(logprobs=0)}),
    (
        "--max-tokens 9 --min-tokens 3 --ignore-eos --stop-ids 4,5 --stop a --stop b",
        {
            "stop": pb.StopConditions(
                max_tokens=9,
                min_tokens=3,
                ignore_eos=True,
                stop_token_ids=[4, 5],
                stop_strings=["a", "b"],
            )
        },
    ),
    ("--thinking-budget 0", {"thinking_budget": 0}),
    ("--json-schema {}", {"json_schema": "{}"}),
    ("--regex [a-z]+", {"regex": "[a-z]+"}),
    ("--lark start:", {"lark": "start:"}),
    ("--block-size 8 --threshold 0", {"block_size": 8, "threshold": 0.0}),
    ("--no-adapter --no-governor", {"use_draft_adapter": False, "governed": False}),
    ("--priority batch", {"priority": pb.PRIORITY_BATCH}),
    ("--cache-salt me", {"cache_salt": "me"}),
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[pb.GenerateRequest]:
    """The messages that commands would have sent."""
    messages: list[pb.GenerateRequest] = []
    monkeypatch.setattr(generate, "run", lambda message, **_: messages.append(message))
    return messages


def fields_of(descriptor: Any) -> Iterator[str]:
    """Names of the fields of a message and of those in it."""
    for field in descriptor.fields:
        nested = field.message_type and not field.message_type.GetOptions().map_entry
        yield from fields_of(field.message_type) if nested else [field.name]


def fields_set(message: Any) -> Iterator[str]:
    for field, value in message.ListFields():
        nested = field.message_type and not field.message_type.GetOptions().map_entry
        for inner in (value if field.is_repeated else [value]) if nested else ():
            yield from fields_set(inner)
        if not nested:
            yield field.name


def invoke(*options: str) -> Any:
    return CliRunner().invoke(app, ["generate", *options])


@pytest.mark.parametrize(("options", "fields"), OPTIONS)
def test_an_option_is_a_field_of_the_message(
    asked: list[pb.GenerateRequest], options: str, fields: dict[str, Any]
) -> None:
    assert invoke("--prompt", "def", *options.split()).exit_code == 0
    expected = pb.GenerateRequest(
        text="def",
        mode=pb.MODE_AUTO,
        sampling=pb.Sampling(temperature=0),
        stop=pb.StopConditions(max_tokens=128, ignore_eos=False),
        use_draft_adapter=True,
        governed=True,
        priority=pb.PRIORITY_INTERACTIVE,
    )  # fmt: skip
    expected.MergeFrom(pb.GenerateRequest(**fields))
    assert asked == [expected]


def test_every_field_of_the_message_has_an_option(asked: list[pb.GenerateRequest]) -> None:
    for options, _ in OPTIONS:
        invoke("--prompt", "def", *options.split())
    invoke("--prompt-ids", "1")
    invoke("--prompt", "def", "--chat", "--thinking")
    known = {name for message in asked for name in fields_set(message)}
    without = {"request_id", "add_generation_prompt"}
    assert known == set(fields_of(pb.GenerateRequest.DESCRIPTOR)) - without


def test_a_prompt_may_be_ids(asked: list[pb.GenerateRequest]) -> None:
    invoke("--prompt-ids", "1,200")
    assert list(asked[0].token_ids.ids) == [1, 200]


@pytest.mark.parametrize("thinking", [False, True])
def test_a_prompt_may_be_a_user_s_turn(
    asked: list[pb.GenerateRequest], thinking: bool, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("How\nso?")
    more = ["--thinking"] if thinking else []
    invoke("--prompt-file", f"{tmp_path}/prompt", "--chat", *more)
    turns = [pb.ChatMessage(role="user", content="How\nso?")]
    assert asked[0].chat == pb.Chat(messages=turns, enable_thinking=thinking)
    assert asked[0].WhichOneof("prompt") == "chat"


@pytest.mark.parametrize("option", ["--json-schema", "--regex", "--lark"])
def test_a_grammar_may_lie_in_a_file(
    asked: list[pb.GenerateRequest], option: str, tmp_path: Path
) -> None:
    (tmp_path / "grammar").write_text("first\nsecond\n")
    invoke("--prompt", "def", option, f"@{tmp_path}/grammar")
    assert getattr(asked[0], asked[0].WhichOneof("grammar")) == "first\nsecond"


@pytest.mark.parametrize("prompt", [[], ["--prompt", "def", "--prompt-ids", "1"]])
def test_exactly_one_prompt_is_required(prompt: list[str]) -> None:
    result = invoke("--max-tokens", "4", *prompt)
    assert isinstance(result.exception, InvalidRequest)
    assert "exactly one of" in str(result.exception)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--mode magic", "'--mode': not one of auto, ar, diffusion, speculation"),
        ("--priority high", "'--priority': not one of interactive, batch"),
        ("--logit-bias 5", "'--logit-bias': takes pairs like 5=-100,7=2.5, got '5'"),
        ("--stop-ids 5,x", "'--stop-ids': takes ids like 1,2,3, got '5,x'"),
        ("--stop-ids -5", "stop_token_ids field: Value out of range: -5"),
        ("--top-k -1", "top_k field: Value out of range: -1"),
        ("--temperature nan", "GenerateRequest.sampling.temperature"),
        ("--regex a --json-schema {}", 'multiple "grammar" oneof fields'),
        ("--regex @nowhere", "'--regex': nowhere cannot be read: No such file or directory"),
        ("--prompt-file nowhere", "'--prompt-file': nowhere cannot be read"),
        ("--logprobs 1", "--logprobs needs --json"),
        ("--thinking", "--thinking needs --chat"),
    ],
)
def test_a_mistake_is_named(asked: list[pb.GenerateRequest], options: str, words: str) -> None:
    result = invoke("--prompt", "def", *options.split())
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
    assert asked == []


def test_ids_are_no_user_s_turn() -> None:
    assert "--chat needs --prompt or --prompt-file" in invoke("--prompt-ids", "1", "--chat").output


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff\xfe\xff")
    output = invoke("--prompt-file", f"{tmp_path}/prompt").output
    assert "is not UTF-8 text" in " ".join(output.replace("│", " ").split())
