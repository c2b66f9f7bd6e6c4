"""A Pyro optimizer that moves all parameters in one call of one PyTorch optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor


class JointOptim(PyroOptim):
    r"""One PyTorch optimizer for all parameters, in place of ``pyro.optim``'s one for each of them.

    The parameters move as with :class:`pyro.optim.PyroOptim`, in fewer and larger operations, so that a step is
    faster: most with ``fused=True`` (or ``foreach=True``) among the arguments of optimizers that have it. Two things
    differ on purpose. ``clip_norm`` is the norm of the gradient of *all* parameters of the step,

    .. math:: g \leftarrow g \cdot \min\left(1, c / \sqrt{\textstyle\sum_i \|g_i\|^2}\right),

    and gradients are dropped after the step, not filled with zeros. Parameters may appear later, as Pyro's do; those
    that a step does not use stay where they are. After the first step ``optimizer`` is the PyTorch optimizer, for a
    scheduler of ``torch.optim.lr_scheduler``, for example.

    Args:
        optim_constructor: a class of ``torch.optim`` that treats each entry or each parameter on its own.
        optim_args: its arguments, or a function from a parameter's name to its arguments. Parameters with equal
            arguments share a parameter group.
        clip_args: ``clip_norm`` (the largest norm of the whole gradient) or ``clip_value`` (the largest entry), or
            both.

    Raises:
        ValueError: for a function as ``clip_args`` or unknown names in it.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model():
        ...     pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=torch.tensor(3.0))
        >>> optimizer = JointOptim(torch.optim.Adam, {"lr": 0.1, "fused": True}, {"clip_norm": 10.0})
        >>> svi = SVI(model, lambda: None, optimizer, Trace_ELBO())
        >>> losses = [svi.step() for _ in range(100)]
        >>> round(pyro.param("loc").item())
        3
    """

    def __init__(
        self,
        optim_constructor: Callable[..., torch.optim.Optimizer],
        optim_args: dict[str, Any] | Callable[..., dict[str, Any]],
        clip_args: dict[str, float] | None = None,
    ) -> None:
        if callable(clip_args) or not set(clip_args or {}) <= {"clip_norm", "clip_value"}:
            raise ValueError(
                f"Expected clip_args to be a dictionary of clip_norm or clip_value, got {clip_args!r}; one norm is "
                "taken over all parameters"
            )
        super().__init__(optim_constructor, optim_args, clip_args)
        # There is none before the first step shows the parameters.
        self.optimizer: torch.optim.Optimizer | None = None

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """One step for ``params``; those not seen before are added."""
        # In the order of their names, because the set that SVI passes has none and sums depend on it.
        params = sorted(params, key=_name)
        for param in params:
            if param not in self.optim_objs:
                self._add(param)
        self._clip_grad(params, **self.pt_clip_args)  # type: ignore[arg-type]
        if self.optimizer is None:
            return
        used = set(params)
        unused = [param for param in self.optim_objs if param not in used and param.grad is not None]
        gradients = [param.grad for param in unused]
        for param in unused:
            param.grad = None
        self.optimizer.step(*args, **kwargs)
        for param, gradient in zip(unused, gradients, strict=True):
            param.grad = gradient
        for param in params:
            param.grad = None

    def _add(self, param: Tensor) -> None:
        # Built for this parameter alone first: it fills in the defaults, and loads a state as PyTorch does.
        single = self._get_optim(param)
        state = self._state_waiting_to_be_consumed.pop(_name(param), None)
        if state is not None:
            single.load_state_dict(state)
        self.optim_objs[param] = None
        if self.optimizer is None:
            self.optimizer = single
            return
        (new,) = single.param_groups
        for group in self.optimizer.param_groups:
            if _options(group) == _options(new):
                group["params"].append(param)
                break
        else:
            self.optimizer.add_param_group(new)
        if param in single.state:
            self.optimizer.state[param] = single.state[param]

    def get_state(self) -> dict[str, Any]:
        """The state of each parameter by name, in the form of ``PyroOptim.get_state``, which may load it too."""
        state = dict(self._state_waiting_to_be_consumed)
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            for param in group["params"]:
                own = self.optimizer.state.get(param)  # type: ignore[union-attr]
                state[_name(param)] = {
                    "state": {} if own is None else {0: own},
                    "param_groups": [_options(group) | {"params": [0]}],
                }
        return state


def _name(param: Tensor) -> str:
    return str(pyro.get_param_store().param_name(param))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
