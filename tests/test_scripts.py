"""Every tutorial and every experiment runs in smoke mode, without a warning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("joblib", "sklearn", "tqdm"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted(ROOT.glob("tutorials/*.py"))
EXPERIMENTS = sorted(ROOT.glob("experiments/[!_]*.py"))


def environment():
    """The environment of a user who asks for smoke mode, with the package of this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {name: value for name, value in os.environ.items() if name != "PYRO_ILVAE_FULL"}
    return own | {"PYTHONPATH": path, "PYRO_ILVAE_SMOKE": "1", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}


def run(script, folder):
    command = [sys.executable, "-W", "error", str(script)]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("script", TUTORIALS + EXPERIMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_runs_in_smoke_mode(script, tmp_path):
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    # All that is written is where smoke mode writes, beside a real run's pictures and results.
    written = [file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()]
    assert all(file.is_relative_to(Path(script.parent.name, "output", "smoke")) for file in written)


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_short(script):
    assert len(script.read_text().splitlines()) <= 150
