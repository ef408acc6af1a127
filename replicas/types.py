"""What crosses the borders of a replica: the request, its chunks, and who should serve it.

Plain frozen data without torch, so that gateway and router can import it. Limits are checked in one
place each: shapes of values in `Request.__post_init__`, what a given model and engine can hold in
`Engine.add`.
"""

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from trimode.replicas.errors import InvalidRequest

# Limits on what one request may carry; each is named in the error that enforces it.
MAX_STOP_IDS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_SAMPLES = 64
MAX_GRAMMAR_CHARS = 64 * 1024
MAX_SEED = 2**63 - 1


class Mode(StrEnum):
    """How a request is decoded. AUTO is the router's to resolve; an engine never sees it."""

    AUTO = "auto"
    AUTOREGRESSIVE = "autoregressive"
    BLOCK_DIFFUSION = "block_diffusion"
    SELF_SPECULATION = "self_speculation"


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # eos or a stop token id, the last id of the output; or a stop string ends in it
    LENGTH = "length"  # max_tokens reached
    GRAMMAR = (
        "grammar"  # its grammar met a limit and allows nothing more; the output is a beginning
    )
    DEADLINE = "deadline"  # timeout_s passed; what was generated until then was sent
    ABORTED = "aborted"  # cancelled


class Priority(IntEnum):
    """Service class; the lower number is served first."""

    INTERACTIVE = 0
    BATCH = 1


class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"  # llguidance's dialect of Lark


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language that the whole output must belong to."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """At most max_tokens tokens after start_id; then end_id is forced once and the text goes on."""

    max_tokens: int
    start_id: int
    end_id: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """What the gateway decided for a request, and in which order replicas should be tried."""

    pool: str
    replica_ids: tuple[str, ...]  # best first; empty: any
    reason: str


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked, tokenised and validated.

    Raises InvalidRequest that names the field and the limit.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    mode: Mode
    max_tokens: int
    # How tokens are chosen, in the order in which it is applied (docs/sampling.md).
    repetition_penalty: float = 1.0  # over prompt and output; 1 is none
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output, times the count
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # of the position-keyed noise
    n: int = 1  # samples that share the prompt; each has noise of its own
    num_logprobs: int | None = None  # alternatives beside the chosen token; None: no logprobs
    grammar: Grammar | None = None
    thinking: ThinkingBudget | None = None
    # When it ends, besides max_tokens.
    stop_ids: tuple[int, ...] = ()  # besides the checkpoint's eos
    stop_strings: tuple[str, ...] = ()
    min_tokens: int = 0  # eos and stop ids are banned before
    ignore_eos: bool = False
    # How it is decoded.
    block_size: int | None = None  # pinned by the client and then never changed; None: the engine's
    governed: bool = True  # False: the engine's largest block, always
    threshold: float | None = None  # of denoise passes and iterative drafts; None: the mode's
    use_adapter: bool = True  # False: drafts run without the draft adapter
    # How it is served.
    priority: Priority = Priority.INTERACTIVE
    cache_salt: str = ""  # requests share cached pages only under the same salt
    timeout_s: float | None = None  # what was left of the client's deadline when this was built
    ranking: Ranking | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InvalidRequest("prompt", "must hold at least one token")
        _check_range("max_tokens", self.max_tokens, 1, None)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_range("presence_penalty", self.presence_penalty, -10, 10)
        _check_range("frequency_penalty", self.frequency_penalty, -10, 10)
        _check_range("temperature", self.temperature, 0, 10)
        _check_range("top_k", self.top_k, 0, None)
        _check_range("top_p", self.top_p, 1e-6, 1)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("seed", self.seed, 0, MAX_SEED)
        _check_range("n", self.n, 1, MAX_SAMPLES)
        _check_range("num_logprobs", self.num_logprobs, 0, MAX_LOGPROBS)
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_range("block_size", self.block_size, 1, None)
        _check_range("threshold", self.threshold, 0, 1)
        _check_count("stop_token_ids", self.stop_ids, MAX_STOP_IDS)
        _check_count("stop_strings", self.stop_strings, MAX_STOP_STRINGS)
        _check_count("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for text in self.stop_strings:
            if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequest(
                    "stop_strings", f"each must have 1 to {MAX_STOP_STRING_CHARS} characters"
                )
        for _, bias in self.logit_bias:
            _check_range("logit_bias", bias, -100, 100)
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidRequest("logit_bias", "each token id may occur once")
        if self.grammar is not None and len(self.grammar.text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest("grammar", f"at most {MAX_GRAMMAR_CHARS} characters are allowed")
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            raise InvalidRequest(
                "grammar", "ends by itself: no min_tokens, no ignore_eos beside it"
            )
        if self.thinking is not None:
            _check_range("thinking_budget", self.thinking.max_tokens, 0, None)
            if self.grammar is not None:
                raise InvalidRequest("thinking_budget", "cannot be combined with a grammar")
        if self.mode is Mode.BLOCK_DIFFUSION:
            self._check_diffusion()

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def _check_diffusion(self) -> None:
        # Both need the tokens before a position when it is chosen; a denoise pass has only masks.
        if self.grammar is not None:
            raise InvalidRequest("grammar", "block diffusion cannot follow one; use another mode")
        if self.min_tokens:
            raise InvalidRequest("min_tokens", "block diffusion cannot keep it; use another mode")


def _check_range(field: str, value: float | None, lowest: float, highest: float | None) -> None:
    if value is None:
        return
    # Written so that NaN is refused, too.
    if highest is None and not value >= lowest:
        raise InvalidRequest(field, f"must be at least {lowest}, is {value}")
    if highest is not None and not lowest <= value <= highest:
        raise InvalidRequest(field, f"must be in [{lowest}, {highest}], is {value}")


def _check_count(field: str, values: tuple[object, ...], limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequest(field, f"at most {limit} are allowed, got {len(values)}")


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since the engine took the request."""

    queue_s: float  # until its first pass was launched
    first_token_s: float  # until its first chunk
    total_s: float  # until its last


@dataclass(frozen=True, slots=True)
class Finish:
    """The account of a finished sequence."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    forwards: int  # one for the prefill, whatever its chunks, then each pass of this sequence
    accepted: tuple[int, ...]  # tokens of each verify round before any cut; empty in other modes
    timings: Timings
    cached_tokens: int = 0  # of the prompt, found in the prefix cache


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities under the model's own softmax, before anything the request asks for."""

    logprob: float  # of the chosen token
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class Chunk:
    """What an engine committed for one sample of a request since its last chunk: the tokens of one
    step or, where the reader was slower than the engine, of several.
    """

    token_ids: tuple[int, ...]
    finish: Finish | None = None  # on the sample's last chunk
    index: int = 0  # of the sample, below the request's n
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one a token where they were asked for

    def then(self, later: "Chunk") -> "Chunk":
        """This and a later one of the same sample as one."""
        logprobs = self.logprobs
        if logprobs is not None:
            logprobs += later.logprobs or ()
        return Chunk(self.token_ids + later.token_ids, later.finish, self.index, logprobs)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a replica tells of the model it serves."""

    vocab_size: int
    max_positions: int
    block_size: int
    eos_id: int
    mask_id: int
    has_draft_adapter: bool
    dtype: str
    quantization: str | None = None  # of the decoder's projections; None: of that dtype, too


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is at one moment."""

    waiting: int
    running: int
    free_pages: int  # cached pages that nobody uses are free, too
    total_pages: int
    cached_pages: int = 0  # in the prefix cache, in use or not
    num_preemptions: int = 0  # since the start
    running_by_mode: dict[str, int] = field(default_factory=dict)
