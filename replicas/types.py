"""What crosses the borders of a replica: the request, its chunks, and who should serve it.

Plain frozen data without torch, so that gateway and router can import it. Limits are checked in one
place each: shapes of values in `Request.__post_init__`, what a given model and engine can hold in
`Engine.add`.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from trimode.replicas.errors import InvalidRequest

MAX_STOP_IDS = 64
MAX_SEED = 2**63 - 1


class Mode(StrEnum):
    """How a request is decoded. AUTO is the router's to resolve; an engine never sees it."""

    AUTO = "auto"
    AUTOREGRESSIVE = "autoregressive"
    BLOCK_DIFFUSION = "block_diffusion"
    SELF_SPECULATION = "self_speculation"


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # eos or a stop token id, which is the last id of the output
    LENGTH = "length"  # max_tokens reached
    ABORTED = "aborted"  # cancelled, or past its deadline


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
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0  # of the position-keyed noise
    stop_ids: tuple[int, ...] = ()  # besides the checkpoint's eos
    block_size: int | None = None  # pinned by the client and then never changed; None: the engine's
    threshold: float | None = (
        None  # of denoise passes and iterative drafts; None: the mode's default
    )
    use_adapter: bool = True  # False: drafts run without the draft adapter
    timeout_s: float | None = None  # what was left of the client's deadline when this was built
    ranking: Ranking | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InvalidRequest("prompt", "must hold at least one token")
        if self.max_tokens < 1:
            raise InvalidRequest("max_tokens", f"must be at least 1, is {self.max_tokens}")
        if not 0 <= self.temperature <= 10:  # also refuses NaN
            raise InvalidRequest("temperature", f"must be in [0, 10], is {self.temperature}")
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequest("seed", f"must be in [0, 2^63), is {self.seed}")
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise InvalidRequest(
                "stop_token_ids", f"at most {MAX_STOP_IDS} are allowed, got {len(self.stop_ids)}"
            )
        if self.block_size is not None and self.block_size < 1:
            raise InvalidRequest("block_size", f"must be at least 1, is {self.block_size}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InvalidRequest("threshold", f"must be in [0, 1], is {self.threshold}")


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


@dataclass(frozen=True, slots=True)
class Chunk:
    """All tokens that one engine step committed for one request."""

    token_ids: tuple[int, ...]
    finish: Finish | None = None  # on the last chunk


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


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is at one moment."""

    waiting: int
    running: int
    free_pages: int
    total_pages: int
    running_by_mode: dict[str, int] = field(default_factory=dict)
