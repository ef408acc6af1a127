"""Microseconds of the draft adapter by the sizes of its blocks, to choose the constants at the head
of kernels/draft_adapter.py for a card. Nothing is written; the fastest at each number of rows are
printed.

    python tests/benchmarks/gpu/draft_adapter_blocks.py
"""

import argparse
from itertools import product

import torch
from elementwise import TINY, Bench, Sizes, adapter_case, microseconds

from trimode.kernels import draft_adapter

CHOICES = {
    "SPLIT_LEN": (512, 1024, 2048),
    "BLOCK_RANK": (16, 32),
    "BLOCK_ROWS": (16, 32, 64),
    "BLOCK_OUT": (64, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="one choice at small sizes")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = TINY if arguments.tiny else Sizes(num_tokens=(32, 128, 512))
    choices = list(product(*CHOICES.values()))
    taken: dict[int, list[tuple[float, tuple[int, ...]]]] = {n: [] for n in sizes.num_tokens}
    with torch.inference_mode():
        for choice in choices[:1] if arguments.tiny else choices:
            for name, value in zip(CHOICES, choice, strict=True):
                setattr(draft_adapter, name, value)
            for num_tokens, found in taken.items():
                case = adapter_case(Bench(sizes, num_tokens, device), drafts=True)
                found.append((microseconds(case.kernel, sizes.num_layers, device), choice))
    for num_tokens, found in taken.items():
        print(f"{num_tokens} rows")
        for time_us, choice in sorted(found)[:5]:
            settings = ", ".join(f"{n} {v}" for n, v in zip(CHOICES, choice, strict=True))
            print(f"  {time_us:8.2f} us  {settings}")


if __name__ == "__main__":
    main()
