"""Pyro's ELBO objectives with a weighted KL divergence, and an error for losses that are not finite."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.util import torch_item, zero_grads
from torch import Tensor

from pyro_ilvae.infer.annealing import AnnealMessenger, Beta
from pyro_ilvae.infer.schedules import Schedule

__all__ = ["AnnealedELBO", "NonFiniteLossError"]

Stochastic: TypeAlias = Callable[..., Any]

# TraceMeanField_ELBO derives from Trace_ELBO.
_SUPPORTED = (Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, RenyiELBO)
_COMPILED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


class NonFiniteLossError(ValueError):
    """A loss or gradient was NaN or infinite; the parameters keep their values from before the step.

    Attributes:
        step: the number of steps that the schedule of beta had taken, or None without a schedule.
        site: the first site whose value or log density is not finite, or, for a gradient, the first parameter with a
            gradient that is not finite; None if no such site was found.
    """

    def __init__(self, message: str, step: int | None, site: str | None) -> None:
        super().__init__(message, step, site)
        self.step = step
        self.site = site

    def __str__(self) -> str:
        return str(self.args[0])


class AnnealedELBO(ELBO):
    r"""One of Pyro's ELBO objectives, with its latent sites weighted by beta.

    .. math:: \mathcal{L}_\beta = E_{q(z \mid x)}[\log p(x \mid z)] - \beta\,\mathrm{KL}(q(z \mid x) \| p(z)).

    Training (``loss_and_grads``, ``differentiable_loss``) uses the annealed objective; evaluation (``loss``, and so
    ``svi.evaluate_loss``) uses the objective itself, at beta = 1. The object counts no steps: a schedule moves when the
    training loop calls its ``step()``.

    With :class:`~pyro.infer.RenyiELBO`, the log weight of each particle becomes
    :math:`\log p(x \mid z) + \beta (\log p(z) - \log q(z \mid x))`, and the scale of a subsampled plate stands inside
    the log-sum-exp, as in Pyro's objective. With :class:`~pyro.infer.TraceEnum_ELBO`, a site enumerated in the *model*
    must have the same scale as the sites that depend on it, so all of them need the same beta.

    A loss or gradient that is not finite raises :class:`NonFiniteLossError` before the optimizer moves.

    Args:
        elbo: a Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, TraceGraph_ELBO or RenyiELBO.
        beta: the weight: a number of at least 0, a scalar tensor, or a :class:`~pyro_ilvae.infer.schedules.Schedule`.
            A mapping from names of sites to weights gives each named site its own weight and leaves the other sites
            alone.

    Raises:
        ValueError: for an objective in which beta has no meaning, a compiled objective, and a weight that is negative
            or not finite. A training step raises it for a name that is not a latent site, and for different weights
            of sites that must share a scale.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_ilvae.infer import schedules
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> beta = schedules.linear(0.0, 1.0, num_steps=10)
        >>> elbo = AnnealedELBO(Trace_ELBO(), beta=beta)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
        >>> for _ in range(10):
        ...     loss = svi.step(torch.tensor(1.0))
        ...     beta.step()
        >>> elbo
        AnnealedELBO(Trace_ELBO, beta=linear(0.0, 1.0, num_steps=10) at step 10: 1)
    """

    def __init__(self, elbo: ELBO, beta: Beta | Mapping[str, Beta] = 1.0) -> None:
        # ELBO.__init__ is not called, because __getattr__ reads the settings from ``elbo``: each exists only once.
        if isinstance(elbo, _COMPILED):
            raise ValueError(
                f"Expected an objective that is not compiled, got {type(elbo).__name__}, which would keep the first "
                "value of beta in its compiled graph"
            )
        if not isinstance(elbo, _SUPPORTED) or isinstance(elbo, TraceTailAdaptive_ELBO):
            raise ValueError(
                "Expected elbo to be one of Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, "
                f"RenyiELBO, got {type(elbo).__name__}, in which a weight of the KL has no meaning"
            )
        self.elbo = elbo
        self.beta = beta
        AnnealMessenger(beta)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.elbo).__name__}, beta={self.beta!r})"

    def __getattr__(self, name: str) -> Any:
        if name == "elbo":  # unpickling asks for attributes before ``elbo`` is set
            raise AttributeError(name)
        return getattr(self.elbo, name)

    def _get_trace(self, model: Stochastic, guide: Stochastic, args: Any, kwargs: Any) -> Any:
        return self.elbo._get_trace(model, guide, args, kwargs)

    def loss(self, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any) -> float:
        """The negative objective at beta = 1, in nats, without gradients."""
        return float(torch_item(self.elbo.loss(model, guide, *args, **kwargs)))

    def loss_and_grads(self, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any) -> float:
        """The negative annealed objective, in nats; its gradients are added to the parameters' gradients."""
        rng_state = torch.get_rng_state()
        with poutine.trace(param_only=True) as capture:
            loss = self._annealed(self.elbo.loss_and_grads, rng_state, model, guide, *args, **kwargs)
        # With module-local parameters, Pyro records the nn.Parameter, which has no unconstrained().
        values: dict[str, Any] = {name: node["value"] for name, node in capture.trace.nodes.items()}
        parameters: dict[str, Tensor] = {
            name: value.unconstrained() if hasattr(value, "unconstrained") else value for name, value in values.items()
        }
        value = torch_item(loss)
        try:
            self._check_loss(value, rng_state, model, guide, *args, **kwargs)
            self._check_gradients(value, parameters)
        except NonFiniteLossError:
            zero_grads(parameters.values())
            raise
        return float(value)

    def differentiable_loss(self, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any) -> Tensor:
        """The negative annealed objective, in nats, as a tensor to differentiate."""
        if not hasattr(self.elbo, "differentiable_loss"):
            raise ValueError(
                f"Expected an objective with a differentiable loss, got {type(self.elbo).__name__}, which works with "
                "SVI only"
            )
        rng_state = torch.get_rng_state()
        loss: Tensor = self._annealed(self.elbo.differentiable_loss, rng_state, model, guide, *args, **kwargs)
        self._check_loss(torch_item(loss), rng_state, model, guide, *args, **kwargs)
        return loss

    def _annealed(
        self, compute: Stochastic, rng_state: Tensor, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any
    ) -> Any:
        # One handler around the whole computation sees the sites of both model and guide, even if the guide runs the
        # model itself (Pyro's GuideMessenger).
        try:
            with AnnealMessenger(self.beta):
                return compute(model, guide, *args, **kwargs)
        except ValueError as error:
            if "share a common" in str(error):
                raise ValueError(
                    "Expected sites enumerated in the model to have the scale of the sites that depend on them, got "
                    f"beta={self.beta!r}: give all of these sites the same beta, or enumerate in the guide"
                ) from error
            # Pyro's validation refuses NaN in a distribution's arguments without naming the site.
            site = "invalid values" in str(error) and _first_non_finite_site(rng_state, model, guide, *args, **kwargs)
            if not site:
                raise
            raise self._non_finite_loss("invalid arguments of a distribution", site) from error

    def _check_loss(
        self, loss: float, rng_state: Tensor, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any
    ) -> None:
        if not math.isfinite(loss):
            site = _first_non_finite_site(rng_state, model, guide, *args, **kwargs)
            raise self._non_finite_loss(f"{loss}", site)

    def _non_finite_loss(self, loss: str, site: str | None) -> NonFiniteLossError:
        where = "at a site that a second run with the same draws did not find" if site is None else f"at site '{site}'"
        return NonFiniteLossError(
            f"Expected a finite loss, got {loss}{self._step_text()}, {where}; the parameters keep their values from "
            "before this step",
            self._step(),
            site,
        )

    def _check_gradients(self, loss: float, parameters: dict[str, Tensor]) -> None:
        gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
        if not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(list(gradients.values())))).all()):
            return
        # A norm may overflow although every entry is finite, so the entries decide.
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        if bad:
            raise NonFiniteLossError(
                f"Expected finite gradients, got NaN or infinity{self._step_text()} for {bad}, at a loss of {loss:g}; "
                "the parameters keep their values from before this step",
                self._step(),
                bad[0],
            )

    def _step(self) -> int | None:
        betas = self.beta.values() if isinstance(self.beta, Mapping) else [self.beta]
        return next((beta.num_steps_taken for beta in betas if isinstance(beta, Schedule)), None)

    def _step_text(self) -> str:
        step = self._step()
        return "" if step is None else f" at step {step}"


def _first_non_finite_site(
    rng_state: Tensor, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any
) -> str | None:
    """The first site whose value or log density is not finite under the same random draws, guide before model."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad(), pyro.validation_enabled(False):
        torch.set_rng_state(rng_state)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    with torch.no_grad(), pyro.validation_enabled(False):
        for trace in (guide_trace, model_trace):
            for name, site in trace.nodes.items():
                if site["type"] != "sample":
                    continue
                value: Any = site["value"]
                log_prob = site["fn"].log_prob(value)  # type: ignore[attr-defined]
                if not (value.isfinite().all() and log_prob.isfinite().all()):
                    return str(name)
    return None
