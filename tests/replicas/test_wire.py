from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trimode.replicas.array_tree import leaves, map_leaves, to_device
from trimode.replicas.wire import decode, encode


@dataclass(frozen=True, slots=True)
class Leaf:
    values: Any
    count: int


@dataclass(frozen=True, slots=True)
class Tree:
    first: Any
    inner: Leaf | None
    second: Any = None
    _cache: int = 0  # not part of it


some_arrays = arrays.arrays(
    dtype=st.sampled_from([np.int64, np.float32, np.float64, np.bool_, np.int32]),
    shape=arrays.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=5),
)
trees = st.builds(
    Tree, some_arrays, st.none() | st.builds(Leaf, some_arrays, st.integers(-9, 9)), some_arrays
)


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    return all(
        a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs
    )


@settings(deadline=None)
@given(trees)
def test_a_tree_survives_the_wire(tree: Tree) -> None:
    got = decode(encode(tree), [Tree, Leaf])
    assert same(got, tree)
    assert (got.inner is None) == (tree.inner is None)
    assert got.inner is None or got.inner.count == tree.inner.count


@settings(deadline=None)
@given(trees)
def test_a_tree_on_a_cpu_shares_its_arrays(tree: Tree) -> None:
    there = to_device(tree, torch.device("cpu"))
    assert same(map_leaves(there, lambda tensor: tensor.numpy()), tree)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves(there))


def test_arrays_in_a_message_are_aligned() -> None:
    got = decode(encode(Tree(np.ones(3, np.bool_), None, np.ones(2))), [Tree])
    assert got.second.ctypes.data % 8 == 0


def test_a_kind_that_is_not_named_does_not_come_into_being() -> None:
    with pytest.raises(ValueError, match="Leaf"):
        decode(encode(Tree(np.ones(1), Leaf(np.ones(1), 1))), [Tree])


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ValueError, match="not a message"):
        decode(np.frombuffer(noise, dtype=np.uint8), [Tree, Leaf])


def test_a_message_that_was_cut_is_refused() -> None:
    message = encode(Tree(np.arange(100), None))
    with pytest.raises(ValueError, match="not a message"):
        decode(message[:-8], [Tree])
