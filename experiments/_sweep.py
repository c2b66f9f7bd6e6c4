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

``python experiments/_sweep.py NAME`` adds the results of a full sweep to ``experiments/results/NAME.json``, which is a
part of the repository: a full sweep takes from there what it finds. Delete what a changed recipe has outdated.
"""

import json
import os
import shutil
import sys
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
RESULTS = Path(__file__).parent / "results"


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
        self.recorded = recorded(name) if FULL else {}

    def file(self, *words: object, suffix: str) -> Path:
        """The file of a fit."""
        name = "_".join(map(str, [*words, self.settings])).replace(" ", "")
        return self.folder / f"{name}{suffix}"

    def run(self, fit: Callable[..., Run], jobs: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], Run]:
        """What ``fit(*job)`` returns for each job, in the order of the jobs."""
        if KEPT:
            files = {job: self.file(fit.__name__, *job, suffix=".json") for job in jobs}
            jobs = [job for job, file in files.items() if file.exists() or file.stem in self.recorded]
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
        if file.stem in self.recorded and not file.exists():
            return self.recorded[file.stem]
        if not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(fit(*job)))
            partial.rename(file)  # at once, so that a stop in between leaves no half of a result
        result: Run = json.loads(file.read_text())
        return result


def recorded(name: str) -> dict[str, Run]:
    """The results of an experiment that are a part of the repository, by the names of their files."""
    file = RESULTS / f"{name}.json"
    results: dict[str, Run] = json.loads(file.read_text()) if file.exists() else {}
    return results


def record(name: str) -> None:
    """Add the results in the folder of an experiment to those that are a part of the repository."""
    results = recorded(name)
    for file in (OUTPUT / name).glob("*.json"):
        results[file.stem] = json.loads(file.read_text())
    RESULTS.mkdir(exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(_rounded(run))}" for key, run in sorted(results.items())]
    (RESULTS / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(results)} results of {name}")


def _rounded(value: Any) -> Any:
    """The value with six digits of each number, which is more than any of them is good for."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


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


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        record(argument)
