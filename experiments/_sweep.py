"""What the experiments share: how much to fit, parallel fits with kept results, tables, and the front of a trade-off.

Two environment variables say how much is fitted:

- ``PYRO_ILVAE_FULL=1``: all seeds and settings, for the README's tables and figures.
- ``PYRO_ILVAE_SMOKE=1``: every line in seconds, for tests. The numbers mean nothing.
- neither: one or two seeds of some settings, in minutes.

Two more say how: ``PYRO_ILVAE_JOBS`` is the number of processes, without it one for each core, and with
``PYRO_ILVAE_KEPT=1`` no fit is made: tables and pictures show those that are there.

Pictures are in ``experiments/output``. The result of each fit is in a folder there, in a JSON file whose name says the
settings. A fit whose file exists is not made again, so a sweep goes on where it was stopped. Delete the folder after
changing a recipe.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from joblib import Parallel, delayed
from tqdm import tqdm

T = TypeVar("T")
Run = dict[str, Any]  # the measures of one fit by name; None where a model has no such measure
Column = Callable[[Sequence[Run]], str]  # from the fits of one row, a fit for each seed, to a cell

SMOKE = bool(os.environ.get("PYRO_ILVAE_SMOKE"))
FULL = bool(os.environ.get("PYRO_ILVAE_FULL")) and not SMOKE
KEPT = bool(os.environ.get("PYRO_ILVAE_KEPT")) and not SMOKE
# In smoke mode tests run in parallel already.
NUM_JOBS = 1 if SMOKE or KEPT else int(os.environ.get("PYRO_ILVAE_JOBS") or -1)
OUTPUT = Path("experiments/output/smoke" if SMOKE else "experiments/output")


def chosen(*, smoke: T, short: T, full: T) -> T:
    """The value for the extent that the environment asks for."""
    return smoke if SMOKE else full if FULL else short


class Sweep:
    """Fits of one experiment, in parallel processes, with their results in files.

    Args:
        name: the name of the experiment, and of the folder of its results.
        settings: what all fits share and a rerun may change, such as the number of epochs; part of each file's name.
    """

    def __init__(self, name: str, settings: str) -> None:
        self.folder = OUTPUT / name
        self.settings = settings
        if SMOKE:
            shutil.rmtree(self.folder, ignore_errors=True)  # a kept result would leave lines untested
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, *words: object, suffix: str) -> Path:
        """The file of a fit."""
        name = "_".join(map(str, [*words, self.settings])).replace(" ", "")
        return self.folder / f"{name}{suffix}"

    def run(self, fit: Callable[..., Run], jobs: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], Run]:
        """What ``fit(*job)`` returns for each job, in the order of the jobs."""
        if KEPT:
            jobs = [job for job in jobs if self.file(fit.__name__, *job, suffix=".json").exists()]
        parallel = Parallel(n_jobs=NUM_JOBS, return_as="generator")
        runs = parallel(delayed(self._kept)(fit, *job) for job in jobs)
        results = {}
        with tqdm(total=len(jobs), desc=fit.__name__, mininterval=1.0) as bar:
            for job in jobs:
                bar.set_postfix_str(", ".join(map(str, job)))
                results[job] = next(runs)
                bar.update()
        return results

    def _kept(self, fit: Callable[..., Run], *job: object) -> Run:
        """The result from its file, if the fit was made before."""
        torch.set_num_threads(1)  # there is a process for each core
        file = self.file(fit.__name__, *job, suffix=".json")
        if not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(fit(*job)))
            partial.rename(file)  # at once, so that a stop in between leaves no half of a result
        result: Run = json.loads(file.read_text())
        return result


def median_and_range(measure: str | Callable[[Run], float], digits: int) -> Column:
    """The column "median (smallest to largest)" of a measure; empty where a run has none."""

    def cell(runs: Sequence[Run]) -> str:
        values = [measure(run) if callable(measure) else run.get(measure) for run in runs]
        if None in values:
            return ""
        low, middle, high = (f"{value:.{digits}f}" for value in np.quantile(values, [0.0, 0.5, 1.0]))
        return middle if len(values) == 1 else f"{middle} ({low} to {high})"

    return cell


def print_table(title: str, rows: Mapping[str, Sequence[Run]], columns: Mapping[str, Column]) -> None:
    """A table in Markdown: a row for each configuration, a column for each measure."""
    print(f"\n| {' | '.join([title, *columns])} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, runs in rows.items():
        print(f"| {' | '.join([name, *(column(runs) for column in columns.values())])} |")


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (gain, cost) that no other point beats in both, from little gain to much."""
    kept: list[tuple[float, float]] = []
    for gain, cost in sorted(points, key=lambda point: (-point[0], point[1])):
        if not kept or cost < kept[-1][1]:
            kept.append((gain, cost))
    return kept[::-1]
