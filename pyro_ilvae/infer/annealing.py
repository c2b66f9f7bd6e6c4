"""The handler that weights the KL divergence of an ELBO by scaling latent sites."""

from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, Self, TypeAlias, TypeVar, overload

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.distributions import innermost
from pyro_ilvae.infer.schedules import Schedule

__all__ = ["AnnealMessenger", "anneal"]

P = ParamSpec("P")
T = TypeVar("T")
Beta: TypeAlias = float | Tensor | Schedule


def current_beta(beta: Beta, name: str = "beta") -> float | Tensor:
    """The current value of ``beta``, checked to be finite and not negative."""
    value = beta.value if isinstance(beta, Schedule) else beta
    number = _checks.non_negative(name, value)
    return value if isinstance(value, Tensor) else number


class AnnealMessenger(Messenger):
    r"""Scales the log densities of latent sites by beta and leaves observed sites alone.

    .. math:: \log p_\beta(x, z) = \log p(x \mid z) + \beta \log p(z).

    Applied to both model and guide, the handler turns the ELBO into
    :math:`E_q \log p(x \mid z) - \beta\,\mathrm{KL}(q \| p)`, for a sampled and for an analytic KL. Unlike
    ``poutine.scale``, it takes beta = 0, the value at which annealing schedules start. Beta multiplies the scales that
    plates and other handlers set. A handler that observes sites (``poutine.condition``) must be applied inside this
    one.

    Args:
        beta: the weight: a number of at least 0, a scalar tensor, or a :class:`~pyro_ilvae.infer.schedules.Schedule`
            whose current value is used. A mapping from names of sites to weights gives each named site its own weight
            and leaves the other sites alone.

    Raises:
        ValueError: for a weight that is negative or not finite. With a mapping, also when the function returns: if a
            name is not a latent site of the function, or if an auxiliary site holds the density of the named site (as
            in guides such as AutoNormal).

    Example:
        >>> AnnealMessenger({"y": 2.0, "z": 1.0})
        AnnealMessenger(beta={'y': 2.0, 'z': 1.0})
    """

    def __init__(self, beta: Beta | Mapping[str, Beta]) -> None:
        super().__init__()
        self.betas: Mapping[str, Beta] | None = None
        if isinstance(beta, Mapping):
            self.betas = dict(beta)
        else:
            self.beta = beta
            current_beta(beta)
        for name, value in (self.betas or {}).items():
            current_beta(value, f"beta of site '{name}'")
        self.latent_sites: set[str] = set()
        self._delta_sites: set[str] = set()
        self._auxiliary_sites: set[str] = set()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(beta={self.beta if self.betas is None else self.betas!r})"

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or site_is_subsample(msg):  # type: ignore[arg-type]
            return
        name = msg["name"]
        self.latent_sites.add(name)
        if msg["infer"].get("is_auxiliary"):
            self._auxiliary_sites.add(name)
        if self.betas is None:
            msg["scale"] = msg["scale"] * current_beta(self.beta)
        elif name in self.betas:
            if isinstance(innermost(msg["fn"]), dist.Delta):
                self._delta_sites.add(name)
            msg["scale"] = msg["scale"] * current_beta(self.betas[name], f"beta of site '{name}'")

    def __enter__(self) -> Self:
        for names in (self.latent_sites, self._delta_sites, self._auxiliary_sites):
            names.clear()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if exception[0] is None and self.betas is not None:
            self._check_sites()

    def _check_sites(self) -> None:
        """Raise a ValueError if a named site was never scaled or if an auxiliary site holds its density."""
        assert self.betas is not None
        missing = set(self.betas) - self.latent_sites
        if missing:
            raise ValueError(
                f"Expected beta to name latent sites of model or guide, got {sorted(missing)}; the latent sites are "
                f"{sorted(self.latent_sites)}"
            )
        uncovered = self._auxiliary_sites - set(self.betas)
        if self._delta_sites and uncovered:
            raise ValueError(
                f"Expected beta to name sites whose density is their own, got {sorted(self._delta_sites)}, which in "
                f"this guide are functions of the auxiliary sites {sorted(uncovered)}. Give one beta for all latent "
                "sites, or also name the auxiliary sites if no other site depends on them"
            )


@overload
def anneal(fn: None = None, beta: Beta | Mapping[str, Beta] = 1.0) -> AnnealMessenger: ...


@overload
def anneal(fn: Callable[P, T], beta: Beta | Mapping[str, Beta] = 1.0) -> Callable[P, T]: ...


def anneal(fn: Callable[..., Any] | None = None, beta: Beta | Mapping[str, Beta] = 1.0) -> Any:
    r"""Scale the latent sites of a stochastic function by beta, as a wrapper, decorator or context manager.

    .. math:: \log p_\beta(x, z) = \log p(x \mid z) + \beta \log p(z).

    Args:
        fn: the model or guide; None returns the handler itself, for ``with`` and ``@``.
        beta: the weight of all latent sites, or a mapping from names to weights; see :class:`AnnealMessenger`.

    Returns:
        ``fn`` under the handler, or the handler.

    Raises:
        ValueError: as :class:`AnnealMessenger`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        >>> trace = pyro.poutine.trace(anneal(model, beta=0.5)).get_trace()
        >>> trace.nodes["z"]["scale"], trace.nodes["x"]["scale"]
        (0.5, 1.0)
        >>> with anneal(beta=0.0):
        ...     trace = pyro.poutine.trace(model).get_trace()
        >>> trace.nodes["z"]["scale"]
        0.0
    """
    messenger = AnnealMessenger(beta)
    return messenger if fn is None else messenger(fn)
