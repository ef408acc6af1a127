"""The layers of the decoder: RMSNorm, YaRN rotary embedding, attention projections, SwiGLU, draft
adapter.

Tensors are flat: every token of every sequence of a pass is one row. How keys and values are kept
and which of them a token sees is not decided here but by the `attend` that the caller hands in
(`transformer.Attend`). What a layer adds to the residual stream is added by the norm behind it, so
that the stream is read and written once.

A rank holds its shard of the heads, of the feed-forward's channels and of the vocabulary; what it
adds to the stream is its part of a sum over the group's ranks. The stream itself is everywhere.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimode.kernels.activation import silu_mul
from trimode.kernels.draft_adapter import DraftRows, add_draft_adapter
from trimode.kernels.fp8 import Fp8Rows, quantise_rows
from trimode.kernels.linear import Linear, linear_form
from trimode.kernels.linear_packed import lay_out
from trimode.kernels.norm import add_rms_norm
from trimode.kernels.rope import Rotary
from trimode.replicas.model.config import ModelConfig, RopeConfig
from trimode.replicas.model.parallel import Group, Shard

AttendLayer = Callable[[Tensor, Rotary], Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm of the residual stream, which it first brings up to date."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, update [num_tokens, size] -> norm of x + update, and x + update. x is used up."""
        return add_rms_norm(x, update, self.weight, self.eps)


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
    """From absolute positions to the rotation that every layer of a pass uses."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig, shard: Shard | None = None) -> None:
        """shard: of the heads that are turned; None: all."""
        super().__init__()
        shard = Shard.of(config, 0, 1) if shard is None else shard
        frequencies, self.magnitude = yarn_frequencies(config.rope, config.head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.rope = config.rope
        self.num_heads, self.num_kv_heads = len(shard.heads), len(shard.kv_heads)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """positions [num_tokens]; dtype: of the activations."""
        # Angles in float32 as the published code has them; only float64 runs keep float64.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        at = positions.to(wide)[:, None]
        angles = at * self.frequencies.to(wide)  # [num_tokens, head_dim / 2]
        turns = torch.floor(at[:, 0] / self.rope.original_max_positions)
        return Rotary(
            cos=angles.cos() * self.magnitude,
            sin=angles.sin() * self.magnitude,
            query_scale=1 + self.rope.query_scaling_beta * torch.log1p(turns),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
        )


class TokenEmbedding(nn.Embedding):
    """The vectors of token ids. Each rank looks up the ids that it holds."""

    def __init__(self, config: ModelConfig, shard: Shard, group: Group) -> None:
        super().__init__(shard.num_rows, config.hidden_size)
        self._first_id, self._num_ids = shard.token_ids.start, len(shard.token_ids)
        self._group = group

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [num_tokens] int64 -> [num_tokens, hidden_size]."""
        if self._group.size == 1:
            return functional.embedding(token_ids, self.weight)
        rows = token_ids - self._first_id
        is_held = (rows >= 0) & (rows < self._num_ids)
        x = functional.embedding(rows.where(is_held, 0), self.weight)
        return self._group.all_reduce(x.where(is_held[:, None], 0))


class Projection(nn.Linear):
    """A Linear without bias. To serve, it is given the form of product that is best for its weight,
    which must not change any more. A quantised one has no weight but that in float8, and serves
    only once it is prepared.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._fp8: Fp8Rows | None = None
        self._linear: Linear | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_linear": None}  # it cannot be copied, and the copy may change

    def quantise(self, device: torch.device) -> Fp8Rows:
        """Put the weight into float8 on the device; the wide one is freed, whoever has a view of
        it.
        """
        self._fp8 = quantise_rows(self.weight.detach().to(device))
        self.weight.untyped_storage().resize_(0)
        del self.weight
        return self._fp8

    @property
    def is_quantised(self) -> bool:
        return self._fp8 is not None

    def prepare(self, *, batch_invariant: bool) -> None:
        """Choose the product. Raises ValueError where there is none such."""
        if self._fp8 is None:
            weight = lay_out(self.weight.detach())
            self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        held = self.weight if self._fp8 is None else self._fp8
        self._linear = linear_form(held, batch_invariant=batch_invariant)

    def forward(self, x: Tensor) -> Tensor:
        if self._linear is None:
            return functional.linear(x, self.weight)
        return self._linear(x)


class DraftAdapter(nn.Module):
    """The draft LoRA of one o_proj: a low-rank product that only DRAFT rows receive."""

    def __init__(self, config: ModelConfig, shard: Shard, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.empty(rank, len(shard.heads) * config.head_dim))
        self.lora_b = nn.Parameter(torch.zeros(config.hidden_size, rank))
        self.scale = alpha / rank

    def forward(self, out: Tensor, x: Tensor, rows: DraftRows) -> Tensor:
        """out [num_tokens, hidden_size] plus the product of x [num_tokens, heads * head_dim]."""
        return add_draft_adapter(out, x, rows, self.lora_a, self.lora_b, self.scale)


class Attention(nn.Module):
    """Projections around an attention that the caller supplies. q, k and v share one matrix
    product.
    """

    def __init__(self, config: ModelConfig, shard: Shard, group: Group) -> None:
        super().__init__()
        query_width = len(shard.heads) * config.head_dim
        kv_width = len(shard.kv_heads) * config.head_dim
        self.widths = [query_width, kv_width, kv_width]
        self.qkv_proj = Projection(config.hidden_size, sum(self.widths))
        self.o_proj = Projection(query_width, config.hidden_size)
        self.draft_adapter: DraftAdapter | None = None
        self._group = group

    def forward(
        self,
        x: Tensor,  # [num_tokens, hidden_size]
        rotary: Rotary,
        attend: AttendLayer,
        draft_rows: DraftRows | None,
    ) -> Tensor:
        mixed = attend(self.qkv_proj(x), rotary).flatten(-2)  # [num_tokens, heads * head_dim]
        out: Tensor = self.o_proj(mixed)
        if draft_rows is not None and self.draft_adapter is not None:
            out = self.draft_adapter(out, mixed, draft_rows)
        return self._group.all_reduce(out)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up share one matrix product."""

    def __init__(self, config: ModelConfig, shard: Shard, group: Group) -> None:
        super().__init__()
        self.gate_up_proj = Projection(config.hidden_size, 2 * len(shard.channels))
        self.down_proj = Projection(len(shard.channels), config.hidden_size)
        self._group = group

    def forward(self, x: Tensor) -> Tensor:  # [num_tokens, hidden_size]
        return self._group.all_reduce(self.down_proj(silu_mul(self.gate_up_proj(x))))


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config: ModelConfig, shard: Shard, group: Group) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, shard, group)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config, shard, group)

    def forward(
        self,
        x: Tensor,  # [num_tokens, hidden_size]: the residual stream, used up
        update: Tensor | None,  # [num_tokens, hidden_size]: what the layer before adds to it
        rotary: Rotary,
        attend: AttendLayer,
        draft_rows: DraftRows | None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and what is still to be added to it."""
        normed, x = self.input_layernorm(x, update)
        update = self.self_attn(normed, rotary, attend, draft_rows)
        normed, x = self.post_attention_layernorm(x, update)
        return x, self.mlp(normed)
