"""Pyro's ELBO objectives with a weighted KL divergence, and an error for losses that are not finite."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
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

from pyro_ilvae import _checks
from pyro_ilvae.infer.annealing import AnnealMessenger, Beta
from pyro_ilvae.infer.loss_module import LossModule, unconstrained
from pyro_ilvae.infer.moving import MovingValue
from pyro_ilvae.infer.remedies.free_bits import FreeBitsELBO
from pyro_ilvae.infer.step_watch import StepWatch
from pyro_ilvae.infer.wrapped_elbo import WrappedELBO

__all__ = ["AnnealedELBO", "NonFiniteLossError"]

Stochastic: TypeAlias = Callable[..., Any]

# TraceMeanField_ELBO derives from Trace_ELBO.
_SUPPORTED = (Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, RenyiELBO, FreeBitsELBO)
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


class AnnealedELBO(WrappedELBO):
    r"""One of Pyro's ELBO objectives, with its latent sites weighted by beta.

    .. math:: \mathcal{L}_\beta = E_{q(z \mid x)}[\log p(x \mid z)] - \beta\,\mathrm{KL}(q(z \mid x) \| p(z)).

    Training (``loss_and_grads``, ``differentiable_loss``) uses the annealed objective; evaluation (``loss``, and so
    ``svi.evaluate_loss``) uses the objective itself, at beta = 1. As a module, ``elbo(model, guide)`` does the same in
    training and in evaluation mode. A schedule moves only when the training loop calls its ``step()``; if that never
    happens, the training loss warns once: the 100th if all losses are of the same tensors, else the 1,000th.

    With :class:`~pyro.infer.RenyiELBO`, the log weight of each particle becomes
    :math:`\log p(x \mid z) + \beta (\log p(z) - \log q(z \mid x))`, and the scale of a subsampled plate stands inside
    the log-sum-exp, as in Pyro's objective. With :class:`~pyro.infer.TraceEnum_ELBO`, a site enumerated in the *model*
    must have the same scale as the sites that depend on it, so all of them need the same beta.

    A loss or gradient that is not finite raises :class:`NonFiniteLossError` before the optimizer moves.

    Args:
        elbo: a Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, TraceGraph_ELBO or RenyiELBO, or a
            :class:`~pyro_ilvae.remedies.FreeBitsELBO`.
        beta: the weight: a number of at least 0, a scalar tensor, or a :class:`~pyro_ilvae.infer.schedules.Schedule`.
            A mapping from names of sites to weights gives each named site its own weight and leaves the other sites
            alone.

    Raises:
        ValueError: for an objective in which beta has no meaning, a compiled objective, a weight that is negative or
            not finite, and an empty mapping. A training step raises it for a name that is not a latent site of both
            model and guide, for an auxiliary site of the guide without the sites that are functions of it (see
            :class:`AnnealMessenger`), and for different weights of sites that must share a scale.
        RuntimeError: by a training step, if another thread runs a model meanwhile.

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
        if isinstance(elbo, _COMPILED):
            raise ValueError(
                f"Expected an objective that is not compiled, got {type(elbo).__name__}, which would keep the first "
                "value of beta in its compiled graph"
            )
        if not isinstance(elbo, _SUPPORTED) or isinstance(elbo, TraceTailAdaptive_ELBO):
            got = f"{type(elbo).__name__}, in which a weight of the KL has no meaning"
            if isinstance(elbo, type):
                got = f"the class {elbo.__name__}: pass an object of it, such as {elbo.__name__}()"
            raise ValueError(
                "Expected elbo to be one of Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, "
                f"RenyiELBO, FreeBitsELBO, got {got}"
            )
        super().__init__(elbo)
        self.beta = beta
        AnnealMessenger(beta)
        self._step_watch = StepWatch(self._schedules())
        self._earlier_step: int | None = None

    def __call__(self, model: Stochastic, guide: Stochastic) -> LossModule:
        r"""The loss as a module, for optimizers of ``torch.optim`` and for PyTorch Lightning.

        ``loss = elbo(vae.model, vae.guide)`` holds the modules of the model and the guide, each once, so that
        ``parameters()``, ``state_dict()``, ``to()``, ``train()`` and ``eval()`` reach them: a module that is passed
        itself as ``model`` or ``guide``, and otherwise the module that a bound method belongs to, as ``model_module``
        or ``guide_module``, also inside a partial function or a handler. ``loss(x)`` is the annealed loss in training
        mode and the loss at beta = 1 in evaluation mode.

        Modules that a function refers to by name cannot be found: ``eval()`` does not reach them, ``parameters()``
        lacks theirs, and the first loss warns if it has others. A guide of ``pyro.infer.autoguide`` has parameters once
        it has run. If a module keeps the loss of its own methods as an attribute, parameters and state stay with that
        module.

        Args:
            model: a module, a method of a module, or any other model.
            guide: a module, a method of a module, or any other guide.

        Returns:
            a module whose result is a tensor of shape (), in nats.

        Raises:
            ValueError: for an objective without a differentiable loss.
            TypeError: for a model or guide that cannot be called, or that is a class.

        Example:
            >>> from pyro.infer import Trace_ELBO
            >>> from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, likelihoods
            >>> decoder = MLPDecoder(latent_dim=2, event_shape=6, hidden_features=(8,))
            >>> encoder = MLPEncoder(event_shape=6, latent_dim=2, hidden_features=(8,))
            >>> vae = VAE(decoder, encoder, likelihoods.Normal(0.5))
            >>> loss = AnnealedELBO(Trace_ELBO(), beta=0.1)(vae.model, vae.guide)
            >>> optimizer = torch.optim.Adam(loss.parameters())
            >>> loss(torch.randn(20, 6)).backward()
            >>> optimizer.step()
        """
        self._check_differentiable()
        return LossModule(_checks.function("model", model), _checks.function("guide", guide), self)

    def __repr__(self) -> str:
        inside = repr(self.elbo) if isinstance(self.elbo, FreeBitsELBO) else type(self.elbo).__name__
        return f"{type(self).__name__}({inside}, beta={self.beta!r})"

    def loss_and_grads(self, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any) -> float:
        """The negative annealed objective, in nats; its gradients are added to the parameters' gradients."""
        rng_state = torch.get_rng_state()
        with poutine.trace(param_only=True) as capture:
            loss = self._annealed(self.elbo.loss_and_grads, rng_state, model, guide, *args, **kwargs)
        parameters = {name: unconstrained(node["value"]) for name, node in capture.trace.nodes.items()}
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
        self._check_differentiable()
        rng_state = torch.get_rng_state()
        compute = self.elbo.differentiable_loss
        loss: Tensor = self._annealed(compute, rng_state, model, guide, *args, **kwargs)
        self._check_loss(torch_item(loss), rng_state, model, guide, *args, **kwargs)
        return loss

    def _annealed(
        self, compute: Stochastic, rng_state: Tensor, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any
    ) -> Any:
        self._step_watch.count(*args, **kwargs)
        # One handler around the whole computation sees the sites of both model and guide, even if the guide runs the
        # model itself (Pyro's GuideMessenger).
        try:
            with AnnealMessenger(self.beta) as messenger:
                loss = compute(model, guide, *args, **kwargs)
        except ValueError as error:
            if "share a common" in str(error):
                raise ValueError(
                    "Expected sites enumerated in the model to have the scale of the sites that depend on them, got "
                    f"beta={self.beta!r}: give all of these sites the same beta, or enumerate in the guide"
                ) from error
            # Pyro's validation refuses NaN in a distribution's arguments without naming the site.
            site = None
            if "invalid values" in str(error):
                # Without validation, a value out of range may raise an error of its own.
                with contextlib.suppress(IndexError, RuntimeError):
                    site = _first_non_finite_site(rng_state, model, guide, *args, **kwargs)
            if not site:
                raise
            raise self._non_finite_loss("invalid arguments of a distribution", site) from error
        if messenger.without_counterpart:
            raise ValueError(
                f"Expected beta to name sites of both model and guide, got {messenger.without_counterpart}, which only "
                "one of them draws"
            )
        return loss

    def _check_differentiable(self) -> None:
        if not hasattr(self.elbo, "differentiable_loss"):
            raise ValueError(
                f"Expected an objective with a differentiable loss, got {type(self.elbo).__name__}, which works with "
                "SVI only"
            )

    def _schedules(self) -> list[MovingValue]:
        betas = self.beta.values() if isinstance(self.beta, Mapping) else [self.beta]
        return [beta for beta in betas if isinstance(beta, MovingValue)]

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

    @contextlib.contextmanager
    def _as_at(self, beta: Any, num_steps_taken: int | None) -> Iterator[None]:
        """A context for an earlier step, with its beta, whose number errors name."""
        before = self.beta
        self.beta, self._earlier_step = beta, num_steps_taken
        try:
            yield
        finally:
            self.beta, self._earlier_step = before, None

    def _step(self) -> int | None:
        if self._earlier_step is not None:
            return self._earlier_step
        return next((schedule.num_steps_taken for schedule in self._schedules()), None)

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
