"""All Triton kernels under one engine, without a GPU: each where its launcher would run there."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trimode.kernels.accept import accept_triton
from trimode.kernels.activation import silu_mul_triton
from trimode.kernels.draft_adapter import add_draft_adapter_triton
from trimode.kernels.norm import add_rms_norm_triton
from trimode.kernels.paged_attention import paged_attention_triton
from trimode.kernels.pending import fill_in_triton
from trimode.kernels.rope import rotate_and_write_triton
from trimode.kernels.sampling import sample_triton
from trimode.replicas import look_ahead, rank_runner
from trimode.replicas.engine import Engine
from trimode.replicas.model import layers
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.rank_runner import RankRunner
from trimode.replicas.types import Mode
from trimode.replicas.warm_up import warm_up

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here; test_on_gpu.py runs them"
)
AR, DIFFUSION, SPECULATION = Mode.AUTOREGRESSIVE, Mode.BLOCK_DIFFUSION, Mode.SELF_SPECULATION


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model runs on Triton's kernels, in its interpreter."""
    for module, name, launcher in (
        (layers, "add_rms_norm", add_rms_norm_triton),
        (layers, "silu_mul", silu_mul_triton),
        (layers, "add_draft_adapter", add_draft_adapter_triton),
        (rank_runner, "rotate_and_write", rotate_and_write_triton),
        (rank_runner, "paged_attention", paged_attention_triton),
        (rank_runner, "sample", sample_triton),
        (rank_runner, "accept", accept_triton),
        (look_ahead, "fill_in", fill_in_triton),
    ):
        monkeypatch.setattr(module, name, launcher)


def ask(make_request: Any) -> list[Any]:
    """One request a mode; a prompt that is longer than a page and one that is not."""
    return [
        make_request(AR, 9, 4, "ar", ignore_eos=True, temperature=0.8, top_k=9, top_p=0.9),
        make_request(SPECULATION, 3, 6, "spec", block_size=4, ignore_eos=True),
        make_request(DIFFUSION, 5, 4, "diffusion", block_size=4, ignore_eos=True),
    ]


@pytest.mark.parametrize("launch_ahead", [False, True])
def test_the_tokens_are_those_of_the_references(
    tiny_model: Any, make_request: Any, small_engine: Any, drain: Any, launch_ahead: bool,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    config = small_engine(launch_ahead=launch_ahead)

    def decode() -> dict[str, Any]:
        engine = Engine(TorchModelRunner(tiny_model(torch.float32), config), config)
        return drain(engine, ask(make_request))

    wanted = decode()
    request.getfixturevalue("kernels")
    got = decode()
    assert {name: one.token_ids for name, one in got.items()} == {
        name: one.token_ids for name, one in wanted.items()
    }


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result the host must see before it can go on."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        # An index of booleans is a nonzero in disguise.
        if name in ("index", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


def test_launching_a_pass_asks_the_device_for_nothing(
    tiny_model: Any, make_request: Any, small_engine: Any, kernels: None
) -> None:
    config = small_engine(launch_ahead=True)
    runner = TorchModelRunner(tiny_model(torch.float32), config)
    launch = runner.launch

    def guarded(*given: Any) -> Any:
        with NoWaiting():
            return launch(*given)

    runner.launch = guarded  # type: ignore[method-assign]
    engine = Engine(runner, config)
    for request in ask(make_request)[:2]:
        engine.add(request)
    for _ in range(6):
        engine.step()


def test_they_are_warmed_up_for_whatever_requests_usually_ask(
    tiny_model: Any, small_engine: Any, kernels: None
) -> None:
    config = small_engine(max_block_size=4)
    model = tiny_model(torch.float32)
    with NoWaiting():
        warm_up(RankRunner(model, config), model, config)
