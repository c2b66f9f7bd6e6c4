"""Checks of the tokens that the networks of sequences are called with."""

from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.distributions import PADDING


def tokens_of(name: str, value: Any, vocab_size: int) -> Tensor:
    """Return ``value`` as int64 of shape (..., T), if its tokens are of the vocabulary and padding only ends them."""
    tokens = _integers(name, value)
    if tokens.dim() == 0:
        raise ValueError(f"Expected {name} of shape (..., T), got ()")
    if torch.compiler.is_compiling() or tokens.numel() == 0:
        return tokens
    smallest, largest = (int(end) for end in tokens.aminmax())
    if smallest < PADDING or largest >= vocab_size:
        raise ValueError(
            f"Expected {name} to hold tokens from 0 to {vocab_size - 1}, or {PADDING} as padding, got values from "
            f"{smallest} to {largest}"
        )
    if smallest == PADDING and ((tokens[..., 1:] >= 0) & (tokens[..., :-1] < 0)).any():
        raise ValueError(f"Expected {name} to have padding ({PADDING}) only after its last token, got a token after it")
    return tokens


def inputs_of(value: Any, vocab_size: int, *, dim: int) -> Tensor:
    """Return ``value`` as inputs of a history, (N, T) or (N,): tokens, the start of a sequence, or a hidden token."""
    inputs = _integers("inputs", value)
    if inputs.dim() != dim or (dim == 2 and inputs.shape[1] == 0):
        expected = "(N, T) with T >= 1" if dim == 2 else "(N,)"
        raise ValueError(f"Expected inputs of shape {expected}, got {tuple(inputs.shape)}")
    if not torch.compiler.is_compiling() and inputs.numel():
        smallest, largest = (int(end) for end in inputs.aminmax())
        if smallest < 0 or largest > vocab_size + 1:
            raise ValueError(f"Expected inputs from 0 to {vocab_size + 1}, got values from {smallest} to {largest}")
    return inputs


def _integers(name: str, value: Any) -> Tensor:
    tokens = _checks.tensor(name, value)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"Expected {name} to hold tokens of dtype torch.int64, got {tokens.dtype}")
    return tokens.long()
