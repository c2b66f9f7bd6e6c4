"""A loss as a PyTorch module, with the parameters of the modules that the model and the guide belong to."""

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from pyro import poutine
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

__all__ = ["LossModule", "unconstrained"]


class LossModule(ELBOModule):
    """The loss of a model and a guide as a module; ``AnnealedELBO.__call__`` says what it holds and computes."""

    def __init__(self, model: Any, guide: Any, elbo: Any) -> None:
        super().__init__(model, guide, elbo)
        # A model or guide that is a module itself is registered under Pyro's names "model" and "guide".
        found: dict[str, nn.Module] = {}
        for role, function in (("model", model), ("guide", guide)):
            if not isinstance(function, nn.Module):
                for i, module in enumerate(_modules_of(function)):
                    found[f"{role}_module" if i == 0 else f"{role}_module_{i}"] = module
        self._found_names = []
        for name, module in found.items():
            others = [*self.children(), *(other for other in found.values() if other is not module)]
            if not any(_holds(other, module) for other in others):
                self._found_names.append(name)
                self.add_module(name, module)
        self._compared_parameters = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The negative objective in nats: annealed in training mode, at beta = 1 in evaluation mode."""
        if not self.training:
            own: Any = self.elbo
            base = getattr(own.elbo, "elbo", own.elbo)  # of an objective around another one
            return base.differentiable_loss(self.model, self.guide, *args, **kwargs)
        if self._compared_parameters:
            return super().forward(*args, **kwargs)
        with poutine.trace(param_only=True) as capture:
            loss = super().forward(*args, **kwargs)
        self._compare_parameters(capture.trace.nodes)
        return loss

    def _compare_parameters(self, nodes: dict[str, Any]) -> None:
        """Warn of parameters that an optimizer of ``parameters()`` would leave alone."""
        self._compared_parameters = True
        own = set(map(id, self.parameters()))
        foreign = [name for name, node in nodes.items() if id(unconstrained(node["value"])) not in own]
        if own and foreign:
            warnings.warn(
                f"The loss depends on {foreign}, which are not among its parameters(): an optimizer of parameters() "
                "does not train them. They belong to a function, or to another module that Pyro's param store holds "
                "under the same names. Write model and guide as modules or as methods of modules, and call "
                "pyro.clear_param_store() before you fit a new model.",
                stacklevel=5,
            )

    # A module may keep its own loss, as Lightning users write: ``self.loss = elbo(self.model, self.guide)``. Then the
    # loss must not hold the module, because PyTorch's traversals do not end in a cycle. The methods below are where
    # these traversals enter.

    def _leave_modules_that_hold_the_loss(self) -> None:
        for name in list(self._found_names):
            module = self._modules[name]
            if module is not None and _holds(module, self):
                del self._modules[name]
                self._found_names.remove(name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        self._leave_modules_that_hold_the_loss()
        return super().named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        self._leave_modules_that_hold_the_loss()
        return super().named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._leave_modules_that_hold_the_loss()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._leave_modules_that_hold_the_loss()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        self._leave_modules_that_hold_the_loss()
        return repr(self.elbo)


def unconstrained(value: Any) -> Any:
    """The leaf that an optimizer moves, of a parameter's value as Pyro's traces record it."""
    # With module-local parameters, Pyro records the nn.Parameter, which has no unconstrained().
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _modules_of(function: Any) -> list[nn.Module]:
    """The modules that a function is called with or belongs to, without what it refers to by name."""
    if isinstance(function, nn.Module):
        return [function]
    if isinstance(function, partial):
        # Pyro's handlers wrap a function as partial(..., handler, function).
        inside = [function.func, *function.args, *function.keywords.values()]
    else:
        inside = [getattr(function, name, None) for name in ("__self__", "__wrapped__", "fn")]
    found: dict[int, nn.Module] = {}
    for part in inside:
        if isinstance(part, nn.Module) or callable(part):
            found.update((id(module), module) for module in _modules_of(part))
    return list(found.values())


def _holds(module: nn.Module, wanted: nn.Module) -> bool:
    """Whether ``wanted`` is the module or one of those inside it."""
    waiting, seen = [module], set()
    while waiting:
        current = waiting.pop()
        if current is wanted:
            return True
        if id(current) not in seen:
            seen.add(id(current))
            waiting.extend(child for child in current._modules.values() if child is not None)
    return False
