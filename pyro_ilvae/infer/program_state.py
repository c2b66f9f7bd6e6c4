"""What a model and a guide read besides their arguments: tensors, and settings that a graph takes as they are."""

import functools
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Distribution, Transform, TransformedDistribution

from pyro_ilvae.infer.generators import GENERATORS

__all__ = ["ProgramState"]

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
# Bookkeeping of nn.Module and PyroModule that says nothing about what they compute.
_SKIPPED = {"_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_pyro_context", "_pyro_name"}
# Where a PyroModule keeps constraints and priors.
_OF_PYRO = ("_pyro_params", "_pyro_samples")
_SKIPPED |= set(_OF_PYRO)
_COLLECTIONS = (list, tuple, dict, set, frozenset, deque, np.ndarray)
_CLOSED = {"torch", "pyro", "numpy", "builtins", "collections"}
_LIBRARIES = _CLOSED | sys.stdlib_module_names  # whose functions and classes stay as they are
# Models of Pyro that hold data as plain attributes.
_OPEN_LIBRARY = "pyro.contrib."
# Objects of this package are watched like a user's own objects; functions of this package are not watched.
_OWN = __name__.partition(".")[0]
_LARGEST_COLLECTION = 1000
_LARGEST_ARRAY = 2**16  # in bytes
_DEEPEST = 8
# What is read from an attribute or an item that is no longer there.
_GONE = object()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Cell:
    """A variable of an enclosing function, which is its only item."""

    def __init__(self, cell: Any) -> None:
        self._cell = cell

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:  # not assigned yet
            return None

    def __setitem__(self, key: Any, value: Any) -> None:
        self._cell.cell_contents = value


class _Slots:
    """The attributes of an object that has no dictionary of them."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __getitem__(self, key: str) -> Any:
        return getattr(self._owner, key)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self._owner, key, value)


class _Places(NamedTuple):
    """Items of one holder, such as attributes of an object, that are read at once."""

    holder: Any
    names: list[str]
    items: Callable[[Any], Any]
    by_value: bool
    keys: list[Any]  # none for what is no item, such as a length

    def values(self) -> tuple[Any, ...]:
        """The items as they are now."""
        try:
            found = self.items(self.holder)
        except (KeyError, IndexError, AttributeError):
            return (_GONE,)
        several = len(self.names) > 1 or (not self.keys and type(found) is tuple)
        return found if several else (found,)

    def read(self) -> tuple[Any, ...]:
        """What says whether an item is another one than before: its type and value if it is simple, else its id."""
        values = self.values()
        return (*map(type, values), *values) if self.by_value and values != (_GONE,) else tuple(map(id, values))


class ProgramState:
    """The tensors and settings that functions and what they refer to hold, found once and read at each step.

    Args:
        roots: functions, modules and objects, such as a model, a guide and an objective.
    """

    def __init__(self, *roots: Any) -> None:
        self._settings: list[_Places] = []
        self._last_values: list[Any] = []
        self._last_settings: tuple[Any, ...] = ()
        self._tensors: list[tuple[Any, Any]] = []
        self.generators: list[Any] = []
        self._transforms: list[Transform] = []
        self._seen: dict[int, Any] = {}  # holds the objects, so that no other object takes the place of one
        self._noted: set[tuple[int, Any]] = set()
        # Nearest first, because an object that is reached in two ways counts from the shorter one.
        self._waiting: list[deque[tuple[Any, str]]] = [deque() for _ in range(_DEEPEST + 1)]
        for root in roots:
            self._visit(root, getattr(root, "__qualname__", type(root).__name__), 0)
        while any(self._waiting):
            depth = next(i for i, waiting in enumerate(self._waiting) if waiting)
            self._visit_now(*self._waiting[depth].popleft(), depth)

    def tensors(self) -> list[Tensor]:
        """The tensors that are no parameters, as they are now."""
        found = (_item(holder, key) for holder, key in self._tensors)
        return [value for value in found if isinstance(value, Tensor)]

    def settings(self) -> tuple[Any, ...]:
        """All settings, to be compared between steps."""
        values: list[Any] = []
        for places in self._settings:
            values += places.values()
        # In most steps they are the very same objects.
        if len(values) != len(self._last_values) or not all(map(operator.is_, values, self._last_values)):
            self._last_values = values
            self._last_settings = tuple([places.read() for places in self._settings])
        return self._last_settings

    def clear_caches(self) -> None:
        """Let transforms forget their last result, which belongs to an earlier run with the same data."""
        for transform in self._transforms:
            if getattr(transform, "_cached_x_y", None) is not None:
                transform._cached_x_y = (None, None)

    def held(self, *, tensors: bool = True) -> list[tuple[Any, Any, Any]]:
        """All items with their holders and keys, for :meth:`put_back`; without ``tensors``, the settings alone."""
        places = [(one.holder, key) for one in self._settings for key in one.keys]
        return [(holder, key, _item(holder, key)) for holder, key in (self._tensors if tensors else []) + places]

    def put_back(self, held: list[tuple[Any, Any, Any]]) -> bool:
        """Give all items the values that they had, and return whether a tensor was another one."""
        replaced = False
        for holder, key, value in held:
            if value is not _GONE and _item(holder, key) is not value:
                replaced = replaced or isinstance(value, Tensor)
                holder[key] = value
        return replaced

    def changed(self, before: tuple[Any, ...]) -> list[str]:
        """The names of the settings that have changed since an earlier result of :meth:`settings`."""
        changed = []
        for places, old, new in zip(self._settings, before, self.settings(), strict=False):
            differs = [a is not b and a != b for a, b in zip(old, new, strict=False)]
            size = len(places.names)
            changed += [name for i, name in enumerate(places.names) if any(differs[i::size])]
        return changed

    def _visit(self, value: Any, name: str, depth: int) -> None:
        if depth <= _DEEPEST and id(value) not in self._seen:
            self._waiting[depth].append((value, name))

    def _visit_now(self, value: Any, name: str, depth: int) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Transform):
            self._transforms.append(value)
        if isinstance(value, ComposeTransform | TransformedDistribution):
            for part in value.parts if isinstance(value, ComposeTransform) else value.transforms:
                self._visit(part, name, depth)
        if isinstance(value, GENERATORS):
            self.generators.append(value)
        elif isinstance(value, nn.Module):
            self._visit_module(value, name, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._visit(part, name, depth + 1)
        elif isinstance(value, MethodType):
            self._visit(value.__self__, type(value.__self__).__name__, depth)
            self._visit(value.__func__, name, depth)
        elif isinstance(value, FunctionType):
            self._visit_function(value, depth)
        elif isinstance(value, tuple) and len(value) <= _LARGEST_COLLECTION:
            self._tensors += [(value, i) for i, part in enumerate(value) if _is_input(part)]
            for i, part in enumerate(value):  # which stays
                if not isinstance(part, (*_SIMPLE, Tensor)):
                    self._visit(part, f"{name}[{i}]", depth + 1)
        elif isinstance(value, list) and len(value) <= _LARGEST_COLLECTION:
            self._watch(value, f"the length of {name}", len)
            self._note(value, {i: f"{name}[{i}]" for i in range(len(value))}, depth)
        elif isinstance(value, dict) and len(value) <= _LARGEST_COLLECTION:
            self._watch(value, f"the length of {name}", len)
            self._note(value, {key: f"{name}[{key!r}]" for key in value}, depth)
        elif isinstance(value, set | frozenset | deque) and len(value) <= _LARGEST_COLLECTION:
            self._watch(value, name, _ids)
        elif isinstance(value, np.ndarray) and value.nbytes <= _LARGEST_ARRAY:
            self._watch(value, name, np.ndarray.tobytes)
        elif isinstance(value, type):
            self._visit_class(value, depth)
        elif not isinstance(value, (*_SIMPLE, ModuleType, BuiltinFunctionType, Tensor, *_COLLECTIONS)):
            self._visit_attributes(value, name, depth)
        if isinstance(value, _COLLECTIONS) and hasattr(value, "__dict__"):
            self._visit_attributes(value, name, depth)

    def _visit_module(self, module: nn.Module, name: str, depth: int) -> None:
        self._tensors += [(module._buffers, key) for key in module._buffers]
        self._watch(module, f"the parts of {name}", _parts)
        for key in _OF_PYRO:
            part = module.__dict__.get(key)
            if part:
                self._note(part, {item: f"{name}.{key}[{item!r}]" for item in part}, depth)
        for holder in (module._parameters, module._modules):
            self._add(holder, {key: f"{name}.{key}" for key in holder}, by_value=False)
        for key, part in module._modules.items():
            if part is not None:
                self._visit(part, f"{name}.{key}", 0)  # modules may be nested as deep as they like
        self._visit_attributes(module, name, depth)

    def _visit_attributes(self, value: Any, name: str, depth: int) -> None:
        attributes, kind = getattr(value, "__dict__", {}), type(value)
        of_library = _is_of(_CLOSED, kind) and not str(kind.__module__).startswith(_OPEN_LIBRARY)
        skipped = _SKIPPED | getattr(kind, "_tensors_when_recorded", set())
        # What a handler does, such as the data that it conditions on.
        kinds: tuple[Any, ...] = (*_SIMPLE, Tensor, dict) if isinstance(value, Messenger) else _SIMPLE
        if isinstance(value, Distribution):
            kinds = (*_SIMPLE, Tensor, Distribution)
        names = {}
        for key, part in attributes.items():
            hook = isinstance(value, nn.Module) and key.startswith("_") and "hook" in key
            # What else a library keeps is its own affair.
            own = not of_library or (isinstance(part, kinds) and not key.startswith("_"))
            if key not in skipped and not hook and own and not key.startswith("_cached_"):
                names[key] = f"{name}.{key}"
        self._note(attributes, names, depth)
        if not _is_of(_CLOSED | {_OWN}, kind):
            self._watch(attributes, f"the attributes of {name}", len)
        slots: dict[Any, str] = {}
        for base in kind.__mro__:
            self._visit(base, base.__qualname__, depth + 1)
            if not _is_of(_LIBRARIES, base):
                members = (key for key, part in vars(base).items() if isinstance(part, MemberDescriptorType))
                slots |= {key: f"{name}.{key}" for key in members if hasattr(value, key)}
        self._note(_Slots(value), slots, depth)

    def _visit_class(self, kind: type, depth: int) -> None:
        """Watch the attributes of a class, and what its methods use."""
        if _is_of(_LIBRARIES | {_OWN}, kind):
            return
        names = {key: f"{kind.__qualname__}.{key}" for key in vars(kind) if not key.startswith(("__", "_abc_"))}
        self._note(vars(kind), names, depth)
        for key, part in vars(kind).items():
            function = getattr(part, "fget", None) or getattr(part, "func", None) or getattr(part, "__func__", part)
            if isinstance(function, FunctionType):
                self._visit(function, f"{kind.__qualname__}.{key}", depth + 1)

    def _visit_function(self, function: FunctionType, depth: int) -> None:
        self._visit(getattr(function, "__wrapped__", None), function.__qualname__, depth + 1)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._note(_Cell(cell), {0: f"{name} of {function.__qualname__}"}, depth)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(default, function.__qualname__, depth + 1)
        if not _is_of(_LIBRARIES | {_OWN}, function):
            self._visit_globals(function.__globals__, set(_names_in(function.__code__)), "the global ", depth)

    def _visit_globals(self, holder: dict[str, Any], names: set[str], prefix: str, depth: int) -> None:
        """Watch those variables of a module that code may read, also by way of modules that it names."""
        used = sorted(names & holder.keys())
        self._note(holder, {name: f"{prefix}{name}" for name in used}, depth)
        for module in (holder[name] for name in used):
            if isinstance(module, ModuleType) and module.__name__.partition(".")[0] not in _LIBRARIES | {_OWN}:
                key = (id(module), frozenset(names))
                if key not in self._noted:  # modules may name each other
                    self._noted.add(key)
                    self._visit_globals(vars(module), names, f"{module.__name__}.", depth)

    def _note(self, holder: Any, names: dict[Any, str], depth: int) -> None:
        """Watch items of a holder, and what they hold."""
        if not isinstance(holder, _Cell | _Slots):  # which are seen once only
            names = {key: name for key, name in names.items() if (id(holder), key) not in self._noted}
            self._noted.update((id(holder), key) for key in names)
        values = {key: holder[key] for key in names}
        tensors = {key for key, part in values.items() if _is_input(part)}
        simple = {key for key, part in values.items() if isinstance(part, _SIMPLE)}
        self._tensors += [(holder, key) for key in tensors]
        self._add(holder, {key: names[key] for key in names if key in simple}, by_value=True)
        self._add(holder, {key: names[key] for key in names if key not in simple | tensors}, by_value=False)
        for key, part in values.items():
            if key not in simple | tensors:
                self._visit(part, names[key], depth + 1)

    def _add(self, holder: Any, names: dict[Any, str], *, by_value: bool) -> None:
        if names:
            self._settings.append(_Places(holder, list(names.values()), itemgetter(*names), by_value, list(names)))

    def _watch(self, holder: Any, name: str, read: Callable[[Any], Any]) -> None:
        """Watch something about a holder that is no item."""
        self._settings.append(_Places(holder, [name], read, True, []))


def _item(holder: Any, key: Any) -> Any:
    try:
        return holder[key]
    except (KeyError, IndexError, AttributeError):
        return _GONE


def _is_input(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _ids(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(map(id, values))


def _parts(module: nn.Module) -> tuple[Any, ...]:
    """What a module has by name, which of its parameters are trained, and its hooks."""
    held = module.__dict__  # read in each step, so without the detour by way of nn.Module
    trained = [parameter is not None and parameter.requires_grad for parameter in held["_parameters"].values()]
    hooks = [tuple(held[name]) if held[name] else () for name in _HOOKS]
    of_pyro = [tuple(held[name]) if held.get(name) else () for name in _OF_PYRO]
    # The parts are watched by their names, so their number tells of new ones.
    return len(held["_modules"]), len(held["_parameters"]), len(held["_buffers"]), *trained, *hooks, *of_pyro


def _is_of(packages: set[str], value: Any) -> bool:
    """Whether a class or function is of one of the packages."""
    return str(value.__module__).partition(".")[0] in packages


def _names_in(code: Any) -> Iterator[str]:
    """The names that a function looks up, in the functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names_in(constant)
