"""Evaluation mode for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.messenger import unwrap
from torch import nn


@contextmanager
def evaluation_mode(*functions: Callable[..., Any]) -> Iterator[None]:
    """Puts modules, and the modules that methods are bound to, in evaluation mode and then back as they were.

    Keeps dropout out of what is computed, and what is computed out of the running statistics of batch normalisation.
    """
    owners = [getattr(unwrap(function), "__self__", unwrap(function)) for function in functions]
    modules = [module for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
