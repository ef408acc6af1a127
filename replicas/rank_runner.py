"""RankRunner: one pass on one device, from its PassInputs to its answers.

It knows no requests: with tensor parallelism every rank has one, and all are given the same inputs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimode.kernels.accept import num_accepted
from trimode.kernels.draft_adapter import DraftRows
from trimode.kernels.kv_cache import KVCache, copy_page
from trimode.kernels.paged_attention import AttentionInputs, paged_attention
from trimode.kernels.rope import Rotary, rotate_and_write
from trimode.kernels.sampling import Sampled, sample
from trimode.replicas.array_tree import to_device
from trimode.replicas.look_ahead import Outputs, resolve
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.pass_inputs import PassInputs


@dataclass(frozen=True, slots=True)
class RankPass:
    """A launched pass: what is, or will be, on the device."""

    sampled: Sampled
    outputs: Outputs


class RankRunner:
    """The real model over a paged KV cache, on one device."""

    def __init__(self, model: NemotronLabsDiffusionModel, num_pages: int, page_size: int) -> None:
        model.pack()
        self._model = model
        self._page_size = page_size
        weight, shape = model.diffusion_head.weight, model.config
        self._device = weight.device
        self._cache = KVCache.allocate(
            shape.num_layers,
            num_pages * page_size,
            shape.num_kv_heads,
            shape.head_dim,
            weight.dtype,
            weight.device,
        )

    @torch.inference_mode()
    def launch(self, inputs: PassInputs, before: RankPass | None = None) -> RankPass:
        """Start a pass of numpy inputs; nothing here waits for a GPU.

        before: the launched pass that pending ids hang on.
        """
        if inputs.copies is not None:
            for source, target in inputs.copies.tolist():
                copy_page(self._cache, source, target, self._page_size)
        there: PassInputs = to_device(replace(inputs, copies=None), self._device)
        if before is not None:
            there = resolve(there, before.outputs, self._page_size)
        hidden = self._forward(inputs, there)
        if len(there.answer_rows) == 0:  # a prefill chunk that is not the last one, alone
            return RankPass(Sampled(there.answer_rows, hidden.new_empty(0)), _no_outputs(there))
        logits = self._model.logits(hidden[there.answer_rows])
        sampled = sample(logits, there.sampling)
        return RankPass(sampled, _outputs(there, sampled.token_ids))

    def _forward(self, inputs: PassInputs, there: PassInputs) -> Tensor:
        """Hidden states [num_tokens, hidden_size]. inputs: the host's."""
        visible = inputs.visible if there.pending is None else there.visible.numpy(force=True)
        attention = AttentionInputs.build(
            inputs.query_start, visible, inputs.page_table, self._page_size, self._device
        )

        def attend(layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
            query = rotate_and_write(qkv, rotary, self._cache, layer, there.slots)
            return paged_attention(query, self._cache, layer, attention)

        draft_rows = None if there.draft_mask is None else DraftRows(there.draft_mask)
        hidden: Tensor = self._model(there.token_ids, there.positions, attend, draft_rows)
        return hidden


def _outputs(inputs: PassInputs, answers: Tensor) -> Outputs:
    accept = inputs.accept
    if accept is None:
        return Outputs(answers, None)
    accepted = num_accepted(
        inputs.token_ids, answers,
        accept.first_rows, accept.first_answers, accept.counts, accept.max_count,
    )  # fmt: skip
    return Outputs(answers, accepted)


def _no_outputs(inputs: PassInputs) -> Outputs:
    accept = inputs.accept
    return Outputs(inputs.answer_rows, None if accept is None else torch.ones_like(accept.counts))
