"""The part of the model that each rank holds, and what the parts make together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.replicas.errors import ConfigError
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.parallel import Alone, Shard, smallest
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel, dense_attention


def config_of(base: dict[str, Any], **changes: int) -> ModelConfig:
    return ModelConfig.from_dict(base | changes)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_shards_of_all_ranks_are_the_model(tiny_config: ModelConfig, size: int) -> None:
    shards = [Shard.of(tiny_config, rank, size) for rank in range(size)]
    for name, number in (
        ("heads", tiny_config.num_heads),
        ("channels", tiny_config.intermediate_size),
        ("token_ids", tiny_config.vocab_size),
    ):
        assert [i for shard in shards for i in getattr(shard, name)] == list(range(number)), name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_holds_the_kv_heads_that_its_heads_read(tiny_config: ModelConfig, size: int) -> None:
    per_kv_head = tiny_config.num_heads // tiny_config.num_kv_heads
    for rank in range(size):
        shard = Shard.of(tiny_config, rank, size)
        assert list(shard.kv_heads) == sorted({head // per_kv_head for head in shard.heads})


def test_a_vocabulary_that_does_not_divide_leaves_the_last_ranks_less(
    tiny_config_dict: dict[str, Any],
) -> None:
    config = config_of(tiny_config_dict, vocab_size=9)
    shards = [Shard.of(config, rank, 4) for rank in range(4)]
    assert [shard.num_rows for shard in shards] == [4, 4, 4, 4]
    assert [len(shard.token_ids) for shard in shards] == [4, 4, 1, 0]


@pytest.mark.parametrize(
    ("changes", "size", "numbers"),
    [
        ({}, 3, ("3", "num_attention_heads 4")),
        ({"intermediate_size": 49}, 2, ("2", "intermediate_size 49")),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3},
            4,
            ("4", "num_key_value_heads 3"),
        ),
    ],
)
def test_a_model_that_cannot_be_split_so_is_refused_with_both_numbers(
    tiny_config_dict: dict[str, Any], changes: dict[str, int], size: int, numbers: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel is {numbers[0]}.*{numbers[1]}"):
        Shard.of(config_of(tiny_config_dict, **changes), 0, size)


class Lockstep:
    """A group whose ranks are run one after the other, as often as they have something to say."""

    def __init__(self, rank: int, said: list[list[Tensor]]) -> None:
        self.rank, self.size = rank, len(said)
        self._said = said  # by rank: what each has contributed to each collective so far
        self._turn = 0

    def _meet(self, x: Tensor) -> list[Tensor]:
        turn, self._turn = self._turn, self._turn + 1
        if turn == len(self._said[self.rank]):
            self._said[self.rank].append(x.clone())
        if any(len(of_rank) <= turn for of_rank in self._said):
            raise InterruptedError  # until the others have come as far
        return [of_rank[turn] for of_rank in self._said]

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._meet(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._meet(x))


def shard_of(
    full: NemotronLabsDiffusionModel, rank: int, said: list[list[Tensor]]
) -> NemotronLabsDiffusionModel:
    model = NemotronLabsDiffusionModel(full.config, Lockstep(rank, said)).to(torch.float64).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(torch.nan)  # rows past the vocabulary's end stay so
    whole = full.published_tensors()
    for name, target in model.targets().items():
        part = target.part
        source = whole[name]
        assert target.stored_shape == source.shape, name
        if part is not None:
            source = source.narrow(part.dim, part.start, target.view.shape[part.dim])
        target.view.copy_(source)
    return model


@torch.inference_mode()
def test_ranks_over_an_uneven_vocabulary_give_the_whole_models_logits(
    tiny_config_dict: dict[str, Any],
) -> None:
    config = config_of(tiny_config_dict, vocab_size=61)
    torch.manual_seed(0)
    full = NemotronLabsDiffusionModel(config).to(torch.float64).eval()
    ids = torch.arange(61)
    positions = torch.arange(len(ids))
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()

    def logits(model: NemotronLabsDiffusionModel) -> Tensor:
        hidden = model(ids, positions, lambda _, qkv, rotary: dense_attention(qkv, rotary, mask))
        part = model.logits(hidden)
        return part if model.vocabulary is None else model.vocabulary.whole(part)

    said: list[list[Tensor]] = [[] for _ in range(4)]
    results: dict[int, Tensor] = {}
    while len(results) < 4:
        for rank in range(4):
            try:
                results[rank] = logits(shard_of(full, rank, said))
            except InterruptedError:
                continue
    for result in results.values():
        torch.testing.assert_close(result, logits(full))


def test_alone_everything_is_here() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert Alone().all_reduce(x) is x
    assert torch.equal(Alone().all_gather(x), x[None])
    assert smallest(7, Alone(), torch.device("cpu")) == 7
