"""Size: how many rows and sequences a pass has once it is padded, and the padding itself."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimode.kernels.attention_inputs import AttentionInputs
from trimode.replicas.graph_keys import GraphKey


@dataclass(frozen=True, slots=True)
class Size:
    """Padding rows come after all others; they see nothing and write nothing."""

    num_tokens: int
    num_sequences: int

    @classmethod
    def of(cls, key: GraphKey) -> "Size":
        return cls(key.num_tokens, key.num_sequences)

    def attention(
        self,
        query_start: np.ndarray,  # [num_sequences + 1], of the pass before padding
        visible: np.ndarray,
        page_table: np.ndarray,
        page_size: int,
        batch_invariant: bool,
    ) -> AttentionInputs:
        """Of numpy arrays, padded."""
        return AttentionInputs.build(
            query_start,
            filled(visible, self.num_tokens, 0),
            filled(page_table, self.num_sequences, 0),
            page_size,
            _stay,
            batch_invariant=batch_invariant,
            num_tokens=self.num_tokens,
            num_sequences=self.num_sequences,
        )

    def blank_attention(
        self, page_table: Tensor, page_size: int, batch_invariant: bool
    ) -> AttentionInputs:
        """Of tensors on the page table's device: all rows are padding."""
        device = page_table.device
        return AttentionInputs.build(
            np.zeros(1, dtype=np.int64),
            np.zeros(self.num_tokens, dtype=np.int64),
            page_table[: self.num_sequences],
            page_size,
            lambda array: torch.from_numpy(array).to(device),
            batch_invariant=batch_invariant,
            num_tokens=self.num_tokens,
            num_sequences=self.num_sequences,
        )


def filled(array: np.ndarray, size: int, value: int) -> np.ndarray:
    """Longer along its first dimension, by rows of this value."""
    missing = size - len(array)
    if missing == 0:
        return array
    return np.concatenate((array, np.full((missing, *array.shape[1:]), value, dtype=array.dtype)))


def _stay(array: np.ndarray) -> Any:
    """Arrays go to the device later, with all others of their pass."""
    return array
