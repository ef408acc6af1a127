"""ModelRunner: one forward pass over a batch. Where answers come from, and the seam for anything
that can answer.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from trimode.kernels.kv_cache import KVCache, copy_page
from trimode.kernels.paged_attention import paged_attention
from trimode.kernels.rope import Rotary, rotate_and_write
from trimode.kernels.sampling import Sampled, sample
from trimode.replicas.batch import Batch
from trimode.replicas.config import EngineConfig
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.page_tables import PageCopy
from trimode.replicas.scheduled import Answers, Scheduled
from trimode.replicas.types import ModelInfo

Pass = TypeVar("Pass")


class ModelRunner(Protocol[Pass]):
    """Answers the queries of one pass after another."""

    info: ModelInfo

    def launch(
        self,
        scheduled: SequenceOf[Scheduled],
        before: Pass | None = None,
        copies: SequenceOf[PageCopy] = (),
    ) -> Pass:
        """Start a pass without waiting for its answers. before: the unread pass whose answers
        pending queries need. copies are made first, in order.
        """
        ...

    def read(self, launched: Pass) -> list[Answers]:
        """Wait for a pass: one Answers for each scheduled query, in order."""
        ...


def run_pass(runner: ModelRunner[Any], scheduled: SequenceOf[Scheduled]) -> list[Answers]:
    """Launch a pass and read it."""
    return runner.read(runner.launch(scheduled))


@dataclass(frozen=True, slots=True)
class TorchPass:
    """A launched pass: its answers are, or will be, on the device."""

    batch: Batch
    sampled: Sampled


class TorchModelRunner:
    """The real model over a paged KV cache, on one device."""

    def __init__(self, model: NemotronLabsDiffusionModel, config: EngineConfig) -> None:
        model.pack()
        self._model = model
        self._page_size = config.page_size
        weight = model.diffusion_head.weight
        self._device = weight.device
        shape = model.config
        self._cache = KVCache.allocate(
            shape.num_layers,
            config.num_pages * config.page_size,
            shape.num_kv_heads,
            shape.head_dim,
            weight.dtype,
            weight.device,
        )
        self.info = ModelInfo(
            vocab_size=shape.vocab_size,
            max_positions=shape.max_positions,
            block_size=shape.block_size,
            eos_id=shape.eos_id,
            mask_id=shape.mask_id,
            has_draft_adapter=model.has_draft_adapter,
            dtype=str(weight.dtype).removeprefix("torch."),
        )

    @torch.inference_mode()
    def launch(
        self,
        scheduled: SequenceOf[Scheduled],
        before: TorchPass | None = None,
        copies: SequenceOf[PageCopy] = (),
    ) -> TorchPass:
        info = self.info
        for copy in copies:
            copy_page(self._cache, copy.source, copy.target, self._page_size)
        unread = None if before is None else before.batch.unread(before.sampled)
        batch = Batch.build(
            scheduled, self._page_size, info.mask_id, info.vocab_size, self._device, unread
        )

        def attend(layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
            query = rotate_and_write(qkv, rotary, self._cache, layer, batch.slots)
            return paged_attention(query, self._cache, layer, batch.attention)

        hidden = self._model(batch.token_ids, batch.positions, attend, batch.draft_rows)
        if len(batch.answer_rows) == 0:  # a prefill chunk that is not the last one, alone
            return TorchPass(batch, Sampled(batch.answer_rows, hidden.new_empty(0)))
        logits = self._model.logits(hidden[batch.answer_rows])
        return TorchPass(batch, sample(logits, batch.sampling))

    def read(self, launched: TorchPass) -> list[Answers]:
        return launched.batch.split(launched.sampled)
