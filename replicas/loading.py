"""From a model folder and an EngineConfig to an engine that is ready to step."""

from collections.abc import Callable
from pathlib import Path

import torch

from trimode.replicas.acceptance import load_prior
from trimode.replicas.calibration import measure
from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine, StepRecord
from trimode.replicas.errors import CheckpointError
from trimode.replicas.governor import Governor
from trimode.replicas.language import Language
from trimode.replicas.model.safetensors_reader import LoadReport, Progress
from trimode.replicas.model.weights import load_model, log_report
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.startup import settle, start_rank
from trimode.replicas.step_profile import StepProfile
from trimode.replicas.tensor_parallel import Peers, TensorParallelRunner

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def build_engine(
    folder: Path,
    config: EngineConfig,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    adapter: bool = True,
    governed: bool = False,
    profile: Path | None = None,
    progress: Progress | None = None,
    on_loaded: Callable[[LoadReport], None] = log_report,
    on_capture: Progress | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    peers: Peers | None = None,
) -> Engine:
    """An engine over a checkpoint's runner, ready to step; dtype, quantization and peers as for
    build_runner.

    governed: a governor picks the block sizes that requests leave open, by the step-time profile in
    the file given, or else by one that is measured now, which takes some seconds. Its prior is the
    checkpoint's where that carries one.
    Raises CheckpointError and ConfigError.
    """
    runner = build_runner(
        folder,
        config,
        dtype=dtype,
        quantization=quantization,
        adapter=adapter,
        progress=progress,
        on_loaded=on_loaded,
        on_capture=on_capture,
        peers=peers,
    )
    config = runner.config
    governor = None
    if governed and config.max_block_size > 1:
        measured = measure(runner, config) if profile is None else StepProfile.load(profile)
        governor = Governor(measured, config.max_block_size, load_prior(folder))
    language = Language.load(folder, runner.info)
    return Engine(runner, config, language=language, governor=governor, on_step=on_step)


def build_runner(
    folder: Path,
    config: EngineConfig,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    adapter: bool = True,
    progress: Progress | None = None,
    on_loaded: Callable[[LoadReport], None] = log_report,
    on_capture: Progress | None = None,
    peers: Peers | None = None,
) -> TorchModelRunner | TensorParallelRunner:
    """Load a checkpoint onto the GPU where there is one, else the CPU. What the config leaves open
    is settled in the runner's own.

    progress is told bytes of weights, on_loaded what they took in the end, on_capture sizes of pass
    that a GPU captures. dtype 'auto' is bfloat16 on a GPU and float32 on a CPU, where bfloat16 is
    slower and less exact. quantization 'fp8' puts the decoder's projections into float8; on a CPU
    that is right but slow. peers: the other ranks; this one is rank 0 and loads its part only.
    Raises CheckpointError, and ConfigError where the model cannot be split over the ranks.
    """
    device = default_device()
    model = load_model(
        folder,
        torch_dtype(dtype, device),
        device,
        adapter=adapter,
        quantization=quantization,
        progress=progress,
        on_loaded=on_loaded,
        group=None if peers is None else peers.group,
    )
    if peers is not None:
        peers.wait()
    config = settle(model, config)
    rank, graph_keys = start_rank(model, config, on_capture)
    runner = TorchModelRunner(model, config, rank, graph_keys)
    return runner if peers is None else TensorParallelRunner(runner, peers.steps, peers.clock)


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    # With its number, by which tensors and NCCL tell devices apart.
    is_cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")


def torch_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """'float32' -> torch.float32, for the dtypes that a model can run in; 'auto' on a device."""
    if name == "auto" and device is not None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise CheckpointError(f"dtype {name!r} is not supported; use one of {sorted(DTYPES)}")
    return DTYPES[name]
