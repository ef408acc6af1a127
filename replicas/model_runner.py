"""ModelRunner: one forward pass over a batch. Where answers come from, and the seam for anything
that can answer.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from trimode.replicas.batch import Batch, BatchLimits
from trimode.replicas.config import EngineConfig
from trimode.replicas.download import Download
from trimode.replicas.graph_keys import GraphKeys
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.page_tables import PageCopy
from trimode.replicas.rank_runner import RankPass, RankRunner
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
    there: RankPass
    answers: Download


class TorchModelRunner:
    """The real model on one device."""

    def __init__(
        self,
        model: NemotronLabsDiffusionModel,
        config: EngineConfig,
        rank: RankRunner | None = None,
        graph_keys: GraphKeys | None = None,
    ) -> None:
        """rank: what runs the model; graph_keys: the sizes that it has captured."""
        self._rank = RankRunner(model, config) if rank is None else rank
        self.config = config
        shape = model.config
        self.info = ModelInfo(
            vocab_size=shape.vocab_size,
            max_positions=shape.max_positions,
            block_size=shape.block_size,
            eos_id=shape.eos_id,
            mask_id=shape.mask_id,
            has_draft_adapter=model.has_draft_adapter,
            dtype=str(model.diffusion_head.weight.dtype).removeprefix("torch."),
            quantization=model.quantization,
        )
        self._limits = BatchLimits(
            page_size=config.page_size,
            mask_id=shape.mask_id,
            vocab_size=shape.vocab_size,
            launch_ahead=bool(config.launch_ahead),
            batch_invariant=config.batch_invariant,
            graph_keys=graph_keys,
        )

    def launch(
        self,
        scheduled: SequenceOf[Scheduled],
        before: TorchPass | None = None,
        copies: SequenceOf[PageCopy] = (),
    ) -> TorchPass:
        return self.run(self.build(scheduled, before, copies), before)

    def build(
        self,
        scheduled: SequenceOf[Scheduled],
        before: TorchPass | None = None,
        copies: SequenceOf[PageCopy] = (),
    ) -> Batch:
        """The host's part of launch()."""
        return Batch.build(
            scheduled, self._limits, None if before is None else before.batch, copies
        )

    def run(self, batch: Batch, before: TorchPass | None = None) -> TorchPass:
        """The device's part of launch()."""
        there = self._rank.launch(batch.inputs, None if before is None else before.there)
        return TorchPass(batch, there, Download(there.sampled))

    def read(self, launched: TorchPass) -> list[Answers]:
        return launched.batch.split(launched.answers.wait())
