"""What an engine's config leaves to the device, found out before the engine starts: how many pages
of KV fit, whether passes are launched ahead, which sizes of pass are captured.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import structlog
import torch

from trimode.replicas.config import DEFAULT_CPU_PAGES, EngineConfig
from trimode.replicas.errors import ConfigError
from trimode.replicas.graph_keys import GraphKeys
from trimode.replicas.memory_plan import MIB, MemoryPlan
from trimode.replicas.model.parallel import smallest
from trimode.replicas.model.safetensors_reader import Progress
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.rank_runner import RankRunner
from trimode.replicas.step_graphs import CudaCapture
from trimode.replicas.warm_up import largest_pass, warm_up

logger = structlog.get_logger(__name__)


def settle(model: NemotronLabsDiffusionModel, config: EngineConfig) -> EngineConfig:
    """The config with nothing left open. On a GPU it runs the largest pass once.

    Raises ConfigError where no block of KV fits.
    """
    on_gpu = model.diffusion_head.weight.is_cuda
    if config.launch_ahead is None:
        config = replace(config, launch_ahead=on_gpu)
    if config.num_pages is None:
        pages = _count_pages(model, config) if on_gpu else DEFAULT_CPU_PAGES
        config = replace(config, num_pages=pages)
    elif config.num_pages < config.least_pages:
        raise ConfigError(
            f"engine.num_pages is {config.num_pages}; a block of {config.max_block_size} and a "
            f"token before it take {config.least_pages} pages of {config.page_size}"
        )
    return config


def start_rank(
    model: NemotronLabsDiffusionModel,
    config: EngineConfig,
    progress: Progress | None = None,
    runner: Callable[..., RankRunner] = RankRunner,
) -> tuple[RankRunner, GraphKeys | None]:
    """A runner of a settled config, and the sizes of pass that it has captured: on a GPU the
    smaller ones. What they launch is compiled by then. runner: what makes it, of RankRunner's
    arguments.
    """
    device = model.diffusion_head.weight.device
    # In float64 references run, which wait for the device.
    is_wide = model.diffusion_head.weight.dtype == torch.float64
    if device.type != "cuda" or is_wide:
        return runner(model, config), None
    capture = CudaCapture(device, model.group) if config.cuda_graphs else None
    rank = runner(model, config, capture)
    warm_up(rank, model, config)
    if capture is None:
        return rank, None
    keys = GraphKeys.of(
        config.max_sequences, config.max_block_size, config.max_step_tokens,
        model.has_draft_adapter,
    )  # fmt: skip
    wanted = keys.all()
    begun, before = time.perf_counter(), capture.used_bytes()
    count = rank.capture(wanted, config.graph_memory_mib * MIB, progress)
    logger.info(
        "captured passes",
        captured=count,
        sizes=len(wanted),
        seconds=round(time.perf_counter() - begun, 1),
        used_mib=(capture.used_bytes() - before) // MIB,
        memory_mib=config.graph_memory_mib,
    )
    return rank, keys


def kv_page_bytes(model: NemotronLabsDiffusionModel, page_size: int) -> int:
    """One page's keys and values of all layers."""
    shape = model.config
    width = len(model.shard.kv_heads) * shape.head_dim  # of this rank
    slot = 2 * shape.num_layers * width * model.diffusion_head.weight.element_size()
    return slot * page_size


def _count_pages(model: NemotronLabsDiffusionModel, config: EngineConfig) -> int:
    device = model.diffusion_head.weight.device
    activations = _activation_bytes(model, config)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    weights = torch.cuda.memory_allocated(device)
    plan = MemoryPlan(
        total_bytes=total,
        utilization=config.memory_utilization,
        others_bytes=max(0, total - free - torch.cuda.memory_reserved(device)),
        weight_bytes=weights,
        activation_bytes=activations,
        graph_bytes=config.graph_memory_mib * MIB if config.cuda_graphs else 0,
        page_bytes=kv_page_bytes(model, config.page_size),
    )
    own = plan.num_pages(config.least_pages)
    pages = smallest(own, model.group, device)  # the same pages on every rank
    logger.info(
        "KV memory", arithmetic=plan.describe(), pages=pages, tokens=pages * config.page_size
    )
    return pages


def _activation_bytes(model: NemotronLabsDiffusionModel, config: EngineConfig) -> int:
    """What the largest pass takes beyond weights and KV."""
    device = model.diffusion_head.weight.device
    rank = RankRunner(model, replace(config, num_pages=1))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    rank.launch(largest_pass(model, config))
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
