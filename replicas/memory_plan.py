"""MemoryPlan: how many KV pages fit beside the model, with the arithmetic to show."""

from dataclasses import dataclass

from trimode.replicas.errors import ConfigError

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one device."""

    total_bytes: int
    utilization: float  # share of the total that this replica may use, what others hold included
    others_bytes: int  # what other processes and the driver hold
    weight_bytes: int
    activation_bytes: int  # peak of the largest pass, beyond weights and KV
    graph_bytes: int  # kept for captured graphs
    page_bytes: int  # one page's keys and values of all layers, on this device

    @property
    def kv_bytes(self) -> int:
        """What is left for KV."""
        usable = int(self.total_bytes * self.utilization)
        taken = self.others_bytes + self.weight_bytes + self.activation_bytes + self.graph_bytes
        return max(0, usable - taken)

    def num_pages(self, least: int) -> int:
        """Raises ConfigError with the arithmetic where fewer than `least` pages fit."""
        pages = self.kv_bytes // self.page_bytes
        if pages < least:
            raise ConfigError(
                f"the KV cache has room for {pages} pages and needs {least} at least: "
                f"{self.describe()}. Raise engine.memory_utilization, lower "
                "engine.max_step_tokens, engine.max_block_size or engine.graph_memory_mib, use "
                "quantization: fp8, or more ranks (tensor_parallel)"
            )
        return pages

    def describe(self) -> str:
        """The arithmetic in one line."""
        return (
            f"{_gib(self.total_bytes)} x {self.utilization:g} - {_gib(self.others_bytes)} others "
            f"- {_gib(self.weight_bytes)} weights - {_gib(self.activation_bytes)} activations "
            f"- {_gib(self.graph_bytes)} graphs = {_gib(self.kv_bytes)}; "
            f"/ {self.page_bytes / MIB:.2f} MiB a page"
        )


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
