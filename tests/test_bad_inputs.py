"""Wrong inputs end in a ValueError or TypeError that names the argument, over the whole public surface."""

import inspect
from collections import defaultdict

import bad_inputs
import pytest

import pyro_ilvae
from pyro_ilvae import datasets, diagnostics, likelihoods, measures, plots, remedies, schedules
from pyro_ilvae.datasets import text

CASES = bad_inputs.cases()


@pytest.mark.parametrize("name", bad_inputs.CALLS)
def test_the_right_call_is_accepted(name):
    function, arguments = bad_inputs.CALLS[name].make()
    function(**arguments)


@pytest.mark.parametrize("case", CASES, ids=map(str, CASES))
def test_a_wrong_value_raises_and_names_the_argument(case):
    assert case.outcome() == "right"


def test_there_are_many_distinct_cases():
    assert len(set(map(str, CASES))) == len(CASES) >= 400


def public_names():
    """The functions and classes that a user calls with arguments, without results, errors and folders of data."""
    modules = {
        module: f"{module.__name__.split('.')[-1]}." for module in (likelihoods, measures, remedies, schedules, text)
    }
    for module in (pyro_ilvae, diagnostics, plots, datasets, *modules):
        for name in module.__all__:
            value = getattr(module, name)
            if not callable(value) or (inspect.isclass(value) and issubclass(value, tuple | Exception)):
                continue
            if not inspect.signature(value).parameters.keys() <= {"name", "folder", "offline"}:
                yield name if value in vars(pyro_ilvae).values() else f"{modules.get(module, '')}{name}"


@pytest.mark.parametrize("name", sorted(set(public_names())))
def test_every_public_function_has_a_right_call(name):
    assert name in bad_inputs.CALLS


def test_every_argument_is_tried():
    tried, arguments = defaultdict(set), defaultdict(set)
    for call in bad_inputs.CALLS.values():
        function, right = call.make()
        owner = getattr(function, "__self__", None)
        name = f"{type(owner).__name__}.{function.__name__}" if owner is not None else function.__qualname__
        tried[name] |= right.keys()
        arguments[name] |= inspect.signature(function).parameters.keys()
    left_out = {name: arguments[name] - tried[name] - {"name", "frame", "join", "xlabel"} for name in tried}
    assert not {name: some for name, some in left_out.items() if some}
