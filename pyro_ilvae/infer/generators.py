"""Random generators besides those that PyTorch draws from by itself: a graph does not draw from them."""

import pickle
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

__all__ = ["GENERATORS", "set_states", "states"]

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def states(generators: Iterable[Any]) -> list[bytes]:
    """The states of generators, or of the modules ``random`` and ``numpy.random``, to be compared and restored."""
    return [pickle.dumps(_state(generator)) for generator in generators]


def set_states(generators: Iterable[Any], values: Iterable[bytes]) -> None:
    """Return to earlier states."""
    for generator, value in zip(generators, values, strict=True):
        state = pickle.loads(value)
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = state
        elif hasattr(generator, "setstate"):
            if state is not None:
                generator.setstate(state)
        else:
            generator.set_state(state)


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.SystemRandom):  # which has no state
        return None
    return generator.getstate() if hasattr(generator, "getstate") else generator.get_state()
