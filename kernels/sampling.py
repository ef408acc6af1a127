"""From logits to token ids and confidences, one row an answer, whatever pass the row comes from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.kernels.noise import gumbel


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """Parameters of the answers of one pass. Rows index the answers; None where no row is
    concerned.
    """

    mask_id: int
    sampled_rows: Tensor | None  # [num_sampled] int64: rows with a temperature above 0
    temperatures: Tensor  # [num_sampled] float32
    seeds: Tensor  # [num_sampled] int64
    positions: Tensor  # [num_sampled] int64: of the token that the row produces
    confident_rows: Tensor | None  # [num_confident] int64: rows whose confidence is wanted
    confidence_temperatures: Tensor  # [num_confident] float32


def sample_reference(logits: Tensor, inputs: SamplingInputs) -> tuple[Tensor, Tensor]:
    """logits [num_answers, vocab_size], changed in place -> ids [num_answers], confidences
    [num_confident].

    id = argmax(logits + T * gumbel(seed, position, id)), which is a draw from softmax(logits / T),
    and plain argmax at T = 0. Confidence is softmax(logits / confidence temperature) at the id. The
    mask id is never an answer.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide[:, inputs.mask_id] = -torch.inf
    token_ids = wide.argmax(-1)
    if inputs.sampled_rows is not None:
        noise = gumbel(inputs.seeds, inputs.positions, logits.shape[1])
        noisy = wide[inputs.sampled_rows] + inputs.temperatures[:, None] * noise
        token_ids[inputs.sampled_rows] = noisy.argmax(-1)
    if inputs.confident_rows is None:
        return token_ids, wide.new_empty(0)
    scaled = wide[inputs.confident_rows] / inputs.confidence_temperatures[:, None]
    chosen = scaled.gather(1, token_ids[inputs.confident_rows, None])[:, 0]
    return token_ids, torch.exp(chosen - scaled.logsumexp(-1))


sample = sample_reference
