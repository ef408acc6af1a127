"""The engine on a GPU: kernels, graphs, memory and launching ahead together."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.loading import build_engine, build_runner
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model.weights import load_model
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.startup import settle, start_rank
from trimode.replicas.types import Mode, Request

pytestmark = pytest.mark.gpu
MODES = list(Mode)[1:]
CONFIG = EngineConfig(num_pages=512, max_sequences=8)


def crowd(mode: Mode, **own: Any) -> list[Request]:
    """Requests of one mode, sampled and greedy, of several lengths."""
    return [
        Request(
            f"r{index}", tuple(range(40 + index, 60 + 7 * index)), mode, 24, seed=index,
            temperature=0.8 * (index % 2), block_size=8, ignore_eos=True, **own,
        )
        for index in range(6)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    """float32, so that tokens can be compared with a CPU's."""
    return build_engine(BUNDLED_CHECKPOINT, CONFIG, dtype="float32")


class Guarded:
    """A runner; it is an error to wait for the device while a pass is launched."""

    def __init__(self, runner: TorchModelRunner) -> None:
        self.info = runner.info
        self._runner = runner

    def launch(self, *given: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return self._runner.launch(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def read(self, launched: Any) -> Any:
        return self._runner.read(launched)


@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_are_those_of_a_cpu(engine: Engine, drain: Any, mode: Mode) -> None:
    on_cpu = Engine(TorchModelRunner(load_model(BUNDLED_CHECKPOINT, torch.float32), CONFIG), CONFIG)
    wanted, got = drain(on_cpu, crowd(mode)), drain(engine, crowd(mode))
    for name, one in wanted.items():
        assert got[name].token_ids == one.token_ids


@pytest.mark.parametrize("mode", MODES)
def test_replayed_graphs_give_the_tokens_of_plain_launches(
    engine: Engine, drain: Any, mode: Mode
) -> None:
    plain = build_engine(BUNDLED_CHECKPOINT, replace(CONFIG, cuda_graphs=False), dtype="float32")
    wanted, got = drain(plain, crowd(mode)), drain(engine, crowd(mode))
    assert {n: one.token_ids for n, one in got.items()} == {
        n: one.token_ids for n, one in wanted.items()
    }


@pytest.mark.parametrize("mode", [Mode.AUTOREGRESSIVE, Mode.SELF_SPECULATION])
def test_a_launch_never_waits_for_the_device(drain: Any, mode: Mode) -> None:
    runner = build_runner(BUNDLED_CHECKPOINT, CONFIG, dtype="bfloat16")
    assert runner.config.launch_ahead
    assert len(drain(Engine(Guarded(runner), runner.config), crowd(mode))) == 6


@pytest.mark.parametrize("mode", [Mode.AUTOREGRESSIVE, Mode.SELF_SPECULATION])
def test_batch_invariance_gives_the_same_tokens_alone_and_in_a_crowd(
    drain: Any, mode: Mode
) -> None:
    config = replace(CONFIG, batch_invariant=True)
    engine = build_engine(BUNDLED_CHECKPOINT, config, dtype="bfloat16")
    together = drain(engine, crowd(mode))
    for request in crowd(mode):
        alone = drain(engine, [request])[request.request_id]
        assert alone.token_ids == together[request.request_id].token_ids


def test_batch_invariance_makes_self_speculation_equal_to_ar(drain: Any) -> None:
    config = replace(CONFIG, batch_invariant=True)
    engine = build_engine(BUNDLED_CHECKPOINT, config, dtype="bfloat16")
    wanted, got = (
        drain(engine, crowd(mode)) for mode in (Mode.AUTOREGRESSIVE, Mode.SELF_SPECULATION)
    )
    for name, one in wanted.items():
        assert got[name].token_ids == one.token_ids


def test_the_kv_pool_takes_what_memory_is_left() -> None:
    model = load_model(BUNDLED_CHECKPOINT, torch.bfloat16, "cuda")
    config = settle(model, EngineConfig(memory_utilization=0.3))
    assert config.launch_ahead
    small = settle(model, EngineConfig(memory_utilization=0.2))
    total = torch.cuda.mem_get_info()[1]
    slots = (config.pages - small.pages) * config.page_size
    shape = model.config
    assert slots * 2 * shape.num_layers * shape.kv_width * 2 == pytest.approx(0.1 * total, rel=0.05)


def test_whatever_the_cache_takes_every_size_of_a_small_model_is_captured() -> None:
    model = load_model(BUNDLED_CHECKPOINT, torch.bfloat16, "cuda")
    rank, keys = start_rank(model, settle(model, EngineConfig(memory_utilization=0.3)))
    assert keys is not None and rank._graphs is not None
    assert len(rank._graphs) == len(keys.all())


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_of_several_chunks_is_answered(drain: Any, mode: Mode) -> None:
    """A chunk alone asks for no answer."""
    config = EngineConfig(num_pages=512, max_sequences=2, max_step_tokens=64)
    engine = build_engine(BUNDLED_CHECKPOINT, config, dtype="bfloat16")
    request = Request("r", tuple(range(40, 240)), mode, 8, ignore_eos=True)
    assert len(drain(engine, [request])["r"].token_ids) == 8
    assert not engine.has_work
