"""Handlers that a model or a guide runs under."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ilvae._programs.sites import is_data


class HoldSubsamples(Messenger):
    """Holds each plate at the same indices, so that all draws of model and guide are about the same data.

    Attributes:
        indices: the indices of each plate by its name.
        moved: whether a program has chosen other indices for a plate than it was held at.
        chosen: the names of the plates for which a program has chosen the indices.
        instead: indices to hold plates at, whatever the programs choose, while there are any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.indices: dict[str, Any] = {}
        self.moved = False
        self.chosen: set[str] = set()
        self.instead: Mapping[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            return
        name = msg["name"]
        if name in self.instead:
            msg["value"] = self.instead[name]
        elif msg["value"] is None:
            # The first indices rather than random ones, because they are right both for a model that indexes
            # the full data with them and for one that is called with a minibatch and ignores them.
            fn = msg["fn"]
            size = fn.size if fn.subsample_size is None else fn.subsample_size
            if size < 0:
                raise ValueError(f"Expected a size for plate '{name}', which an AutoGuide needs, got none")
            held = self.indices[name] if name in self.indices else torch.arange(size, device=fn.device)
            msg["value"] = held
            if len(held) != size:
                raise ValueError(
                    f"Expected plate '{name}' to have one size in model and guide, got {len(held)} and {size}: "
                    "a guide that holds values for each datum, as an AutoGuide does, takes the data that it was "
                    "learned on, all together (batch_size=None)"
                )
        else:
            self.chosen.add(name)

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] not in self.instead:
            before = self.indices.get(msg["name"], msg["value"])
            if before is not msg["value"] and not torch.equal(*map(torch.as_tensor, (before, msg["value"]))):
                self.moved = True
            self.indices[msg["name"]] = msg["value"]


@contextmanager
def without_table() -> Iterator[None]:
    """Takes the table of shapes so far, which Pyro adds, from the errors that say themselves what was expected."""
    try:
        yield
    except ValueError as error:
        words, table, _ = str(error).partition("\nTrace Shapes:")
        if not table:
            words, table, _ = str(error).partition("\n Trace Shapes:")
        if not table or type(error) is not ValueError or not words.startswith("Expected "):
            raise
        raise ValueError(words) from error.__cause__


class Release(Messenger):
    """Samples observed sites but, unlike ``poutine.uncondition``, leaves deterministic ones as they are."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_data(msg):
            msg.update(is_observed=False, value=None, done=False)


class Replay(Messenger):
    """Gives latent sites the values of a draw, as ``poutine.replay`` gives them the values of a trace."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg.update(value=self.values[msg["name"]], done=True)
