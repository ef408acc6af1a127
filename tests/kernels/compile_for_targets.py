"""Compiles kernels for GPUs that are not there: JSON cases from stdin, JSON findings to stdout.

A process of its own, as the tests' kernels are bound to Triton's interpreter. A case is
{"kernel": "module:function", "signature": {argument: "*bf16" | "i32" | "fp32" | ...},
 "constexprs": {argument: value}, "options": {"num_warps": 4, ...}, "targets": [80, ...],
 "aligned": [integers that are multiples of 16]}, the last three optional.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

TARGETS = (80, 90, 100)
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")


def find(case: dict[str, Any], capability: int) -> dict[str, Any]:
    module, name = case["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    constexprs = case["constexprs"]
    signature = case["signature"] | dict.fromkeys(constexprs, "constexpr")
    # Pointers and sizes that a launch finds divisible by 16 are compiled as such.
    order = {argument: (index,) for index, argument in enumerate(kernel.arg_names)}
    aligned = {
        order[argument]: [["tt.divisibility", 16]]
        for argument, kind in case["signature"].items()
        if kind.startswith("*") or argument in case.get("aligned", ())
    }
    source = ASTSource(
        kernel,
        {argument: signature[argument] for argument in kernel.arg_names},
        {order[argument]: value for argument, value in constexprs.items()},
        aligned,
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=case.get("options", {}))
    ptx = compiled.asm["ptx"]
    resources = assemble(ptx, capability)
    return {
        "kernel": case["kernel"],
        "capability": capability,
        "tensor_cores": sorted(set(TENSOR_CORES.findall(ptx))),
        "cubin_bytes": len(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", resources))),
        "registers": max(map(int, re.findall(r"Used (\d+) registers", resources)), default=0),
    }


def assemble(ptx: str, capability: int) -> str:
    """What the assembler says of a kernel's resources."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [
            get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}",
            file.name, "-o", "/dev/null",
        ]  # fmt: skip
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


if __name__ == "__main__":
    found = [
        find(case, target)
        for case in json.load(sys.stdin)
        for target in case.get("targets", TARGETS)
    ]
    json.dump(found, sys.stdout)
