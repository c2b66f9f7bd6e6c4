"""What the diagnostics import: no part of the package that they are about, and nothing slow before it is needed."""

import ast
import pathlib
import subprocess
import sys

import pytest

from pyro_ilvae import diagnostics

FOLDER = pathlib.Path(diagnostics.__file__).parent
KNOWN = {"_checks", "_contexts", "_programs", "diagnostics", "distributions"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            yield from [name.name for name in node.names]


@pytest.mark.parametrize("path", [str(path.relative_to(FOLDER)) for path in sorted(FOLDER.rglob("*.py"))])
def test_no_decoder_likelihood_or_model_is_imported(path):
    parts = {name.split(".")[1] for name in imported(FOLDER / path) if name.startswith("pyro_ilvae.")}
    assert parts <= KNOWN


SCRIPT = """
import importlib, sys, types
import pyro
package = types.ModuleType("pyro_ilvae")  # without what the package itself imports
package.__path__ = [sys.argv[1]]
sys.modules["pyro_ilvae"] = package
before = set(sys.modules)
importlib.import_module("pyro_ilvae.diagnostics")
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_nothing_slow_is_imported_before_it_is_needed():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(FOLDER.parent)], capture_output=True, text=True, check=True, timeout=120
    )
    slow = {"scipy", "sklearn", "xarray", "pandas", "arviz", "matplotlib"}
    assert "pyro_ilvae" in run.stdout.split()
    assert slow.isdisjoint(run.stdout.split())
