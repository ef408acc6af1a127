from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def linear(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("linear")


def test_every_form_is_checked_and_timed_at_every_size(linear: ModuleType) -> None:
    found = linear.run(DEVICE, linear.TINY)
    forms = linear.forms_of(DEVICE)
    assert len(found["rows"]) == len(forms) * len(linear.TINY.num_rows)
    for row in found["rows"]:
        assert min(row["us"], row["gb_per_s"], row["tflops"]) > 0
        assert row["error"] < 0.004


@pytest.mark.parametrize(
    ("factor", "complaint"), [(1.01, "is off by"), (torch.nan, "is off by"), (None, "the batch")]
)
def test_a_wrong_form_is_not_timed(
    linear: ModuleType, factor: float | None, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: Tensor, weight: object) -> Tensor:
        by = 1 + len(x) * 2e-4 if factor is None else factor
        return linear.cublas(x, weight) * by

    monkeypatch.setattr(linear, "FORMS", (wrong, wrong))
    monkeypatch.setattr(linear, "INVARIANT", (wrong,))
    with pytest.raises(AssertionError, match=complaint):
        linear.run(DEVICE, linear.TINY)
