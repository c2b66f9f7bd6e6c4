"""Objectives around another objective, which training changes and evaluation does not."""

from typing import Any

from pyro.infer import ELBO
from pyro.infer.util import torch_item

__all__ = ["WrappedELBO"]


class WrappedELBO(ELBO):
    """An objective around another one, from which it has its settings and its loss without gradients."""

    def __init__(self, elbo: ELBO) -> None:
        # ELBO.__init__ is not called, because __getattr__ reads the settings from ``elbo``: each exists only once.
        self.elbo: Any = elbo

    def __getattr__(self, name: str) -> Any:
        if name == "elbo":  # unpickling asks for attributes before ``elbo`` is set
            raise AttributeError(name)
        return getattr(self.elbo, name)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.elbo._get_trace(model, guide, args, kwargs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The negative objective inside, in nats, without gradients: neither beta nor free bits change it."""
        return float(torch_item(self.elbo.loss(model, guide, *args, **kwargs)))
