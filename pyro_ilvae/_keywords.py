"""Handlers of Pyro that pass on every keyword of a program, ``context`` and ``fn`` included.

Pyro's handlers call a program through a function whose own arguments have these two names. ``svi.step(x, context=c)``
would raise that ``context`` has two values. Here the same function takes them by position alone. That is a change for
all of the process, and no program that runs without it can tell the difference.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from pyro.poutine import messenger


def _context_wrap(context: AbstractContextManager[Any], fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    with context:
        return fn(*args, **kwargs)


def pass_on_all_keywords() -> None:
    """Let Pyro's handlers pass on every keyword, unless this version of Pyro does so already."""
    own: Any = getattr(messenger, "_context_wrap", None)
    if own is None or [*inspect.signature(own).parameters] != ["context", "fn", "args", "kwargs"]:
        return
    if inspect.signature(own).parameters["context"].kind is inspect.Parameter.POSITIONAL_ONLY:
        return
    # Where pickled programs look for it.
    _context_wrap.__module__, _context_wrap.__qualname__ = own.__module__, own.__qualname__
    messenger._context_wrap = _context_wrap  # type: ignore[assignment]
