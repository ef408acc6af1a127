"""Products of rows with a weight matrix on a CPU: oneDNN's, on a weight that it has laid out once.
Only a single row of float32 on one thread is quicker where torch streams the weight as it is.
"""

import torch
from torch import Tensor
from torch.nn import functional

ROWS_HINT = 16  # that the layout is chosen for
PACKABLE = (torch.float32, torch.bfloat16)


def pack_weight(weight: Tensor) -> Tensor | None:
    """A second copy of weight [out_features, in_features] in oneDNN's layout; None where oneDNN
    has none for its device or dtype. Changes of the weight do not reach it.
    """
    if weight.device.type != "cpu" or weight.dtype not in PACKABLE:
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
    return packed


def linear(x: Tensor, weight: Tensor, packed: Tensor | None) -> Tensor:
    """x [num_rows, in_features] times weight [out_features, in_features]: [num_rows, out_features].

    packed: of the same weight; never used where a gradient is kept.
    """
    if packed is None or torch.is_grad_enabled():
        return functional.linear(x, weight)
    if len(x) == 1 and x.dtype == torch.float32 and torch.get_num_threads() == 1:
        return functional.linear(x, weight)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return out
