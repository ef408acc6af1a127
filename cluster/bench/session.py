"""One `trimode bench`: what takes turns on what, and the files it leaves."""

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trimode.cluster.bench.against import compare
from trimode.cluster.bench.local import LocalTarget, engine_config, load_encoder
from trimode.cluster.bench.measure import Curves, Entry, Target, measure
from trimode.cluster.bench.options import Options
from trimode.cluster.bench.plot import draw
from trimode.cluster.bench.remote import RemoteTarget
from trimode.cluster.bench.settings import AR, Setting
from trimode.cluster.bench.workload import Load
from trimode.cluster.loading_bars import loading_bars
from trimode.cluster.model_folder import fetch
from trimode.replicas.errors import ConfigError
from trimode.replicas.loading import build_engine
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.source import label


@dataclass(frozen=True, slots=True)
class Measured:
    """The curves, and what else the JSON says of them: what ran, and a comparison."""

    curves: Curves
    facts: dict[str, Any] = field(default_factory=dict)


def run(options: Options) -> None:
    """Measure, print a line a point, write JSON and PNG. Raises TrimodeError."""
    console = Console(soft_wrap=True)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {error}") from None
    if options.address is not None:
        measured = _measure_cluster(options, options.address, console)
    else:
        folder = fetch(options.model)
        if options.against is not None:
            measured = _measure_against(options, folder, options.against, console)
        else:
            measured = _measure_engine(options, folder, console)
    _write(options, measured)
    console.print(f"wrote {options.out} and {options.out.with_suffix('.png')}", highlight=False)


def sweep(settings: Sequence[Setting], loads: Sequence[Load], target: Target) -> list[list[Entry]]:
    """The settings take turns at each load."""
    return [[Entry(setting.name, setting, load, target) for setting in settings] for load in loads]


def _measure_cluster(options: Options, address: str, console: Console) -> Measured:
    target = RemoteTarget(address)
    model = target.describe()
    # A server that names no pools is asked for everything.
    largest = max((pool.max_block_size for pool in model.pools), default=math.inf)
    groups = sweep(options.settings_for(largest), options.loads(), target)
    facts = {
        "machine": describe_machine("trimode", "grpcio"),
        "model": model.name,
        "dtype": model.dtype,
        "quantization": model.quantization or None,
        "pools": {pool.name: pool.replicas for pool in model.pools},
    }
    return Measured(measure(groups, options.repeats, options.limits, console), facts)


def _measure_engine(options: Options, folder: Path, console: Console) -> Measured:
    loads = options.loads()
    settings = options.settings_for(ModelConfig.load(folder).block_size)
    target, facts = _local(options, folder, settings, loads)
    groups = sweep(settings, loads, target)
    return Measured(measure(groups, options.repeats, options.limits, console), facts)


def _measure_against(options: Options, folder: Path, library: str, console: Console) -> Measured:
    try:
        from trimode.cluster.bench.transformers_baseline import TransformersTarget
    except ImportError:
        raise ConfigError(f"--against {library} needs it: pip install {library}") from None
    options = replace(options, sampling=replace(options.sampling, ignore_eos=True))
    loads = options.loads()
    target, facts = _local(options, folder, [AR], loads)
    baseline = TransformersTarget(folder, facts["dtype"], load_encoder(folder))
    # In turns with ours at the lightest load, whose requests they share.
    ours = [Entry(AR.name, AR, load, target) for load in loads]
    theirs = Entry(library, AR, replace(loads[0], label="1"), baseline)
    curves = measure([[*ours, theirs]], options.repeats, options.limits, console)
    points = curves[AR.name], curves[library][0]
    num_prompts = min(len(options.prompts), len(points[1].outputs))
    comparison = compare(library, baseline.attention, *points, num_prompts)
    for line in comparison.lines():
        console.print(line, highlight=False)
    facts["machine"] = describe_machine("torch", "trimode", library)
    return Measured(curves, facts | {"against": comparison.to_dict()})


def _local(
    options: Options, folder: Path, settings: Sequence[Setting], loads: Sequence[Load]
) -> tuple[LocalTarget, dict[str, Any]]:
    """An engine here, and the facts about it. Raises CheckpointError and InvalidRequest."""
    encode = load_encoder(folder)
    config = engine_config(folder, encode, loads)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    governed = any(setting.is_governed for setting in settings)
    if governed and options.profile is None:
        note = "the governor measures step times first; --profile spares that"
        Console(stderr=True).print(note, highlight=False)
    with loading_bars(label(folder)) as bars:
        engine = build_engine(
            folder,
            config,
            dtype=options.dtype,
            quantization=options.quantization,
            governed=governed,
            profile=options.profile,
            progress=bars.on_load,
            on_loaded=bars.on_loaded,
            on_capture=bars.on_capture,
        )
    facts = {
        "machine": describe_machine("torch", "trimode"),
        "model": label(options.model),
        "dtype": engine.info.dtype,
        "quantization": engine.info.quantization,
        "threads": torch.get_num_threads(),
    }
    return LocalTarget(engine, encode), facts


def _write(options: Options, measured: Measured) -> None:
    """The JSON, and the picture beside it."""
    document = {
        "command": shlex.join(["trimode", *sys.argv[1:]]),
        **measured.facts,
        "loop": options.loop,
        "prompts": len(options.trace or options.prompts),
        "system_characters": len(options.system),
        "max_tokens": options.sampling.max_tokens,
        "temperature": options.sampling.temperature,
        "seed": options.sampling.seed,
        "ignore_eos": options.sampling.ignore_eos or options.against is not None,
        "repeats": options.repeats,
        "settings": {
            curve: {
                point.label: point.summary.to_dict() | {"tokens_per_s_of_repeats": point.speeds}
                for point in points
            }
            for curve, points in measured.curves.items()
        },
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    draw(measured.curves, options.out.with_suffix(".png"))
