"""A layer of each published size at its full width, with random weights, against transformers'
Ministral3: float32, also where YaRN has slowed the slow dimensions and queries are scaled.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel, dense_attention

FIXTURES = Path(__file__).parent / "fixtures"
NUM_TOKENS, VOCAB = 20, 256
NARROW = {"hidden_size": 64, "intermediate_size": 64}
FAR = 3 * 16384 - 10  # the block lies astride a step of the query scaling


def random_model(raw: dict[str, Any]) -> NemotronLabsDiffusionModel:
    """Weights of unit gain, so that every layer counts. One pool of noise, cut differently for each
    weight, fills them at the speed of memory.
    """
    with torch.device("meta"):
        model = NemotronLabsDiffusionModel(ModelConfig.from_dict(raw))
    model = model.to_empty(device="cpu").requires_grad_(False)
    model.encoder.rotary = type(model.encoder.rotary)(model.config)
    pool = torch.empty(1_000_003).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    for index, (name, view) in enumerate(model.published_tensors().items()):
        if view.dim() == 1:
            view.copy_(1 + pool[: len(view)] / 2)
            continue
        bound = 1.0 if "embed" in name else (3 / view.shape[1]) ** 0.5
        for column, values in enumerate(view.t()):  # in the order of the memory
            first = (7919 * column + 104_729 * index) % (len(pool) - len(values))
            torch.mul(pool[first : first + len(values)], bound, out=values)
    return model


def logits(model: NemotronLabsDiffusionModel, ids: Tensor, start: int, mask: Tensor) -> Tensor:
    positions = torch.arange(start, start + len(ids))
    hidden = model(ids, positions, lambda _, qkv, rotary: dense_attention(qkv, rotary, mask))
    return model.logits(hidden)


def their_logits(oracle: Any, ids: Tensor, start: int, mask: Tensor) -> Tensor:
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    out = oracle(
        input_ids=ids[None],
        attention_mask=bias[None, None],
        position_ids=torch.arange(start, start + len(ids))[None],
        use_cache=False,
    )
    result: Tensor = out.logits[0]
    return result


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        pytest.param("3B", {}, id="3B"),
        pytest.param("14B", NARROW, id="14B, its rotation alone"),
        pytest.param("8B", {}, id="8B", marks=pytest.mark.slow),
        pytest.param("14B", {}, id="14B", marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_full_width_layers_answer_as_transformers_does(size: str, changes: dict[str, int]) -> None:
    from trimode.cluster.bench.transformers_baseline import as_ministral  # here: it takes seconds

    raw = json.loads((FIXTURES / size / "config.json").read_text())
    raw |= {"num_hidden_layers": 1, "vocab_size": VOCAB} | changes
    model = random_model(raw)
    oracle = as_ministral(model, raw, attn_implementation="eager")
    ids = torch.randint(VOCAB, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    causal = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
    block = causal.clone()
    block[-8:] = True
    # Far out, an angle's own float32 is off by thousandths of a turn.
    for start, mask, most in ((0, causal, 1e-5), (FAR, causal, 1e-3), (FAR, block, 1e-3)):
        got, wanted = logits(model, ids, start, mask), their_logits(oracle, ids, start, mask)
        ratio = float((got - wanted).norm() / wanted.norm())
        assert ratio < most
