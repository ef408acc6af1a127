"""The layers of the decoder: RMSNorm, YaRN rotary embedding, attention projections, SwiGLU, draft
adapter.

Tensors are flat: every token of every sequence of a pass is one row. How keys and values are kept
and which of them a token sees is not decided here but by the `attend` that the caller hands in
(`transformer.Attend`).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimode.kernels.linear import linear, pack_weight
from trimode.replicas.model.config import ModelConfig, RopeConfig

AttendLayer = Callable[[Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (float64 stays so) whatever the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [num_tokens, size]
        weight = self.weight
        if x.dtype == weight.dtype and x.dtype.itemsize >= 4 and not torch.is_grad_enabled():
            # Fewer operations than functional.rms_norm; a gradient through the norm of 0 is NaN.
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            scale = norm.mul_(norm).mul_(1 / x.shape[-1]).add_(self.eps).rsqrt_()
            out: Tensor = (x * scale).mul_(weight)
            return out
        # Narrow x is rounded before the weight is applied, as the published code has it.
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * (wide * scale).to(x.dtype)


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
    """cos and sin of absolute positions, the scale of the queries in them; computed once a pass,
    used by every layer.
    """

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies, self.magnitude = yarn_frequencies(config.rope, config.head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.rope = config.rope
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [num_tokens] -> cos, sin [num_tokens, num_heads + num_kv_heads, 2, head_dim /
        2]: of the query heads first, then of the key heads.
        """
        # Angles in float32 as the published code has them; only float64 runs keep float64.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        at = positions.to(wide)[:, None]
        angles = at * self.frequencies.to(wide)  # [num_tokens, head_dim / 2]
        turns = torch.floor(at / self.rope.original_max_positions)
        scale = 1 + self.rope.query_scaling_beta * torch.log1p(turns)  # [num_tokens, 1]
        factors = (
            torch.cat(
                (
                    scale.expand(-1, self.num_heads),
                    torch.ones_like(scale).expand(-1, self.num_kv_heads),
                ),
                dim=-1,
            )[..., None, None]
            * self.magnitude
        )  # [num_tokens, num_heads + num_kv_heads, 1, 1]
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.stack((cos, cos), dim=1), torch.stack((-sin, sin), dim=1)
        return (factors * cos[:, None]).to(dtype), (factors * sin[:, None]).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head: x, cos, sin, result [num_tokens, any, 2, head_dim / 2].

    sin is negative for the first half.
    """
    return torch.addcmul(x * cos, x.flip(2), sin)


class Projection(nn.Linear):
    """A Linear without bias whose weight [out_features, in_features] lies in memory input by input:
    a product with one row then streams it, about twice as fast on a CPU.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous().t())
        self._packed: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # it cannot be copied, and the copy may change

    def pack(self) -> None:
        """Make other products quicker, too; the weight must not change any more."""
        self._packed = pack_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self._packed)


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
        self.num_heads = config.num_heads
        self.widths = [config.query_width, config.kv_width, config.kv_width]
        self.qkv_proj = Projection(config.hidden_size, sum(self.widths))
        self.o_proj = Projection(config.query_width, config.hidden_size)
        self.draft_adapter: DraftAdapter | None = None

    def forward(
        self,
        x: Tensor,  # [num_tokens, hidden_size]
        rotary: tuple[Tensor, Tensor],
        attend: AttendLayer,
        draft_rows: Tensor | None,  # [num_draft_rows] int64, None where no row drafts
    ) -> Tensor:
        fused = self.qkv_proj(x)
        *rotated_widths, value_width = self.widths
        rotated, value = fused.split((sum(rotated_widths), value_width), dim=-1)
        # Queries and keys turn together: [num_tokens, num_heads + num_kv_heads, head_dim].
        rotated = rotate(rotated.unflatten(-1, (-1, 2, self.head_dim // 2)), *rotary).flatten(-2)
        query, key = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        value = value.unflatten(-1, (-1, self.head_dim))
        mixed = attend(query, key, value).flatten(-2)  # [num_tokens, query_width]
        out: Tensor = self.o_proj(mixed)
        if draft_rows is not None and self.draft_adapter is not None:
            out = out.index_add(0, draft_rows, self.draft_adapter(mixed[draft_rows]).to(out.dtype))
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up share one matrix product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Projection(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size)

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
        rotary: tuple[Tensor, Tensor],
        attend: AttendLayer,
        draft_rows: Tensor | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, attend, draft_rows)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out
