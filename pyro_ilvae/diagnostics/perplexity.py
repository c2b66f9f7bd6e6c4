"""The perplexity of a corpus."""

from torch import Tensor

from pyro_ilvae import _checks

__all__ = ["perplexity"]

_TOLERANCE = 0.01  # nats per token


def perplexity(log_likelihood: Tensor, num_tokens: Tensor) -> Tensor:
    r"""The perplexity per token of a corpus, a number without units of at least 1.

    .. math:: \exp\left(-\frac{\sum_n \log p(x_n)}{\sum_n T_n}\right).

    Published perplexities count the token that ends a document, which the models of the package predict too: for the
    rows of :mod:`pyro_ilvae.datasets.text` the numbers of tokens are ``(x >= 0).sum(1)``.

    Args:
        log_likelihood: :math:`\log p(x_n)` in nats, of shape (N,).
        num_tokens: the numbers :math:`T_n` of tokens, integers of shape (N,). A token that ends a sequence counts if
            the model predicts it.

    Returns:
        The perplexity, of shape ().

    Raises:
        ValueError: if the shapes differ, if a number of tokens is negative or no integer, if there are no tokens, if a
            datum without tokens has a log likelihood other than 0, and for log likelihoods that are NaN or whose sum is
            above 0, as the sum of losses is.
        TypeError: for what is neither a tensor nor an array.

    Example:
        >>> import math
        >>> import torch
        >>> perplexity(torch.tensor([-6 * math.log(4.0), 0.0]), torch.tensor([4, 2]))
        tensor(4.)
    """
    log_likelihood, num_tokens = _checks.real("log_likelihood", log_likelihood), _checks.real("num_tokens", num_tokens)
    if not (num_tokens == num_tokens.floor()).all():
        raise ValueError(f"Expected num_tokens to be integers, got {num_tokens[num_tokens != num_tokens.floor()][0]}")
    if log_likelihood.shape != num_tokens.shape:
        raise ValueError(
            f"Expected num_tokens of the shape {tuple(log_likelihood.shape)} of log_likelihood, got "
            f"{tuple(num_tokens.shape)}"
        )
    if num_tokens.numel() == 0 or (num_tokens < 0).any() or not num_tokens.sum() > 0:
        smallest = f"the smallest {num_tokens.min()}" if num_tokens.numel() else "none"
        raise ValueError(f"Expected num_tokens >= 0 with a positive sum, got {smallest} and the sum {num_tokens.sum()}")
    empty = (num_tokens == 0) & ~(log_likelihood.abs() <= _TOLERANCE)
    if empty.any():
        n = int(empty.nonzero()[0])
        raise ValueError(
            f"Expected num_tokens of at least 1 where log_likelihood is not 0, got 0 tokens and {log_likelihood[n]:g} "
            f"nats for datum {n}: count the token that ends a document, or leave the document out"
        )
    nats = -log_likelihood.double().sum() / num_tokens.double().sum()
    # The tolerance has room for estimates of log likelihoods near 0.
    if not nats > -_TOLERANCE:
        raise ValueError(f"Expected log_likelihood to be log probabilities of tokens, got {-nats} nats per token")
    return nats.exp().to(log_likelihood.dtype)
