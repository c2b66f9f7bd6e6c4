"""Sequences from an autoregressive decoder, token by token: random draws, and a search for the most probable one."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_ilvae import _checks
from pyro_ilvae.distributions import PADDING
from pyro_ilvae.sequences.decoder import SequenceDecoder
from pyro_ilvae.sequences.histories import State

__all__ = ["Exclusions", "ancestral_sample", "beam_search"]


class Exclusions:
    """The tokens that a generated sequence may not have.

    Args:
        exclude: tokens that it has nowhere.
        min_length: the number of tokens that come before the end token.
    """

    def __init__(self, exclude: Iterable[int] = (), min_length: int = 0) -> None:
        try:
            tokens = list(exclude)
        except TypeError as error:
            raise TypeError(f"Expected exclude to hold token numbers, got {exclude!r}") from error
        self.exclude = [_checks.positive_int("a token in exclude", token, at_least=0) for token in tokens]
        self.min_length = _checks.positive_int("min_length", min_length, at_least=0)

    def masks(self, logits: Tensor, end_token: int | None, max_length: int) -> list[Tensor]:
        """For each place which tokens of the vocabulary are excluded, each of shape (V,)."""
        vocab_size = logits.shape[-1]
        for token in self.exclude:
            _checks.index_below("a token in exclude", token, vocab_size)
        if self.min_length > max_length:
            raise ValueError(f"Expected min_length of at most max_length = {max_length}, got {self.min_length}")
        always = torch.zeros(vocab_size, dtype=torch.bool, device=logits.device)
        always[self.exclude] = True
        early = always.clone()
        if end_token is not None:
            early[end_token] = True
        if always.all() or (self.min_length > 0 and early.all()):
            raise ValueError(
                "Expected exclude to leave a token, and one that is no end token before min_length, got none"
            )
        return [early if t < self.min_length else always for t in range(max_length)]


def ancestral_sample(
    decoder: SequenceDecoder,
    z: Tensor,
    max_length: int,
    end_token: int | None,
    temperature: float = 1.0,
    *,
    context: Tensor | None = None,
    exclusions: Exclusions | None = None,
) -> Tensor:
    r"""One sequence for each z, drawn token by token given z and the tokens before.

    .. math:: x_t \sim \operatorname{Categorical}(\operatorname{softmax}(f(z; h_t) / \tau)).

    Args:
        decoder: a decoder of sequences.
        z: of shape (N, K).
        max_length: the number of tokens after which a sequence is cut off.
        end_token: the token that ends a sequence; if None, every sequence has ``max_length`` tokens.
        temperature: :math:`\tau > 0`; below 1, probable tokens become more probable.
        context: the context of each sequence, of shape (N, C), for a decoder that takes one.
        exclusions: tokens whose probability is taken as 0.

    Returns:
        Tokens of shape (N, max_length), padded with -1 after the end token.
    """
    _checks.positive("temperature", temperature)
    tokens = torch.full((len(z), max_length), PADDING, device=z.device)
    running = torch.ones(len(z), dtype=torch.bool, device=z.device)
    logits, state = decoder.begin(z) if context is None else decoder.begin(z, context)
    masks = (exclusions or Exclusions()).masks(logits, end_token, max_length)
    for t in range(max_length):
        logits = logits.masked_fill(masks[t], -torch.inf)
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
        drawn = torch.multinomial(F.softmax(scaled, dim=-1), 1).squeeze(-1)
        tokens[:, t] = drawn.masked_fill(~running, PADDING)
        if end_token is not None:
            running &= drawn != end_token
        if t + 1 == max_length or not running.any():
            break
        logits, state = decoder.step(drawn, state)
    return tokens


def beam_search(
    decoder: SequenceDecoder,
    z: Tensor,
    max_length: int,
    end_token: int | None,
    num_beams: int = 1,
    *,
    context: Tensor | None = None,
    length_bonus: float = 0.0,
    exclusions: Exclusions | None = None,
) -> Tensor:
    r"""The most probable sequence that a beam search finds for each z; with one beam, the search is greedy.

    .. math:: \hat x = \operatorname{argmax}_x \sum_{t=1}^T \big(\log p(x_t \mid x_{<t}, z) + b\big),

    over the sequences of length T, with the end token, that are among the ``num_beams`` with the largest sums at every
    length.

    Args:
        decoder: a decoder of sequences.
        z: of shape (N, K).
        max_length: the number of tokens after which a sequence is cut off.
        end_token: the token that ends a sequence; if None, every sequence has ``max_length`` tokens.
        num_beams: the number of sequences that are kept.
        context: the context of each sequence, of shape (N, C), for a decoder that takes one.
        length_bonus: the number :math:`b` of nats that each token earns.
        exclusions: tokens that no sequence has; the probabilities of the others stay as they are.

    Returns:
        Tokens of shape (N, max_length), padded with -1 after the end token.
    """
    _checks.positive_int("num_beams", num_beams)
    _checks.finite("length_bonus", length_bonus)
    count = len(z)
    # Start with one beam, because equal beams would stay equal.
    tokens = torch.full((count, 1, max_length), PADDING, device=z.device)
    score = z.new_zeros(count, 1)
    running = torch.ones(count, 1, dtype=torch.bool, device=z.device)
    logits, state = decoder.begin(z) if context is None else decoder.begin(z, context)
    masks = (exclusions or Exclusions()).masks(logits, end_token, max_length)
    for t in range(max_length):
        vocab_size = logits.shape[-1]
        nats = F.log_softmax(logits, dim=-1).reshape(*running.shape, vocab_size)
        if nats.isnan().any():
            raise ValueError("Expected the decoder to return logits without NaN, got some")
        nats = (nats + length_bonus).masked_fill(masks[t], -torch.inf)
        # The only continuation of a sequence that has ended is itself; it takes the place of token 0.
        itself = torch.full_like(nats, -torch.inf)
        itself[..., 0] = 0.0
        candidates = score.unsqueeze(-1) + torch.where(running.unsqueeze(-1), nats, itself)
        flat = candidates.flatten(1)
        score, place = flat.topk(min(num_beams, flat.shape[1]))
        parent, token = place // vocab_size, place % vocab_size
        tokens = tokens.gather(1, parent.unsqueeze(-1).expand(-1, -1, max_length))
        running = running.gather(1, parent)
        tokens[..., t] = token.masked_fill(~running, PADDING)
        if end_token is not None:
            running = running & (token != end_token)
        if t + 1 == max_length or not running.any():
            break
        logits, state = decoder.step(token.flatten(), _of_parents(state, parent))
    return tokens[:, 0]


def _of_parents(state: State, parent: Tensor) -> State:
    """The rows of the state that belong to each sequence's parent; rows are ordered by datum, then by beam."""
    beams_before = state[0].shape[0] // len(parent)
    rows = (parent + beams_before * torch.arange(len(parent), device=parent.device).unsqueeze(-1)).flatten()
    return tuple(part[rows] for part in state)
