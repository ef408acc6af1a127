"""Naive decoders, one a mode: no cache, no batch, no scheduler, every pass over the whole text.

They share nothing with the engine but the model's weights and the noise, and write the published
loops down as they are told. A pass is token ids and, for each row, how many entries it sees.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimode.kernels.draft_adapter import DraftRows
from trimode.kernels.noise import gumbel
from trimode.kernels.rope import Rotary
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel, dense_attention


@dataclass(slots=True)
class Output:
    """What a decoder brought, and at what price."""

    max_tokens: int
    stop_ids: Collection[int]
    token_ids: list[int] = field(default_factory=list)
    forwards: int = 0
    accepted: list[int] = field(default_factory=list)

    def emit(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            if not self.is_finished:
                self.token_ids.append(token_id)

    @property
    def is_finished(self) -> bool:
        ids = self.token_ids
        return len(ids) == self.max_tokens or bool(ids and ids[-1] in self.stop_ids)


@dataclass(frozen=True, slots=True)
class Sampler:
    """Picks the token of a position, and says how confident the model is of it."""

    mask_id: int
    temperature: float = 0.0
    seed: int = 0

    def pick(self, logits: Tensor, position: int, softness: float = 1.0) -> tuple[int, float]:
        logits = logits.clone()
        logits[self.mask_id] = -torch.inf
        noisy = logits
        if self.temperature > 0:
            where = torch.tensor([self.seed]), torch.tensor([position])
            noisy = logits + self.temperature * gumbel(*where, len(logits))[0]
        token_id = int(noisy.argmax())
        return token_id, float((logits / softness).softmax(-1)[token_id])


def causal_pass(model: NemotronLabsDiffusionModel, ids: list[int]) -> Tensor:
    """Logits of every row; row i answers position i + 1."""
    return _dense_pass(model, ids, list(range(1, len(ids) + 1)), None)


def block_pass(
    model: NemotronLabsDiffusionModel, ids: list[int], block: list[int], adapter: bool = False
) -> Tensor:
    """Logits of the rows of a block that follows ids; row i answers its own position."""
    known, total = len(ids), len(ids) + len(block)
    visible = list(range(1, known + 1)) + [total] * len(block)
    rows = DraftRows(torch.arange(total) >= known) if adapter else None
    return _dense_pass(model, ids + block, visible, rows)[known:]


def _dense_pass(
    model: NemotronLabsDiffusionModel, ids: list[int], visible: list[int], drafts: DraftRows | None
) -> Tensor:
    positions = torch.arange(len(ids))
    mask = positions[None, :] < torch.tensor(visible)[:, None]

    def attend(layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
        return dense_attention(qkv, rotary, mask)

    return model.logits(model(torch.tensor(ids), positions, attend, drafts))


def autoregressive(
    model: NemotronLabsDiffusionModel, prompt: list[int], output: Output, sampler: Sampler
) -> Output:
    ids = list(prompt)
    while not output.is_finished:
        token_id, _ = sampler.pick(causal_pass(model, ids)[-1], len(ids))
        output.forwards += 1
        output.emit([token_id])
        ids.append(token_id)
    return output


def block_diffusion(
    model: NemotronLabsDiffusionModel,
    prompt: list[int],
    output: Output,
    sampler: Sampler,
    block_size: int,
    threshold: float = 0.9,
) -> Output:
    """The commit pass of the last block is left out: nobody needs what it gives."""
    ids = list(prompt)
    while True:
        known, _ = sampler.pick(causal_pass(model, ids)[-1], len(ids))
        output.forwards += 1  # the prefill, later the commit of the block before
        output.emit([known])
        if output.is_finished:
            return output
        block = [known] + [sampler.mask_id] * (block_size - 1)
        while sampler.mask_id in block:
            fill_some(block, block_pass(model, ids, block), len(ids), sampler, threshold)
            output.forwards += 1
            clear = block.index(sampler.mask_id) if sampler.mask_id in block else block_size
            if any(token_id in output.stop_ids for token_id in block[1:clear]):
                block = block[:clear]
                break
        output.emit(block[1:])
        if output.is_finished:
            return output
        ids += block


def self_speculation(
    model: NemotronLabsDiffusionModel,
    prompt: list[int],
    output: Output,
    sampler: Sampler,
    block_size: int,
    threshold: float = 0.0,
    adapter: bool = True,
) -> Output:
    ids = list(prompt)
    known, _ = sampler.pick(causal_pass(model, ids)[-1], len(ids))
    output.forwards += 1
    output.emit([known])
    while not output.is_finished:
        block = [known] + [sampler.mask_id] * (block_size - 1)
        while sampler.mask_id in block:
            logits = block_pass(model, ids, block, adapter)
            fill_some(block, logits, len(ids), sampler, threshold, sampler.temperature or 1.0)
            output.forwards += 1
        logits = causal_pass(model, ids + block)[len(ids) :]
        output.forwards += 1
        answers = [sampler.pick(row, len(ids) + 1 + i)[0] for i, row in enumerate(logits)]
        accepted = 1
        while accepted < block_size and block[accepted] == answers[accepted - 1]:
            accepted += 1
        output.accepted.append(accepted)
        output.emit(answers[:accepted])
        ids += block[:accepted]
        known = answers[accepted - 1]
    return output


def fill_some(
    block: list[int],
    logits: Tensor,
    start: int,
    sampler: Sampler,
    threshold: float,
    softness: float = 1.0,
) -> None:
    """Unmask the best answer and all others that reach the threshold; at 0 that is everything."""
    picked = {
        index: sampler.pick(logits[index], start + index, softness)
        for index, token_id in enumerate(block)
        if token_id == sampler.mask_id
    }
    best = max(picked, key=lambda index: picked[index][1])
    for index, (token_id, confidence) in picked.items():
        if index == best or confidence >= threshold:
            block[index] = token_id
