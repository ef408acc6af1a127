"""The layers of the decoder: RMSNorm, YaRN rotary embedding, attention projections, SwiGLU, draft
adapter.

Tensors are flat: every token of every sequence of a pass is one row. How keys and values are kept
and which of them a token sees is not decided here but by the `attend` that the caller hands in
(`transformer.Attend`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimode.replicas.model.config import ModelConfig, RopeConfig

AttendLayer = Callable[[Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (float64 stays so) whatever the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [num_tokens, size]
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def yarn_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] in float64 and the factor on cos and sin (arXiv
    2309.00071, 3.2-3.4).

    Dimensions that turn often inside the original context keep their frequency, those that turn
    less than once are slowed by `factor`, and a linear ramp joins the two.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    unscaled = rope.theta**-exponents  # [head_dim / 2]

    def dimension_that_turns(times: float) -> float:
        turns = rope.original_max_positions / (times * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension_that_turns(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_that_turns(rope.beta_slow)), head_dim - 1)
    width = high - low if high > low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    frequencies = unscaled * (1 - ramp) + unscaled / rope.factor * ramp

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    return frequencies, magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)


class RotaryEmbedding(nn.Module):
    """cos, sin and the query scale of absolute positions; computed once a pass, used by every
    layer.
    """

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies, self.magnitude = yarn_frequencies(config.rope, config.head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.rope = config.rope

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """positions [num_tokens] -> cos, sin [num_tokens, 1, head_dim], query scale [num_tokens, 1,
        1].
        """
        # Angles in float32 as the published code has them; only float64 runs keep float64.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions.to(wide)[:, None] * self.frequencies.to(
            wide
        )  # [num_tokens, head_dim / 2]
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        turns = torch.floor(positions.to(wide) / self.rope.original_max_positions)
        scale = 1 + self.rope.query_scaling_beta * torch.log1p(turns)
        cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        return cos.to(dtype), sin.to(dtype), scale.to(dtype)[:, None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head: x, result [num_tokens, num_heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class DraftAdapter(nn.Module):
    """The draft LoRA of one o_proj: a low-rank product that only DRAFT rows receive."""

    def __init__(self, config: ModelConfig, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.empty(rank, config.query_width))
        self.lora_b = nn.Parameter(torch.zeros(config.hidden_size, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:  # [num_draft_rows, query_width] -> [.., hidden_size]
        return functional.linear(functional.linear(x, self.lora_a), self.lora_b) * self.scale


class Attention(nn.Module):
    """Projections around an attention that the caller supplies. q, k and v share one matrix
    product.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.widths = [config.query_width, config.kv_width, config.kv_width]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.o_proj = nn.Linear(config.query_width, config.hidden_size, bias=False)
        self.draft_adapter: DraftAdapter | None = None

    def forward(
        self,
        x: Tensor,  # [num_tokens, hidden_size]
        rotary: tuple[Tensor, Tensor, Tensor],
        attend: AttendLayer,
        draft_rows: Tensor | None,  # [num_draft_rows] int64, None where no row drafts
    ) -> Tensor:
        cos, sin, query_scale = rotary
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim))
            for part in self.qkv_proj(x).split(self.widths, dim=-1)
        )
        query = rotate(query, cos, sin) * query_scale  # [num_tokens, num_heads, head_dim]
        key = rotate(key, cos, sin)  # [num_tokens, num_kv_heads, head_dim]
        mixed = attend(query, key, value).flatten(-2)  # [num_tokens, query_width]
        out: Tensor = self.o_proj(mixed)
        if draft_rows is not None and self.draft_adapter is not None:
            out = out.index_add(0, draft_rows, self.draft_adapter(mixed[draft_rows]).to(out.dtype))
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up share one matrix product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [num_tokens, hidden_size]
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(functional.silu(gate) * up)
        return out


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,  # [num_tokens, hidden_size]
        rotary: tuple[Tensor, Tensor, Tensor],
        attend: AttendLayer,
        draft_rows: Tensor | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, attend, draft_rows)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out
