"""A Pyro optimizer that moves all parameters in one call of one PyTorch optimizer."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.params.param_store import module_from_param_with_module_name, normalize_param_name, user_param_name
from torch import Tensor

from pyro_ilvae import _checks

__all__ = ["JointOptim", "PartialOptim"]

_LIMITS = {"clip_norm", "clip_value"}


class JointOptim(PyroOptim):
    r"""One PyTorch optimizer for all parameters, where ``pyro.optim`` has one optimizer for each parameter.

    The parameters move as with :class:`pyro.optim.PyroOptim`, but a step takes fewer and larger operations and is
    faster, above all with ``fused=True`` or ``foreach=True`` for optimizers that have this option. Two things differ on
    purpose. First, ``clip_norm`` limits the norm of the gradient of *all* parameters of the step,

    .. math:: g \leftarrow g \cdot \min\left(1, c / \sqrt{\textstyle\sum_i \|g_i\|^2}\right).

    Second, a step sets gradients to None and not to zeros. Parameters may appear at any step, as in Pyro, and
    parameters that a step does not use stay where they are. After the first step, the attribute ``optimizer`` is the
    PyTorch optimizer, which for example a scheduler of ``torch.optim.lr_scheduler`` needs. A parameter that appears
    later joins the group of the parameters with equal arguments, at the present learning rate of this group.

    Args:
        optim_constructor: a class of ``torch.optim`` that treats each entry or each parameter on its own.
        optim_args: the arguments of the class, or a function from a parameter's name to its arguments. Parameters with
            equal arguments share a parameter group.
        clip_args: ``clip_norm`` (the largest norm of the whole gradient), ``clip_value`` (the largest absolute value of
            an entry), or both: positive numbers.

    Raises:
        ValueError: if ``clip_args`` is a function, has unknown names, or has a limit that is not positive; for
            arguments that the class refuses; and by a step, for a parameter that appears under a scheduler of PyTorch
            with arguments that no earlier parameter has.
        TypeError: for an ``optim_constructor`` that is no class of ``torch.optim``, such as ``pyro.optim.Adam`` or an
            optimizer that is already built, and for ``optim_args`` that are neither a dictionary nor a function.

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
        >>> optimizer
        JointOptim(Adam, {'lr': 0.1, 'fused': True}, {'clip_norm': 10.0})
    """

    def __init__(
        self,
        optim_constructor: Callable[..., torch.optim.Optimizer],
        optim_args: dict[str, Any] | Callable[..., dict[str, Any]],
        clip_args: dict[str, float] | None = None,
    ) -> None:
        if not isinstance(optim_args, Mapping):
            _checks.function("optim_args", optim_args, "a dictionary of arguments, or a function from a name to one")
        _check_constructor(optim_constructor)
        if callable(clip_args) or not isinstance(clip_args, Mapping | None) or not set(clip_args or {}) <= _LIMITS:
            raise ValueError(
                f"Expected clip_args to be a dictionary with clip_norm or clip_value, got {clip_args!r}; the limits "
                "hold for all parameters together"
            )
        limits = {
            name: _limit(f"{name} in clip_args", value)
            for name, value in (clip_args or {}).items()
            if value is not None
        }
        super().__init__(optim_constructor, dict(optim_args) if isinstance(optim_args, Mapping) else optim_args, limits)
        if callable(optim_args):
            if self.pt_optim_args_argc not in (1, 2):
                raise TypeError("Expected optim_args to be a function from the name of a parameter to its arguments")
        else:
            # What the class refuses, it refuses for any parameter, other than devices, which raise a RuntimeError.
            with contextlib.suppress(RuntimeError):
                self._build(torch.nn.Parameter(torch.zeros(1, 1)), dict(optim_args))
        # The first step shows the parameters, without which PyTorch builds no optimizer.
        self.optimizer: torch.optim.Optimizer | None = None
        # The arguments that each parameter group was built with: schedulers change the options.
        self._group_arguments: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        clip_args = f", {self.pt_clip_args!r}" if self.pt_clip_args else ""
        return f"{type(self).__name__}({_repr(self.pt_optim_constructor)}, {self.pt_optim_args!r}{clip_args})"

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """One step for ``params``; parameters not seen before are added to the optimizer."""
        # SVI passes a set, whose order varies from run to run, and rounding of sums depends on the order.
        params = sorted(params, key=_name)
        for param in params:
            if param not in self.optim_objs:
                self._add(param)
        self._clip_grad(params, **self.pt_clip_args)  # type: ignore[arg-type]
        if self.optimizer is None:
            return
        unused: list[Any] = []
        if len(params) < len(self.optim_objs):
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
        # An optimizer for this parameter alone fills in the default arguments and loads a state as PyTorch does.
        single = self._get_optim(param)
        arguments = _options(single.param_groups[0])
        state = self._state_waiting_to_be_consumed.get(_name(param))
        if state is not None:
            single.load_state_dict(state)
        (new,) = single.param_groups
        if self.optimizer is None:
            self.optimizer = single
            self._group_arguments = [arguments]
        elif (group := self._group_of(new, arguments, has_state=state is not None)) is not None:
            group["params"].append(param)
        elif _is_scheduled(self.optimizer):
            raise ValueError(
                "Expected parameters that appear under a scheduler of PyTorch to have the arguments of earlier ones, "
                f"got '{_name(param)}' with {self._get_optim_args(param)!r}, of which the scheduler has no group. Run "
                "the model once with all its parameters before you build the scheduler"
            )
        else:
            self.optimizer.add_param_group(new)
            self._group_arguments.append(arguments)
        self.optim_objs[param] = None
        self._state_waiting_to_be_consumed.pop(_name(param), None)
        if param in single.state:
            self.optimizer.state[param] = single.state[param]

    def _group_of(self, new: dict[str, Any], arguments: dict[str, Any], has_state: bool) -> dict[str, Any] | None:
        """The group that a new parameter joins, if there is one."""
        assert self.optimizer is not None
        groups = self.optimizer.param_groups
        for group in groups:
            if _options(group) == _options(new):
                return group
        # A saved state has options of its own, which only a scheduler overrules.
        if has_state and not _is_scheduled(self.optimizer):
            return None
        return next((g for g, own in zip(groups, self._group_arguments, strict=True) if own == arguments), None)

    def _get_optim(self, param: Any) -> torch.optim.Optimizer:
        return self._build(param, self._get_optim_args(param))

    def _get_optim_args(self, param: Any) -> dict[str, Any]:
        if not callable(self.pt_optim_args):
            return self.pt_optim_args
        name = _name(param)
        # Pyro's two forms: the name as in named_parameters(), or the names of the module and of the parameter.
        names = [normalize_param_name(name)]
        if self.pt_optim_args_argc == 2:
            names = [module_from_param_with_module_name(name), user_param_name(name)]
        arguments = self.pt_optim_args(*names)
        if not isinstance(arguments, Mapping):
            raise TypeError(f"Expected optim_args to return a dictionary of arguments for '{name}', got {arguments!r}")
        return dict(arguments)

    def _build(self, param: Any, arguments: dict[str, Any]) -> torch.optim.Optimizer:
        constructor: Any = self.pt_optim_constructor
        try:
            if "lr" in arguments:
                _checks.non_negative("lr", arguments["lr"])
            optimizer = constructor([param], **arguments)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"Expected optim_args to be arguments of {_repr(constructor)}, got {arguments!r}: {error}"
            ) from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Expected optim_constructor to build an optimizer of PyTorch, got a {type(optimizer).__name__}"
            )
        return optimizer

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Take the state that :meth:`get_state` gave; a parameter gets its part when it appears."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Expected state_dict to be a dictionary from names to states, got {state_dict!r}")
        for name, state in state_dict.items():
            if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
                raise ValueError(f"Expected state_dict['{name}'] to be the state of an optimizer, got {state!r}")
        super().set_state(dict(state_dict))

    def get_state(self) -> dict[str, Any]:
        """The state of each parameter by name, in the form of ``PyroOptim``, which can load it too."""
        state = dict(self._state_waiting_to_be_consumed)
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            for param in group["params"]:
                own = self.optimizer.state.get(param)  # type: ignore[union-attr]
                state[_name(param)] = {
                    "state": {} if own is None else {0: own},
                    "param_groups": [_options(group) | {"params": [0]}],
                }
        return state


class PartialOptim:
    """An optimizer that is shown a part of the parameters in each step; the rest, with their states, stay.

    Args:
        whole: a Pyro optimizer.
        choose: a function from the parameters of a step to those that move.
    """

    def __init__(self, whole: Any, choose: Callable[[set[Tensor]], set[Tensor]]) -> None:
        self.whole = whole
        self._choose = choose

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """One step for a part of ``params``."""
        chosen = self._choose(set(params))
        if chosen:
            self.whole(chosen, *args, **kwargs)


def _check_constructor(value: Any) -> None:
    of_pyro = isinstance(value, PyroOptim) or (
        not isinstance(value, type) and str(getattr(value, "__module__", "")).startswith("pyro.optim")
    )
    if of_pyro or not callable(value) or (isinstance(value, type) and not issubclass(value, torch.optim.Optimizer)):
        hint = "; pyro.optim has wrappers of these classes" if of_pyro else ""
        raise TypeError(
            f"Expected optim_constructor to be a class of torch.optim, such as torch.optim.Adam, got {value!r}{hint}"
        )
    if isinstance(value, type) and issubclass(value, torch.optim.LBFGS):
        raise TypeError(
            "Expected optim_constructor to treat each parameter on its own, got LBFGS, which needs the loss itself"
        )


def _limit(name: str, value: float) -> float:
    # An infinite limit is a usual way to say that there is none.
    return value if isinstance(value, float) and value == math.inf else _checks.positive(name, value)


def _is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a scheduler of PyTorch has been built for the optimizer: it wraps step()."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched") or hasattr(optimizer.step, "_with_counter")


def _repr(constructor: Any) -> str:
    return str(getattr(constructor, "__name__", constructor))


def _name(param: Tensor) -> str:
    return str(pyro.get_param_store().param_name(param))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
