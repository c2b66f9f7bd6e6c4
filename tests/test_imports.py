"""Imports: arrows between the parts of the package point one way, without a circle, and what is slow comes in late."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pyro_ilvae

ROOT = Path(pyro_ilvae.__file__).parent
# What each part may import of the others; pyro_ilvae itself imports them all.
ALLOWED = {
    "_checks": set(),
    "networks": {"_checks"},
    "_natural": {"_checks"},
    "_count_distributions": {"_checks", "_natural"},
    "distributions": {"_checks", "_natural", "_count_distributions"},
    "protocols": set(),
    "_evaluation": set(),
    "_recording": set(),
    "_keywords": set(),
    "_contexts": {"_checks", "_evaluation"},
    "_programs": {"_checks", "_evaluation", "_contexts", "distributions"},
    "_exponential_family": {"_checks", "networks"},
    "_normal": {"_checks", "_exponential_family", "distributions", "networks"},
    "_counts": {"_checks", "_exponential_family", "distributions", "networks"},
    "likelihoods": {"_checks", "_exponential_family", "_normal", "_counts", "distributions", "networks"},
    "encoders": {"_checks", "networks"},
    "decoders": {"_checks", "_contexts", "_recording", "networks", "likelihoods"},
    "sequences": {"_checks", "_contexts", "_recording", "networks", "distributions", "encoders", "decoders"},
    "models": {
        "_checks",
        "_contexts",
        "_keywords",
        "networks",
        "distributions",
        "likelihoods",
        "decoders",
        "sequences",
    },
    # Remedies of collapse are encoders and decoders too.
    "infer": {"_checks", "_contexts", "_recording", "networks", "distributions", "decoders"},
    "datasets": {"_checks", "_contexts", "distributions"},
    "diagnostics": {"_checks", "_contexts", "_programs", "distributions"},
    "control": {"_checks", "_contexts", "infer", "diagnostics"},
    "monitoring": {"_checks", "_contexts", "_evaluation", "_programs", "diagnostics"},
    "io_pyro": {"_checks", "_contexts", "_programs", "distributions", "diagnostics"},
    "plots": {"_checks", "_contexts", "infer", "diagnostics"},
}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name):
    """The modules of the package that a module imports, at its top or inside of functions, each with the names used."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "pyro_ilvae")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in {name}"
            if node.module.split(".")[0] == "pyro_ilvae":
                for alias in node.names:
                    full_name = f"{node.module}.{alias.name}"
                    yield (full_name, None) if full_name in FILES else (node.module, alias.name)


def part(name):
    return name.split(".")[1]


GRAPH = {name: dict.fromkeys(found for found, _ in imports(name)) for name in FILES}
INSIDE = [name for name in FILES if name != "pyro_ilvae"]


def test_every_part_has_its_place():
    assert {part(name) for name in INSIDE} == set(ALLOWED)
    assert list(TopologicalSorter(ALLOWED).static_order())


@pytest.mark.parametrize("name", ALLOWED)
def test_arrows_point_one_way(name):
    wrong = {
        (module, found)
        for module in INSIDE
        for found in GRAPH[module]
        if part(module) == name and (found == "pyro_ilvae" or part(found) not in {name, *ALLOWED[name]})
    }
    assert not wrong


def test_no_circle():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_pictures_know_the_results_of_diagnostics_and_the_schedules_alone():
    for module in INSIDE:
        if part(module) == "plots":
            for found, name in imports(module):
                if part(found) == "diagnostics":
                    assert inspect.isclass(getattr(importlib.import_module(found), name)), (module, name)
                if part(found) == "infer":
                    assert found == "pyro_ilvae.infer.schedules", (module, name)


def test_import_leaves_what_is_needed_later_for_later():
    heavy = ["arviz", "matplotlib.pyplot", "pandas", "scipy.optimize", "sklearn", "xarray"]
    code = f"import sys, pyro_ilvae; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


PUBLIC = [name for name in FILES if not any(word.startswith("_") for word in name.split("."))]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_say_what_is_public(name):
    module = importlib.import_module(name)
    assert isinstance(module.__all__, list)
    assert len(set(module.__all__)) == len(module.__all__)
    assert not [exported for exported in module.__all__ if not hasattr(module, exported)]
    assert not [exported for exported in module.__all__ if exported.startswith("_")]


@pytest.mark.parametrize("name", [name for name in PUBLIC if FILES[name].name == "__init__.py"])
def test_packages_show_their_contents_and_nothing_else(name):
    package = importlib.import_module(name)
    modules = {info.name for info in pkgutil.iter_modules(package.__path__)}
    shown = {word for word in dir(package) if not word.startswith("_")}
    assert shown <= modules | set(package.__all__)
