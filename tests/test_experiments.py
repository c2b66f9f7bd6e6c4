"""What the experiments share: how much to fit, kept results, tables, fronts."""

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

joblib = pytest.importorskip("joblib")
pytest.importorskip("tqdm")

FILE = Path(__file__).parent.parent / "experiments" / "_sweep.py"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="this distribution has no experiments")
VARIABLES = ("PYRO_ILVAE_SMOKE", "PYRO_ILVAE_FULL")
OTHERS = ("PYRO_ILVAE_JOBS", "PYRO_ILVAE_KEPT")


def load():
    """The module as an experiment imports it, in the environment of the moment."""
    spec = importlib.util.spec_from_file_location("_sweep", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sweeps(monkeypatch, tmp_path):
    """The module in a folder of its own, without processes of its own."""
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES + OTHERS:
        monkeypatch.delenv(name, raising=False)
    with joblib.parallel_config("sequential"):
        yield load()


class Fit:
    """A fit that counts how often it is made, and may be stopped."""

    __name__ = "fit"

    def __init__(self):
        self.made = []
        self.stop_at = None

    def __call__(self, name, seed):
        if (name, seed) == self.stop_at:
            raise KeyboardInterrupt
        self.made.append((name, seed))
        return {"value": seed + 0.5, "name": name, "call": len(self.made)}


JOBS = [(name, seed) for seed in (0, 1) for name in ("plain", "L = 1")]


def test_results_are_in_the_order_of_the_jobs(sweeps):
    results = sweeps.Sweep("test", "epochs1").run(Fit(), JOBS)
    assert list(results) == JOBS
    assert results["L = 1", 1] == {"value": 1.5, "name": "L = 1", "call": 4}


def test_no_fit_is_made_twice(sweeps):
    fit = Fit()
    first = sweeps.Sweep("test", "epochs1").run(fit, JOBS)
    assert sweeps.Sweep("test", "epochs1").run(fit, JOBS) == first
    assert fit.made == JOBS


def test_other_settings_are_other_fits(sweeps):
    fit = Fit()
    for settings in ("epochs1", "epochs2"):
        sweeps.Sweep("test", settings).run(fit, JOBS)
    assert fit.made == JOBS + JOBS


def test_a_stopped_sweep_goes_on(sweeps):
    fit = Fit()
    fit.stop_at = JOBS[2]
    with pytest.raises(KeyboardInterrupt):
        sweeps.Sweep("test", "epochs1").run(fit, JOBS)
    fit.stop_at = None
    assert list(sweeps.Sweep("test", "epochs1").run(fit, JOBS)) == JOBS
    assert fit.made == JOBS


def test_a_result_half_written_is_none(sweeps, monkeypatch):
    def cut(path, text):
        path.write_bytes(text.encode()[:3])
        raise KeyboardInterrupt

    fit, sweep = Fit(), sweeps.Sweep("test", "epochs1")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut)
        with pytest.raises(KeyboardInterrupt):
            sweep.run(fit, JOBS[:1])
    assert sweep.run(fit, JOBS[:1])[JOBS[0]]["value"] == 0.5


def test_only_kept_results_are_shown(sweeps, monkeypatch):
    fit = Fit()
    made = sweeps.Sweep("test", "epochs1").run(fit, JOBS[1:3])
    monkeypatch.setenv("PYRO_ILVAE_KEPT", "1")
    assert load().Sweep("test", "epochs1").run(fit, JOBS) == made
    assert load().Sweep("test", "epochs2").run(fit, JOBS) == {}
    assert fit.made == JOBS[1:3]


@pytest.mark.parametrize(("value", "expected"), [(None, -1), ("", -1), ("1", 1), ("3", 3)])
def test_the_environment_says_how_many_processes(sweeps, monkeypatch, value, expected):
    if value is not None:
        monkeypatch.setenv("PYRO_ILVAE_JOBS", value)
    module, asked = load(), []
    parallel = module.Parallel
    monkeypatch.setattr(module, "Parallel", lambda n_jobs, **other: asked.append(n_jobs) or parallel(1, **other))
    module.Sweep("test", "epochs1").run(Fit(), JOBS)
    assert asked == [expected]
    monkeypatch.setenv("PYRO_ILVAE_SMOKE", "1")
    assert load().NUM_JOBS == 1


def test_smoke_mode_begins_anew_and_apart(sweeps, monkeypatch):
    fit = Fit()
    real = sweeps.Sweep("test", "epochs1").run(fit, JOBS)
    monkeypatch.setenv("PYRO_ILVAE_SMOKE", "1")
    for _ in range(2):
        load().Sweep("test", "epochs1").run(fit, JOBS)
    assert fit.made == 3 * JOBS
    monkeypatch.delenv("PYRO_ILVAE_SMOKE")
    assert load().Sweep("test", "epochs1").run(fit, JOBS) == real


@pytest.mark.parametrize(
    ("variables", "expected"),
    [((), "short"), (("PYRO_ILVAE_FULL",), "full"), (("PYRO_ILVAE_SMOKE",), "smoke"), (VARIABLES, "smoke")],
)
def test_the_environment_says_how_much(sweeps, monkeypatch, variables, expected):
    for name in variables:
        monkeypatch.setenv(name, "1")
    module = load()
    assert module.chosen(smoke="smoke", short="short", full="full") == expected
    assert {"smoke": module.SMOKE, "full": module.FULL, "short": not (module.SMOKE or module.FULL)}[expected]
    assert not (module.SMOKE and module.FULL)


def test_table(sweeps, capsys):
    columns = {
        "KL": sweeps.median_and_range("kl", 2),
        "twice": sweeps.median_and_range(lambda run: 2 * run["kl"], 0),
        "k-NN": sweeps.median_and_range("knn", 1),
    }
    rows = {"plain": [{"kl": kl, "knn": 0.5} for kl in (1.0, 3.0, 2.0)], "one seed": [{"kl": 1.005, "knn": None}]}
    sweeps.print_table("model", rows, columns)
    assert capsys.readouterr().out.strip().splitlines() == [
        "| model | KL | twice | k-NN |",
        "|---|---|---|---|",
        "| plain | 2.00 (1.00 to 3.00) | 4 (2 to 6) | 0.5 (0.5 to 0.5) |",
        "| one seed | 1.00 | 2 |  |",
    ]


NUMBERS = st.integers(0, 5).map(float)


@given(points=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12))
def test_front(points):
    found = load().front(points)
    assert set(found) <= set(points)
    # From little gain to much each point of the front costs more.
    assert all(low[0] < high[0] and low[1] < high[1] for low, high in pairwise(found))
    # No point is better than all of the front in one of both and as good in the other.
    assert all(any(gain >= point[0] and cost <= point[1] for gain, cost in found) for point in points)
