"""``torch.compile`` for the networks of a model, which falls back to the ordinary call where it fails."""

import warnings
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def compiled(module: M, **options: Any) -> M:
    """Let ``torch.compile`` treat a network of a model: a decoder, an encoder or a backbone, in place.

    The module stays what it is: its parameters keep their names in ``state_dict()`` and in Pyro's param store, L may
    still change, and copies and pickles of it are not compiled. A call that the compiler cannot do raises nothing but
    a warning, once, and from then on the module runs as it did before; an error of the module's own is raised as ever.

    Whether it is faster is a matter of the machine: :file:`benchmarks/README.md` has measurements, in which it is not
    on a CPU. Compiled code has no second derivatives, which is PyTorch's restriction.

    Args:
        module: the module, changed in place.
        **options: those of :func:`torch.compile`.

    Returns:
        The same module.

    Raises:
        ValueError: if ``module`` is not a ``torch.nn.Module``.

    Example:
        >>> from pyro_ilvae import MLPEncoder
        >>> encoder = compiled(MLPEncoder(event_shape=8, latent_dim=2), backend="eager")
        >>> with torch.no_grad():
        ...     loc, scale = encoder(torch.zeros(5, 8))
        >>> loc.shape
        torch.Size([5, 2])
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"Expected module to be a torch.nn.Module, got {module!r}")
    # What nn.Module.compile() sets, so that copies, pickles and the param store see no wrapper.
    eager = module._call_impl
    fast = torch.compile(eager, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return fast(*args, **kwargs)
        except Exception as error:
            result = eager(*args, **kwargs)  # raises by itself if it was the module that failed
            module._compiled_call_impl = None
            summary = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"torch.compile failed for {type(module).__name__}, which runs as before: "
                f"{type(error).__name__}: {summary}",
                stacklevel=2,
            )
            return result

    module._compiled_call_impl = call
    return module
