"""The handler that weights the KL divergence of an ELBO by scaling latent sites."""

from collections.abc import Callable, Iterable, Mapping
from threading import get_ident
from typing import Any, ParamSpec, Self, TypeAlias, TypeVar, overload

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.infer.auxiliary import DrawnSite, joint_densities, make_traceable
from pyro_ilvae.infer.moving import MovingValue

__all__ = ["AnnealMessenger", "anneal"]

P = ParamSpec("P")
T = TypeVar("T")
Beta: TypeAlias = float | Tensor | MovingValue


def current_beta(beta: Beta, name: str = "beta") -> float | Tensor:
    """The current value of ``beta``, checked to be finite and not negative."""
    if callable(beta):
        raise ValueError(
            f"Expected {name} to be a finite number >= 0 or a Schedule, got {beta!r}; schedules.linear(...) makes a "
            "Schedule"
        )
    value = beta.value if isinstance(beta, MovingValue) else beta
    number = _checks.non_negative(name, value)
    return value if isinstance(value, Tensor) else number


def _check_beta(beta: Beta, name: str = "beta") -> None:
    """Raise unless beta is a weight now, and, as far as it is known, at the later steps of a schedule."""
    current_beta(beta, name)
    for value in beta._ends if isinstance(beta, MovingValue) else ():
        _checks.non_negative(f"{name} = {beta.name} at every step", value)  # type: ignore[union-attr]


def _named_betas(betas: Mapping[str, Beta]) -> dict[str, Beta]:
    if not betas:
        raise ValueError("Expected beta to name at least one site, got {}, which anneals nothing")
    for name, value in betas.items():
        if not isinstance(name, str):
            raise TypeError(f"Expected beta to map names of sites to weights, got the key {name!r}")
        _check_beta(value, f"beta of site '{name}'")
    return dict(betas)


def _instead(name: str, latent: Iterable[str]) -> str:
    """What to name in place of a site that a handler has reparameterized."""
    instead = sorted(site for site in latent if site.startswith(f"{name}_"))
    return f" and computed from {instead}, which can be named" if instead else ""


class AnnealMessenger(Messenger):
    r"""Scales the log densities of latent sites by beta and leaves observed sites alone.

    .. math:: \log p_\beta(x, z) = \log p(x \mid z) + \beta \log p(z).

    Applied to both model and guide, the handler turns the ELBO into
    :math:`E_q \log p(x \mid z) - \beta\,\mathrm{KL}(q \| p)`, for a sampled and for an analytic KL. Unlike
    ``poutine.scale``, it takes beta = 0, the value at which annealing schedules start. Beta multiplies the scales that
    plates and other handlers set. A handler that observes sites (``poutine.condition``) must be applied inside this
    one.

    Some guides draw an auxiliary site and compute the model's sites from it: the density of ``t`` in AutoNormal is that
    of ``t_unconstrained`` times a Jacobian determinant. These sites need one common weight, so a mapping names all of
    them, ``{"t": 0.5, "t_unconstrained": 0.5}``, or none. All sites of AutoMultivariateNormal share one auxiliary site.

    Args:
        beta: the weight: a number of at least 0, a scalar tensor, or a :class:`~pyro_ilvae.infer.schedules.Schedule`
            whose current value is used. A mapping from names of sites to weights gives each named site its own weight
            and leaves the other sites alone.

    Raises:
        ValueError: for a weight that is negative or not finite, also where a schedule ends, and for an empty mapping.
            With a mapping, also when the function returns: if a name is not a latent site of the function, or if the
            mapping names or weights the sites of one joint density differently.
        RuntimeError: if another thread runs a model meanwhile: Pyro has one stack of handlers for all threads.

    Example:
        >>> AnnealMessenger({"y": 2.0, "z": 1.0})
        AnnealMessenger(beta={'y': 2.0, 'z': 1.0})
    """

    def __init__(self, beta: Beta | Mapping[str, Beta]) -> None:
        super().__init__()
        self.betas: Mapping[str, Beta] | None = None
        if isinstance(beta, Mapping):
            self.betas = _named_betas(beta)
        else:
            self.beta = beta
            _check_beta(beta)
        self._thread: int | None = None
        # What a mapping is checked against when the function returns.
        self._drawn: dict[str, DrawnSite] = {}
        self._fixed: set[str] = set()
        self._in_both: set[str] = set()
        #: the named sites that the function drew and no second function replayed
        self.without_counterpart: list[str] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}(beta={self.beta if self.betas is None else self.betas!r})"

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if get_ident() != self._thread:
            raise RuntimeError(
                f"Expected one thread at a time to run models, got site '{msg['name']}' from a thread while another "
                "thread anneals: Pyro has one stack of handlers for all threads. Use processes, or a lock"
            )
        if site_is_subsample(msg):  # type: ignore[arg-type]
            return
        if self.betas is None:
            if not msg["is_observed"]:
                msg["scale"] = msg["scale"] * current_beta(self.beta)
            return
        name = msg["name"]
        if msg["is_observed"]:
            self._fixed.add(name)
            return
        if name in self.betas:
            msg["scale"] = msg["scale"] * current_beta(self.betas[name], f"beta of site '{name}'")
        drawn = self._drawn.get(name)
        infer = msg["infer"]
        # A model takes the guide's value itself; a GuideMessenger runs both at once; or the model's site is summed out.
        replayed = drawn is not None and msg["value"] is drawn.value
        if replayed or "prior" in infer or "_enumerate_dim" in infer:
            self._in_both.add(name)
        if not replayed:
            self._drawn[name] = DrawnSite(msg["fn"], msg["value"], bool(infer.get("is_auxiliary")))

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if self.betas is None or msg["is_observed"] or site_is_subsample(msg):  # type: ignore[arg-type]
            return
        drawn = self._drawn[msg["name"]]
        if drawn.value is None:
            if drawn.auxiliary:
                make_traceable(msg["value"])
            self._drawn[msg["name"]] = drawn._replace(value=msg["value"])

    def __enter__(self) -> Self:
        super().__enter__()
        self._thread = get_ident()
        for seen in (self._drawn, self._fixed, self._in_both):
            seen.clear()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if exception[0] is None and self.betas is not None:
            self._check_names(self.betas)
            self._check_joint_densities(self.betas)
            self.without_counterpart = [
                name for name in self.betas if name not in self._in_both and not self._drawn[name].auxiliary
            ]
        self._drawn.clear()  # the graph behind the values

    def _check_names(self, betas: Mapping[str, Beta]) -> None:
        """Raise a ValueError if a named site is not a latent one."""
        missing = sorted(set(betas) - set(self._drawn))
        if not missing:
            return
        hints = [
            f"; '{name}' is observed or deterministic{_instead(name, self._drawn)}"
            for name in missing
            if name in self._fixed
        ]
        raise ValueError(
            f"Expected beta to name latent sites of model or guide, got {missing}; the latent sites are "
            f"{sorted(self._drawn)}{''.join(hints)}"
        )

    def _check_joint_densities(self, betas: Mapping[str, Beta]) -> None:
        """Raise a ValueError if beta weights one part of a density and not the other."""
        if not any(site.auxiliary for site in self._drawn.values()):
            return
        for auxiliary, functions in joint_densities(self._drawn).items():
            together = {auxiliary, *functions}
            named = sorted(together & set(betas))
            weights = {float(current_beta(betas[name])) for name in named}
            if not named or (together <= set(betas) and len(weights) == 1 and functions):
                continue
            if not functions:
                raise ValueError(
                    f"Expected beta to name sites whose density is their own, got '{auxiliary}', an auxiliary site of "
                    "which no site of the guide is a function: the model has no density to go with it"
                )
            both = f"the auxiliary site '{auxiliary}' and by {sorted(functions)}, which this guide computes from it"
            if together <= set(betas):
                weighted = {name: betas[name] for name in named}
                raise ValueError(f"Expected one beta for the density that is shared by {both}, got {weighted}")
            raise ValueError(
                f"Expected beta to name sites whose density is their own, got {named}: one density is shared by "
                f"{both}. Also name {sorted(together - set(betas))} with the same beta, or give one beta for all sites"
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
    return messenger if fn is None else messenger(_checks.function("fn", fn, "a model or guide"))
