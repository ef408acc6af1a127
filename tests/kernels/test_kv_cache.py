from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from trimode.kernels.kv_cache import KVCache, copy_page, write_kv_reference


def small_cache(dtype: torch.dtype = torch.float32, device: str = "cpu") -> KVCache:
    return KVCache.allocate(3, 10, 2, 4, dtype, device)


def filled_cache(device: str) -> KVCache:
    """Slot s of layer l holds 100 * l + s, the values of it half more; 10 slots."""
    cache = small_cache(device=device)
    content = torch.arange(3.0)[:, None] * 100 + torch.arange(10.0)  # [num_layers, num_slots]
    cache.keys.copy_(content[..., None, None])
    cache.values.copy_(content[..., None, None] + 0.5)
    return cache


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """The host must not wait for a GPU in here."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_a_fresh_cache_holds_nothing_one_could_read() -> None:
    cache = small_cache()
    assert cache.keys.isnan().all()
    assert cache.values.isnan().all()


def test_keys_and_values_share_one_shape() -> None:
    cache = small_cache(torch.bfloat16)
    assert cache.keys.shape == cache.values.shape == (3, 10, 2, 4)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16


def test_a_write_reaches_its_slots_in_any_order() -> None:
    cache = small_cache()
    key, value = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    write_kv_reference(cache, 1, key, value, torch.tensor([7, 0, 4]))
    assert torch.equal(cache.keys[1, [7, 0, 4]], key)
    assert torch.equal(cache.values[1, [7, 0, 4]], value)


def test_a_write_touches_no_other_slot_and_no_other_layer() -> None:
    cache = small_cache()
    write_kv_reference(cache, 1, torch.ones(2, 2, 4), torch.ones(2, 2, 4), torch.tensor([3, 5]))
    written = torch.zeros(3, 10, dtype=torch.bool)
    written[1, [3, 5]] = True
    assert torch.equal(~cache.keys.isnan().all(-1).all(-1), written)
    assert torch.equal(~cache.values.isnan().all(-1).all(-1), written)


def test_a_second_write_replaces_the_first() -> None:
    cache = small_cache()
    slots = torch.tensor([2])
    write_kv_reference(cache, 0, torch.ones(1, 2, 4), torch.ones(1, 2, 4), slots)
    write_kv_reference(cache, 0, torch.zeros(1, 2, 4), torch.full((1, 2, 4), 5.0), slots)
    assert (cache.keys[0, 2] == 0).all()
    assert (cache.values[0, 2] == 5).all()


@pytest.mark.parametrize("slots", [[-1, 0, -1, 4], [7, -1, 0, -1], [-1, -1, -1, -1]])
def test_padding_is_kept_nowhere(slots: list[int], device: str) -> None:
    cache = small_cache(device=device)
    key, value = (torch.randn(4, 2, 4, device=device) for _ in "kv")
    write_kv_reference(cache, 1, key, value, torch.tensor(slots, device=device))
    kept = [slot for slot in slots if slot >= 0]
    rows = [row for row, slot in enumerate(slots) if slot >= 0]
    assert torch.equal(cache.keys[1, kept], key[rows])
    assert torch.equal(cache.values[1, kept], value[rows])
    assert cache.entries.isfinite().sum() == 2 * key[rows].numel()


def test_a_slot_beyond_the_cache_is_an_error() -> None:
    """On a GPU it would end the process."""
    one = torch.ones(2, 2, 4)
    with pytest.raises(IndexError):
        write_kv_reference(small_cache(), 0, one, one, torch.tensor([-1, 10]))


def test_a_page_is_copied_in_all_layers_and_no_other_changes(device: str) -> None:
    cache = filled_cache(device)
    wanted = cache.entries.clone()
    wanted[:, 6:8] = wanted[:, 2:4]
    with no_waiting(device):
        copy_page(cache, source=1, target=3, page_size=2)
    assert torch.equal(cache.entries, wanted)
    assert cache.values[2, 6].unique().tolist() == [202.5]


def test_copies_are_made_in_order(device: str) -> None:
    """Of a copied page, over a source, and around in a ring."""
    cache, copies = filled_cache(device), [(0, 1), (1, 2), (4, 1), (2, 4), (1, 0)]
    pages = list(range(5))
    with no_waiting(device):
        for source, target in copies:
            copy_page(cache, source, target, page_size=2)
            pages[target] = pages[source]
    wanted = filled_cache(device).entries.unflatten(1, (5, 2))[:, pages].flatten(1, 2)
    assert torch.equal(cache.entries, wanted)


def test_slots_that_nobody_wrote_are_copied_too(device: str) -> None:
    cache = filled_cache(device)
    cache.entries[:, 1] = torch.nan
    copy_page(cache, source=0, target=2, page_size=2)
    assert (cache.keys[1, 4] == 100).all()
    assert cache.entries[:, 5].isnan().all()
