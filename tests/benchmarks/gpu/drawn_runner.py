"""DrawnRunner: the real RankRunner, whose verify passes keep as many drafts as a distribution says.

The model's own answers are computed and sampled as ever, so their time counts; then, on the device
and without waiting, those of verify queries are replaced: as many agree with their drafts as was
drawn, and the next one does not. All other answers stay what the random weights make them.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from trimode.kernels.sampling import Sampled
from trimode.replicas.config import EngineConfig
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.pass_inputs import AcceptInputs, PassInputs
from trimode.replicas.rank_runner import RankRunner
from trimode.replicas.step_graphs import Capture

Survival = Mapping[int, list[float]]  # by block size: P(at least 1, 2, ... drafts are kept)

STRATA = 16  # consecutive draws that cover [0, 1) evenly, in random order: short runs are fair, too
NUM_DRAWS = 1 << 16  # after which they repeat


def even_draws(seed: int) -> Tensor:
    """[NUM_DRAWS] in [0, 1), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_DRAWS // STRATA, STRATA)
    strata = torch.rand(shape, generator=generator).argsort(dim=1)
    return ((strata + torch.rand(shape, generator=generator)) / STRATA).flatten()


def drawn_answers(
    answers: Tensor,  # [num_answers] int32 or int64
    token_ids: Tensor,  # [num_tokens] int32 or int64
    accept: AcceptInputs,
    survival: Tensor,  # [max_block_size + 1, max_block_size - 1]: by answers of a query
    uniform: Tensor,  # [num_sequences] in [0, 1)
    forbidden_id: int,  # that no answer is: the mask
) -> Tensor:
    """[num_answers]: verify queries keep the first drafts that `uniform` draws."""
    index = torch.arange(accept.max_count - 1, device=answers.device)
    is_draft = index < accept.counts[:, None] - 1  # [num_sequences, max_count - 1]
    kept = (uniform[:, None] < survival[accept.counts][:, : len(index)]).sum(1)[:, None]
    drafts = token_ids[(accept.first_rows[:, None] + 1 + index).clamp(max=len(token_ids) - 1)]
    other = torch.where(drafts > 0, drafts - 1, 1)  # an id that is not the draft
    other = torch.where(other == forbidden_id, drafts + 1, other)
    at = torch.where(is_draft, accept.first_answers[:, None] + index, len(answers))
    padded = torch.cat((answers, answers.new_zeros(1)))  # the last one takes what is no draft
    wanted = torch.where(index < kept, drafts, torch.where(index == kept, other, padded[at]))
    return padded.scatter(0, at.flatten(), wanted.flatten().to(answers.dtype))[:-1]


class DrawnRunner(RankRunner):
    """draw() switches the drawing on; without it, it is a RankRunner."""

    def __init__(
        self,
        model: NemotronLabsDiffusionModel,
        config: EngineConfig,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(model, config, capture)
        self._mask_id = model.config.mask_id
        self._survival: Tensor | None = None

    def draw(self, survival: Survival | None, seed: int = 0) -> None:
        """From now on. None: the model's own answers."""
        if survival is None:
            self._survival = None
            return
        largest = max(survival)
        table = torch.zeros(largest + 1, largest - 1)
        for block_size, reached in survival.items():
            table[block_size, : block_size - 1] = torch.tensor(reached)
        self._survival = table.to(self._device)
        self._draws = even_draws(seed).to(self._device)
        self.restart()

    def restart(self) -> None:
        """The same draws again, so that runs have the same luck."""
        self._next_draw = 0

    @torch.inference_mode()
    def fill_cache(self) -> None:
        """KV as if all slots had been written: zeros take less power, and NaN would spread."""
        for layer in self._cache.layers:
            layer.normal_()

    def _sample(self, logits: Tensor, there: PassInputs) -> Sampled:
        sampled = super()._sample(logits, there)
        accept = there.accept
        if self._survival is None or accept is None or accept.max_count == 1:
            return sampled
        if self._next_draw + len(accept.counts) > NUM_DRAWS:
            self.restart()
        uniform = self._draws[self._next_draw :][: len(accept.counts)]  # [num_sequences]
        self._next_draw += len(accept.counts)
        ids = drawn_answers(
            sampled.token_ids, there.token_ids, accept, self._survival, uniform, self._mask_id
        )
        return replace(sampled, token_ids=ids)
