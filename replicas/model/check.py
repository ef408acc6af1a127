"""Is a folder a checkpoint that can be served? Told from its headers alone, in a second and without
memory for weights.
"""

from dataclasses import dataclass
from pathlib import Path

from trimode.replicas.model.checkpoint_files import AdapterConfig
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.safetensors_header import StoredTensor
from trimode.replicas.model.weights import empty_model, locate_weights

KV_ITEM_BYTES = 2  # as served on GPUs


@dataclass(frozen=True, slots=True)
class WeightCount:
    """How much weight some tensors are, as they are stored."""

    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """What is in a folder that holds all that its config.json promises, and nothing else."""

    config: ModelConfig
    base: WeightCount
    adapter: WeightCount | None
    adapter_rank: int | None
    bytes_a_pass: int  # of base weights: all but the embeddings, of which a pass reads some rows
    kv_bytes_per_token: int  # in 16 bits
    has_tokenizer: bool  # without one, requests come as token ids
    has_chat_template: bool


def check_checkpoint(folder: Path) -> CheckpointReport:
    """Read config and headers, no weights.

    Raises CheckpointError that names the file and the key, or the tensor that is missing, surplus,
    misshapen or of a type that cannot be loaded.
    """
    config = ModelConfig.load(folder)
    adapter = AdapterConfig.load(folder)
    model = empty_model(config, adapter)
    stored = locate_weights(folder, model)
    base = {name: stored[name] for name in model.published_tensors()}
    own = [tensor for name, tensor in stored.items() if name not in base]
    return CheckpointReport(
        config=config,
        base=_count(list(base.values())),
        adapter=_count(own) if adapter is not None else None,
        adapter_rank=adapter.rank if adapter is not None else None,
        bytes_a_pass=sum(
            tensor.num_bytes for name, tensor in base.items() if "embed_tokens" not in name
        ),
        kv_bytes_per_token=2 * config.num_layers * config.kv_width * KV_ITEM_BYTES,
        has_tokenizer=(folder / "tokenizer.json").is_file(),
        has_chat_template=(folder / "chat_template.jinja").is_file(),
    )


def _count(tensors: list[StoredTensor]) -> WeightCount:
    return WeightCount(
        num_tensors=len(tensors),
        num_parameters=sum(tensor.num_elements for tensor in tensors),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors})),
    )
