"""Inference that is trained further than the model as long as the posterior lags behind."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode
from pyro_ilvae.infer.loss_module import unconstrained
from pyro_ilvae.infer.optim import PartialOptim

__all__ = ["AggressiveInference"]

_STATE = ("updates_guide", "num_inner", "loss_sum", "last_mean", "best", "num_without_gain", "num_at_update")
_PUBLIC_STATE = ("is_aggressive", "num_model_steps")


class AggressiveInference:
    r"""Steps of SVI that update the guide alone until it is up to date, and then the model alone, while that helps.

    .. math:: \phi \leftarrow \phi + \nabla_\phi \mathcal{L}(\theta, \phi) \text{ until } \mathcal{L} \text{ stops
        rising}, \qquad \theta \leftarrow \theta + \nabla_\theta \mathcal{L}(\theta, \phi) \text{ once},

    with the parameters :math:`\phi` of the guide and :math:`\theta` of the model, and again. The loss has stopped
    falling if its mean over ``window`` steps is not below its mean over the ``window`` steps before. When the mutual
    information of data and latent variable no longer rises, ordinary steps of ``svi`` follow: call :meth:`update` each
    time the model has had as many steps as an epoch has batches, which ``num_model_steps`` counts and which takes up to
    ``max_inner + 1`` passes over the data. Neutral: ``max_inner=0`` is ``svi`` itself.

    A parameter that both model and guide use belongs to the model's update. The optimizer sees only the parameters that
    a step moves: the state of the others stays, and their gradients are set to zero. ``model`` and ``guide`` run as in
    ``svi``; once for new parameters, the model also runs by itself, without gradients and with draws of its own.

    Args:
        svi: a ``pyro.infer.SVI`` or :class:`~pyro_ilvae.GraphSVI`, with any optimizer.
        max_inner: the most steps of the guide between two of the model; 0 for none.
        window: the number of steps over which the loss is averaged.
        patience: the number of calls of :meth:`update` without a higher mutual information after which ordinary steps
            follow.
        information: a function without arguments that returns the mutual information in nats, for :meth:`update`.

    Attributes:
        is_aggressive: whether steps update the guide or the model alone.
        num_model_steps: the number of steps that updated the model alone.

    Raises:
        ValueError: for numbers below 1 (``max_inner``: 0).
        TypeError: for an ``svi`` that is not an SVI, and ``information`` that is no function.

    References:
        He et al. 2019, Lagging inference networks and posterior collapse in variational autoencoders,
        https://arxiv.org/abs/1901.05534

    Example:
        >>> import pyro
        >>> from pyro.infer import TraceMeanField_ELBO
        >>> from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, diagnostics, likelihoods, remedies
        >>> x = torch.randn(60, 6)
        >>> decoder = MLPDecoder(latent_dim=2, event_shape=6, hidden_features=(8,))
        >>> encoder = MLPEncoder(latent_dim=2, event_shape=6, hidden_features=(8,))
        >>> vae = VAE(decoder, encoder, likelihoods.Normal(0.5), data_size=60)
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        >>> inference = remedies.AggressiveInference(svi, max_inner=20)
        >>> for _ in range(2):
        ...     losses = [inference.step(batch) for batch in x.split(20)]
        ...     information = diagnostics.mutual_information(vae.model, vae.guide, x, seed=0)
        ...     still_aggressive = inference.update(information.mutual_information)
    """

    def __init__(
        self,
        svi: SVI,
        *,
        max_inner: int = 100,
        window: int = 10,
        patience: int = 1,
        information: Callable[[], float] | None = None,
    ) -> None:
        self.svi = _checks.instance("svi", svi, SVI, "such as SVI(...) or GraphSVI(...)")
        self.max_inner = _checks.positive_int("max_inner", max_inner, at_least=0)
        self.window = _checks.positive_int("window", window)
        self.patience = _checks.positive_int("patience", patience)
        self.information = None if information is None else _checks.function("information", information)
        self.is_aggressive = self.max_inner > 0
        self.num_model_steps = 0
        self._num_at_update = 0
        self._best = -math.inf
        self._num_without_gain = 0
        self._of_model: set[Tensor] = set()
        self._of_guide: set[Tensor] = set()
        self._synchronize()
        self._start_round()

    def __repr__(self) -> str:
        part = ("the guide" if self._updates_guide else "the model") if self.is_aggressive else "both"
        own = f"max_inner={self.max_inner}, window={self.window}, patience={self.patience}"
        return f"{type(self).__name__}({type(self.svi).__name__}, {own}) whose next step updates {part}"

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step for the caller's next minibatch: of the guide, of the model, or an ordinary one.

        Args:
            *args: the arguments of model and guide.
            **kwargs: their named arguments.

        Returns:
            what the step of ``svi`` returns, the loss in nats.
        """
        if not self.is_aggressive:
            return self.svi.step(*args, **kwargs)
        with self._one_part(args, kwargs):
            loss = self.svi.step(*args, **kwargs)
        if self._updates_guide:
            self._count(float(loss))
        else:
            self.num_model_steps += 1
            self._start_round()
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of ``svi``, in nats, without gradients."""
        return self.svi.evaluate_loss(*args, **kwargs)

    def update(self, information: float | None = None) -> bool:
        """Tell the mutual information after an epoch of the model, and return whether the next steps are aggressive.

        Nothing changes while the model has had no step since the last call.

        Args:
            information: the mutual information of data and latent variable, in nats; if None, the function that was
                given as ``information`` tells it.

        Raises:
            ValueError: for an information that is no finite number, and for None without such a function.
        """
        if information is None:
            if self.information is None:
                raise ValueError("Expected information to be a number, or a function at the start, got None")
            self._synchronize()
            information = self.information()
        information = _checks.finite("information", information)
        if self.num_model_steps == self._num_at_update:
            return self.is_aggressive
        self._num_at_update = self.num_model_steps
        if information > self._best:
            self._best, self._num_without_gain = information, 0
        else:
            self._num_without_gain += 1
        self.is_aggressive = self.is_aggressive and self._num_without_gain < self.patience
        return self.is_aggressive

    def state_dict(self) -> dict[str, Any]:
        """Where the steps are, as numbers; parameters and optimizer have states of their own."""
        return {name: getattr(self, self._attribute(name)) for name in (*_PUBLIC_STATE, *_STATE)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called.

        Args:
            state_dict: the result of :meth:`state_dict`.

        Raises:
            ValueError: for a dictionary with other names.
            TypeError: for something else than a dictionary.
        """
        _checks.instance("state_dict", state_dict, Mapping, "a dictionary")  # type: ignore[type-abstract]
        names = [*_PUBLIC_STATE, *_STATE]
        if set(state_dict) != set(names):
            raise ValueError(f"Expected state_dict with the names {names}, got {list(state_dict)}")
        for name, value in state_dict.items():
            _check_state(f"state_dict['{name}']", name, value)
        self._synchronize()
        for name, value in state_dict.items():
            setattr(self, self._attribute(name), value)

    @staticmethod
    def _attribute(name: str) -> str:
        return name if name in _PUBLIC_STATE else f"_{name}"

    def _synchronize(self) -> None:
        """Let steps on a GPU that are under way come to their end."""
        synchronize = getattr(self.svi, "synchronize", None)
        if synchronize is not None:
            synchronize()

    def _start_round(self) -> None:
        """From now on, update the guide."""
        self._updates_guide = True
        self._num_inner, self._loss_sum = 0, 0.0
        self._last_mean = math.inf

    def _count(self, loss: float) -> None:
        """Count a step of the guide, after which the next one may be the model's."""
        self._num_inner += 1
        self._loss_sum += loss
        if self._num_inner % self.window == 0:
            mean = self._loss_sum / self.window
            self._updates_guide = mean < self._last_mean
            self._last_mean, self._loss_sum = mean, 0.0
        if self._num_inner >= self.max_inner:
            self._updates_guide = False

    @contextmanager
    def _one_part(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """A context in which the optimizer sees the guide's parameters alone, or the model's."""
        optim = self.svi.optim

        def choose(params: set[Tensor]) -> set[Tensor]:
            if not params <= self._of_model | self._of_guide:
                self._of_model |= self._parameters_of_model(args, kwargs)
                self._of_guide = (self._of_guide | params) - self._of_model
            return params & (self._of_guide if self._updates_guide else self._of_model)

        self.svi.optim = PartialOptim(optim, choose)
        try:
            yield
        finally:
            self.svi.optim = optim

    def _parameters_of_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[Tensor]:
        """The parameters that the model uses, by a run of the model that leaves no trace."""
        model = self.svi.model
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            evaluation_mode(model),
            poutine.block(),
            poutine.trace(param_only=True) as capture,
        ):
            model(*args, **kwargs)
        return {unconstrained(node["value"]) for node in capture.trace.nodes.values()}


def _check_state(argument: str, name: str, value: Any) -> None:
    """Raise for a value that no state has."""
    if name in ("is_aggressive", "updates_guide"):
        _checks.boolean(argument, value)
    elif name.startswith("num_"):
        _checks.positive_int(argument, value, at_least=0)
    elif isinstance(value, bool) or not isinstance(value, int | float):  # it may be infinite, or NaN
        raise ValueError(f"Expected {argument} to be a number, got {value!r}")
