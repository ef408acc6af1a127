from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimode.kernels.places import places_of_reference, places_of_triton


@pytest.mark.parametrize(("num_listed", "num_rows"), [(0, 5), (1, 1), (5, 9), (130, 300)])
def test_the_kernel_equals_the_reference(num_listed: int, num_rows: int, device: str) -> None:
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(num_rows))
    rows = order[:num_listed].to(device)
    got = places_of_triton(rows, num_rows)
    assert got.dtype == torch.int32
    assert torch.equal(got, places_of_reference(rows, num_rows))
    assert torch.equal(got[rows].cpu(), torch.arange(num_listed, dtype=torch.int32))
    assert (got >= 0).sum() == num_listed


def test_it_compiles_for_every_target_without_a_spill(
    compile_launches: Callable[..., list[dict[str, Any]]],
) -> None:
    rows = torch.empty(100, dtype=torch.int64, device="meta")

    def launch() -> None:
        places_of_triton(rows, 128)

    for found in compile_launches("trimode.kernels.places", launch):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
