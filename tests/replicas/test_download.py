import numpy as np
import pytest
import torch

from trimode.kernels.sampling import Sampled
from trimode.replicas.array_tree import leaves
from trimode.replicas.download import Download, pack, unpack


@pytest.fixture
def sampled() -> Sampled:
    return Sampled(
        token_ids=torch.tensor([7, 8, 2**40]),
        confidences=torch.tensor([0.25]),
        candidates=torch.tensor([[1, 2], [3, 4]]),
        logprobs=torch.empty(0),
        top_ids=torch.empty(0, 0, dtype=torch.int64),
    )


def test_what_was_packed_is_unpacked(sampled: Sampled) -> None:
    got = unpack(sampled, pack(list(leaves(sampled))).numpy())
    for one, other in zip(leaves(got), leaves(sampled), strict=True):
        assert one.shape == other.shape
        assert np.array_equal(one, other.numpy())
    assert got.top_logprobs is None


def test_on_a_cpu_the_answers_are_here_at_once(sampled: Sampled) -> None:
    got = Download(sampled).wait()
    assert got.token_ids.tolist() == [7, 8, 2**40]
    assert got.candidates.tolist() == [[1, 2], [3, 4]]


@pytest.mark.gpu
def test_answers_come_home_though_their_tensors_are_overwritten(sampled: Sampled) -> None:
    ids = sampled.token_ids.cuda()
    download = Download(Sampled(ids, sampled.confidences.cuda()))
    ids.zero_()
    assert download.wait().token_ids.tolist() == [7, 8, 2**40]
