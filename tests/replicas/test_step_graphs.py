"""Passes that are padded and replayed, with a capture that runs again what a graph would replay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.graph_keys import GraphKey, GraphKeys
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.pass_size import Size
from trimode.replicas.rank_runner import RankRunner
from trimode.replicas.step_graphs import ForwardInputs, StepGraphs
from trimode.replicas.types import Mode

AR, DIFFUSION, SPECULATION = Mode.AUTOREGRESSIVE, Mode.BLOCK_DIFFUSION, Mode.SELF_SPECULATION
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Rerun:
    """A capture: the result is always in the same place, as a graph's is."""

    def __init__(self, bytes_each: int = 0, bytes_before: int = 0) -> None:
        self.num_replays = 0
        self._bytes_each = bytes_each
        self._used = bytes_before

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        out = run()
        self._used += self._bytes_each

        def replay() -> Tensor:
            self.num_replays += 1
            return out.copy_(run())

        return replay

    def used_bytes(self) -> int:
        return self._used


@pytest.fixture(scope="module")
def make_engine(tiny_model: Any, small_engine: Any) -> Callable[..., tuple[Engine, Rerun]]:
    """make_engine(**settings): an engine of the tiny model that replays its passes."""

    def make(max_graph_sequences: int = 4, **own: Any) -> tuple[Engine, Rerun]:
        config: EngineConfig = small_engine(**({"max_sequences": 4, "max_block_size": 4} | own))
        capture = Rerun()
        rank = RankRunner(tiny_model(), config, capture)
        keys = GraphKeys.of(max_graph_sequences, 4, config.max_step_tokens, has_adapter=True)
        assert rank.capture(keys.all(), max_bytes=1) == len(keys.all())
        return Engine(TorchModelRunner(tiny_model(), config, rank, keys), config), capture

    return make


requests = st.lists(
    st.tuples(
        st.sampled_from([AR, SPECULATION, DIFFUSION]),
        st.integers(1, 30),  # prompt
        st.integers(1, 20),  # max_tokens
        st.integers(1, 4),  # block size
        st.sampled_from([0.0, 0.8]),  # temperature
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(requests=requests, launch_ahead=st.booleans())
def test_replayed_passes_give_the_same_tokens(
    make_engine: Any,
    tiny_model: Any,
    small_engine: Any,
    make_request: Any,
    drain: Any,
    requests: list[tuple[Mode, int, int, int, float]],
    launch_ahead: bool,
) -> None:
    def ask() -> list[Any]:
        return [
            make_request(
                mode, prompt, max_tokens, f"r{index}", block_size=block, temperature=heat,
                seed=index, ignore_eos=True,
            )
            for index, (mode, prompt, max_tokens, block, heat) in enumerate(requests)
        ]  # fmt: skip

    plain_config = small_engine(max_sequences=4, max_block_size=4)
    wanted = drain(Engine(TorchModelRunner(tiny_model(), plain_config), plain_config), ask())
    engine, capture = make_engine(launch_ahead=launch_ahead)
    got = drain(engine, ask())
    assert {name: one.token_ids for name, one in got.items()} == {
        name: one.token_ids for name, one in wanted.items()
    }
    # Only a pass with a prompt in it may be larger than every size.
    assert capture.num_replays > 0 or all(max_tokens == 1 for _, _, max_tokens, _, _ in requests)


@pytest.mark.parametrize("launch_ahead", [False, True])
def test_blocks_that_reach_behind_the_last_position_are_replayed(
    make_engine: Any, make_request: Any, drain: Any, launch_ahead: bool
) -> None:
    engine, capture = make_engine(launch_ahead=launch_ahead)
    last = make_request(SPECULATION, 500, 12, block_size=4, ignore_eos=True)
    assert len(drain(engine, [last])["r"].token_ids) == 12
    assert capture.num_replays > 0


def test_a_pass_larger_than_every_size_runs_as_it_is(
    make_engine: Any, make_request: Any, drain: Any
) -> None:
    engine, capture = make_engine(max_graph_sequences=1)
    drain(engine, [make_request(AR, 4, 6, f"r{i}", ignore_eos=True) for i in range(3)])
    assert capture.num_replays == 0


def test_sizes_that_memory_has_no_room_for_are_left_out(tiny_model: Any, small_engine: Any) -> None:
    config = small_engine(max_sequences=8, max_block_size=8)
    # What the KV cache took before the first capture does not count.
    rank = RankRunner(tiny_model(), config, Rerun(bytes_each=100, bytes_before=10_000))
    keys = GraphKeys.of(8, 8, config.max_step_tokens, has_adapter=True)
    told: list[tuple[int, int]] = []
    count = rank.capture(keys.all(), 450, lambda done, total: told.append((done, total)))
    assert count == 4
    assert told == [(done, len(keys.all())) for done in (1, 2, 3, 4)]


def test_a_size_without_drafts_knows_no_adapter() -> None:
    seen: list[ForwardInputs] = []

    def forward(inputs: ForwardInputs) -> Tensor:
        seen.append(inputs)
        return inputs.token_ids.double()

    graphs = StepGraphs(forward, Rerun())
    nothing = torch.zeros(2, dtype=torch.int64)
    table = torch.zeros(2, 4, dtype=torch.int32)
    attention = Size(2, 2).blank_attention(table, 4, batch_invariant=False)
    blank = ForwardInputs(nothing, nothing, nothing - 1, attention, None)
    list(graphs.capture([(GraphKey(2, 2, False), blank)], max_bytes=1))
    assert seen[0].draft_mask is None
    assert GraphKey(2, 2, False) in graphs
    assert GraphKey(2, 2, True) not in graphs
