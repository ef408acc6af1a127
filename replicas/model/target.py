"""Target: where a tensor of a checkpoint file goes in a model."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """A slice of one dimension of a stored tensor, which has full_len entries there."""

    dim: int
    start: int
    full_len: int


@dataclass(frozen=True, slots=True)
class Target:
    """A view of the model's memory, of any strides, dtype and device.

    part: which slice of the stored tensor the view is for; its length is the view's. None: all.
    """

    view: Tensor
    part: Part | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the file must have."""
        shape = list(self.view.shape)
        if self.part is not None:
            shape[self.part.dim] = self.part.full_len
        return tuple(shape)
