"""The registry: which strategy decodes which mode."""

from collections.abc import Callable, Mapping

from trimode.replicas.decoding.autoregressive import Autoregressive
from trimode.replicas.decoding.block_diffusion import BlockDiffusion
from trimode.replicas.decoding.self_speculation import SelfSpeculation
from trimode.replicas.decoding.strategy import DecodingContext, Strategy
from trimode.replicas.types import Mode

Registry = Mapping[Mode, Callable[[DecodingContext], Strategy]]

ALL_MODES: Registry = {
    Mode.AUTOREGRESSIVE: Autoregressive,
    Mode.BLOCK_DIFFUSION: BlockDiffusion,
    Mode.SELF_SPECULATION: SelfSpeculation,
}
