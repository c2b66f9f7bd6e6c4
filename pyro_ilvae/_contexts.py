"""What holds for a while: evaluation mode, and draws from a seed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import unwrap
from torch import nn

from pyro_ilvae import _checks


@contextmanager
def evaluation_mode(*functions: Callable[..., Any]) -> Iterator[None]:
    """Puts modules, and the modules that methods are bound to, in evaluation mode and then back as they were.

    Keeps dropout out of what is computed, and what is computed out of the running statistics of batch normalization.
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


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """With a seed, draw from it and restore the global random state afterwards; without one, use the global state."""
    if _checks.seed(seed) is None:
        yield
        return
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(int(seed))
        yield
