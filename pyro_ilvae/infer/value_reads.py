"""What Python reads from tensors while a graph is recorded: kept as guards, let through, or refused with the place."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode

__all__ = ["Guard", "NotRecordableError", "ValueReads", "is_of_user", "place_of"]

_PACKAGES = {module.__name__: str(Path(str(module.__file__)).parent) for module in (torch, pyro)}
_PACKAGES["pyro_ilvae"] = str(Path(__file__).parent.parent)
_NUMBERS = {Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, torch.is_nonzero}
_TRUTHS = {Tensor.__bool__, torch.is_nonzero}
_COMPARISONS = {torch.equal, Tensor.equal, torch.allclose, Tensor.allclose}
_ARRAYS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
# Pyro's reports of NaN and infinity, which the check of loss and gradients makes superfluous.
_REPORTS = {"warn_if_nan", "warn_if_inf"}
# Files of PyTorch that pass a call on.
_PASSING = ("overrides.py", "_tensor.py", "proxy_tensor.py", "_compile.py", "_stats.py", "eval_frame.py")


class NotRecordableError(RuntimeError):
    """A model or guide does what a graph cannot repeat; the message names the place."""


class Guard(NamedTuple):
    """A value that decided what Python did: the graph is right as long as the tensor holds it."""

    value: Tensor
    expected: float


class ValueReads(TorchFunctionMode):
    """Watches the reads of single values while a graph is recorded.

    Pyro sums losses as numbers, which stay tensors here. Where PyTorch, Pyro or this package look at a value, for a
    check or a shortcut, the graph goes on from what they saw, and a guard is kept. Values that the user's own code
    looks at are refused.

    Attributes:
        guards: the guards, in the order of the reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[Guard] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.register_hook and _caller().f_code.co_name in _REPORTS:
            return None
        if func in _NUMBERS:
            return self._read_number(func, args[0])
        if func in _COMPARISONS:
            return self._read_comparison(func, args, kwargs)
        if func in _ARRAYS:
            raise NotRecordableError(f"the values of a tensor are read {place_of(_caller())}")
        return func(*args, **kwargs)

    def _read_number(self, func: Callable[..., Any], tensor: Tensor) -> Any:
        frame = _caller()
        name, package = frame.f_code.co_name, _package_of(frame)
        if func is Tensor.item and package == "pyro" and name in ("torch_item", "differentiable_loss"):
            return tensor.detach()
        if name in _REPORTS and package == "pyro":
            return False
        if package is None:
            raise NotRecordableError(f"what happens depends on the value of a tensor {place_of(frame)}")
        with disable_proxy_modes_tracing():
            value = func(tensor)
        # Both check numbers that are tensors only in a graph: this package its own, and Pyro that scales agree.
        passed = func is Tensor.__float__ and (
            frame.f_code.co_filename.endswith("_checks.py") if package == "pyro_ilvae" else name == "_get_common_scale"
        )
        if not passed:
            # Other numbers may have the same truth, or be rounded to the same integer.
            seen = tensor.detach() != 0 if func in _TRUTHS else tensor.detach()
            self.guards.append(Guard(seen.trunc() if type(value) is int and seen.is_floating_point() else seen, value))
        return value

    def _read_comparison(self, func: Callable[..., bool], args: Any, kwargs: Any) -> bool:
        frame = _caller()
        if _package_of(frame) is None:
            raise NotRecordableError(f"what happens depends on the values of tensors {place_of(frame)}")
        with disable_proxy_modes_tracing():
            value = func(*args, **kwargs)
        if func in (torch.equal, Tensor.equal):
            first, second = args
            if first.shape == second.shape:
                self.guards.append(Guard((first == second).all(), value))
        else:
            self.guards.append(Guard(torch.isclose(*args, **kwargs).all(), value))
        return value


def _caller() -> FrameType:
    """The frame of the code that called a function of a tensor."""
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__
        or (frame.f_code.co_filename.startswith(_PACKAGES["torch"]) and frame.f_code.co_filename.endswith(_PASSING))
    ):
        frame = frame.f_back
    return frame  # type: ignore[no-any-return]


def _package_of(frame: FrameType) -> str | None:
    file = frame.f_code.co_filename
    return next((name for name, folder in _PACKAGES.items() if file.startswith(folder)), None)


def is_of_user(frame: FrameType) -> bool:
    """Whether a frame is neither of PyTorch nor of Pyro nor of this package."""
    return _package_of(frame) is None and not frame.f_code.co_filename.startswith("<")


def place_of(frame: FrameType) -> str:
    """A frame as words: the function, the file and the line."""
    code = frame.f_code
    return f"in {code.co_qualname}, {Path(code.co_filename).name}, line {frame.f_lineno}"
