"""What the tests share: a tiny random model, an engine to drain, a runner without a model."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.strategy import PassKind, Pending, Query
from trimode.replicas.engine import Engine
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.page_tables import PageCopy
from trimode.replicas.scheduled import Answers, Scheduled
from trimode.replicas.types import Finish, Mode, ModelInfo, Request

torch.set_num_threads(1)

ADAPTER_RANK, ADAPTER_ALPHA = 4, 8.0

# Small, and every rule acts: query width 48 differs from hidden size 32, positions pass YaRN's
# original context of 32 at once, and the mask id is not the last one.
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mask_token_id": 3,
    "block_size": 32,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "llama_4_scaling_beta": 0.1,
    },
}


@pytest.fixture(scope="session")
def tiny_config_dict() -> dict[str, Any]:
    """The config.json of the tiny model. Copy it before a change."""
    return TINY_CONFIG


@pytest.fixture(scope="session")
def tiny_config(tiny_config_dict: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(tiny_config_dict)


@pytest.fixture(scope="session")
def tiny_model(tiny_config: ModelConfig) -> Callable[..., NemotronLabsDiffusionModel]:
    """tiny_model(dtype): the same random weights in any dtype, draft adapter included.

    All embeddings share a direction, so that drafts agree with the causal path about every other
    time, and the head is sharp enough for confidences all over (0, 1).
    """
    built: dict[torch.dtype, NemotronLabsDiffusionModel] = {}

    def build(dtype: torch.dtype = torch.float64) -> NemotronLabsDiffusionModel:
        if dtype not in built:
            model = NemotronLabsDiffusionModel(tiny_config)
            model.add_draft_adapter(ADAPTER_RANK, ADAPTER_ALPHA)
            generator = torch.Generator().manual_seed(1)
            scales = {"embed_tokens": 0.4, "norm": 0.2, "o_proj": 0.4, "head": 1.2, "lora": 0.08}
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    scale = next((s for part, s in scales.items() if part in name), 0.3)
                    noise = torch.randn(weight.shape, generator=generator) * scale
                    if "embed_tokens" in name:
                        noise += torch.randn(weight.shape[1], generator=generator)
                    weight.copy_(1 + noise if "norm" in name else noise)
            built[dtype] = model.to(dtype).eval().requires_grad_(False)
        return built[dtype]

    return build


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors start as NaN, so that whoever reads what nobody wrote is found out."""
    # On a GPU some of what references are made of has no deterministic form; it only warns there.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """tests/reference.py: naive decoders without a cache."""
    path = Path(__file__).with_name("reference.py")
    spec = importlib.util.spec_from_file_location("trimode_test_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scripted_id(seed: int, position: int) -> int:
    """A fixed pseudo-random token id of the tiny vocabulary for each (seed, position); never eos
    nor mask.
    """
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=2).digest()
    return 4 + int.from_bytes(digest) % 60


@dataclass(frozen=True, slots=True)
class ScriptedPass:
    """A pass of a ScriptedRunner."""

    answers: list[Answers]
    by_sequence: dict[Any, tuple[Query, Answers]]  # queries with all ids known


def _with_ids(item: Scheduled, before: ScriptedPass | None) -> Query:
    """What the device makes of a query that hangs on an unread pass, told in plain words."""
    query = item.query
    if query.pending is None:
        return query
    assert before is not None
    asked, answers = before.by_sequence[item.sequence]
    if query.pending is Pending.DRAFTS:
        token_ids = [asked.token_ids[0], *answers.token_ids]
        return replace(query, token_ids=token_ids, pending=None)
    kept = 1
    if len(asked.answers) > 1:
        for draft, answer in zip(asked.token_ids[1:], answers.token_ids, strict=False):
            if draft != answer:
                break
            kept += 1
    token_ids = [answers.token_ids[kept - 1], *query.token_ids[1:]]
    return replace(query, token_ids=token_ids, start=query.start + kept - 1, pending=None)


class ScriptedRunner:
    """A ModelRunner without a model: the token of a position is a function of seed and position.

    Block passes give it wrong where `drafts_right(seed, position)` is false; confidences are one of
    0.1, 0.5 and 0.9.
    """

    def __init__(
        self,
        token_at: Callable[[int, int], int] = scripted_id,
        drafts_right: Callable[[int, int], bool] = lambda seed, position: position % 3 != 0,
    ) -> None:
        self.info = ModelInfo(
            vocab_size=64,
            max_positions=512,
            block_size=32,
            eos_id=2,
            mask_id=3,
            has_draft_adapter=True,
            dtype="float64",
        )
        self.passes: list[list[Scheduled]] = []
        self.copies: list[PageCopy] = []
        self._token_at = token_at
        self._drafts_right = drafts_right

    def launch(
        self,
        scheduled: SequenceOf[Scheduled],
        before: ScriptedPass | None = None,
        copies: SequenceOf[PageCopy] = (),
    ) -> ScriptedPass:
        self.passes.append(list(scheduled))
        self.copies += copies
        queries = [_with_ids(item, before) for item in scheduled]
        answers = [
            self._answer(query, item.sequence.request.seed)
            for item, query in zip(scheduled, queries, strict=True)
        ]
        sequences = [item.sequence for item in scheduled]
        return ScriptedPass(
            answers, dict(zip(sequences, zip(queries, answers, strict=True), strict=True))
        )

    def read(self, launched: ScriptedPass) -> list[Answers]:
        return launched.answers

    def _answer(self, query: Query, seed: int) -> Answers:
        causal = query.kind is PassKind.CAUSAL
        token_ids, confidences = [], []
        for index in query.answers:
            position = query.start + index + causal
            token_id = self._token_at(seed, position)
            if not causal and not self._drafts_right(seed, position):
                token_id = 4 + (token_id - 3) % 60
            token_ids.append(token_id)
            confidences.append((0.1, 0.5, 0.9)[position % 3])
        return Answers(token_ids, confidences if query.wants_confidence else [])


@pytest.fixture(scope="session")
def scripted_runner() -> type[ScriptedRunner]:
    return ScriptedRunner


@pytest.fixture(scope="session")
def token_at() -> Callable[[int, int], int]:
    """token_at(seed, position): what a ScriptedRunner answers unless told otherwise."""
    return scripted_id


@dataclass(frozen=True, slots=True)
class Decoded:
    """One request's output and its account."""

    token_ids: tuple[int, ...]
    finish: Finish


@pytest.fixture(scope="session")
def drain() -> Callable[..., dict[str, Decoded]]:
    """drain(engine, requests=()): add them, step until all is done -> what each request got."""

    def run(engine: Engine, requests: Iterable[Request] = ()) -> dict[str, Decoded]:
        for request in requests:
            engine.add(request)
        tokens: dict[str, list[int]] = {}
        decoded: dict[str, Decoded] = {}
        while engine.has_work:
            for request_id, chunk in engine.step():
                tokens.setdefault(request_id, []).extend(chunk.token_ids)
                if chunk.finish is not None:
                    decoded[request_id] = Decoded(tuple(tokens[request_id]), chunk.finish)
            engine.check_integrity()
        return decoded

    return run


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """make_request(mode, num_prompt, **fields): a request whose prompt depends on its length."""

    def make(
        mode: Mode = Mode.AUTOREGRESSIVE,
        num_prompt: int = 5,
        max_tokens: int = 20,
        request_id: str = "r",
        **fields: Any,
    ) -> Request:
        prompt = tuple(scripted_id(num_prompt, position) for position in range(num_prompt))
        return Request(request_id, prompt, mode, max_tokens, **fields)

    return make


@pytest.fixture(scope="session")
def small_engine() -> Callable[..., EngineConfig]:
    """small_engine(**settings): an EngineConfig with few small pages."""

    def make(**settings: int) -> EngineConfig:
        return EngineConfig(**({"page_size": 4, "num_pages": 256} | settings))

    return make
