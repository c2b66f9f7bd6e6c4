"""The frame of logits from the tokens of a sample."""

import pytest
import torch
from helpers.sequence_decoders import VOCAB, tokens
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae import principal_token_frame


def scaled_counts(x, vocab_size):
    """The matrix Y of the definition, written out, with its rows centered."""
    counts = torch.stack([(x == token).sum(1) for token in range(vocab_size)], dim=1).double()
    spread = counts.std(0, correction=0)
    scaled = (counts - counts.mean(0)) / (spread + spread.square().mean().sqrt())
    return scaled - scaled.mean(1, keepdim=True)


@given(st.integers(0, 10_000), st.integers(1, VOCAB - 1))
def test_columns_are_the_leading_singular_vectors(seed, latent_dim):
    x = tokens(40, 6, seed)
    frame = principal_token_frame(x, vocab_size=VOCAB, latent_dim=latent_dim).double()
    torch.testing.assert_close(frame.mT @ frame, torch.eye(latent_dim, dtype=torch.float64), rtol=0, atol=1e-5)
    assert frame.sum(0).abs().max() < 1e-5
    assert (frame.gather(0, frame.abs().argmax(0, keepdim=True)) > 0).all()
    y = scaled_counts(x, VOCAB)
    values = torch.linalg.svdvals(y)[:latent_dim]
    torch.testing.assert_close((y @ frame).norm(dim=0), values, rtol=1e-4, atol=1e-4)


def test_the_order_of_sequences_and_the_padding_do_not_matter():
    x = tokens(40, 6)
    expected = principal_token_frame(x, vocab_size=VOCAB, latent_dim=2)
    wider = torch.cat([x, torch.full((40, 3), -1)], dim=1)
    for other in (x.flip(0), wider, x.int()):
        torch.testing.assert_close(
            principal_token_frame(other, vocab_size=VOCAB, latent_dim=2), expected, rtol=0, atol=1e-5
        )


def test_tokens_that_never_occur_take_no_part():
    frame = principal_token_frame(tokens(40, 6), vocab_size=VOCAB + 5, latent_dim=2)
    # But for the centering, which spreads the sum of the others over them.
    assert frame[VOCAB:].std(0).max() < 1e-6


def test_dtype_is_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        assert principal_token_frame(tokens(40, 6), vocab_size=VOCAB, latent_dim=2).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("x", "vocab_size", "latent_dim", "message"),
    [
        (tokens(40, 6), VOCAB - 1, 2, "with tokens below 8"),
        (tokens(40, 6).float(), VOCAB, 2, "got torch.float32"),
        (tokens(40, 6)[0], VOCAB, 2, r"of shape \(N, T\)"),
        (tokens(40, 6), VOCAB, VOCAB, "Expected latent_dim < 9"),
        (tokens(3, 6), VOCAB, 3, "Expected latent_dim < 3"),
        (tokens(40, 6), VOCAB, 0, "latent_dim"),
        (torch.zeros(40, 6, dtype=torch.long), VOCAB, 2, "differ in at least 2 directions, got 0"),
        (torch.arange(5).repeat(3, 3).where(torch.arange(15) < 5 * torch.arange(1, 4)[:, None], -1), 5, 1, "got 0"),
        (torch.arange(40)[:, None] % 2, VOCAB, 2, "differ in at least 2 directions, got 1"),
    ],
)
def test_refuses(x, vocab_size, latent_dim, message):
    with pytest.raises(ValueError, match=message):
        principal_token_frame(x, vocab_size=vocab_size, latent_dim=latent_dim)
