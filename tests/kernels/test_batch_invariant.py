from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.kernels import batch_invariant
from trimode.kernels.batch_invariant import GROUP, Tile, product_reference, product_triton
from trimode.kernels.fp8 import FP8, quantise_rows_reference

# What rounding alone makes: a float32 sum in another order, and the last digit of a narrow result.
RATIOS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}
# Inside one tile, past its edges by one, and with a sum of one part, of two, and of a ragged three.
SHAPES = [(1, 8, 8), (3, 130, 72), (65, 33, 100), (5, 24, 1024), (2, 130, 2120)]
SIZES_8B = {"qkv": (6144, 4096), "down": (4096, 14336), "gate_up": (28672, 4096)}


def operands(
    num_rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(in_features)
    x = torch.randn(num_rows, in_features, generator=generator) + 0.5
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    return x.to(device, dtype), weight.to(device, dtype)


@pytest.mark.parametrize("dtype", RATIOS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_near_the_reference(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    assert_near: Callable[..., None],
) -> None:
    x, weight = operands(*shape, dtype, device)
    got = product_triton(x, weight, dtype)
    assert got.dtype == dtype
    assert_near("product", got, product_reference(x, weight, torch.float64), RATIOS[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_float8_are_those_of_the_same_quantised_operands(
    shape: tuple[int, int, int], device: str, assert_near: Callable[..., None]
) -> None:
    x, weight = (quantise_rows_reference(o) for o in operands(*shape, torch.float32, device))
    scales = x.scales, weight.scales
    got = product_triton(x.values, weight.values, torch.bfloat16, scales)
    wanted = x.dequantise(torch.float64) @ weight.dequantise(torch.float64).t()
    assert_near("product", got, wanted, RATIOS[torch.bfloat16])


@pytest.mark.parametrize("dtype", [*RATIOS, FP8], ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(40, 72), (24, 2048)])
def test_a_row_has_the_same_bits_in_any_company_and_place(
    out_features: int, in_features: int, dtype: torch.dtype, device: str
) -> None:
    wide = torch.float32 if dtype == FP8 else dtype
    x, weight = (o.to(dtype) for o in operands(70, out_features, in_features, wide, device))
    all_at_once = product_triton(x, weight, wide)
    for rows in ([0], [69], [3, 69], [*range(60, 70), *range(5)], list(range(69, -1, -1))):
        alone = product_triton(x[rows], weight, wide)
        assert torch.equal(alone, all_at_once[rows]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
def test_parts_summed_by_one_program_and_by_many_have_the_same_bits(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = (o.to(dtype) for o in operands(3, 40, 2048, torch.float32, device))
    tile = Tile.of(*weight.shape, dtype)
    assert tile.num_parts > 1
    by_many = product_triton(x, weight, torch.float32)
    monkeypatch.setattr(Tile, "of", lambda *_: tile)
    monkeypatch.setattr(batch_invariant, "MANY_PROGRAMS", 1)
    assert torch.equal(product_triton(x, weight, torch.float32), by_many)


def test_no_rows_have_no_products(device: str) -> None:
    x, weight = operands(0, 24, 16, torch.float32, device)
    assert product_triton(x, weight, torch.float32).shape == (0, 24)


def test_nan_reaches_its_own_row_only(device: str) -> None:
    x, weight = operands(3, 24, 16, torch.float32, device)
    x[1, 5] = torch.nan
    assert product_triton(x, weight, torch.float32).isnan().all(dim=1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", SIZES_8B)
def test_few_rows_keep_a_gpu_busy(name: str) -> None:
    out_features, in_features = SIZES_8B[name]
    tile = Tile.of(out_features, in_features, torch.bfloat16)
    assert -(-out_features // tile.columns) * tile.num_parts >= 128
    assert (tile.num_parts - 1) * tile.num_steps * tile.step < in_features


def case(name: str, kind: str, is_part: bool) -> dict[str, Any]:
    """The kernel as it runs on an 8B's weight; kind: of the operands, in Triton's words."""
    dtype = {"bf16": torch.bfloat16, "fp8e4nv": FP8, "fp32": torch.float32}[kind]
    tile = Tile.of(*SIZES_8B[name], dtype)
    is_fp8 = dtype == FP8
    out = "*fp32" if is_part else "*bf16" if is_fp8 else f"*{kind}"
    return {
        "kernel": "trimode.kernels.batch_invariant:_product_kernel",
        "signature": dict.fromkeys(("x_ptr", "weight_ptr"), f"*{kind}")
        | dict.fromkeys(("x_scales_ptr", "weight_scales_ptr"), "*fp32")
        | {"out_ptr": out}
        | dict.fromkeys(("num_rows", "out_features", "in_features", "num_steps"), "i32"),
        "aligned": ["out_features", "in_features"],
        "constexprs": {
            "NUM_PARTS": tile.num_parts, "IS_PART": is_part, "HAS_SCALES": is_fp8,
            "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.step,
            "IS_RAGGED": False, "IMPRECISE": tile.imprecise, "GROUP": GROUP,
        },
        "options": {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        "targets": [90, 100] if is_fp8 else [80, 90, 100],
    }  # fmt: skip


def test_it_compiles_for_every_target_with_tensor_cores_and_without_a_spill(
    compile_for_targets: Callable[..., list[dict[str, Any]]],
) -> None:
    cases = [
        case("down", "bf16", is_part=True),
        case("down", "bf16", is_part=False),
        case("gate_up", "bf16", is_part=False),
        case("down", "fp8e4nv", is_part=True),
        case("down", "fp8e4nv", is_part=False),
    ]
    for found in compile_for_targets(cases):
        assert found["tensor_cores"], found
        assert found["spilled_bytes"] == 0, found


def test_exact_products_of_float32_compile_without_a_spill(
    compile_for_targets: Callable[..., list[dict[str, Any]]],
) -> None:
    for found in compile_for_targets([case("gate_up", "fp32", is_part=False)]):
        assert found["tensor_cores"] == []
        assert found["spilled_bytes"] == 0, found
