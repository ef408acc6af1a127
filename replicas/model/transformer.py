"""NemotronLabsDiffusionModel: one backbone and one head for all three decoding modes.

It knows nothing of modes: a pass is token ids, positions, an `Attend` that keeps keys and values
and applies the mask, and the rows that run with the draft adapter on.
"""

from collections.abc import Iterator
from functools import partial
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional

from trimode.kernels.draft_adapter import DraftRows
from trimode.kernels.rope import Rotary, rotate
from trimode.kernels.vocabulary import VocabularyShard
from trimode.replicas.errors import CheckpointError, ConfigError
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.layers import (
    DecoderLayer,
    DraftAdapter,
    Projection,
    RMSNorm,
    RotaryEmbedding,
    TokenEmbedding,
)
from trimode.replicas.model.parallel import Alone, Group, Shard
from trimode.replicas.model.target import Part, Target


class Attend(Protocol):
    """Keeps one layer's new keys and values and answers the queries under the pass's mask."""

    def __call__(self, layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
        """qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], as projected and not yet
        rotated -> [num_tokens, num_heads, head_dim]. Heads are those of this rank.
        """
        ...


class Encoder(nn.Module):
    """Embedding, decoder layers and final norm (the published name of the backbone)."""

    def __init__(self, config: ModelConfig, shard: Shard, group: Group) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(config, shard, group)
        self.layers = nn.ModuleList(
            DecoderLayer(config, shard, group) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config, shard)


class NemotronLabsDiffusionModel(nn.Module):
    """The published architecture (model.md sections 1, 2 and 4): arXiv 2607.05722."""

    def __init__(self, config: ModelConfig, group: Group | None = None) -> None:
        """group: the ranks that share the model; None: this one alone.

        Raises ConfigError where the model cannot be split over them.
        """
        super().__init__()
        group = Alone() if group is None else group
        self.config = config
        self.group = group
        self.shard = Shard.of(config, group.rank, group.size)
        self.encoder = Encoder(config, self.shard, group)
        self.diffusion_head = Projection(config.hidden_size, self.shard.num_rows)

    def forward(
        self,
        token_ids: Tensor,  # [num_tokens] int64
        positions: Tensor,  # [num_tokens] int64, absolute
        attend: Attend,
        draft_rows: DraftRows | None = None,  # rows with the adapter on
    ) -> Tensor:
        """Hidden states after the final norm, [num_tokens, hidden_size]."""
        x: Tensor = self.encoder.embed_tokens(token_ids)
        rotary = self.encoder.rotary(positions, x.dtype)
        update: Tensor | None = None
        for index, layer in enumerate(self.encoder.layers):
            x, update = layer(x, update, rotary, partial(attend, index), draft_rows)
        out: Tensor = self.encoder.norm(x, update)[0]
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_answers, hidden_size] -> [num_answers, vocab_size], or the columns that
        `vocabulary` says, in the model's dtype.
        """
        out: Tensor = self.diffusion_head(hidden)
        return out

    @property
    def vocabulary(self) -> VocabularyShard | None:
        """Which columns of the logits this rank has; None for all."""
        rank, num_rows = self.group.rank, self.shard.num_rows
        if self.group.size == 1:
            return None
        return VocabularyShard(rank * num_rows, self.config.vocab_size, self.group.all_gather)

    def prepare(self, *, batch_invariant: bool = False) -> None:
        """Choose every product for serving: the weights must not change any more.

        batch_invariant: a row has the same bits in any batch; changes nothing on a CPU. Raises
        ConfigError where a product has no such form.
        """
        for module in self.modules():
            if isinstance(module, Projection):
                try:
                    module.prepare(batch_invariant=batch_invariant)
                except ValueError as error:
                    raise ConfigError(f"engine.batch_invariant: {error}") from None

    def add_draft_adapter(self, rank: int, alpha: float) -> None:
        """Give every o_proj an (empty) draft adapter on the model's own device and dtype."""
        for layer in self._layers():
            weight = layer.input_layernorm.weight
            adapter = DraftAdapter(self.config, self.shard, rank, alpha)
            layer.self_attn.draft_adapter = adapter.to(device=weight.device, dtype=weight.dtype)

    @property
    def quantization(self) -> str | None:
        """Of the decoder's projections; None where they are as wide as all else."""
        return "fp8" if self._layers()[0].mlp.down_proj.is_quantised else None

    @property
    def has_draft_adapter(self) -> bool:
        return self._layers()[0].self_attn.draft_adapter is not None

    def targets(self) -> dict[str, Target]:
        """Where the base weights go, under their names in a checkpoint file.

        Loading and saving go by it: this is the one place that knows which of our fused matrices
        holds what, and which part of each tensor this rank has.
        """
        targets = {
            "encoder.embed_tokens.weight": self._ids(self.encoder.embed_tokens.weight),
            "encoder.norm.weight": Target(self.encoder.norm.weight.detach()),
            "diffusion_head.weight": self._ids(self.diffusion_head.weight),
        }
        for index, layer in enumerate(self._layers()):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                name = f"encoder.layers.{index}.{norm}.weight"
                targets[name] = Target(getattr(layer, norm).weight.detach())
        cuts = self._cuts()
        for projection, parts in self.decoder_projections():
            if projection.is_quantised:
                raise CheckpointError("the model is quantised and no longer has published tensors")
            views = projection.weight.split(list(parts.values()), dim=0)
            for name, view in zip(parts, views, strict=True):
                targets[name] = self._part(view, *cuts[name.split(".")[-2]])
        return targets

    def decoder_projections(self) -> Iterator[tuple[Projection, dict[str, int]]]:
        """Every projection but the head, with the published tensors that it holds one above the
        other: names, and how many rows each has.
        """
        for index, layer in enumerate(self._layers()):
            prefix, attention, mlp = f"encoder.layers.{index}", layer.self_attn, layer.mlp
            query, key, value = attention.widths
            yield (
                attention.qkv_proj,
                {
                    f"{prefix}.self_attn.q_proj.weight": query,
                    f"{prefix}.self_attn.k_proj.weight": key,
                    f"{prefix}.self_attn.v_proj.weight": value,
                },
            )
            rows = attention.o_proj.out_features
            yield attention.o_proj, {f"{prefix}.self_attn.o_proj.weight": rows}
            rows = mlp.gate_up_proj.out_features // 2
            yield (
                mlp.gate_up_proj,
                {f"{prefix}.mlp.gate_proj.weight": rows, f"{prefix}.mlp.up_proj.weight": rows},
            )
            rows = mlp.down_proj.out_features
            yield mlp.down_proj, {f"{prefix}.mlp.down_proj.weight": rows}

    def _cuts(self) -> dict[str, tuple[int, int, int]]:
        """How each kind of projection is cut for a rank: dimension, start, length of the whole."""
        config, shard = self.config, self.shard
        heads = (shard.heads.start * config.head_dim, config.query_width)
        kv_heads = (shard.kv_heads.start * config.head_dim, config.kv_width)
        channels = (shard.channels.start, config.intermediate_size)
        return {
            "q_proj": (0, *heads),
            "k_proj": (0, *kv_heads),
            "v_proj": (0, *kv_heads),
            "o_proj": (1, *heads),
            "gate_proj": (0, *channels),
            "up_proj": (0, *channels),
            "down_proj": (1, *channels),
        }

    def adapter_targets(self) -> dict[str, Target]:
        """Where the draft adapter goes, under PEFT's names as `linear_spec_lora/` holds them."""
        targets: dict[str, Target] = {}
        start = self.shard.heads.start * self.config.head_dim
        for index, layer in enumerate(self._layers()):
            adapter = layer.self_attn.draft_adapter
            if adapter is None:
                raise CheckpointError("the model has no draft adapter")
            prefix = f"base_model.model.encoder.layers.{index}.self_attn.o_proj"
            lora_a = self._part(adapter.lora_a, 1, start, self.config.query_width)
            targets[f"{prefix}.lora_A.weight"] = lora_a
            targets[f"{prefix}.lora_B.weight"] = Target(adapter.lora_b.detach())
        return targets

    def published_tensors(self) -> dict[str, Tensor]:
        """Views of the base weights that this rank holds, by their names in a checkpoint file."""
        return {name: target.view for name, target in self.targets().items()}

    def published_adapter_tensors(self) -> dict[str, Tensor]:
        """Views of this rank's draft adapter under PEFT's names."""
        return {name: target.view for name, target in self.adapter_targets().items()}

    def _ids(self, weight: Tensor) -> Target:
        held = self.shard.token_ids
        return self._part(weight[: len(held)], 0, held.start, self.config.vocab_size)

    def _part(self, view: Tensor, dim: int, start: int, full_len: int) -> Target:
        part = None if self.group.size == 1 else Part(dim, start, full_len)
        return Target(view.detach(), part)

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
