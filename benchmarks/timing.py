"""Paired measurements: the variants take turns, so that a busy moment of the machine hits all of them."""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

Step = Callable[[], object]

# Set by run.py.
settings = {"clock": time.perf_counter, "seconds": 8.0, "quick": False}


class Timing(NamedTuple):
    """Median seconds of one call, and the quartiles over rounds of its ratio to the baseline's of the same round."""

    seconds: float
    low: float
    ratio: float
    high: float


class Line(NamedTuple):
    """A line of the table: what was measured, against what, the ratio with its quartiles, and the target if any."""

    row: str
    measured: str
    against: str
    ratio: str
    target: str = ""
    met: bool | None = None


def on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def seconds_of(step: Step, calls: int) -> float:
    """Mean seconds of ``calls`` calls."""
    clock = settings["clock"]
    if on_gpu():
        torch.cuda.synchronize()
    start = clock()
    for _ in range(calls):
        step()
    if on_gpu():
        torch.cuda.synchronize()
    return (clock() - start) / calls


def compare(variants: dict[str, Step], baseline: str) -> dict[str, Timing]:
    """Time the variants in turns, each call by call in a block of about 30 ms, until the seconds of a row are over."""
    for step in variants.values():
        seconds_of(step, 3)
    calls = {name: max(1, round(0.03 / max(seconds_of(step, 3), 1e-6))) for name, step in variants.items()}
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(rounds) < (3 if settings["quick"] else 9) or time.perf_counter() - start < settings["seconds"]:
        # The order alternates, so that no variant always finds the caches of the same other one.
        order = list(variants) if len(rounds) % 2 == 0 else list(reversed(variants))
        rounds.append({name: seconds_of(variants[name], calls[name]) for name in order})
    return {
        name: Timing(
            statistics.median(one[name] for one in rounds),
            *statistics.quantiles((one[name] / one[baseline] for one in rounds), n=4),
        )
        for name in variants
    }


def milliseconds(timing: Timing) -> str:
    return milliseconds_of(timing.seconds)


def milliseconds_of(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.{2 if value < 10 else 1}f} ms"


def at_most(row: str, name: str, baseline: str, timings: dict[str, Timing], target: float | None = None) -> Line:
    """The line "``name`` costs this many times ``baseline``"; the timings must be relative to ``baseline``."""
    timing = timings[name]
    return Line(
        row,
        f"{name} {milliseconds(timing)}",
        f"{baseline} {milliseconds(timings[baseline])}",
        f"{timing.ratio:.2f} [{timing.low:.2f}, {timing.high:.2f}]",
        "" if target is None else f"<= {target:g}",
        None if target is None else timing.ratio <= target,
    )


def faster(row: str, name: str, baseline: str, timings: dict[str, Timing], target: float | None = None) -> Line:
    """The line "``name`` is this many times faster than ``baseline``"; the timings must be relative to ``name``."""
    timing = timings[baseline]
    return Line(
        row,
        f"{name} {milliseconds(timings[name])}",
        f"{baseline} {milliseconds(timing)}",
        f"{timing.ratio:.2f} faster [{timing.low:.2f}, {timing.high:.2f}]",
        "" if target is None else f">= {target:g}",
        None if target is None else timing.ratio >= target,
    )


def peak_bytes(step: Step) -> int:
    """The most memory that PyTorch held during a call beyond the least, from its allocator's own records.

    The least is what stays: of a training step, the parameters and the optimizer's state, but not the gradients.
    """
    step()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = peak = least = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        least = min(least, held)
        peak = max(peak, held - least)
    return peak


def machine_line() -> str:
    """What the numbers belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name() if on_gpu() else names[0] if names else platform.processor()
    clock = "processor time" if settings["clock"] is time.process_time else "wall time"
    return (
        f"{device}, {torch.get_num_threads()} threads of {len(names)} cores, float32, {clock}; "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    )
