"""The same checkpoint through transformers' `generate`: what people run who have no server."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Ministral3Config, Ministral3ForCausalLM
from transformers.initialization import no_init_weights

from trimode.cluster.bench.local import Encode
from trimode.cluster.bench.metrics import Arrival, Record
from trimode.cluster.bench.workload import Job
from trimode.replicas.loading import torch_dtype
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.model.weights import load_model

# What config.json and transformers' Ministral 3, which is the causal path's backbone, both have.
SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
)


class TransformersTarget:
    """Answers one request at a time, greedily, with a KV cache and the attention that
    transformers prefers. End-of-sequence is a token like others.
    """

    def __init__(self, folder: Path, dtype: str, encode: Encode) -> None:
        self._encode = encode
        self._model = _load(folder, dtype)

    @property
    def attention(self) -> str:
        """The implementation that transformers chose."""
        return str(self._model.config._attn_implementation)

    @torch.inference_mode()
    def run(
        self, jobs: Sequence[Job], concurrency: int, on_done: Callable[[], None]
    ) -> list[Record]:
        """One after the other, whatever the concurrency."""
        prompts = [
            torch.tensor([self._encode(job.ask.prompt)], device=self._model.device) for job in jobs
        ]
        records = []
        for job, prompt in zip(jobs, prompts, strict=True):
            records.append(self._answer(prompt, job.ask.sampling.max_tokens))
            on_done()
        return records

    def _answer(self, prompt: torch.Tensor, max_tokens: int) -> Record:
        """prompt: [1, num_prompt]."""
        sent_s = time.perf_counter()
        output = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_tokens,
        )
        token_ids = output[0, prompt.shape[1] :].tolist()
        return Record(
            sent_s=sent_s,
            arrivals=(Arrival(time.perf_counter(), len(token_ids)),),
            token_ids=tuple(token_ids),
            prompt_tokens=prompt.shape[1],
            forwards=len(token_ids),
        )


def as_ministral(
    model: NemotronLabsDiffusionModel, raw: dict[str, Any], **own: Any
) -> Ministral3ForCausalLM:
    """The same weights in transformers' network, on the CPU. raw: the checkpoint's config.json.
    own: what else the network's config should say.
    """
    shared = {key: raw[key] for key in SHARED_KEYS}
    shared["rope_parameters"] = dict(shared["rope_parameters"])  # the library writes into it
    with no_init_weights():  # the weights are ours in a moment
        theirs = Ministral3ForCausalLM(Ministral3Config(**shared, pad_token_id=None, **own))
    theirs = theirs.to(model.diffusion_head.weight.dtype).eval()
    theirs.load_state_dict(
        {
            name.replace("encoder.", "model.", 1).replace("diffusion_head", "lm_head"): tensor
            for name, tensor in model.published_tensors().items()
        }
    )
    return theirs


def _load(folder: Path, dtype: str) -> Ministral3ForCausalLM:
    """dtype: 'float32', ... Raises CheckpointError."""
    raw = json.loads((folder / "config.json").read_text())
    theirs = as_ministral(load_model(folder, torch_dtype(dtype), adapter=False), raw)
    theirs.generation_config.eos_token_id = None
    return theirs.to("cuda" if torch.cuda.is_available() else "cpu")
