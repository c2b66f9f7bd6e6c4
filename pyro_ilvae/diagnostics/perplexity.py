"""The perplexity of a corpus."""

import torch
from torch import Tensor

__all__ = ["perplexity"]


def perplexity(log_likelihood: Tensor, num_tokens: Tensor) -> Tensor:
    r"""The perplexity per token of a corpus, a number without units of at least 1.

    .. math:: \exp\left(-\frac{\sum_n \log p(x_n)}{\sum_n T_n}\right).

    Args:
        log_likelihood: :math:`\log p(x_n)` in nats, of shape (N,).
        num_tokens: the numbers :math:`T_n` of tokens, of shape (N,). A token that ends a sequence counts if the model
            predicts it.

    Returns:
        The perplexity, of shape ().

    Raises:
        ValueError: if the shapes differ, if a number of tokens is negative, and if there are no tokens.

    Example:
        >>> import math
        >>> perplexity(torch.tensor([-6 * math.log(4.0), 0.0]), torch.tensor([4, 2]))
        tensor(4.)
    """
    if log_likelihood.shape != num_tokens.shape:
        raise ValueError(
            f"Expected num_tokens of the shape {tuple(log_likelihood.shape)} of log_likelihood, got "
            f"{tuple(num_tokens.shape)}"
        )
    if (num_tokens < 0).any() or not num_tokens.sum() > 0:
        raise ValueError(
            f"Expected num_tokens >= 0 with a positive sum, got the smallest {num_tokens.min()} and the sum "
            f"{num_tokens.sum()}"
        )
    return torch.exp(-log_likelihood.sum() / num_tokens.sum())
