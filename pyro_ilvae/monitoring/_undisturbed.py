"""Contexts in which a model and its guide can be run in the middle of a training that must not notice."""

import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_ilvae._contexts import seeded
from pyro_ilvae._evaluation import modules_of

_Key = tuple[type, str, int, str]  # the category of a warning, its file and line, and its words


@contextmanager
def undisturbed(*functions: Callable[..., Any], seed: int, warned: set[_Key]) -> Iterator[None]:
    """Draw from a seed, without gradients, and leave all that the functions read as it was.

    Restored are the random states of PyTorch, NumPy and Python, the buffers of modules, and which parameters Pyro's
    store holds; each diagnostic restores the modes of modules itself. A warning is shown if it is not in ``warned``,
    which then holds it too.
    """
    states = random.getstate(), np.random.get_state()
    with seeded(seed), torch.no_grad(), _same_buffers(functions), _same_names(), _each_once(warned):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def is_set_up(*functions: Callable[..., Any]) -> bool:
    """Whether a first run leaves nothing behind: it draws the start of an AutoGuide and of PyTorch's lazy modules."""
    for module in modules_of(functions):
        for part in module.modules():
            if getattr(part, "prototype_trace", part) is None:
                return False
            if any(isinstance(parameter, nn.UninitializedParameter) for parameter in part._parameters.values()):
                return False
    return True


@contextmanager
def _same_buffers(functions: tuple[Callable[..., Any], ...]) -> Iterator[None]:
    """Restores buffers, which some modules change in evaluation mode too."""
    parts = {id(part): part for module in modules_of(functions) for part in module.modules()}
    before = [
        (part, name, buffer, buffer.detach().clone())
        for part in parts.values()
        for name, buffer in part._buffers.items()
        if isinstance(buffer, Tensor) and not isinstance(buffer, nn.UninitializedBuffer)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, buffer, value in before:
                if part._buffers.get(name) is not buffer:
                    part._buffers[name] = buffer
                if buffer.shape != value.shape or not torch.equal(buffer, value):
                    buffer.data = value


@contextmanager
def _same_names() -> Iterator[None]:
    """Takes out of Pyro's store what was not in it: the start of a parameter belongs to the first step."""
    store = pyro.get_param_store()
    before = set(store._params)
    try:
        yield
    finally:
        for name in set(store._params) - before:
            del store[name]


@contextmanager
def _each_once(warned: set[_Key]) -> Iterator[None]:
    """Shows each warning once, however often it comes and whatever numbers it holds.

    Only what is shown is changed: other filters would make Python forget which warnings of the training it has shown.
    """
    shown = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        key = (category, filename, lineno, re.sub(r"\d+", "", str(message)))
        if key not in warned:
            warned.add(key)
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
