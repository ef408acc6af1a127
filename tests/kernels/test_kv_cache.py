import torch

from trimode.kernels.kv_cache import KVCache, write_kv_reference


def small_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache.allocate(3, 10, 2, 4, dtype)


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
