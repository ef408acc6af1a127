from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimode.kernels.noise import gumbel_reference, gumbel_triton, philox_reference

# Published with Random123: counter, key, output of Philox4x32-10.
KNOWN_ANSWERS = [
    ("00000000" * 4, "00000000" * 2, "6627e8d5e169c58dbc57ac4c9b00dbd8"),
    ("ffffffff" * 4, "ffffffff" * 2, "408f276d41c83b0ea20bc7c66d5451fd"),
    ("243f6a8885a308d313198a2e03707344", "a4093822299f31d0", "d16cfe0994fdcceb5001e42024126ea1"),
]


def words(text: str) -> list[int]:
    return [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, wanted: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in words(counter))
    k0, k1 = (torch.tensor([word]) for word in words(key))
    got = philox_reference((c0, c1, c2, c3), (k0, k1))
    assert [int(word) for word in got] == words(wanted)


def noise(seeds: list[int], positions: list[int], vocab_size: int = 50) -> torch.Tensor:
    return gumbel_reference(torch.tensor(seeds), torch.tensor(positions), vocab_size)


def test_noise_does_not_depend_on_the_rest_of_the_batch() -> None:
    together = noise([5, 9, 2**62, 5], [0, 7, 3, 8])
    for row, (seed, position) in enumerate([(5, 0), (9, 7), (2**62, 3), (5, 8)]):
        assert torch.equal(together[row], noise([seed], [position])[0])


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 5, 49])
def test_noise_of_a_token_does_not_depend_on_the_vocabulary_size(vocab_size: int) -> None:
    assert torch.equal(noise([3], [4], vocab_size), noise([3], [4], 50)[:, :vocab_size])


@pytest.mark.parametrize("other", [(8, 11), (7, 12), (7 + 2**32, 11), (7, 11 + 2**32)], ids=str)
def test_noise_depends_on_all_bits_of_seed_and_position(other: tuple[int, int]) -> None:
    mine, others = noise([7], [11]), noise([other[0]], [other[1]])
    assert (mine == others).sum() < 3


def test_noise_of_different_tokens_differs() -> None:
    assert len(noise([1], [1], 1000).unique()) > 990


def test_noise_has_the_moments_of_a_gumbel_distribution() -> None:
    draws = noise(list(range(100)), [3] * 100, 4000).double()
    assert draws.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert draws.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.03)


def test_noise_is_always_finite() -> None:
    assert noise(list(range(200)), list(range(200)), 5000).isfinite().all()


# The kernel's logarithms are polynomials of its own.
RATIO = 1e-6


@pytest.mark.parametrize(("vocab_size", "start"), [(1, 0), (50, 0), (1024, 8), (2051, 130000)])
@pytest.mark.parametrize("has_samples", [False, True])
def test_the_kernel_is_near_the_reference(
    vocab_size: int,
    start: int,
    has_samples: bool,
    device: str,
    assert_near: Callable[..., None],
) -> None:
    seeds, positions = torch.tensor([0, -5, 2**62 + 7]), torch.tensor([0, 7, 2**35 + 1])
    samples = torch.tensor([0, 3, 1]) if has_samples else None
    wanted = gumbel_reference(seeds, positions, vocab_size, samples, start)
    got = gumbel_triton(
        seeds.to(device),
        positions.to(device),
        vocab_size,
        None if samples is None else samples.to(device),
        start,
    )
    assert_near("noise", got, wanted, RATIO)
    assert (got.cpu() - wanted).abs().max() < 5e-6


def test_noise_of_a_part_of_the_vocabulary_is_a_part_of_the_noise() -> None:
    seeds, positions = torch.tensor([3, 4]), torch.tensor([5, 6])
    whole = gumbel_reference(seeds, positions, 100)
    assert torch.equal(gumbel_reference(seeds, positions, 30, start=40), whole[:, 40:70])


def test_it_compiles_for_every_target_without_a_spill(
    compile_launches: Callable[..., list[dict[str, Any]]],
) -> None:
    integers = torch.empty(8, dtype=torch.int64, device="meta")

    def launch() -> None:
        gumbel_triton(integers, integers, 131072, integers)

    for found in compile_launches("trimode.kernels.noise", launch):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
