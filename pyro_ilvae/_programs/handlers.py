"""Handlers that a model or a guide runs under."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_ilvae._programs.sites import is_data


class HoldSubsamples(Messenger):
    """Holds each plate at the same indices, so that all draws of model and guide are about the same data.

    Attributes:
        indices: the indices of each plate by its name.
        moved: whether a program has chosen other indices for a plate than it was held at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.indices: dict[str, Any] = {}
        self.moved = False

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            # The first indices rather than random ones, because they are right both for a model that indexes
            # the full data with them and for one that is called with a minibatch and ignores them.
            fn = msg["fn"]
            size = fn.size if fn.subsample_size is None else fn.subsample_size
            msg["value"] = self.indices.get(msg["name"], torch.arange(size, device=fn.device))

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            before = self.indices.get(msg["name"], msg["value"])
            if before is not msg["value"] and not torch.equal(*map(torch.as_tensor, (before, msg["value"]))):
                self.moved = True
            self.indices[msg["name"]] = msg["value"]


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
