"""`trimode check`: what is in a checkpoint, and whether it can be served."""

from rich.console import Console
from rich.table import Table

from trimode.cluster.model_folder import fetch
from trimode.replicas.model.check import CheckpointReport, WeightCount, check_checkpoint
from trimode.replicas.model.source import ModelSource, label


def run(source: ModelSource) -> None:
    """Check and print. Raises CheckpointError."""
    folder = fetch(source)
    report = check_checkpoint(folder)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{label(source)} can be served ({folder})")
    console.print(_table(report))


def _table(report: CheckpointReport) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    config = report.config
    rows = {
        "layers": str(config.num_layers),
        "hidden / intermediate size": f"{config.hidden_size:,} / {config.intermediate_size:,}",
        "heads / KV heads / head size": (
            f"{config.num_heads} / {config.num_kv_heads} / {config.head_dim}"
        ),
        "vocabulary": f"{config.vocab_size:,}",
        "positions": f"{config.max_positions:,}",
        "block size": str(config.block_size),
        "weights": _weights(report.base),
        "read by a pass": f"{report.bytes_a_pass / 1e9:.2f} GB",
        "draft adapter": (
            "none" if report.adapter is None
            else f"rank {report.adapter_rank}, {_weights(report.adapter)}"
        ),
        "KV per token, 16 bits": f"{report.kv_bytes_per_token:,} B",
        "tokenizer": "yes" if report.has_tokenizer else "none: requests must be token ids",
        "chat template": "yes" if report.has_chat_template else "none: no chat requests",
    }  # fmt: skip
    for row in rows.items():
        table.add_row(*row)
    return table


def _weights(count: WeightCount) -> str:
    return (
        f"{count.num_parameters:,} parameters in {count.num_tensors} tensors, "
        f"{count.num_bytes:,} B of {', '.join(count.dtypes)}"
    )
