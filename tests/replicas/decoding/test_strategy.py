import pytest

from trimode.replicas.decoding.strategy import confident_indices


@pytest.mark.parametrize(
    ("confidences", "threshold", "chosen"),
    [
        ([0.2, 0.9, 0.5], 0.5, [1, 2]),
        ([0.2, 0.4, 0.3], 0.5, [1]),
        ([0.2, 0.2, 0.2], 0.5, [0]),
        ([0.1, 0.4, 0.4], 0.9, [1]),
        ([0.7], 1.0, [0]),
        ([0.1, 0.0, 0.9], 0.0, [0, 1, 2]),
        ([0.9, 0.9], 0.9, [0, 1]),
        ([float("0.0"), 0.0], 1.0, [0]),
    ],
)
def test_the_best_and_all_at_or_over_the_threshold_are_chosen(
    confidences: list[float], threshold: float, chosen: list[int]
) -> None:
    assert confident_indices(confidences, threshold) == chosen
