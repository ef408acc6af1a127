"""Worker: a rank above 0 of a tensor-parallel group. It runs what rank 0 says and answers nobody:
its share of each pass is in the sums.
"""

import numpy as np

from trimode.replicas.pass_inputs import KINDS
from trimode.replicas.rank_runner import RankPass, RankRunner
from trimode.replicas.step_channel import StepReceiver
from trimode.replicas.wire import decode


class Worker:
    """One pass after another, until rank 0 is done."""

    def __init__(self, runner: RankRunner, steps: StepReceiver) -> None:
        self.num_steps = 0  # launched
        self._runner = runner
        self._steps = steps

    def run(self) -> None:
        """Returns once rank 0 has left or is gone. Raises where a pass cannot be run."""
        before: RankPass | None = None
        while (message := self._steps.receive()) is not None:
            inputs = decode(np.frombuffer(message, dtype=np.uint8), KINDS)
            before = self._runner.launch(inputs, before)
            self.num_steps += 1
