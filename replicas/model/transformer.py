"""NemotronLabsDiffusionModel: one backbone and one head for all three decoding modes.

It knows nothing of modes: a pass is token ids, positions, an `Attend` that keeps keys and values
and applies the mask, and the rows that run with the draft adapter on.
"""

from functools import partial
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional

from trimode.kernels.draft_adapter import DraftRows
from trimode.kernels.rope import Rotary, rotate
from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.layers import (
    DecoderLayer,
    DraftAdapter,
    Projection,
    RMSNorm,
    RotaryEmbedding,
)


class Attend(Protocol):
    """Keeps one layer's new keys and values and answers the queries under the pass's mask."""

    def __call__(self, layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
        """qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], as projected and not yet
        rotated -> [num_tokens, num_heads, head_dim].
        """
        ...


class Encoder(nn.Module):
    """Embedding, decoder layers and final norm (the published name of the backbone)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)


class NemotronLabsDiffusionModel(nn.Module):
    """The published architecture (model.md sections 1, 2 and 4): arXiv 2607.05722."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.diffusion_head = Projection(config.hidden_size, config.vocab_size)

    def forward(
        self,
        token_ids: Tensor,  # [num_tokens] int64
        positions: Tensor,  # [num_tokens] int64, absolute
        attend: Attend,
        draft_rows: DraftRows | None = None,  # rows with the adapter on
    ) -> Tensor:
        """Hidden states after the final norm, [num_tokens, hidden_size]."""
        x = functional.embedding(token_ids, self.encoder.embed_tokens.weight)
        rotary = self.encoder.rotary(positions, x.dtype)
        update: Tensor | None = None
        for index, layer in enumerate(self.encoder.layers):
            x, update = layer(x, update, rotary, partial(attend, index), draft_rows)
        out: Tensor = self.encoder.norm(x, update)[0]
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden_size] -> [num_rows, vocab_size], in the model's dtype."""
        out: Tensor = self.diffusion_head(hidden)
        return out

    def pack(self) -> None:
        """Get ready to serve on a CPU: the weights must not change any more."""
        for module in self.modules():
            if isinstance(module, Projection):
                module.pack()

    def add_draft_adapter(self, rank: int, alpha: float) -> None:
        """Give every o_proj an (empty) draft adapter on the model's own device and dtype."""
        for layer in self._layers():
            weight = layer.self_attn.o_proj.weight
            adapter = DraftAdapter(self.config, rank, alpha)
            layer.self_attn.draft_adapter = adapter.to(device=weight.device, dtype=weight.dtype)

    @property
    def has_draft_adapter(self) -> bool:
        return self._layers()[0].self_attn.draft_adapter is not None

    def published_tensors(self) -> dict[str, Tensor]:
        """Views of the base weights under their names in a checkpoint file.

        Loading copies into these views and saving reads them, so this is the one place that knows
        which of our fused matrices holds what.
        """
        views: dict[str, Tensor] = {
            "encoder.embed_tokens.weight": self.encoder.embed_tokens.weight,
            "encoder.norm.weight": self.encoder.norm.weight,
            "diffusion_head.weight": self.diffusion_head.weight,
        }
        for index, layer in enumerate(self._layers()):
            prefix, attention = f"encoder.layers.{index}", layer.self_attn
            query, key, value = attention.qkv_proj.weight.split(attention.widths, dim=0)
            gate, up = layer.mlp.gate_up_proj.weight.chunk(2, dim=0)
            views |= {
                f"{prefix}.input_layernorm.weight": layer.input_layernorm.weight,
                f"{prefix}.post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
                f"{prefix}.self_attn.q_proj.weight": query,
                f"{prefix}.self_attn.k_proj.weight": key,
                f"{prefix}.self_attn.v_proj.weight": value,
                f"{prefix}.self_attn.o_proj.weight": attention.o_proj.weight,
                f"{prefix}.mlp.gate_proj.weight": gate,
                f"{prefix}.mlp.up_proj.weight": up,
                f"{prefix}.mlp.down_proj.weight": layer.mlp.down_proj.weight,
            }
        return {name: view.detach() for name, view in views.items()}

    def published_adapter_tensors(self) -> dict[str, Tensor]:
        """Views of the draft adapter under PEFT's names, as `linear_spec_lora/` holds them."""
        views: dict[str, Tensor] = {}
        for index, layer in enumerate(self._layers()):
            adapter = layer.self_attn.draft_adapter
            if adapter is None:
                raise CheckpointError("the model has no draft adapter")
            prefix = f"base_model.model.encoder.layers.{index}.self_attn.o_proj"
            views[f"{prefix}.lora_A.weight"] = adapter.lora_a.detach()
            views[f"{prefix}.lora_B.weight"] = adapter.lora_b.detach()
        return views

    def _layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.encoder.layers if isinstance(layer, DecoderLayer)]


def dense_attention(qkv: Tensor, rotary: Rotary, mask: Tensor, batch: int = 1) -> Tensor:
    """Attention without a cache, for training and for naive decoding.

    qkv [batch * len, (num_heads + 2 * num_kv_heads) * head_dim], as `Attend` has it; mask [len,
    len] or [batch, 1, len, len] bool, True where the query (row) may see the key (column). Result
    [batch * len, num_heads, head_dim].
    """
    query, key, value = (
        part.unflatten(0, (batch, -1)).transpose(1, 2) for part in rotate(qkv, rotary)
    )  # [batch, heads, len, head_dim]
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)
