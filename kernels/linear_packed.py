"""Products with a weight on a CPU: oneDNN's, on a weight that it has laid out once. Only a single
row of float32 on one thread is quicker where torch streams the weight as it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ROWS_HINT = 16  # that the layout is chosen for
PACKABLE = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The packed copy is never used where a gradient is kept."""

    weight: Tensor  # [out_features, in_features]
    packed: Tensor  # the same, opaque

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return functional.linear(x, self.weight)
        if len(x) == 1 and x.dtype == torch.float32 and torch.get_num_threads() == 1:
            return functional.linear(x, self.weight)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return out


def pack(weight: Tensor) -> PackedLinear | None:
    """None where oneDNN has no layout for the weight's device or dtype. Changes of the weight do
    not reach the copy.
    """
    if weight.device.type != "cpu" or weight.dtype not in PACKABLE:
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
    return PackedLinear(weight, packed)


def lay_out(weight: Tensor) -> Tensor:
    """The weight [out_features, in_features], on a CPU lying in memory input by input: a product
    with one row then streams it about twice as fast. Only a packed bfloat16 is never streamed.
    """
    if weight.device.type != "cpu" or weight.dtype == torch.bfloat16:
        return weight
    return weight.t().contiguous().t()
