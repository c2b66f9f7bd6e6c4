"""What holds for a while: draws from a seed, and modules without compilation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pyro_ilvae import _checks
from pyro_ilvae._evaluation import evaluation_mode

__all__ = ["evaluation_mode", "seeded", "uncompiled"]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """With a seed, draw from it and restore the global random state afterwards; without one, use the global state."""
    seed = _checks.seed(seed)
    if seed is None:
        yield
        return
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        if torch.cuda.is_available():
            torch.manual_seed(int(seed))
        else:  # the same draws; torch.manual_seed takes a millisecond to note that there is no GPU
            torch.default_generator.manual_seed(int(seed))
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
