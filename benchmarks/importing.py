"""What ``import pyro_ilvae`` costs beside ``import pyro``: processor time of fresh interpreters, which take turns."""

import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from timing import Line, settings

ROOT = Path(__file__).parent.parent
TARGET = 1.3


def seconds_of_import(module: str) -> float:
    """Processor seconds, of user and system, of an interpreter that imports the module and does nothing else."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # ArviZ 0.23 warns of its successor when it is imported.
    command = [sys.executable, "-W", "ignore", "-c", f"import {module}"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def importing(row: str) -> list[Line]:
    names = ("pyro_ilvae", "pyro")
    for name in names:
        seconds_of_import(name)  # bytecode and the files' pages
    rounds = []
    for i in range(3 if settings["quick"] else 15):
        order = names if i % 2 == 0 else names[::-1]
        rounds.append({name: seconds_of_import(name) for name in order})
    ours, theirs = (statistics.median(one[name] for one in rounds) for name in names)
    low, ratio, high = statistics.quantiles((one["pyro_ilvae"] / one["pyro"] for one in rounds), n=4)
    return [
        Line(
            row,
            f"import pyro_ilvae {ours:.2f} s of processor time",
            f"import pyro {theirs:.2f} s",
            f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
            f"<= {TARGET:g}",
            ratio <= TARGET,
        )
    ]


ROWS: dict[str, Callable[[str], list[Line]]] = {"import": importing}
