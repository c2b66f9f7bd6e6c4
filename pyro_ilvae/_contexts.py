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
    """Put modules, and the modules that methods are bound to, in evaluation mode, and restore their modes afterwards.

    Results are then free of dropout, and leave the running statistics of batch normalization as they were.
    """
    owners = {id(owner): owner for owner in (getattr(unwrap(f), "__self__", unwrap(f)) for f in functions)}
    modules = [part for owner in owners.values() if isinstance(owner, nn.Module) for part in owner.modules()]
    modes = [module.training for module in modules]
    try:
        _set_modes(modules, [False] * len(modules))
        yield
    finally:
        _set_modes(modules, modes)


def _set_modes(modules: list[nn.Module], modes: list[bool]) -> None:
    for module, training in zip(modules, modes, strict=True):
        if module.training != training:  # A PyroModule takes longer to set an attribute than to read it.
            module.training = training


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """With a seed, draw from it and restore the global random state afterwards; without one, use the global state."""
    seed = _checks.seed(seed)
    if seed is None:
        yield
        return
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(int(seed))
        yield


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Runs a module without compilation, because compiled code does not report its parts."""
    modules = list(module.modules())
    calls = [part._compiled_call_impl for part in modules]
    try:
        for part in modules:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in zip(modules, calls, strict=True):
            part._compiled_call_impl = call
