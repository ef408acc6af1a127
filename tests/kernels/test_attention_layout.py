from hypothesis import given
from hypothesis import strategies as st

from trimode.kernels.attention_layout import MAX_SPLITS, choose_num_splits

NUM_PLACES = 264  # two programs on each of 132 multiprocessors


def test_a_launch_that_fills_the_device_is_not_split() -> None:
    assert choose_num_splits(NUM_PLACES, NUM_PLACES, 64) == 1
    assert choose_num_splits(10 * NUM_PLACES, NUM_PLACES, 64) == 1


def test_one_long_sequence_is_spread_over_the_device() -> None:
    num_splits = choose_num_splits(8, NUM_PLACES, 64)
    assert 0.8 * NUM_PLACES <= 8 * num_splits <= NUM_PLACES


def test_a_half_empty_second_wave_is_avoided() -> None:
    assert choose_num_splits(160, NUM_PLACES, 64) == 3  # 480 of 528 places, not 160 of 264


@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 600))
def test_splits_are_never_more_than_can_be_had(
    num_programs: int, num_places: int, most: int
) -> None:
    assert 1 <= choose_num_splits(num_programs, num_places, most) <= min(most, MAX_SPLITS)
