"""The Jinja environment that chat templates run in: sandboxed, bounded in time and text, and
tracing which text is the template's own.

A template comes with a checkpoint, and what it renders comes with a request; neither is trusted.
"""

import json
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.environment import Template
from jinja2.exceptions import TemplateRuntimeError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from trimode.cluster.traced_text import TracedText

MAX_RENDER_S = 2.0
MAX_INT_BITS = 256  # of a number that a template computes
MAX_INDENT = 16

# What is left out makes text or lists of any size from one small number, or formats, which loses
# the origin of text.
FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby",
    "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "reverse", "round", "select", "selectattr", "sort", "title", "trim",
    "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
GLOBALS = ("range", "dict", "namespace")
TEXT_METHODS = (
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join",
    "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
    "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip",
    "swapcase", "title", "upper",
)  # fmt: skip


class Refused(TemplateRuntimeError):
    """The template itself says that it cannot render this: its raise_exception()."""


class RenderContext(Context):
    """The variables of one rendering, and when it must be done."""

    def __init__(self, environment: "TemplateEnvironment", *args: Any, **kwargs: Any) -> None:
        super().__init__(environment, *args, **kwargs)
        self._max_render_s = environment.max_render_s
        self._deadline = time.monotonic() + environment.max_render_s

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        context = super().derived(locals)
        assert isinstance(context, RenderContext)
        context._deadline = self._deadline  # a block has the time of the whole
        return context

    def check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise TemplateRuntimeError(f"it took more than {self._max_render_s:g} s")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Blocks are trimmed as transformers does, and templates find the helpers that it has."""

    context_class = RenderContext
    concat = staticmethod(TracedText.concat)
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, max_render_s: float = MAX_RENDER_S) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_text_of,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
        )
        self.max_render_s = max_render_s
        self.literals: dict[str, TracedText] = {}  # every constant text of the templates
        self.filters = {name: self.filters[name] for name in FILTERS} | {
            "concat_traced": _concat,
            "timed": _timed,
            "join": _join,
            "replace": _replace,
            "safe": _text_of,  # nothing is escaped here
            "string": _text_of,
            "tojson": _to_json,
        }
        self.globals = {name: self.globals[name] for name in GLOBALS} | {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def build(self, source: str) -> Template:
        """A template that can render. Raises TemplateSyntaxError, and what else Jinja may."""
        tree = self.parse(source)
        _Tracing(self.literals).visit(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in TEXT_METHODS
        if isinstance(obj, int | float | bytes):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No str.format: it is not among TEXT_METHODS."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(__context, RenderContext)
        __context.check_time()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):  # its methods are bounded
            __obj = getattr(TracedText.of(owner), __obj.__name__)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        match operator, left, right:
            case "+", str(), str():
                return TracedText.concat((left, right))
            case "+", list() | tuple(), list() | tuple():
                _check_length(len(left) + len(right))
            case "*", str(), int():
                return TracedText.of(left) * right
            case "*", int(), str():
                return TracedText.of(right) * left
            case "*", list() | tuple(), int():
                _check_length(len(left) * right)
            case "*", int(), list() | tuple():
                _check_length(len(right) * left)
            case "*", int(), int():
                _check_bits(left.bit_length() + right.bit_length())
            case "**", int(), int():
                _check_bits(left.bit_length() * max(right, 1))
            case "%", str(), _:
                raise TemplateRuntimeError("% does not format text here; use ~")
        return super().call_binop(context, operator, left, right)


class GenerationTag(Extension):
    """{% generation %} marks what a model is trained to say; what it holds is rendered as is."""

    tags = {"generation"}  # noqa: RUF012 # Jinja types it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Tracing(NodeTransformer):
    """Makes constant texts traced ones, `~` join them, and loops watch the time."""

    def __init__(self, literals: dict[str, TracedText]) -> None:
        self._literals = literals

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return self._literal(node, node.data)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return self._literal(node, node.value) if isinstance(node.value, str) else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.node = self.visit(node.node)
        if not isinstance(node.arg, nodes.Const):  # a name is looked up, not rendered
            node.arg = self.visit(node.arg)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "concat_traced")

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "timed")
        return node

    def _literal(self, node: nodes.Node, text: str) -> nodes.Node:
        self._literals[text] = TracedText.written(text)
        literals = nodes.EnvironmentAttribute("literals", lineno=node.lineno)
        key = nodes.Const(text, lineno=node.lineno)
        return nodes.Getitem(literals, key, "load", lineno=node.lineno)


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _timed(context: RenderContext, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        context.check_time()
        yield item


def _text_of(value: Any) -> str:
    """What a value puts out. A list may hold itself many times over, thus have text without end."""
    if value is None or isinstance(value, str | int | float | Undefined):
        return str(value)
    raise TemplateRuntimeError(f"a {type(value).__name__} is not text; tojson makes it some")


def _concat(values: Iterable[Any]) -> TracedText:
    return TracedText.concat(map(_text_of, values))


def _join(values: Iterable[Any], separator: str = "", attribute: str | None = None) -> TracedText:
    if attribute is not None:
        values = (value[attribute] for value in values)
    return TracedText.of(separator).join(map(_text_of, values))


def _replace(text: Any, old: str, new: str, count: int = -1) -> TracedText:
    return TracedText.of(_text_of(text)).replace(old, new, count)


@pass_context
def _to_json(
    context: RenderContext,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not (isinstance(indent, int) and indent <= MAX_INDENT):
        raise TemplateRuntimeError(f"tojson: indent is a number of at most {MAX_INDENT}")
    if sum(map(len, separators or ())) > MAX_INDENT:
        raise TemplateRuntimeError(f"tojson: separators have at most {MAX_INDENT} characters")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return TracedText.concat(_timed(context, encoder.iterencode(value)))


def _raise_exception(message: Any) -> NoReturn:
    raise Refused(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _check_length(length: int) -> None:
    if length > MAX_RANGE:
        raise TemplateRuntimeError(f"a list of more than {MAX_RANGE} items")


def _check_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise TemplateRuntimeError(f"a number of more than {MAX_INT_BITS} bits")
