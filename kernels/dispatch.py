"""Which form of an operation runs: its Triton kernel on a GPU, its reference elsewhere."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def by_device(
    reference: Callable[Arguments, Result], launcher: Callable[Arguments, Result]
) -> Callable[Arguments, Result]:
    """The operation that both are: the first argument, a tensor, says where it runs.

    Kernels compute in float32; what is float64 is the reference's everywhere.
    """

    @wraps(reference)
    def operation(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first: torch.Tensor = args[0]  # type: ignore[assignment]
        if first.is_cuda and first.dtype != torch.float64:
            return launcher(*args, **kwargs)
        return reference(*args, **kwargs)

    return operation
