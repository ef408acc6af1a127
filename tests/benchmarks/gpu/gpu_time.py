"""Seconds on the device: CUDA events, and how long the device was busy by the profiler."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def event_seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """The median of one call's time on the device, after calls that warm it up."""
    times = []
    for turn in range(3 + repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            begun = time.perf_counter()
            work()
            seconds = time.perf_counter() - begun
        if turn >= 3:
            times.append(seconds)
    return statistics.median(times)


def union_length(intervals: Iterable[Interval]) -> float:
    """Of intervals that may overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def busy_seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long at least one kernel or copy ran while `work` did, by the profiler's trace; NaN where
    it saw none.

    The profiler slows the host down, not the kernels: divide by the wall time of a run without it.
    """
    on_gpu = device.type == "cuda"
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as trace:
        work()
        synchronize(device)
    events: Any = trace.events()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    return float(union_length(spans)) / 1e6 if spans else math.nan
