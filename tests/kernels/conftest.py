"""Where kernels run in tests (a GPU, or Triton's interpreter), how near they must be to their
references, and what they compile to.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

KINDS = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.bool: "i1", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip

Case = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def poisoned(poisoned_memory: None) -> None:
    """Every test of this folder runs with poisoned memory."""


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: the GPU, or the CPU by Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _as_numbers(handle: TensorHandle) -> Any:
    """The values of a handle that holds the bit patterns of a type that numpy lacks."""
    kind = handle.dtype.scalar
    if kind == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    if kind == tl.float8e4nv:
        bits = torch.from_numpy(handle.data.view(np.uint8).copy())
        return bits.view(torch.float8_e4m3fn).float().numpy()
    return handle.data


@pytest.fixture(autouse=True, scope="session")
def exact_interpreter() -> None:
    """Triton 3.7's interpreter multiplies the bit patterns of bfloat16 and float8 as if they were
    integers and cuts where a GPU rounds to nearest. Teach it both; a no-op where kernels run on a
    GPU.
    """
    cast, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def create_dot(
        self: InterpreterBuilder,
        a: TensorHandle,
        b: TensorHandle,
        d: TensorHandle,
        input_precision: Any,
        max_num_imprecise_acc: Any,
    ) -> TensorHandle:
        product = np.matmul(_as_numbers(a), _as_numbers(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(
        self: InterpreterBuilder, source: TensorHandle, target: Any, rounding: Any
    ) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.float8e4nv:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
            return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)
        return convert(self, source, target, rounding)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    # The builder's casts are bound to the old one when the class is made.
    InterpreterBuilder.create_fp_trunc = cast_impl


@pytest.fixture(scope="session")
def assert_near() -> Callable[[str, Tensor, Tensor, float], None]:
    """assert_near(name, got, wanted, ratio): the root mean square of the error is at most `ratio`
    times that of what was wanted. NaN is never near.
    """

    def check(name: str, got: Tensor, wanted: Tensor, ratio: float) -> None:
        assert got.shape == wanted.shape, f"{name}: {list(got.shape)}, not {list(wanted.shape)}"
        error = (got.double() - wanted.double().to(got.device)).square().mean().sqrt().item()
        size = wanted.double().square().mean().sqrt().item()
        assert error <= ratio * size, f"{name}: off by {error:.3g} of {size:.3g}"

    return check


@pytest.fixture(scope="session")
def fenced() -> Callable[[Tensor], Tensor]:
    """fenced(tensor): a copy between two stretches of NaN, which a read past its ends brings in."""

    def copy(tensor: Tensor) -> Tensor:
        fence = 256
        around = tensor.new_full((tensor.numel() + 2 * fence,), torch.nan)
        inside = around[fence:-fence].view(tensor.shape)
        return inside.copy_(tensor)

    return copy


@pytest.fixture(scope="session")
def compile_for_targets() -> Callable[[list[Case]], list[dict[str, Any]]]:
    """compile_for_targets(cases): what each kernel becomes on sm_80, sm_90 and sm_100."""

    def run(cases: list[Case]) -> list[dict[str, Any]]:
        script = Path(__file__).with_name("compile_for_targets.py")
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, str(script)],
            input=json.dumps(cases), capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    return run


class _Recorder:
    """Stands for a kernel and keeps its launches as cases."""

    def __init__(self, name: str, kernel: Any, cases: list[Case]) -> None:
        self._name = name
        self._parameters = inspect.signature(kernel.fn).parameters
        self._cases = cases

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        case: Case = {"kernel": self._name, "signature": {}, "constexprs": {}, "options": {}}
        for name, value in given.items():
            if name not in self._parameters:
                case["options"][name] = value
            elif self._parameters[name].annotation is tl.constexpr:
                case["constexprs"][name] = value
            elif isinstance(value, Tensor):
                case["signature"][name] = f"*{KINDS[value.dtype]}"
            else:
                case["signature"][name] = "fp32" if isinstance(value, float) else "i32"
        self._cases.append(case)


@pytest.fixture
def compile_launches(
    compile_for_targets: Callable[[list[Case]], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[dict[str, Any]]]:
    """compile_launches(module, launch, **case): what the kernels of a module that launch() launches
    become on each target. Nothing runs: its tensors may be on the meta device. case: more of it.
    """

    def run(module_name: str, launch: Callable[[], None], **own: Any) -> list[dict[str, Any]]:
        module = importlib.import_module(module_name)
        cases: list[Case] = []
        with monkeypatch.context() as patch:
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, (InterpretedFunction, JITFunction)):
                    patch.setattr(module, name, _Recorder(f"{module_name}:{name}", kernel, cases))
            launch()
        assert cases
        return compile_for_targets([case | own for case in cases])

    return run
