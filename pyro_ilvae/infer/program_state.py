"""What a model and a guide read besides their arguments: tensors, and settings that a graph takes as they are."""

import functools
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["ProgramState", "setting_of"]

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
# Bookkeeping of nn.Module that says nothing about what it computes.
_SKIPPED = {"_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_pyro_context", "_pyro_name"}
_LIBRARIES = {"torch", "pyro", "numpy", "builtins", "collections"}
_LARGEST_COLLECTION = 100
_DEEPEST = 4


class _Slot(NamedTuple):
    """A place that holds a value: a key of a mapping, such as the attributes of an object."""

    holder: Any
    key: Any
    name: str

    def value(self) -> Any:
        if isinstance(self.holder, _Cell):
            return self.holder.contents()
        return self.holder.get(self.key) if isinstance(self.holder, dict) else self.holder[self.key]


class _Cell:
    """A variable of an enclosing function."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def contents(self) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # not assigned yet
            return None


class ProgramState:
    """The tensors and settings that functions and what they refer to hold, found once and read at each step.

    Args:
        roots: functions, modules and objects, such as a model, a guide and an objective.
    """

    def __init__(self, *roots: Any) -> None:
        self._settings: list[_Slot] = []
        self._tensors: list[_Slot] = []
        self._seen: dict[int, Any] = {}  # holds the objects, so that no other object takes the place of one
        for root in roots:
            self._visit(root, getattr(root, "__qualname__", type(root).__name__), 0)

    @property
    def names(self) -> list[str]:
        """The names of all places."""
        return [slot.name for slot in (*self._settings, *self._tensors)]

    def tensors(self) -> list[Tensor]:
        """The tensors that are no parameters, as they are now."""
        return [value for slot in self._tensors if isinstance(value := slot.value(), Tensor)]

    def settings(self) -> tuple[Any, ...]:
        """All settings, to be compared with those of another step."""
        return tuple(setting_of(slot.value()) for slot in self._settings) + tuple(
            isinstance(slot.value(), Tensor) for slot in self._tensors
        )

    def changed(self, before: tuple[Any, ...]) -> list[str]:
        """The names of the settings that differ from those of an earlier step."""
        slots = [*self._settings, *self._tensors]
        if len(before) != len(slots):
            return []
        return [slot.name for slot, old, new in zip(slots, before, self.settings(), strict=True) if old != new]

    def _visit(self, value: Any, name: str, depth: int) -> None:
        if id(value) in self._seen or depth > _DEEPEST:
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Module):
            self._visit_module(value, name, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._visit(part, name, depth + 1)
        elif isinstance(value, MethodType):
            self._visit(value.__self__, type(value.__self__).__name__, depth)
            self._visit(value.__func__, name, depth)
        elif isinstance(value, FunctionType):
            self._visit_function(value, depth)
        elif isinstance(value, list | tuple) and len(value) <= _LARGEST_COLLECTION:
            for i, part in enumerate(value):
                self._note(_Slot(value, i, f"{name}[{i}]"), part, depth)
        elif isinstance(value, dict) and len(value) <= _LARGEST_COLLECTION:
            for key, part in list(value.items()):
                self._note(_Slot(value, key, f"{name}[{key!r}]"), part, depth)
        elif hasattr(value, "__dict__") and not isinstance(value, type | ModuleType | BuiltinFunctionType | Tensor):
            self._visit_attributes(value, name, depth)

    def _visit_module(self, module: nn.Module, name: str, depth: int) -> None:
        for key in list(module._buffers):
            self._tensors.append(_Slot(module._buffers, key, f"{name}.{key}"))
        for holder in (module._parameters, module._modules):
            for key, part in list(holder.items()):
                self._settings.append(_Slot(holder, key, f"{name}.{key}"))
                if isinstance(part, nn.Module):
                    self._visit(part, f"{name}.{key}", 0)  # the depth of modules is not limited
        self._visit_attributes(module, name, depth)

    def _visit_attributes(self, value: Any, name: str, depth: int) -> None:
        attributes = vars(value)
        varying = getattr(type(value), "_tensors_when_recorded", ())
        of_library = _is_of_library(type(value))
        for key, part in list(attributes.items()):
            if key in _SKIPPED or (isinstance(value, nn.Module) and key.startswith("_") and "hook" in key):
                continue
            slot = _Slot(attributes, key, f"{name}.{key}")
            if key in varying:
                self._settings.append(slot._replace(holder={key: type(part)}))
                continue
            if not of_library or isinstance(part, _SIMPLE):  # what else a library keeps is its own affair
                self._note(slot, part, depth)
        for kind in type(value).__mro__:
            if not _is_of_library(kind):
                for method in vars(kind).values():
                    if isinstance(method, FunctionType):
                        self._visit(method, method.__qualname__, depth + 1)

    def _visit_function(self, function: FunctionType, depth: int) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self._visit(wrapped, function.__qualname__, depth + 1)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            holder = _Cell(cell)
            self._note(_Slot(holder, None, f"{name} of {function.__qualname__}"), holder.contents(), depth)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(default, function.__qualname__, depth + 1)
        if not _is_of_library(function):
            for name in _names_in(function.__code__):
                if name in function.__globals__:
                    value = function.__globals__[name]
                    self._note(_Slot(function.__globals__, name, f"the global {name}"), value, depth)

    def _note(self, slot: _Slot, value: Any, depth: int) -> None:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self._tensors.append(slot)
            return
        self._settings.append(slot)
        if not isinstance(value, _SIMPLE):
            self._visit(value, slot.name, depth + 1)


def _is_of_library(value: Any) -> bool:
    """Whether a class or function is of a library."""
    return str(value.__module__).partition(".")[0] in _LIBRARIES


def _names_in(code: Any) -> Iterator[str]:
    """The names that a function looks up, in the functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names_in(constant)


def setting_of(value: Any) -> Any:
    """What says whether a value is another one than before: the value itself if it is simple, else which object."""
    return value if isinstance(value, _SIMPLE) else id(value)
