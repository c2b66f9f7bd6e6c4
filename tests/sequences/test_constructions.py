"""The three decoders of the text experiment, written out in plain operations with the same weights."""

import pytest
import torch
from helpers.decoders import perturb
from helpers.sequence_decoders import tokens
from torch.nn.functional import softplus

from pyro_ilvae import InverseLipschitzDecoder, MLPDecoder, ProjectedDecoder, SequenceDecoder

VOCAB, LATENT, WIDTH, CONSTANT = 9, 3, 16, 2.0
SIZES = {"latent_dim": LATENT, "event_shape": VOCAB, "context_dim": WIDTH}


def plain():
    return MLPDecoder(**SIZES, hidden_features=(WIDTH,))


def projected():
    return ProjectedDecoder(plain(), **SIZES, inverse_lipschitz=CONSTANT, map_features=(12, 8), frame="centered")


def composition():
    return InverseLipschitzDecoder(**SIZES, inverse_lipschitz=CONSTANT, map_features=(12, 8), frame="centered")


def potential(icnn, x):
    """psi(x) = w softplus(W softplus(A_1 x + b_1) + A_2 x + b_2) + v x, with softplus of the raw w and W."""
    (first, second), (b_1, b_2) = (part.split((12, 8)) for part in (icnn.input_weight, icnn.bias))
    [layer] = icnn.hidden_weights
    h = softplus(x @ first.T + b_1)
    h = softplus(h @ softplus(layer.raw).T + x @ second.T + b_2)
    return h @ softplus(icnn.output_weight_raw) + x @ icnn.slope


def brenier(one, constant, x):
    """The gradient of the potential, plus L x."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(potential(one.icnn, x).sum(), x)
    return one.gain * gradient + constant * x


def readout(decoder, z, h):
    """r = W softplus(A h + B z + b) + c."""
    first, _, last = decoder.network
    hidden = softplus(h @ decoder.from_context.weight.T + z @ first.weight.T + first.bias)
    return hidden @ last.weight.T + last.bias


def written_out(decoder, z, h):
    if isinstance(decoder, MLPDecoder):
        return readout(decoder, z, h)
    a = h @ decoder.from_context.weight.T
    frame = decoder.frame.matrix
    if isinstance(decoder, ProjectedDecoder):
        # b + Q (g(z) + A h) + (I - Q Q^T) (W z + r)
        r = readout(decoder.backbone, z, h) + z @ decoder.linear_path.weight.T
        inside = brenier(decoder.map, CONSTANT, z) + a
        return decoder.bias + inside @ frame.T + r @ (torch.eye(VOCAB, dtype=z.dtype) - frame @ frame.T)
    # b + g_2(B g_1(A h + a, z))
    a = a + decoder.from_context.bias
    both = torch.cat([a.expand(*z.shape[:-1], -1), z.expand(*a.shape[:-1], -1)], dim=-1)
    inner = brenier(decoder.inner, CONSTANT**0.5, both)
    return decoder.bias + brenier(decoder.outer, CONSTANT**0.5, inner @ frame.T)


@pytest.mark.parametrize("history", ["gru", "lstm", "transformer"])
@pytest.mark.parametrize("build", [plain, projected, composition])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoder_of_sequences_is_the_construction_written_out(build, history, dtype):
    decoder = perturb(SequenceDecoder(history, build()).to(dtype), 0.2)
    x, z = tokens(5, 7), torch.randn(5, LATENT, dtype=dtype)
    start = torch.full((5, 1), VOCAB)
    inputs = torch.cat([start, x[:, :-1].clamp(min=0)], dim=1)
    if history == "transformer":
        states = decoder.history(inputs)
    else:
        states, _ = decoder.history.recurrent(decoder.history.embedding(inputs))
    with torch.no_grad():
        logits = decoder(z, x)
    expected = written_out(decoder.decoder, z.unsqueeze(1).expand(5, 7, LATENT), states)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logits, expected.detach(), rtol=tolerance, atol=tolerance)
