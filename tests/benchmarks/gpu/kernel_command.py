"""The command line of the files that check and time one kernel each."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trimode.replicas.machine import describe_machine

MEASUREMENTS = Path(__file__).parents[3] / "docs" / "measurements"
NO_FLAGS: Mapping[str, str] = {}


def kernel_command(
    name: str,
    run: Callable[..., dict[str, Any]],
    tiny: object,
    flags: Mapping[str, str] = NO_FLAGS,
) -> dict[str, Any]:
    """run(device), or run(device, tiny) with --tiny; what it found is written unless tiny.

    flags: more options and what they do; --sweep is run(..., is_sweep=True).
    """
    parser = argparse.ArgumentParser(description=f"Check and time: {name}.")
    parser.add_argument("--tiny", action="store_true", help="small sizes, and nothing is written")
    for flag, purpose in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=purpose)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        parser.error("there is no GPU; with TRITON_INTERPRET=1, --tiny shows that all of it runs")
    given = {f"is_{flag}": getattr(arguments, flag) for flag in flags}
    found = run(device, *((tiny,) if arguments.tiny else ()), **given)
    if not arguments.tiny:
        document = {
            "command": " ".join(["python", f"tests/benchmarks/gpu/{name}.py", *sys.argv[1:]]),
            "machine": describe_machine("torch", "triton") | {"gpu": torch.cuda.get_device_name()},
            **found,
        }
        out = MEASUREMENTS / f"gpu_{name}.json"
        out.write_text(json.dumps(document, indent=2) + "\n")
    return found
