"""The distribution of a padded sequence: PyTorch's categoricals, token by token, and nothing for the padding."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.sequence_decoders import DECODERS, LATENT, VOCAB, tokens
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine

from pyro_ilvae.distributions import PADDING, TokenSequence


@st.composite
def sequences(draw):
    """Logits of any size with leaf gradients, tokens of several lengths, and any amount of padding for all of them."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    count, length = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    x = tokens(count, length, seed=draw(st.integers(0, 1000)))
    x = torch.nn.functional.pad(x, (0, draw(st.integers(0, 3))), value=PADDING)
    scale = draw(st.sampled_from([0.1, 1.0, 100.0]))
    logits = scale * torch.randn(*x.shape, VOCAB, dtype=torch.float64)
    return logits.requires_grad_(), x


def one_by_one(logits, x):
    """The sum over each row's tokens of PyTorch's log probability."""
    rows = [
        torch.stack([dist.Categorical(logits=at).log_prob(token) for at, token in zip(*row, strict=True) if token >= 0])
        for row in zip(logits, x, strict=True)
    ]
    return torch.stack([row.sum() for row in rows])


@given(sequences())
def test_log_prob_and_gradients_are_those_of_the_tokens_one_by_one(given_sequences):
    logits, x = given_sequences
    log_prob, expected = TokenSequence(logits, x).log_prob(x), one_by_one(logits, x)
    torch.testing.assert_close(log_prob, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn(len(x), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weight * log_prob).sum(), logits)
    (reference,) = torch.autograd.grad((weight * expected).sum(), logits)
    torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10)
    assert not gradient[x == PADDING].any()


@given(sequences())
def test_is_a_masked_categorical(given_sequences):
    logits, x = given_sequences
    masked = dist.Categorical(logits=logits).mask(x >= 0).to_event(1)
    ours = TokenSequence(logits, x)
    assert (ours.batch_shape, ours.event_shape) == (masked.batch_shape, masked.event_shape)
    torch.testing.assert_close(ours.log_prob(x), masked.log_prob(x.clamp(min=0)), rtol=1e-10, atol=1e-10)


@given(sequences(), st.integers(1, 4))
def test_width_of_the_padding_does_not_matter(given_sequences, width):
    logits, x = given_sequences
    wider = torch.nn.functional.pad(x, (0, width), value=PADDING)
    anything = torch.cat([logits, 1e6 * torch.randn(len(x), width, VOCAB, dtype=torch.float64)], dim=1)
    expected = TokenSequence(logits, x).log_prob(x)
    torch.testing.assert_close(TokenSequence(anything, wider).log_prob(wider), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("left", [(), (3,), (2, 3)])
def test_left_dimensions_are_a_loop_over_them(left):
    x = tokens(4, 5)
    logits = torch.randn(*left, 4, 5, VOCAB, dtype=torch.float64)
    expected = torch.stack([one_by_one(part, x) for part in logits.reshape(-1, 4, 5, VOCAB)]).reshape(*left, 4)
    for history in (x, x.expand(*left, 4, 5)):
        fn = TokenSequence(logits, history)
        assert (fn.batch_shape, fn.event_shape) == ((*left, 4), (5,))
        # What is observed may have fewer dimensions than the logits, as under vectorized particles.
        for value in (history, x):
            torch.testing.assert_close(fn.log_prob(value), expected)


@pytest.mark.parametrize("batch_shape", [(4,), (3, 4), (2, 3, 4)])
def test_expand(batch_shape):
    x = tokens(4, 5)
    logits = torch.randn(4, 5, VOCAB, dtype=torch.float64)
    fn = TokenSequence(logits, x).expand(torch.Size(batch_shape))
    assert (fn.batch_shape, fn.event_shape) == (batch_shape, (5,))
    expected = one_by_one(logits, x).expand(batch_shape)
    for value in (x, x.expand(*batch_shape, 5)):
        torch.testing.assert_close(fn.log_prob(value), expected)
    assert torch.equal(fn.sample(), x.expand(*batch_shape, 5))
    again = fn.expand((2, *batch_shape))
    torch.testing.assert_close(again.log_prob(x), expected.expand(2, *batch_shape))


@pytest.mark.parametrize("sample_shape", [(), (3,), (2, 3)])
def test_a_draw_is_the_history(sample_shape):
    x = tokens(4, 5)
    fn = TokenSequence(torch.randn(4, 5, VOCAB), x)
    draw = fn.sample(sample_shape)
    assert torch.equal(draw, x.expand(*sample_shape, 4, 5))
    assert fn.log_prob(draw).shape == (*sample_shape, 4)


@given(sequences(), st.data())
def test_refuses_other_tokens(given_sequences, data):
    logits, x = given_sequences
    fn = TokenSequence(logits, x)
    torch.testing.assert_close(fn.log_prob(x.clone()), fn.log_prob(x), rtol=0, atol=0)
    row, column = (data.draw(st.integers(0, size - 1)) for size in x.shape)
    other = x.clone()
    other[row, column] = (x[row, column] + 2) % (VOCAB + 1) - 1
    for value in (other, other.expand(2, *x.shape)):
        with pytest.raises(ValueError, match="Expected the tokens that the logits were computed for, got others"):
            fn.log_prob(value)


@pytest.mark.parametrize(("of_logits", "of_tokens"), [((1,), (4,)), ((4,), (3, 4)), ((3, 1), (4,)), ((), (4,))])
def test_batch_shapes_broadcast(of_logits, of_tokens):
    logits = torch.randn(*of_logits, 5, VOCAB, dtype=torch.float64)
    x = tokens(12, 5)[: torch.Size(of_tokens).numel()].reshape(*of_tokens, 5)
    fn = TokenSequence(logits, x)
    shape = torch.broadcast_shapes(of_logits, of_tokens)
    assert fn.batch_shape == fn.log_prob(x).shape == shape
    full = TokenSequence(logits.expand(*shape, 5, VOCAB), x.expand(*shape, 5))
    torch.testing.assert_close(fn.log_prob(x), full.log_prob(x.expand(*shape, 5)))


def test_refuses_lengths_that_differ():
    with pytest.raises(ValueError, match=r"Expected logits of shape \(..., T, V\) for tokens of shape \(..., T\)"):
        TokenSequence(torch.zeros(4, 5, VOCAB), tokens(4, 1))
    fn = TokenSequence(torch.zeros(4, 5, VOCAB), torch.zeros(4, 5, dtype=torch.long))
    for width in (1, 4, 6):
        with pytest.raises(ValueError, match="Expected the tokens that the logits were computed for"):
            fn.log_prob(torch.zeros(4, width, dtype=torch.long))


def test_support_and_parameters_are_checked():
    x = tokens(4, 5)
    fn = TokenSequence(torch.zeros(4, 5, VOCAB), x)
    assert fn.support.event_dim == 1
    assert fn.support.check(x).all()
    for token in (PADDING - 1, VOCAB):
        assert fn.support.check(x.index_fill(0, torch.tensor([2]), token)).equal(torch.arange(4) != 2)
    with pytest.raises(ValueError, match="parameter logits"):
        TokenSequence(torch.full((4, 5, VOCAB), float("nan")), x, validate_args=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype):
    """A log probability is -inf, and not NaN, exactly where a probability is 0."""
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-torch.inf, 0.0, 0.0]]], dtype=dtype).repeat(3, 1, 1).requires_grad_()
    x = torch.tensor([[0, 1], [1, PADDING], [0, 0]])
    log_prob = TokenSequence(logits, x).log_prob(x)
    assert log_prob.dtype == dtype
    torch.testing.assert_close(log_prob, torch.tensor([-(torch.tensor(2.0).log()), -2e4, -torch.inf], dtype=dtype))
    (gradient,) = torch.autograd.grad(log_prob[:2].sum(), logits)
    assert gradient.isfinite().all()


def test_is_a_site_of_pyro_under_masks_scales_and_files():
    x = tokens(4, 5)
    fn = TokenSequence(torch.randn(4, 5, VOCAB, dtype=torch.float64), x)

    def model():
        with pyro.plate("data", 12, subsample_size=4):
            return pyro.sample("x", fn, obs=x)

    site = poutine.trace(poutine.mask(model, mask=torch.arange(4) < 3)).get_trace()
    expected = 12 / 4 * fn.log_prob(x)[:3].sum()
    torch.testing.assert_close(site.log_prob_sum(), expected)
    restored = pickle.loads(pickle.dumps(fn))
    assert torch.equal(restored.log_prob(x), fn.log_prob(x))


@pytest.mark.parametrize("name", DECODERS)
def test_density_of_a_decoder_does_not_depend_on_the_batch(name):
    """A sequence has one log probability, whatever it is padded to and whatever stands beside it."""
    decoder = DECODERS[name]().double().eval()
    x, z = tokens(5, 6), torch.randn(5, LATENT, dtype=torch.float64)
    together = TokenSequence(decoder(z, x), x).log_prob(x)
    for row, at, expected in zip(x, z, together, strict=True):
        alone = row[row >= 0].unsqueeze(0)
        logits = decoder(at.unsqueeze(0), alone)
        torch.testing.assert_close(TokenSequence(logits, alone).log_prob(alone)[0], expected, rtol=1e-10, atol=1e-10)
