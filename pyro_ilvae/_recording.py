"""Whether operations are being recorded into a graph, in which what varies between steps has to be a tensor."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_recording", "recording"]

_DEPTH = 0


def is_recording() -> bool:
    """Whether a graph is being recorded: numbers that may change later are then read as tensors."""
    return _DEPTH > 0


@contextmanager
def recording() -> Iterator[None]:
    """A context in which :func:`is_recording` holds."""
    global _DEPTH
    _DEPTH += 1
    try:
        yield
    finally:
        _DEPTH -= 1
