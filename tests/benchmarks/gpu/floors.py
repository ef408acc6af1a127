"""The least that a pass can take on a card: the larger of the bytes that it must move over the
card's bandwidth and of the operations that it must do over the card's matrix rate.
"""

from dataclasses import dataclass

from trimode.replicas.model.config import ModelConfig

ITEMSIZE = 2  # bfloat16: head, KV, draft adapter, and weights that are not quantised


@dataclass(frozen=True, slots=True)
class Card:
    """What was measured of it."""

    bytes_per_s: float  # of a copy, read and written
    flops_per_s: float  # of a matrix product in bfloat16


@dataclass(frozen=True, slots=True)
class PassShape:
    """Sequences that all look alike."""

    num_sequences: int
    rows: int  # of each
    context_len: int  # slots that each has before the pass
    drafts: bool


@dataclass(frozen=True, slots=True)
class Floors:
    """Of one model on one card."""

    config: ModelConfig
    card: Card
    weight_itemsize: int = ITEMSIZE  # of the decoder's projections; 1 where they are float8
    adapter_rank: int = 128

    @property
    def decoder_weights(self) -> int:
        """Elements of all projections of all layers."""
        c = self.config
        attention = c.hidden_size * (2 * c.query_width + 2 * c.kv_width)
        return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.config.hidden_size * self.config.vocab_size

    @property
    def adapter_weights(self) -> int:
        c = self.config
        return c.num_layers * self.adapter_rank * (c.query_width + c.hidden_size)

    @property
    def weight_bytes(self) -> int:
        """Read by every pass: all but embedding and draft adapter."""
        norms = (2 * self.config.num_layers + 1) * self.config.hidden_size
        head = (self.head_weights + norms) * ITEMSIZE
        return self.decoder_weights * self.weight_itemsize + head

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.config.num_layers * self.config.kv_width * ITEMSIZE

    @property
    def weight_read_s(self) -> float:
        return self.weight_bytes / self.card.bytes_per_s

    def num_bytes(self, shape: PassShape) -> int:
        """Weights and KV read, logits written and read."""
        rows = shape.num_sequences * shape.rows
        slots = shape.num_sequences * (shape.context_len + shape.rows)
        logits = 2 * rows * self.config.vocab_size * ITEMSIZE
        adapter = self.adapter_weights * ITEMSIZE * shape.drafts
        return self.weight_bytes + adapter + slots * self.kv_bytes_per_token + logits

    def num_flops(self, shape: PassShape) -> int:
        """Products with weights, and attention; every row is asked for its answer."""
        rows = shape.num_sequences * shape.rows
        weights = self.decoder_weights + self.head_weights + self.adapter_weights * shape.drafts
        seen = shape.context_len + shape.rows
        attention = 4 * seen * self.config.query_width * self.config.num_layers
        return rows * (2 * weights + attention)

    def seconds(self, shape: PassShape) -> float:
        return max(
            self.num_bytes(shape) / self.card.bytes_per_s,
            self.num_flops(shape) / self.card.flops_per_s,
        )
