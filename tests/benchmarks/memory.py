"""What a token costs: KV bytes as computed from the config and as allocated, and host memory of an
engine's bookkeeping with many long sequences at once. Writes docs/measurements/memory.json.

    python tests/benchmarks/memory.py
"""

import gc
import json
import tracemalloc
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.strategy import PassKind
from trimode.replicas.engine import Engine
from trimode.replicas.loading import build_runner
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT, ModelConfig
from trimode.replicas.scheduled import Answers, Scheduled
from trimode.replicas.types import Mode, ModelInfo, Request

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "memory.json"
SEQUENCES, PROMPT, NEW, PAGE_SIZE = 512, 512, 512, 16


class NoModel:
    """Answers at once, so that only the engine's own memory is seen."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    def launch(self, scheduled: SequenceOf[Scheduled], *rest: Any) -> list[Answers]:
        return [
            Answers([300 + (item.query.start + index + causal) % 1700 for index in answers], [])
            for item in scheduled
            for answers, causal in [(item.query.answers, item.query.kind is PassKind.CAUSAL)]
        ]

    def read(self, launched: list[Answers]) -> list[Answers]:
        return launched


def host_bytes_per_token(info: ModelInfo, mode: Mode) -> float:
    """Python memory of an engine that holds SEQUENCES sequences, over the tokens they hold."""
    slots = SEQUENCES * (PROMPT + NEW + 64)
    config = EngineConfig(
        page_size=PAGE_SIZE, num_pages=slots // PAGE_SIZE, max_sequences=SEQUENCES,
        max_waiting=SEQUENCES, max_step_tokens=32768,
    )  # fmt: skip
    engine = Engine(NoModel(info), config)
    gc.collect()
    tracemalloc.start()
    for index in range(SEQUENCES):
        # Each prompt is another one, and made here: its own memory counts, too.
        prompt = tuple(300 + (index * 31 + j * 7) % 1700 for j in range(PROMPT))
        engine.add(Request(f"r{index}", prompt, mode, NEW, ignore_eos=True, block_size=8))
    tokens = SEQUENCES * PROMPT
    while tokens < SEQUENCES * (PROMPT + NEW - 24):
        tokens += sum(len(chunk.token_ids) for _, chunk in engine.step())
    assert engine.load().running == SEQUENCES
    engine.drain_events()
    gc.collect()
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return used / tokens


def main() -> None:
    model = ModelConfig.load(BUNDLED_CHECKPOINT)
    config = EngineConfig(page_size=PAGE_SIZE, num_pages=1024)
    runner = build_runner(BUNDLED_CHECKPOINT, config, dtype="float32")
    entries = runner._cache.entries
    computed = 2 * model.num_layers * model.num_kv_heads * model.head_dim * entries.element_size()
    allocated = entries.untyped_storage().nbytes() / (config.num_pages * PAGE_SIZE)
    document = {
        "command": "python tests/benchmarks/memory.py",
        "machine": describe_machine("torch", "trimode"),
        "model": BUNDLED_CHECKPOINT.name,
        "kv_bytes_per_token": {"computed": computed, "allocated": allocated},
        "host": {
            "sequences_at_once": SEQUENCES,
            "tokens_each": PROMPT + NEW,
            "bytes_per_token": {
                mode.value: round(host_bytes_per_token(runner.info, mode), 1)
                for mode in (Mode.AUTOREGRESSIVE, Mode.SELF_SPECULATION)
            },
        },
    }
    OUT.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
