"""RankRunner: one pass on one device, from its PassInputs to its answers.

It knows no requests: with tensor parallelism every rank has one, and all are given the same inputs.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimode.kernels.accept import accept
from trimode.kernels.draft_adapter import DraftRows
from trimode.kernels.kv_cache import KVCache, copy_page
from trimode.kernels.paged_attention import paged_attention
from trimode.kernels.rope import Rotary, rotate_and_write
from trimode.kernels.sampling import Sampled, sample
from trimode.replicas.array_tree import to_device
from trimode.replicas.config import EngineConfig
from trimode.replicas.graph_keys import GraphKey
from trimode.replicas.look_ahead import Outputs, resolve
from trimode.replicas.model.safetensors_reader import Progress
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.pass_inputs import PassInputs
from trimode.replicas.pass_size import Size
from trimode.replicas.step_graphs import Capture, ForwardInputs, StepGraphs


@dataclass(frozen=True, slots=True)
class RankPass:
    """A launched pass: what is, or will be, on the device."""

    sampled: Sampled
    outputs: Outputs


class RankRunner:
    """The real model over a paged KV cache, on one device."""

    def __init__(
        self,
        model: NemotronLabsDiffusionModel,
        config: EngineConfig,
        capture: Capture | None = None,
    ) -> None:
        """capture: how smaller passes are captured; None: none is."""
        model.prepare(batch_invariant=config.batch_invariant)
        self._model = model
        self._vocabulary = model.vocabulary
        self._page_size = config.page_size
        self._batch_invariant = config.batch_invariant
        weight, shape = model.diffusion_head.weight, model.config
        self._device = weight.device
        self._cache = KVCache.allocate(
            shape.num_layers,
            config.pages * config.page_size,
            len(model.shard.kv_heads),
            shape.head_dim,
            weight.dtype,
            weight.device,
        )
        # A block begins inside the positions; one that is launched ahead, up to a block later.
        most_slots = shape.max_positions + 2 * config.max_block_size
        self._max_pages = -(-most_slots // config.page_size)
        self._graphs = None if capture is None else StepGraphs(self._forward, capture)

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
        forward = ForwardInputs(
            there.token_ids, there.positions, there.slots, there.attention, there.draft_mask
        )
        hidden = self._hidden(inputs.graph, forward)
        if len(there.answer_rows) == 0:  # a prefill chunk that is not the last one, alone
            nothing = hidden.new_empty(0, dtype=torch.float32)
            return RankPass(Sampled(there.answer_rows, nothing), Outputs(there.answer_rows))
        logits = self._model.logits(hidden[there.answer_rows])
        sampled = self._sample(logits, there)
        return RankPass(sampled, _outputs(there, sampled.token_ids))

    @torch.inference_mode()
    def capture(
        self, keys: SequenceOf[GraphKey], max_bytes: int, progress: Progress | None = None
    ) -> int:
        """Capture passes of these sizes, as far as the memory goes; how many were."""
        if self._graphs is None:
            return 0
        table = torch.zeros(
            max((key.num_sequences for key in keys), default=0), self._max_pages,
            dtype=torch.int32, device=self._device,
        )  # fmt: skip
        blanks = ((key, self._blank(key, table)) for key in keys)
        for done, _ in enumerate(self._graphs.capture(blanks, max_bytes), start=1):
            if progress is not None:
                progress(done, len(keys))
        return len(self._graphs)

    def _blank(self, key: GraphKey, page_table: Tensor) -> ForwardInputs:
        """Inputs of a size, all padding. page_table [any, num_pages]: shared by all sizes."""
        zeros = torch.zeros(key.num_tokens, dtype=torch.int64, device=self._device)
        attention = Size.of(key).blank_attention(page_table, self._page_size, self._batch_invariant)
        mask = torch.zeros_like(zeros, dtype=torch.bool) if key.drafts else None
        return ForwardInputs(zeros, zeros.clone(), zeros - 1, attention, mask)

    def _sample(self, logits: Tensor, there: PassInputs) -> Sampled:
        return sample(logits, there.sampling, self._vocabulary)

    def _hidden(self, graph: GraphKey | None, inputs: ForwardInputs) -> Tensor:
        if self._graphs is None or graph is None or graph not in self._graphs:
            return self._forward(inputs)
        return self._graphs.replay(graph, inputs)

    def _forward(self, inputs: ForwardInputs) -> Tensor:
        """Hidden states [num_tokens, hidden_size]."""

        def attend(layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
            query = rotate_and_write(qkv, rotary, self._cache, layer, inputs.slots)
            return paged_attention(query, self._cache, layer, inputs.attention)

        draft_rows = None if inputs.draft_mask is None else DraftRows(inputs.draft_mask)
        hidden: Tensor = self._model(inputs.token_ids, inputs.positions, attend, draft_rows)
        return hidden


def _outputs(inputs: PassInputs, answers: Tensor) -> Outputs:
    ahead = inputs.accept
    if ahead is None:
        return Outputs(answers)
    kept, last_ids = accept(
        inputs.token_ids, answers,
        ahead.first_rows, ahead.first_answers, ahead.counts, ahead.max_count,
    )  # fmt: skip
    return Outputs(answers, kept, last_ids)
