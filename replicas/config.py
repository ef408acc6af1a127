"""EngineConfig: the bounds of one engine. Every queue and pool of the replica takes its limit from
here. RankConfig: over how many processes its model is split.
"""

from dataclasses import dataclass

from trimode.replicas.errors import ConfigError

DEFAULT_CPU_PAGES = 4096


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises ConfigError that names the setting and what would work."""

    page_size: int = 16  # slots a page
    # Of KV. None: on a GPU what memory holds, on a CPU DEFAULT_CPU_PAGES.
    num_pages: int | None = None
    max_sequences: int = 64  # running at once
    max_waiting: int = 256  # queued for admission; one more is refused
    max_step_tokens: int = 2048  # query tokens of one pass
    max_block_size: int = 32  # the largest block this engine runs; 1 speculates nothing
    prefix_cache: bool = True  # keep the KV of full pages for whoever has the same prefix
    # Launch a pass before the one before it was read. Pays where the device computes by itself;
    # None: on GPUs.
    launch_ahead: bool | None = None
    # The same tokens whatever else is in the batch; costs speed.
    batch_invariant: bool = False
    # Of a GPU only.
    memory_utilization: float = 0.9  # share of the memory that a replica plans with
    cuda_graphs: bool = True  # replay captured passes, where they have few rows
    graph_memory_mib: int = 1024  # that captured passes may take

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if type(value) is int and value < 1:
                raise ConfigError(f"engine.{name} must be at least 1, is {value}")
        if not 0 < self.memory_utilization <= 1:
            raise ConfigError(
                f"engine.memory_utilization must be in (0, 1], is {self.memory_utilization}"
            )
        # The scheduler keeps a quarter of each step for prefill; one block must fit into the rest.
        needed = max(4, (4 * self.max_block_size - 1) // 3)
        if self.max_step_tokens < needed:
            raise ConfigError(
                f"engine.max_step_tokens is {self.max_step_tokens}; blocks of "
                f"{self.max_block_size} beside a prefill need at least {needed}"
            )

    @property
    def pages(self) -> int:
        """num_pages where it is known: in the config that an engine is given."""
        assert self.num_pages is not None, "whoever builds the engine counts its pages first"
        return self.num_pages

    @property
    def least_pages(self) -> int:
        """For a prompt of one token and a block."""
        return 1 + self.max_block_size // self.page_size

    @property
    def prefill_tokens(self) -> int:
        """Query tokens of a step that decoding leaves to prefill when prefill has work."""
        return self.max_step_tokens // 4

    @property
    def decode_tokens(self) -> int:
        return self.max_step_tokens - self.prefill_tokens


@dataclass(frozen=True, slots=True)
class RankConfig:
    """The ranks of one tensor-parallel replica. Raises ConfigError that names the setting."""

    size: int = 1
    cpus: float = 1  # per rank
    gpus: float = 0  # per rank
    # One pass may take so long before the group is given up; long prefills on CPUs need more.
    step_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if self.size > 1 and self.gpus not in (0, 1):
            raise ConfigError(
                f"gpus is {self.gpus:g}; with tensor_parallel {self.size} each rank has one GPU of "
                "its own, or none"
            )
