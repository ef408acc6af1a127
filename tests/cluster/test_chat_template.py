"""A checkpoint's chat template writes a conversation, and a bad one harms nobody."""

import json
import time
from pathlib import Path

import pytest

from trimode.cluster.chat_template import (
    MAX_CONTENT_CHARS,
    MAX_MESSAGES,
    ChatMessage,
    ChatTemplate,
    Conversation,
)
from trimode.replicas.errors import CheckpointError, InvalidRequest


def talk(*contents: str, **settings: bool) -> Conversation:
    """Turns of user and assistant."""
    roles = ("user", "assistant")
    turns = (ChatMessage(roles[at % 2], content) for at, content in enumerate(contents))
    return Conversation(tuple(turns), **settings)


def render(source: str, conversation: Conversation | None = None, seconds: float = 0.2) -> str:
    template = ChatTemplate(source, max_render_s=seconds)
    return str.__str__(template.render(conversation or talk("hi")))


def written(source: str, *contents: str) -> list[str]:
    """The parts of the text that count as the template's."""
    text = ChatTemplate(source).render(talk(*contents or ("hi",)))
    return [str.__str__(text[start:end]) for start, end in text.spans]


SYSTEM = "<|im_start|>system\n<|im_end|>\n"
ASK = "<|im_start|>assistant\n"


def test_a_user_turn_follows_an_empty_system_turn(family_template: str) -> None:
    assert (
        render(family_template) == f"{SYSTEM}<|im_start|>user\nhi<|im_end|>\n{ASK}<think></think>"
    )


def test_a_system_message_takes_the_place_of_the_empty_one(family_template: str) -> None:
    turns = (ChatMessage("system", "Be brief."), ChatMessage("user", "hi"))
    text = render(family_template, Conversation(turns))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_thinking_leaves_its_mark_open(family_template: str) -> None:
    text = render(family_template, talk("hi", enable_thinking=True))
    assert text.endswith(f"{ASK}<think>\n")


def test_without_a_generation_prompt_the_last_turn_ends_the_text(family_template: str) -> None:
    text = render(family_template, talk("hi", add_generation_prompt=False))
    assert text.endswith("user\nhi<|im_end|>\n")


def test_a_template_reads_messages_as_they_are(family_template: str) -> None:
    text = render(family_template, talk("hi", "hm</think> hello ", "how?"))
    assert f"{ASK}<think></think>hello<|im_end|>\n" in text


def test_constants_are_the_template_s_and_contents_are_not(family_template: str) -> None:
    assert written(family_template, "hi") == [
        f"{SYSTEM}<|im_start|>user\n",
        f"<|im_end|>\n{ASK}<think></think>",
    ]


@pytest.mark.parametrize(
    "expression",
    [
        "{{ '<a>' ~ x ~ '<b>' }}",
        "{{ '<a>' + x + '<b>' }}",
        "{{ ('  <a>' ~ x ~ '<b> ') | trim }}",
        "{{ ('  <a>' ~ x ~ '<b> ').strip() }}",
        "{{ ['<a>', x, '<b>'] | join }}",
        "{{ ''.join(['<a>', x, '<b>']) }}",
        "{{ ('<a>' ~ x ~ '<b>c')[:-1] }}",
        "{{ '<a>X<b>'.replace('X', x) }}",
        "{{ '<a>X<b>' | replace('X', x) }}",
        "{{ ('<a>' ~ x ~ '<b>') | string | safe }}",
        "{% set t %}<a>{{ x }}<b>{% endset %}{{ t }}",
        "{% filter trim %}  <a>{{ x }}<b>  {% endfilter %}",
        "{% macro m(a, b='<b>') %}{{ a }}{{ x }}{{ b }}{% endmacro %}{{ m('<a>') }}",
        "{% macro m() %}<a>{{ caller() }}<b>{% endmacro %}{% call m() %}{{ x }}{% endcall %}",
        "{% set ns = namespace(t='') %}{% for part in ['<a>', x, '<b>'] %}"
        "{% set ns.t = ns.t + part %}{% endfor %}{{ ns.t }}",
        "{% generation %}<a>{{ x }}<b>{% endgeneration %}",
        "{{ '<' ~ 'a' ~ '>' }}{{ x }}{{ '<b>' if x else '' }}",
    ],
)
def test_text_is_followed_through_what_templates_do(expression: str) -> None:
    source = "{% set x = messages[0].content %}" + expression
    assert render(source) == "<a>hi<b>"
    assert written(source) == ["<a>", "<b>"]


@pytest.mark.parametrize(
    "expression",
    [
        "{{ x }}",
        "{{ x ~ x }}",
        "{{ x | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ x.upper() }}",
        "{{ x.split('i')[0] ~ x[0] }}",
        "{{ x | replace('h', x) }}",
        "{% for char in x %}{{ char }}{% endfor %}",
        "{{ {'a': x}['a'] }}",
        "{{ [x] | first }}",
        "{{ messages | map(attribute='content') | join }}",
        "{{ messages | tojson | safe }}",
    ],
)
def test_what_comes_of_a_message_never_counts_as_the_template_s(expression: str) -> None:
    assert written("{% set x = messages[0].content %}" + expression) == []


def test_a_role_is_as_good_as_the_template_s_own_text() -> None:
    assert written("{{ '<|' ~ messages[0].role ~ '|>' }}{{ messages[0].content }}") == ["<|user|>"]


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "empty loops": "{% for a in range(99999) if a < 0 %}{% endfor %}" * 100,
    "calls": "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "output": "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "nested lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested JSON": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "numbers": "{% set n = namespace(x=2) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "range": "{{ range(10 ** 9) | list }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "repeated text": "{{ 'a' * 10 ** 12 }}",
    "repeated list": "{{ [1] * 10 ** 12 }}",
    "replacing": "{{ ('a' * 9999).replace('a', 'a' * 9999) }}",
    "joining": "{{ ('a' * 9999).join(('a' * 9999) | list) }}",
    "padding": "{{ 'a'.ljust(10 ** 12) }}",
    "format": "{{ '{:999999999d}'.format(1) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "bytes": "{{ (1).to_bytes(10 ** 12) }}",
    "indent": "{{ messages | tojson(indent=999999999) }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_without_end_is_ended(source: str) -> None:
    begun = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"^chat: the model's chat template cannot render"):
        render(source)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ (messages | map('attr', '__class__')) | list }}",
        "{{ messages[0].content.spans.x }}",
        "{% include 'config.json' %}",
        "{% import '/etc/passwd' as x %}",
    ],
)
def test_a_template_reaches_nothing_but_its_variables(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^chat: the model's chat template cannot render"):
        render(source)


def test_what_a_template_refuses_is_told_in_its_words(family_template: str) -> None:
    with pytest.raises(InvalidRequest, match="refuses this conversation: no turn of tool is known"):
        render(family_template, Conversation((ChatMessage("tool", "42"),)))


def test_a_refusal_is_cut_to_a_line() -> None:
    with pytest.raises(InvalidRequest) as caught:
        render("{{ raise_exception('no' * 9999) }}")
    assert len(str(caught.value)) < 400


def test_the_date_is_known() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_json_is_readable_text() -> None:
    assert render("{{ {'a': 'ü'} | tojson }}") == '{"a": "ü"}'


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "chat.messages: must be 1 to 1024, are 0"),
        ([("user", "")] * (MAX_MESSAGES + 1), "chat.messages: must be 1 to 1024, are 1025"),
        ([("user", ""), ("usr", "")], "chat.messages[1].role: must be one of system, developer,"),
        ([("user", "x" * MAX_CONTENT_CHARS), ("user", "x")], "chat.messages: at most 2097152 char"),
    ],
)
def test_a_conversation_names_what_is_wrong_with_it(
    messages: list[tuple[str, str]], words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Conversation(tuple(ChatMessage(role, content) for role, content in messages))
    assert str(caught.value).startswith(words)


def save(folder: Path, **config: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def loaded(folder: Path) -> str:
    template = ChatTemplate.load(folder)
    assert template is not None
    return str.__str__(template.render(talk("hi")))


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    save(tmp_path, bos_token="<s>")
    assert ChatTemplate.load(tmp_path) is None


def test_a_template_file_comes_before_the_tokenizer_s_configuration(tmp_path: Path) -> None:
    save(tmp_path, chat_template="configured")
    assert loaded(tmp_path) == "configured"
    (tmp_path / "chat_template.jinja").write_text("its own file")
    assert loaded(tmp_path) == "its own file"


def test_of_several_templates_the_default_one_counts(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    save(tmp_path, chat_template=named)
    assert loaded(tmp_path) == "b"


def test_the_tokens_of_the_configuration_are_variables_and_the_template_s(tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ eos_token }}"
    save(tmp_path, bos_token="<s>", eos_token={"content": "</s>"}, chat_template=source)
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    text = template.render(talk("hi"))
    assert (text, text.spans) == ("<s></s>", ((0, 7),))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat_template.jinja", b"a\n{% if %}", r"chat_template\.jinja: chat template, line 2"),
        ("chat_template.jinja", b"{{ x | magic }}", "line 1: No filter named 'magic'"),
        ("chat_template.jinja", b"{{ " + b"(" * 9999, "does not compile"),
        ("chat_template.jinja", b"\xff", "cannot be read"),
        ("chat_template.jinja", b"a" * 1024 * 1025, "has more than 1048576 bytes"),
        ("tokenizer_config.json", b"{", "no JSON"),
        ("tokenizer_config.json", b"[]", "must hold an object"),
        ("tokenizer_config.json", b'{"chat_template": "{{"}', r"config\.json: chat template"),
    ],
)
def test_a_template_that_cannot_be_used_names_its_file(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        ChatTemplate.load(tmp_path)
