"""Where no message spells a special token, a chat has the text and the ids that transformers gives
it.
"""

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from trimode.cluster.chat_template import ChatMessage, ChatTemplate, Conversation
from trimode.cluster.tokenizer import Tokenizer
from trimode.replicas.model.config import BUNDLED_CHECKPOINT

FILE = str(BUNDLED_CHECKPOINT / "tokenizer.json")

# Habits of the templates in use, each with special tokens of the bundled tokenizer.
TEMPLATES = {
    "lines": """\
{{ bos_token }}
{% for message in messages %}
    {% if loop.first and message['role'] == 'system' %}
        {% continue %}
    {% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
    {% if loop.index0 > 4 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    "expressions": """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor -%}
{%- for m in messages -%}
{%- set text = m.content | default('', true) | string | trim -%}
{%- if m.role == 'assistant' and '</think>' not in text %}{% set text = '<think></think>' ~ text %}
{%- endif -%}
{{- '<|im_start|>' + m['role'] + ('!' if loop.index0 < ns.last else '') + '\\n' + text -}}
{{- '<|im_end|>' + '\\n' if not loop.last else eos_token -}}
{%- endfor -%}
""",
    "macros": """\
{%- macro open(role, name=none) %}{{ '<|im_start|>' ~ role }}{% if name is not none %} {{ name }}
{%- endif %}{{ '\\n' }}{% endmacro -%}
{%- for m in messages if m.content | length > 0 -%}
{{ open(m.role, name='x' if m.content is string else none) }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content.strip() }}<|im_end|>{% endgeneration %}
{%- else %}{{ m.content.replace('\\n', ' ') | upper }}<|im_end|>{% endif -%}
{%- else -%}nothing{%- endfor -%}
""",
    "whole": """\
{%- set parts = [bos_token] -%}
{%- for m in messages %}{% set parts = parts + ['<|im_start|>', m.role] %}{% endfor -%}
{{- (messages | map(attribute='content') | join('<|im_end|>')).rstrip() -}}
{{- messages[-1] | tojson -}}
{{- messages[1:] | selectattr('role', 'equalto', 'user') | list | length -}}
{{- messages[0].content.split(' ')[-1] ~ messages[0]['content'][:3] ~ '<think>' -}}
""",
}

CONTENTS = st.text(st.sampled_from("ab {}'<>|\n☃é_"), max_size=12)
TURNS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENTS), min_size=1, max_size=7
)


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    rust = RustTokenizer.from_file(FILE)
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>")


@cache
def build(source: str) -> tuple[ChatTemplate, Tokenizer]:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    return template, Tokenizer(RustTokenizer.from_file(FILE), 1, template)


@pytest.mark.parametrize("name", [*TEMPLATES, "family"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(turns=TURNS, prompt=st.booleans(), thinking=st.booleans())
def test_text_and_ids_are_those_of_transformers(
    oracle: Any,
    family_template: str,
    name: str,
    turns: list[tuple[str, str]],
    prompt: bool,
    thinking: bool,
) -> None:
    source = TEMPLATES.get(name, family_template)
    options: dict[str, Any] = {
        "chat_template": source, "add_generation_prompt": prompt, "enable_thinking": thinking,
    }  # fmt: skip
    messages = [{"role": role, "content": content} for role, content in turns]
    template, tokenizer = build(source)
    conversation = Conversation(
        tuple(ChatMessage(role, content) for role, content in turns), prompt, thinking
    )
    expected = oracle.apply_chat_template(messages, tokenize=False, **options)
    assert template.render(conversation) == expected
    ids = oracle.apply_chat_template(messages, return_dict=False, **options)
    assert tokenizer.encode_chat(conversation) == ids
