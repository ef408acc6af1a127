"""Tokens a second of each mode for one client of a served cluster, the same prompts for all.

    make serve, then: python tests/benchmarks/modes.py 127.0.0.1:50051

Writes docs/measurements/modes_one_client.json. The clock is the client's: the whole path is in it.
"""

import json
import statistics
import sys
import time
from pathlib import Path

from trimode.cluster.bench.workload import DEFAULT_PROMPTS
from trimode.cluster.client import Client
from trimode.proto import inference_pb2 as pb
from trimode.replicas.machine import describe_machine

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "modes_one_client.json"
NEW_TOKENS = 128
REPEATS = 1
MODES = {
    "autoregressive": pb.GenerateRequest(mode=pb.MODE_AUTOREGRESSIVE),
    "self_speculation, block 32": pb.GenerateRequest(mode=pb.MODE_SELF_SPECULATION, block_size=32),
    "self_speculation, block 16": pb.GenerateRequest(mode=pb.MODE_SELF_SPECULATION, block_size=16),
    "self_speculation, block 8": pb.GenerateRequest(mode=pb.MODE_SELF_SPECULATION, block_size=8),
    "block_diffusion, threshold 0.9": pb.GenerateRequest(
        mode=pb.MODE_BLOCK_DIFFUSION, threshold=0.9
    ),
    "block_diffusion, threshold 0.7": pb.GenerateRequest(
        mode=pb.MODE_BLOCK_DIFFUSION, threshold=0.7
    ),
}


def one(client: Client, template: pb.GenerateRequest, prompt: str) -> dict[str, float]:
    """Run one request; figures of the client's clock and the server's account."""
    request = pb.GenerateRequest(text=prompt, stop=pb.StopConditions(max_tokens=NEW_TOKENS))
    request.MergeFrom(template)
    begun, first = time.perf_counter(), 0.0
    for reply in client.generate(request):
        first = first or time.perf_counter() - begun
        finish = reply.finish
    return {
        "seconds": time.perf_counter() - begun,
        "first_s": first,
        "tokens": finish.usage.completion_tokens,
        "forwards": finish.forwards,
        "accepted": sum(finish.accepted),
        "rounds": len(finish.accepted),
    }


def measure(client: Client, template: pb.GenerateRequest) -> dict[str, float]:
    one(client, template, DEFAULT_PROMPTS[0])  # warm-up
    runs = [one(client, template, prompt) for _ in range(REPEATS) for prompt in DEFAULT_PROMPTS]

    def total(key: str) -> float:
        return sum(run[key] for run in runs)

    return {
        "tokens_per_s": total("tokens") / total("seconds"),
        "first_token_p50_ms": statistics.median(run["first_s"] for run in runs) * 1000,
        "tokens_per_forward": total("tokens") / total("forwards"),
        "accepted_per_round": total("accepted") / total("rounds") if total("rounds") else 0.0,
    }


def main() -> None:
    rows = {}
    with Client(sys.argv[1]) as client:
        model = client.get_model()
        for name, template in MODES.items():
            rows[name] = measure(client, template)
            print(name, {key: round(value, 2) for key, value in rows[name].items()})
    document = {
        "command": "python tests/benchmarks/modes.py HOST:PORT",
        "machine": describe_machine("torch", "ray", "grpcio", "trimode"),
        "model": {"name": model.name, "dtype": model.dtype},
        "prompts": len(DEFAULT_PROMPTS),
        "repeats": REPEATS,
        "new_tokens": NEW_TOKENS,
        "modes": rows,
    }
    OUT.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
