"""The draft adapter: a low-rank product (LoRA, arXiv 2106.09685) that only DRAFT rows receive."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The rows of a pass that run with the adapter on."""

    mask: Tensor  # [num_tokens] bool
    _indices: list[Tensor] = field(default_factory=list)

    @property
    def indices(self) -> Tensor:
        """[num_draft_rows] int64, for the reference; the first layer of a pass makes them."""
        if not self._indices:
            self._indices.append(self.mask.nonzero()[:, 0])
        return self._indices[0]


def add_draft_adapter_reference(
    out: Tensor,  # [num_tokens, out_features]: the plain product
    x: Tensor,  # [num_tokens, in_features]: what it was a product of
    rows: DraftRows,
    lora_a: Tensor,  # [rank, in_features]
    lora_b: Tensor,  # [out_features, rank]
    scale: float,
) -> Tensor:
    """out + scale * (x lora_a^T) lora_b^T on the draft rows, out on all others."""
    low = functional.linear(x[rows.indices], lora_a)
    return out.index_add(0, rows.indices, (functional.linear(low, lora_b) * scale).to(out.dtype))


add_draft_adapter = add_draft_adapter_reference
