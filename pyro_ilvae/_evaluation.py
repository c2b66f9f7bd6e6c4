"""Evaluation mode of all modules that a function runs, however the function is written."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

_DEPTH = 5  # of references from a function to a module: a partial of a handler of a closure, and so on
_MOST_PARTS = 200  # of an object that are looked at; a longer list holds data rather than modules


@contextmanager
def evaluation_mode(*functions: Any) -> Iterator[None]:
    """Put every module in evaluation mode before it runs, and restore all modes afterwards.

    Results are then free of dropout, and leave the running statistics of batch normalization as they were. The modules
    are those that the functions are, belong to or refer to, and all others as soon as they are called. An object that
    is no function, such as a distribution, stands for the modules in it.
    """
    modes: dict[int, tuple[nn.Module, bool]] = {}

    def evaluate(module: nn.Module) -> None:
        parts = list(module.modules())
        for part in parts:  # before any is changed, because a compiled module has the mode of the module in it
            modes.setdefault(id(part), (part, part.training))
        for part in parts:
            if part.training:  # A PyroModule takes longer to set an attribute than to read it.
                part.training = False

    def before_call(module: nn.Module, _: Any) -> None:
        if module.training:
            evaluate(module)

    with ExitStack() as stack:
        stack.callback(_restore, modes)
        for module in modules_of(functions):
            evaluate(module)
        stack.callback(register_module_forward_pre_hook(before_call).remove)
        _run_eagerly(stack, modes)
        yield


def _restore(modes: dict[int, tuple[nn.Module, bool]]) -> None:
    for module, training in reversed(modes.values()):
        if module.training != training:
            module.training = training


def _run_eagerly(stack: ExitStack, modes: Mapping[int, tuple[nn.Module, bool]]) -> None:
    """Run compiled functions as they are written, because a hook would have them compiled again each time."""
    dynamo: Any = sys.modules.get("torch._dynamo")  # Nothing is compiled where it has not been loaded.
    if dynamo is None or not hasattr(torch.compiler, "set_stance"):
        return
    stack.enter_context(torch.compiler.set_stance("force_eager"))
    if any(isinstance(module, dynamo.OptimizedModule) for module, _ in modes.values()):
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")


def modules_of(functions: tuple[Any, ...]) -> Iterator[nn.Module]:
    """The modules that functions are, belong to or refer to, directly or by way of other functions and containers."""
    seen: dict[int, Any] = {}
    found: list[Any] = list(functions)
    for _ in range(_DEPTH):
        new = [item for item in found if id(item) not in seen]
        # The items are kept, so that no other object takes over an id.
        seen.update((id(item), item) for item in new)
        yield from (item for item in new if isinstance(item, nn.Module))
        found = [part for item in new for part in _parts(item) if not isinstance(part, _WITHOUT_PARTS)]


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_WITHOUT_PARTS = (Tensor, np.ndarray, np.generic, str, bytes, int, float, complex, type, ModuleType, type(None))


def _parts(item: Any) -> list[Any]:
    if isinstance(item, FunctionType):
        return [*_referred(item), *vars(item).values()]
    if isinstance(item, MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, partial):
        # Handlers of Pyro are partials with an attribute of this name.
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, Mapping):
        return list(item.values()) if len(item) <= _MOST_PARTS else []
    if isinstance(item, list | tuple | set):
        return list(item) if len(item) <= _MOST_PARTS else []
    own = getattr(item, "__dict__", {})
    if isinstance(item, nn.Module):  # whose modules() are found by that
        return [value for name, value in own.items() if name not in _OF_EVERY_MODULE]
    return list(own.values()) if len(own) <= _MOST_PARTS else []


def _referred(function: FunctionType) -> Iterator[Any]:
    """What the code of a function refers to: its closure, its defaults and its global names."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # of a name without a value as yet
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    names = set(_names(function.__code__))
    for value in [function.__globals__[name] for name in names if name in function.__globals__]:
        if isinstance(value, ModuleType):
            yield from (vars(value)[name] for name in names if isinstance(vars(value).get(name), nn.Module))
        # The functions of other files are libraries.
        elif not isinstance(value, FunctionType) or value.__globals__ is function.__globals__:
            yield value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
