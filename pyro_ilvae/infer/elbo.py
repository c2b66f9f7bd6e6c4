"""An annealed version of Pyro's ELBO objectives, which also stops at the first loss that is not finite."""

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

Stochastic: TypeAlias = Callable[..., Any]

# TraceMeanField_ELBO is a Trace_ELBO.
_SUPPORTED = (Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, RenyiELBO)
_COMPILED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


class NonFiniteLossError(ValueError):
    """A loss or gradient was NaN or infinite; the parameters are those of before the step.

    Attributes:
        step: the number of steps the schedule of beta had taken, or None without a schedule.
        site: the first site whose value or log density is not finite; for a gradient, the first parameter; None if
            neither could be found.
    """

    def __init__(self, message: str, step: int | None, site: str | None) -> None:
        super().__init__(message, step, site)
        self.step = step
        self.site = site

    def __str__(self) -> str:
        return str(self.args[0])


class AnnealedELBO(ELBO):
    r"""Any of Pyro's ELBO objectives with its latent sites weighted by beta.

    .. math:: \mathcal{L}_\beta = E_{q(z \mid x)}[\log p(x \mid z)] - \beta\,\mathrm{KL}(q(z \mid x) \| p(z)).

    What is optimized (``loss_and_grads``, ``differentiable_loss``) is annealed; what is evaluated (``loss``, and so
    ``svi.evaluate_loss``) is the objective itself, at beta = 1. Nothing here counts steps: a schedule moves when the
    training loop calls its ``step()``.

    With :class:`~pyro.infer.RenyiELBO` each particle's log weight becomes
    :math:`\log p(x \mid z) + \beta (\log p(z) - \log q(z \mid x))`, and as there the scale of a subsampled plate
    stands inside the log-sum-exp. With :class:`~pyro.infer.TraceEnum_ELBO` a site enumerated in the *model* must have
    the scale of the sites that depend on it, so it can only be annealed together with them.

    A loss or gradient that is not finite raises :class:`NonFiniteLossError` before the optimizer moves.

    Args:
        elbo: a Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, TraceGraph_ELBO or RenyiELBO.
        beta: the weight, a number of at least 0, a scalar tensor, or a :class:`~pyro_ilvae.infer.schedules.Schedule`;
            or a mapping from names of sites to such weights.

    Raises:
        ValueError: for objectives in which beta has no meaning or would be baked into compiled code, weights that are
            negative or not finite, and, from a step, names that are no latent sites or scales that cannot be mixed.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_ilvae.infer import schedules
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> beta = schedules.linear(0.0, 1.0, num_steps=10)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), AnnealedELBO(Trace_ELBO(), beta=beta))
        >>> for _ in range(10):
        ...     loss = svi.step(torch.tensor(1.0))
        ...     beta.step()
        >>> beta.value
        1.0
    """

    def __init__(self, elbo: ELBO, beta: Beta | Mapping[str, Beta] = 1.0) -> None:
        # Without ELBO.__init__: the settings are those of ``elbo``, by __getattr__, so that there is one copy of each.
        if isinstance(elbo, _COMPILED):
            raise ValueError(
                f"Expected an objective that is not compiled, got {type(elbo).__name__}: it would bake the first value "
                "of beta into its graph"
            )
        if not isinstance(elbo, _SUPPORTED) or isinstance(elbo, TraceTailAdaptive_ELBO):
            raise ValueError(
                "Expected elbo to be one of Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, "
                f"RenyiELBO, got {type(elbo).__name__}, in which a weight of the KL has no meaning"
            )
        self.elbo = elbo
        self.beta = beta
        AnnealMessenger(beta)

    def __getattr__(self, name: str) -> Any:
        if name == "elbo":  # not yet set, while unpickling
            raise AttributeError(name)
        return getattr(self.elbo, name)

    def _get_trace(self, model: Stochastic, guide: Stochastic, args: Any, kwargs: Any) -> Any:
        return self.elbo._get_trace(model, guide, args, kwargs)

    def loss(self, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any) -> float:
        """The objective at beta = 1 in nats, negated; no gradients."""
        return float(torch_item(self.elbo.loss(model, guide, *args, **kwargs)))

    def loss_and_grads(self, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any) -> float:
        """The annealed objective in nats, negated; adds its gradients to the parameters."""
        rng_state = torch.get_rng_state()
        with poutine.trace(param_only=True) as capture:
            loss = self._annealed(self.elbo.loss_and_grads, rng_state, model, guide, *args, **kwargs)
        # With module-local parameters Pyro records the Parameter itself.
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
        """The annealed objective in nats, negated, as a tensor to differentiate."""
        if not hasattr(self.elbo, "differentiable_loss"):
            raise ValueError(
                f"Expected an objective with a differentiable loss, got {type(self.elbo).__name__}; use it through SVI"
            )
        rng_state = torch.get_rng_state()
        loss: Tensor = self._annealed(self.elbo.differentiable_loss, rng_state, model, guide, *args, **kwargs)
        self._check_loss(torch_item(loss), rng_state, model, guide, *args, **kwargs)
        return loss

    def _annealed(
        self, compute: Stochastic, rng_state: Tensor, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any
    ) -> Any:
        # One handler around the whole computation sees the sites of model and guide alike, also of a guide that runs
        # the model by itself (Pyro's GuideMessenger).
        try:
            with AnnealMessenger(self.beta):
                return compute(model, guide, *args, **kwargs)
        except ValueError as error:
            if "share a common" in str(error):
                raise ValueError(
                    "Expected sites enumerated in the model to have the scale of the sites that depend on them, got "
                    "another beta for some of them: give all of these the same one, or enumerate them in "
                    "the guide"
                ) from error
            # Pyro's validation stops at NaN in a distribution's arguments, without the name of the site.
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
        where = "at a site that a second run with the same draws did not show" if site is None else f"at site '{site}'"
        return NonFiniteLossError(
            f"Expected a finite loss, got {loss}{self._step_text()}, {where}; the parameters are those of before this "
            "step",
            self._step(),
            site,
        )

    def _check_gradients(self, loss: float, parameters: dict[str, Tensor]) -> None:
        gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
        if not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(list(gradients.values())))).all()):
            return
        # A sum of squares may overflow where every entry is finite, so the entries have the last word.
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        if bad:
            raise NonFiniteLossError(
                f"Expected finite gradients, got NaN or infinity{self._step_text()} for {bad}, at a loss of {loss:g}; "
                "the parameters are those of before this step",
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
    """The first site, guide before model, whose value or log density is not finite under the same random draws."""
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
