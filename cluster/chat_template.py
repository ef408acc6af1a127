"""ChatTemplate: a checkpoint's own way to write a conversation as one text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.environment import Template
from jinja2.exceptions import TemplateSyntaxError

from trimode.cluster.template_sandbox import MAX_RENDER_S, Refused, TemplateEnvironment
from trimode.cluster.traced_text import TracedText
from trimode.replicas.errors import CheckpointError, InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 1024
MAX_CONTENT_CHARS = 2 * 1024 * 1024  # of all messages together
MAX_TEMPLATE_BYTES = 1024 * 1024
MAX_REASON_CHARS = 300

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template renders. Raises InvalidRequest that names the field and the limit."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool = True  # end where the assistant's answer begins
    enable_thinking: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.messages) <= MAX_MESSAGES:
            raise InvalidRequest(
                "chat.messages", f"must be 1 to {MAX_MESSAGES}, are {len(self.messages)}"
            )
        for index, message in enumerate(self.messages):
            if message.role not in ROLES:
                raise InvalidRequest(
                    f"chat.messages[{index}].role",
                    f"must be one of {', '.join(ROLES)}, is {message.role[:32]!r}",
                )
        num_chars = sum(len(message.content) for message in self.messages)
        if num_chars > MAX_CONTENT_CHARS:
            raise InvalidRequest(
                "chat.messages",
                f"at most {MAX_CONTENT_CHARS} characters of content are allowed, got {num_chars}",
            )


class ChatTemplate:
    """A compiled template. What it writes itself stays apart from what the messages hold."""

    def __init__(
        self,
        source: str,
        token_texts: Mapping[str, str] | None = None,
        max_render_s: float = MAX_RENDER_S,
    ) -> None:
        """token_texts: bos_token, eos_token, ... and how they are spelled.

        Raises CheckpointError where the source is no template.
        """
        token_texts = token_texts or {}
        self.own_text = "\n".join((source, *token_texts.values()))  # what it may write comes of it
        self._tokens = {name: TracedText.written(text) for name, text in token_texts.items()}
        self._template = _build(source, max_render_s)

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """The template of a model folder: chat_template.jinja, else chat_template in
        tokenizer_config.json; None where it has neither. Raises CheckpointError.
        """
        config = _config(folder / CONFIG_FILE)
        source, path = _named(config.get("chat_template")), folder / CONFIG_FILE
        if (folder / TEMPLATE_FILE).exists():
            path = folder / TEMPLATE_FILE
            source = _text(path)
        if source is None:
            return None
        try:
            return cls(source, _token_texts(config))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def render(self, conversation: Conversation) -> TracedText:
        """The text of a conversation; its spans are what the template wrote.

        Raises InvalidRequest where the template refuses the conversation, breaks, or makes too
        much of it.
        """
        # A role is one of ROLES, which hold no special token: as good as the template's own text,
        # of which some templates build their special tokens.
        messages = [
            {"role": TracedText.written(message.role), "content": message.content}
            for message in conversation.messages
        ]
        variables = {
            **self._tokens,
            "messages": messages,
            "add_generation_prompt": conversation.add_generation_prompt,
            "enable_thinking": conversation.enable_thinking,
        }
        try:
            return TracedText.concat(self._template.generate(variables))
        except Refused as error:
            raise _failed("refuses this conversation", error) from None
        except Exception as error:  # whatever a template does wrong is no error of ours
            raise _failed("cannot render this conversation", error) from None


def _build(source: str, max_render_s: float) -> Template:
    try:
        return TemplateEnvironment(max_render_s).build(source)
    except TemplateSyntaxError as error:
        raise CheckpointError(f"chat template, line {error.lineno}: {error.message}") from None
    except Exception as error:  # as Python's own compiler does, of what nests too deeply
        raise CheckpointError(f"the chat template does not compile: {error}") from None


def _failed(what: str, error: Exception) -> InvalidRequest:
    reason = (str(error) or type(error).__name__)[:MAX_REASON_CHARS]
    return InvalidRequest("chat", f"the model's chat template {what}: {reason}")


def _config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none."""
    if not path.exists():
        return {}
    try:
        config = json.loads(_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold an object")
    return config


def _named(template: object) -> str | None:
    """The template of a tokenizer_config.json, which may hold several by name."""
    if isinstance(template, list):
        by_name = {item.get("name"): item for item in template if isinstance(item, dict)}
        template = by_name.get("default", {}).get("template")
    return template if isinstance(template, str) else None


def _token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """How a tokenizer_config.json spells its tokens: plainly, or as objects with `content`."""
    texts = {}
    for name in TOKEN_NAMES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            texts[name] = text
    return texts


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_TEMPLATE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
