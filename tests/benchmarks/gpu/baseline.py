"""transformers' `generate` on the same random weights, one request, greedily; what people run who
have no server. The ratio is of our engine's tokens a second on the same load (end_to_end.py).
"""

import time

import torch
from documents import Document, Facts
from end_to_end import NEW_TOKENS, PROMPT_LEN
from gpu_time import synchronize
from published_acceptance import LABEL
from workbench import Workbench

REPEATS = 3


@torch.inference_mode()
def measure_baseline(bench: Workbench, document: Document, size: str, ours: Facts) -> None:
    """ours: what was found end to end with this model."""
    # Where transformers is not installed, this section alone fails.
    from trimode.cluster.bench.transformers_baseline import as_ministral

    new_tokens, prompt_len = (8, 24) if bench.is_tiny else (NEW_TOKENS, PROMPT_LEN)
    bench.release()  # its float32 initialisation takes the memory of a KV pool
    model = bench.model(size)
    with torch.device(bench.device):
        theirs = as_ministral(model, bench.raw(size))
    theirs.generation_config.eos_token_id = None
    document.write(model=size, attention=str(theirs.config._attn_implementation))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, prompt_len), generator=generator)
    prompt = prompt.to(bench.device)
    for _ in range(REPEATS):
        synchronize(bench.device)
        begun = time.perf_counter()
        out = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new_tokens,
        )
        synchronize(bench.device)
        speed = (out.shape[1] - prompt_len) / (time.perf_counter() - begun)
        document.append("repeats", {"tokens_per_s": speed})
    best = max(row["tokens_per_s"] for row in document.facts["repeats"])
    document.write(
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        transformers_tokens_per_s=best,
        label=LABEL,
        ratios={
            row["setting"]: row["tokens_per_s"] / best
            for row in ours.get("rows", ())
            if row["users"] == 1
        },
    )
