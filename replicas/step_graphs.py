"""StepGraphs: forward passes of a few fixed sizes, captured once as CUDA graphs and replayed.

A graph reads its inputs where they were when it was captured, so a pass is padded to the graph's
size and copied there. Padding rows have slot -1 and see nothing: they change nothing and are 0.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from trimode.kernels.attention_inputs import AttentionInputs
from trimode.replicas.array_tree import leaves, map_leaves
from trimode.replicas.graph_keys import GraphKey
from trimode.replicas.model.parallel import Group, smallest


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """What the model's layers read of a pass."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slots: Tensor  # [num_tokens] int64
    attention: AttentionInputs
    draft_mask: Tensor | None  # [num_tokens] bool


Forward = Callable[[ForwardInputs], Tensor]  # -> hidden states [num_tokens, hidden_size]
Replay = Callable[[], Tensor]


class Capture(Protocol):
    """Turns work into its repetition."""

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        """What it returns does again what run does, on the same memory, and gives its result."""
        ...

    def used_bytes(self) -> int:
        """Memory that is not free, captures and all else; only differences count."""
        ...


class CudaCapture:
    """CUDA graphs that share one pool of memory, as one replay ends before the next begins."""

    def __init__(self, device: torch.device, group: Group) -> None:
        self._device = device
        self._group = group
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        # Once outside, which compiles kernels and makes libraries set up what a capture forbids.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Threads of other libraries, NCCL's watchdog for one, may go on meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def used_bytes(self) -> int:
        # Warm-ups leave memory cached that the next one takes again: not a graph's.
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        # The rank that has least left decides, as all must capture the same sizes.
        return total - smallest(free, self._group, self._device)


@dataclass(frozen=True, slots=True)
class _Captured:
    inputs: ForwardInputs  # where the graph reads
    replay: Replay


class StepGraphs:
    """The captured sizes of one rank."""

    def __init__(self, forward: Forward, capture: Capture) -> None:
        self._forward = forward
        self._capture = capture
        self._captured: dict[GraphKey, _Captured] = {}

    def __contains__(self, key: GraphKey) -> bool:
        return key in self._captured

    def __len__(self) -> int:
        return len(self._captured)

    def capture(
        self, blanks: Iterable[tuple[GraphKey, ForwardInputs]], max_bytes: int
    ) -> Iterable[int]:
        """Capture one size after another, each on inputs of its own that nobody else changes;
        yields the bytes used so far. Ends early where the next might pass max_bytes.
        """
        before = self._capture.used_bytes()  # the KV cache, say
        used = largest = 0
        for key, inputs in blanks:
            if used + largest > max_bytes:
                return
            replay = self._capture(partial(self._run, inputs))
            self._captured[key] = _Captured(inputs, replay)
            now = self._capture.used_bytes() - before
            used, largest = now, max(largest, now - used)
            yield used

    def _run(self, inputs: ForwardInputs) -> Tensor:
        return self._forward(map_leaves(inputs, lambda tensor: tensor))  # without what is cached

    def replay(self, key: GraphKey, inputs: ForwardInputs) -> Tensor:
        """Hidden states [key.num_tokens, hidden_size], good until the next replay.

        inputs: of exactly that size, but for page tables, which may be narrower.
        """
        captured = self._captured[key]
        sources = list(leaves(inputs))
        targets = [
            target if target.shape == source.shape else target[tuple(map(slice, source.shape))]
            for target, source in zip(leaves(captured.inputs), sources, strict=True)
        ]
        torch._foreach_copy_(targets, sources, non_blocking=True)
        return captured.replay()
