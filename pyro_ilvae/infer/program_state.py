"""What a model and a guide read besides their arguments: tensors, and settings that a graph takes as they are."""

import functools
from collections.abc import Callable, Iterator
from operator import itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["ProgramState"]

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
# Bookkeeping of nn.Module and PyroModule that says nothing about what they compute.
_SKIPPED = {"_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_pyro_context", "_pyro_name"}
_LIBRARIES = {"torch", "pyro", "numpy", "builtins", "collections"}
# Objects of this package are watched like those of a user, its functions are not.
_OWN = __name__.partition(".")[0]
_LARGEST_COLLECTION = 100
_DEEPEST = 4


class _Cell:
    """A variable of an enclosing function, which is its only item."""

    def __init__(self, cell: Any) -> None:
        self._cell = cell

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:  # not assigned yet
            return None


class _Places(NamedTuple):
    """Items of one holder, such as attributes of an object, that are read at once."""

    holder: Any
    names: list[str]
    items: Callable[[Any], Any]
    by_value: bool

    def read(self) -> tuple[Any, ...]:
        """What says whether an item is another one than before: its type and value if it is simple, else its id."""
        values = self.items(self.holder) if len(self.names) > 1 else (self.items(self.holder),)
        return (*map(type, values), *values) if self.by_value else tuple(map(id, values))


class ProgramState:
    """The tensors and settings that functions and what they refer to hold, found once and read at each step.

    Args:
        roots: functions, modules and objects, such as a model, a guide and an objective.
    """

    def __init__(self, *roots: Any) -> None:
        self._settings: list[_Places] = []
        self._tensors: list[tuple[Any, Any]] = []
        self._seen: dict[int, Any] = {}  # holds the objects, so that no other object takes the place of one
        for root in roots:
            self._visit(root, getattr(root, "__qualname__", type(root).__name__), 0)

    def tensors(self) -> list[Tensor]:
        """The tensors that are no parameters, as they are now."""
        found = (holder[key] for holder, key in self._tensors)
        return [value for value in found if isinstance(value, Tensor)]

    def settings(self) -> tuple[Any, ...]:
        """All settings, to be compared with those of another step."""
        try:
            return tuple([places.read() for places in self._settings])
        except (KeyError, IndexError):  # an attribute or an item is gone
            return (object(),)

    def changed(self, before: tuple[Any, ...]) -> list[str]:
        """The names of the settings that differ from those of an earlier step of the same state."""
        changed = []
        for places, old, new in zip(self._settings, before, self.settings(), strict=False):
            differs = [a is not b and a != b for a, b in zip(old, new, strict=False)]
            size = len(places.names)
            changed += [name for i, name in enumerate(places.names) if any(differs[i::size])]
        return changed

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
            self._note(value, {i: f"{name}[{i}]" for i in range(len(value))}, depth)
        elif isinstance(value, dict) and len(value) <= _LARGEST_COLLECTION:
            self._note(value, {key: f"{name}[{key!r}]" for key in value}, depth)
        elif hasattr(value, "__dict__") and not isinstance(value, type | ModuleType | BuiltinFunctionType | Tensor):
            self._visit_attributes(value, name, depth)

    def _visit_module(self, module: nn.Module, name: str, depth: int) -> None:
        self._tensors += [(module._buffers, key) for key in module._buffers]
        for holder in (module._parameters, module._modules):
            self._add(holder, {key: f"{name}.{key}" for key in holder}, by_value=False)
        for key, part in module._modules.items():
            if part is not None:
                self._visit(part, f"{name}.{key}", 0)  # modules may be nested as deep as they like
        self._visit_attributes(module, name, depth)

    def _visit_attributes(self, value: Any, name: str, depth: int) -> None:
        attributes, of_library = vars(value), _is_of(_LIBRARIES, type(value))
        skipped = _SKIPPED | getattr(type(value), "_tensors_when_recorded", set())
        names = {}
        for key, part in attributes.items():
            hook = isinstance(value, nn.Module) and key.startswith("_") and "hook" in key
            # What else a library keeps is its own affair.
            own = not of_library or (isinstance(part, _SIMPLE) and not key.startswith("_"))
            if key not in skipped and not hook and own:
                names[key] = f"{name}.{key}"
        self._note(attributes, names, depth)
        for kind in type(value).__mro__:
            if not _is_of(_LIBRARIES | {_OWN}, kind):
                for method in vars(kind).values():
                    if isinstance(method, FunctionType):
                        self._visit(method, method.__qualname__, depth + 1)

    def _visit_function(self, function: FunctionType, depth: int) -> None:
        self._visit(getattr(function, "__wrapped__", None), function.__qualname__, depth + 1)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._note(_Cell(cell), {0: f"{name} of {function.__qualname__}"}, depth)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(default, function.__qualname__, depth + 1)
        if not _is_of(_LIBRARIES | {_OWN}, function):
            used = [name for name in _names_in(function.__code__) if name in function.__globals__]
            self._note(function.__globals__, {name: f"the global {name}" for name in used}, depth)

    def _note(self, holder: Any, names: dict[Any, str], depth: int) -> None:
        """Watch items of a holder, and what they hold."""
        values = {key: holder[key] for key in names}
        tensors = {
            key for key, part in values.items() if isinstance(part, Tensor) and not isinstance(part, nn.Parameter)
        }
        simple = {key for key, part in values.items() if isinstance(part, _SIMPLE)}
        self._tensors += [(holder, key) for key in tensors]
        self._add(holder, {key: names[key] for key in names if key in simple}, by_value=True)
        self._add(holder, {key: names[key] for key in names if key not in simple | tensors}, by_value=False)
        for key, part in values.items():
            if key not in simple | tensors:
                self._visit(part, names[key], depth + 1)

    def _add(self, holder: Any, names: dict[Any, str], *, by_value: bool) -> None:
        if names:
            self._settings.append(_Places(holder, list(names.values()), itemgetter(*names), by_value))


def _is_of(packages: set[str], value: Any) -> bool:
    """Whether a class or function is of one of the packages."""
    return str(value.__module__).partition(".")[0] in packages


def _names_in(code: Any) -> Iterator[str]:
    """The names that a function looks up, in the functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names_in(constant)
