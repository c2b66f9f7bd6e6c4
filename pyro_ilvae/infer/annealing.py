"""The handler that scales latent sites, which is what a KL weight is in Pyro's terms."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ParamSpec, Self, TypeAlias, TypeVar, overload

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ilvae.distributions import innermost
from pyro_ilvae.infer.schedules import Schedule

P = ParamSpec("P")
T = TypeVar("T")
Beta: TypeAlias = float | Tensor | Schedule


def current_beta(beta: Beta, name: str = "beta") -> float | Tensor:
    """The value of a beta now, checked to be finite and not negative."""
    value = beta.value if isinstance(beta, Schedule) else beta
    if isinstance(value, Tensor):
        valid = value.dim() == 0 and bool(torch.isfinite(value) & (value >= 0))
    else:
        valid = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value) and value >= 0
    if not valid:
        raise ValueError(f"Expected {name} to be a finite number >= 0 or a Schedule of such, got {value!r}")
    return value


class AnnealMessenger(Messenger):
    r"""Scales the log densities of latent sites by beta and leaves observed sites alone.

    .. math:: \log p_\beta(x, z) = \log p(x \mid z) + \beta \log p(z).

    Used on model and guide alike it makes the ELBO :math:`E_q \log p(x \mid z) - \beta\,\mathrm{KL}(q \| p)`, with
    sampled and with analytic KL. Unlike ``poutine.scale`` it takes beta = 0, where annealing schedules start. It
    multiplies the scales of plates and other handlers. A handler that observes sites (``poutine.condition``) has to
    be applied inside it.

    Args:
        beta: the weight, a number of at least 0, a scalar tensor, or a :class:`~pyro_ilvae.infer.schedules.Schedule`
            whose current value is used; or a mapping from names of sites to such weights.

    Raises:
        ValueError: for a weight that is negative or not finite; and when the function returns, for a name that was no
            latent site in it, or whose density is that of an auxiliary site (as in guides such as AutoNormal).
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
        """Raise a ValueError if a named site was never scaled, or had its density elsewhere."""
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
                f"Expected beta to name sites whose density is their own, got {sorted(self._delta_sites)}: in this "
                f"guide they are functions of the auxiliary sites {sorted(uncovered)}. Give one beta for all latent "
                "sites, or name the auxiliary ones too where no other site depends on them"
            )


@overload
def anneal(fn: None = None, beta: Beta | Mapping[str, Beta] = 1.0) -> AnnealMessenger: ...


@overload
def anneal(fn: Callable[P, T], beta: Beta | Mapping[str, Beta] = 1.0) -> Callable[P, T]: ...


def anneal(fn: Callable[..., Any] | None = None, beta: Beta | Mapping[str, Beta] = 1.0) -> Any:
    r"""Scale the latent sites of a stochastic function by beta; a wrapper, decorator or context manager.

    .. math:: \log p_\beta(x, z) = \log p(x \mid z) + \beta \log p(z).

    Args:
        fn: the model or guide; if None, the handler itself is returned, for ``with`` and ``@``.
        beta: see :class:`AnnealMessenger`.

    Returns:
        ``fn`` under the handler, or the handler.

    Example:
        >>> import pyro, pyro.distributions as dist
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
