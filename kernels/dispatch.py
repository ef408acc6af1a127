"""Which form of an operation runs: its Triton kernel on a GPU, its reference elsewhere."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def by_device(
    reference: Callable[Arguments, Result], launcher: Callable[Arguments, Result]
) -> Callable[Arguments, Result]:
    """The operation that both are: the first argument, a tensor, says where it runs."""

    @wraps(reference)
    def operation(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        on_gpu = args[0].is_cuda  # type: ignore[attr-defined]
        return launcher(*args, **kwargs) if on_gpu else reference(*args, **kwargs)

    return operation
