"""TensorParallelRunner: a ModelRunner of several ranks, as rank 0 has it.

It tells the other ranks what each pass is and then runs its own part of it. What the ranks have to
say to each other within the pass is the model's affair (replicas/model/parallel.py).
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from trimode.replicas.model.parallel import Group
from trimode.replicas.model_runner import TorchModelRunner, TorchPass
from trimode.replicas.page_tables import PageCopy
from trimode.replicas.scheduled import Answers, Scheduled
from trimode.replicas.step_channel import StepSender
from trimode.replicas.wire import encode


class StepClock:
    """How long passes take to be answered. One thread runs them, any other may look on."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.num_steps = 0  # launched
        self._now = now
        self._launched_at: deque[float] = deque()  # of the passes that are still to be read

    def launch(self) -> None:
        self.num_steps += 1
        self._launched_at.append(self._now())

    def read(self) -> None:
        self._launched_at.popleft()

    @property
    def waiting_s(self) -> float:
        """How long the oldest unread pass has been under way; 0 where there is none."""
        try:
            return self._now() - self._launched_at[0]
        except IndexError:
            return 0.0


@dataclass(frozen=True, slots=True)
class Peers:
    """What rank 0 has of the other ranks."""

    group: Group
    steps: StepSender
    clock: StepClock
    wait: Callable[[], None]  # until they have loaded their part; raises what went wrong with it


class TensorParallelRunner:
    """Runs rank 0's part of every pass beside the engine. The other ranks run a Worker each."""

    def __init__(self, runner: TorchModelRunner, steps: StepSender, clock: StepClock) -> None:
        self.info = runner.info
        self.config = runner.config
        self._runner = runner
        self._steps = steps
        self._clock = clock

    def launch(
        self,
        scheduled: SequenceOf[Scheduled],
        before: TorchPass | None = None,
        copies: SequenceOf[PageCopy] = (),
    ) -> TorchPass:
        batch = self._runner.build(scheduled, before, copies)
        self._clock.launch()
        self._steps.send(encode(batch.inputs).data)
        return self._runner.run(batch, before)

    def read(self, launched: TorchPass) -> list[Answers]:
        answers = self._runner.read(launched)
        self._clock.read()
        return answers
