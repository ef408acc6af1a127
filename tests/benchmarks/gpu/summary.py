"""The last thing that is printed: every figure beside its aim, met or not."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import ge, le
from typing import Any

from end_to_end import governor_ratios

PAIR_AIM, AR_AIM, BUSY_AIM, GOVERNOR_AIM = 1.25, 1.1, 0.9, 0.98


@dataclass(frozen=True, slots=True)
class Figure:
    """One line."""

    name: str
    value: float | str
    aim: str = ""
    is_met: bool | None = None  # None: nothing was aimed at

    def line(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        met = "" if self.is_met is None else "met" if self.is_met else "MISSED"
        return f"{self.name:62}{value:>14}  {self.aim:10}{met}"


def at_most(name: str, value: float, aim: float) -> Figure:
    return _against(name, value, aim, "<=", le)


def at_least(name: str, value: float, aim: float) -> Figure:
    return _against(name, value, aim, ">=", ge)


def _against(
    name: str, value: float, aim: float, sign: str, holds: Callable[[float, float], bool]
) -> Figure:
    if math.isnan(value):
        return Figure(name, "not seen", f"{sign} {aim:g}")
    return Figure(name, value, f"{sign} {aim:g}", holds(value, aim))


def figures(documents: Mapping[str, Any]) -> list[Figure]:
    """Of all sections there are; documents by section."""
    found = []
    for section, document in documents.items():
        status = document.get("status", "")
        if status not in ("", "done"):
            found.append(Figure(f"{section}: not complete", str(status), "done", False))
        for prefix, of in READERS.items():
            if section.startswith(prefix):
                found += of(section, document)
    for size in ("8B", "14B"):
        pair = documents.get(f"steps-{size}"), documents.get(f"end-to-end-{size}")
        found += shares_of_bound(size, *pair)
    return [*found, *gains_of_float8(documents)]


def gains_of_float8(documents: Mapping[str, Any]) -> Iterator[Figure]:
    """Step times in bfloat16 over those in float8."""
    wide, narrow = (
        {
            (row["sequences"], row["block"], row["context"]): row["ms"]
            for row in documents.get(name, {}).get("rows", ())
        }
        for name in ("steps-8B", "steps-8B-fp8")
    )
    for (sequences, block, context), ms in narrow.items():
        before = wide.get((sequences, block, context))
        if before is not None:
            where = f"{sequences} seq., block {block}, context {context}"
            yield Figure(f"steps-8B-fp8: {where}, bfloat16 / float8", before / ms)


def shares_of_bound(
    size: str, steps: Mapping[str, Any] | None, engine: Mapping[str, Any] | None
) -> Iterator[Figure]:
    """The engine's tokens a second, prompts and tail included, over what pairs of passes alone
    would give: users times the tokens a round keeps over the device's time of a pair.
    """
    rows = ({} if steps is None else steps).get("rows", [])
    shortest = min((row["context"] for row in rows), default=0)
    pairs = {
        (row["sequences"], row["block"]): row["busy_ms"]
        for row in rows
        if row["context"] == shortest
    }
    for row in ({} if engine is None else engine).get("rows", ()):
        block = int(row["setting"].rpartition("-")[2]) if "-" in row["setting"] else 1
        busy_ms = pairs.get((row["users"], block))
        if busy_ms and block > 1:
            bound = 1e3 * row["users"] * row["accepted_per_round"] / busy_ms
            name = f"end-to-end-{size}: {row['users']} users, {row['setting']}, share of the bound"
            yield Figure(name, row["tokens_per_s"] / bound)


def table(documents: Mapping[str, Any]) -> str:
    return "\n".join(figure.line() for figure in figures(documents))


def _floor(section: str, document: Mapping[str, Any]) -> Iterator[Figure]:
    for key in ("copy_gb_per_s", "read_gb_per_s", "matmul_tflop_per_s", "fp8_matmul_tflop_per_s"):
        if key in document:
            yield Figure(f"{section}: {key}", document[key])


def _steps(section: str, document: Mapping[str, Any]) -> Iterator[Figure]:
    for line in document.get("start_log", ()):
        if "captured" in line:
            yield Figure(f"{section}: passes captured", f"{line['captured']} of {line['sizes']}")
            yield Figure(f"{section}: capture, s", line["seconds"])
            yield Figure(f"{section}: capture, MiB", line["used_mib"])
        if "arithmetic" in line:
            yield Figure(f"{section}: KV {line['arithmetic']}", f"{line['pages']} pages")
    for row in document.get("rows", ()):
        sequences, block = row["sequences"], row["block"]
        where = f"{section}: {sequences} seq., context {row['context']},"
        if sequences == 1 and block == 1:
            yield at_most(f"{where} AR step / weight read", row["over_weight_read"], AR_AIM)
        elif sequences == 1 and block == 32:
            name = f"{where} block 32, pair / 2 weight reads"
            yield at_most(name, row["over_weight_read"], PAIR_AIM)
        if sequences >= 128:
            name = f"{where} block {block}, busy share of a step"
            yield at_least(name, row["busy_share"], BUSY_AIM)


def _end_to_end(section: str, document: Mapping[str, Any]) -> Iterator[Figure]:
    rows = document.get("rows", [])
    for users, (ratio, best) in governor_ratios(rows).items():
        yield at_least(f"{section}: {users} users, governor / {best}", ratio, GOVERNOR_AIM)
    for row in rows:
        if "busy_share" in row and row["users"] >= 128:
            name = f"{section}: {row['users']} users, {row['setting']}, busy share of the engine"
            yield at_least(name, row["busy_share"], BUSY_AIM)
    for row in rows:
        yield Figure(f"{section}: {row['users']} users, {row['setting']}, tokens/s",
                     row["tokens_per_s"])  # fmt: skip


def _baseline(section: str, document: Mapping[str, Any]) -> Iterator[Figure]:
    if "transformers_tokens_per_s" in document:
        yield Figure(f"{section}: transformers, tokens/s", document["transformers_tokens_per_s"])
    for setting, ratio in document.get("ratios", {}).items():
        yield Figure(f"{section}: our {setting} / transformers, one user", ratio)


def _kernels(section: str, document: Mapping[str, Any]) -> Iterator[Figure]:
    best: dict[tuple[str, str], float] = {}
    for row in document.get("rows", ()):
        is_prompt = row.get("kind") == "prompt"
        share = "share_of_matmul" if is_prompt else "share_of_copy"
        # What a row is of is its first text, but for products: those are compared by their form.
        name = row.get("form", next((v for v in row.values() if isinstance(v, str)), ""))
        for key in (share,) if share in row else ("gb_per_s", "tflops"):
            if key in row:
                best[name, key] = max(row[key], best.get((name, key), 0.0))
    for (name, key), value in best.items():
        yield Figure(f"{section}: {name}, best {key}", value)


def _invariance(section: str, document: Mapping[str, Any]) -> Iterator[Figure]:
    for row in document.get("divergences", ()):
        how = "with" if row["batch_invariant"] else "without"
        for name, counts in row.items():
            if name == "batch_invariant":
                continue
            rate, title = counts["per_10000_tokens"], f"{section}: {how}, {name}, per 10,000 tokens"
            yield at_most(title, rate, 0) if row["batch_invariant"] else Figure(title, rate)
    for row in document.get("prices", ()):
        where = f"{row['sequences']} seq., block {row['block']}"
        yield Figure(f"{section}: {where}, price of batch_invariant", row["price"])


def _cold_start(section: str, document: Mapping[str, Any]) -> Iterator[Figure]:
    for row in document.get("rows", ()):
        yield Figure(f"{section}: {row['page_cache']} page cache, GB/s", row["gb_per_s"])


def _tests(section: str, document: Mapping[str, Any]) -> Iterator[Figure]:
    for run in document.get("runs", ()):
        counts = run["counts"]
        failed = counts.get("failed", 0) + counts.get("errors", 0)
        yield Figure(f"{section}: {run['name']}, passed", counts.get("passed", 0))
        yield at_most(f"{section}: {run['name']}, failed", failed, 0)


# By how a section's name begins.
READERS: dict[str, Callable[[str, Mapping[str, Any]], Iterator[Figure]]] = {
    "floor": _floor,
    "steps": _steps,
    "end-to-end": _end_to_end,
    "baseline": _baseline,
    "kernel": _kernels,
    "invariance": _invariance,
    "cold-start": _cold_start,
    "tests": _tests,
}
