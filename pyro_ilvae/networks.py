"""What the package's modules are made of: a PyroModule that knows its names in the param store, and a perceptron."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import islice, pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, pyro_method
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae import _checks

__all__ = ["mlp"]

# The function is private; without it the answer is no, and torch.func needs one call before the transform.
_current_level: Callable[[], int | None] = getattr(torch._C._functorch, "maybe_current_level", lambda: None)

T = TypeVar("T")
M = TypeVar("M", bound="Module")
P = ParamSpec("P")

# Type checkers cannot follow PyroModule[...], which makes classes at run time.
_PyroLinear: type[nn.Linear] = PyroModule[nn.Linear]  # type: ignore[assignment]
_Softplus: type[nn.Softplus] = PyroModule[nn.Softplus]  # type: ignore[assignment]
_Sequential: type[nn.Sequential] = PyroModule[nn.Sequential]  # type: ignore[assignment]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; the batch dimensions of a weight drawn from a prior broadcast with the batch dimensions of x."""
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        # PyTorch's vectorized forward derivatives of products with a single vector have the wrong shape.
        return F.linear(x, weight, bias) if x.dim() > 1 else F.linear(x.unsqueeze(0), weight, bias).squeeze(0)
    product = (x.unsqueeze(-2) @ weight.mT).squeeze(-2)
    return product if bias is None else product + bias


class Module(PyroModule):
    """A PyroModule that warns if SVI would train the parameters of another module in place of its own.

    A PyroModule that is no part of another one stores its parameters without a prefix, for example as
    "network.0.weight". A second one with the same names is then called with its own parameters, which nobody trains.
    """

    _kind: str  # "decoder", "encoder", "likelihood" or "history", of classes that are one of these parts of a model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The value of ``forward``."""
        self._before_call()
        return super().__call__(*args, **kwargs)

    def _before_call(self) -> None:
        # Parts have the prefix of the whole, which was called before them.
        if not self._pyro_context.active and not torch.compiler.is_compiling():
            if _svi_collects_parameters():
                warn_of_another(
                    self, "module", "Make the modules attributes of one PyroModule, or name each by pyro.module"
                )
            if _is_transformed():
                _store_parameters(self)


def public_method(method: Callable[Concatenate[M, P], T]) -> Callable[Concatenate[M, P], T]:
    """Pyro's ``pyro_method`` for a :class:`Module`, which warns and can be transformed as a call of the module."""
    inner = pyro_method(method)

    def outer(self: M, *args: P.args, **kwargs: P.kwargs) -> T:
        self._before_call()
        return inner(self, *args, **kwargs)

    return wraps(method)(outer)  # type: ignore[return-value]


def _is_transformed() -> bool:
    """Whether this runs inside of a transform of torch.func."""
    return _current_level() is not None


def _store_parameters(module: "Module") -> None:
    """Enter the parameters that Pyro's param store lacks, as Pyro does when it first reads them.

    Pyro marks what it enters as requiring gradients, which PyTorch refuses inside of a transform. Parameters require
    them already.
    """
    if pyro.settings.get("module_local_params"):
        return
    store = pyro.get_param_store()
    prefix = f"{module._pyro_name}." if module._pyro_name else ""
    for name, parameter in _named_parameters(module, prefix):
        if name not in store._params and not name.endswith("_unconstrained"):
            store._constraints[name] = constraints.real
            store._params[name] = parameter
            store._param_to_name[parameter] = name


def _svi_collects_parameters() -> bool:
    """Whether this runs in a step of SVI, which trains the parameters that the param store has for the names it met."""
    return any(isinstance(handler, TraceMessenger) and handler.param_only for handler in _PYRO_STACK)


def warn_of_another(module: PyroModule, kind: str, remedy: str) -> None:
    """Warn if the param store holds parameters of another module under the names of this module's parameters."""
    if not torch.is_grad_enabled() or pyro.settings.get("module_local_params"):
        return
    store = pyro.get_param_store()
    for name, parameter in _some_parameters(module):
        stored = store._params.get(name)
        # A module that has a name by pyro.module is trained under that name.
        if stored is not None and stored is not parameter and parameter not in store._param_to_name:
            warnings.warn(
                f"Pyro's param store holds another {kind}'s '{name}': SVI would train the parameters of that {kind} "
                f"instead of this {type(module).__name__}'s. {remedy}.",
                stacklevel=3,
            )
            return


def _some_parameters(module: PyroModule) -> Iterator[tuple[str, nn.Parameter]]:
    """The module's own parameters, and the first parameter of each part, which stands for the whole part."""
    prefix = f"{module._pyro_name}." if module._pyro_name else ""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{prefix}{name}", parameter
    for name, part in module._modules.items():
        if part is not None:
            yield from islice(_named_parameters(part, _prefix(part, f"{prefix}{name}")), 1)


def _named_parameters(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters with their names in Pyro's param store.

    By hand, because the module's own iterator over names takes several times as long.
    """
    for name, parameter in module._parameters.items():
        if isinstance(parameter, nn.Parameter):  # functional_call puts plain tensors in their place
            yield f"{prefix}{name}", parameter
    for name, part in module._modules.items():
        if part is not None:
            yield from _named_parameters(part, _prefix(part, f"{prefix}{name}"))


def _prefix(part: nn.Module, name: str) -> str:
    """What stands before the names of a part's parameters: $$$ marks the first part that is no PyroModule."""
    return f"{name}." if isinstance(part, PyroModule) or "$$$" in name else f"{name}$$$"


class _MLP(_Sequential, Module):  # type: ignore[valid-type, misc]
    """A sequence of layers that knows its names in the param store."""


class Linear(_PyroLinear):  # type: ignore[valid-type, misc]
    """PyTorch's layer, which also takes draws of a weight or bias from a prior, with batch dimensions on the left."""

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, for ``x`` of shape (..., in_features)."""
        return linear(x, self.weight, self.bias)


def unused(module: T) -> T:
    """Return the module, ready to become a part of another module even if it was called on its own before.

    Pyro refuses a part that was called on its own, because its parameters would have two names in the global param
    store. The first name does no harm: nothing reads it once the module is a part of another one.
    """
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if isinstance(part, PyroModule) and not part._pyro_context.active:
            part._pyro_context.used = False
    return module


def mlp(in_features: int, hidden_features: Sequence[int], out_features: int) -> nn.Sequential:
    """A multilayer perceptron with softplus activations, made of PyroModules so that any weight can have a prior.

    Args:
        in_features: the width of the input.
        hidden_features: the widths of the hidden layers; empty for an affine map.
        out_features: the width of the output.

    Returns:
        A ``PyroModule[nn.Sequential]`` from (..., in_features) to (..., out_features).

    Example:
        >>> import torch
        >>> mlp(2, (16,), 3)(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """
    _checks.positive_int("in_features", in_features)
    _checks.positive_int("out_features", out_features)
    # An affine map has no hidden layer.
    affine = isinstance(hidden_features, tuple | list) and not hidden_features
    sizes = [in_features, *(() if affine else _checks.widths("hidden_features", hidden_features))]
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [Linear(wide, narrow), _Softplus()]
    layers.append(Linear(sizes[-1], out_features))
    return _MLP(*layers)  # type: ignore[arg-type]
