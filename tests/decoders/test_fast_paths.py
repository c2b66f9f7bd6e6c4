"""The fast ways to compute a decoder equal the slow ones they stand in for, with their derivatives."""

import pytest
import torch
from helpers.decoders import INVERSE_LIPSCHITZ_DECODERS, LATENT, perturb
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call, jacrev, vmap

from pyro_ilvae import BrenierMap
from pyro_ilvae.decoders.frame_arguments import make_frame

FRAMES = st.sampled_from(["identity", "random"])
SMOOTH = [name for name in INVERSE_LIPSCHITZ_DECODERS if "conv" not in name]


def build(name, seed=0):
    torch.manual_seed(seed)
    return perturb(INVERSE_LIPSCHITZ_DECODERS[name]().double(), 0.5)


@given(st.integers(0, 2**31), FRAMES, st.sampled_from([((5,), (5,)), ((2, 5), (5,)), ((5,), (2, 5)), ((), ())]))
def test_frames_are_their_matrix(seed, kind, shapes):
    torch.manual_seed(seed)
    frame = make_frame(kind, torch.Size([7]), 3).double()
    matrix = frame.coordinates(torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(3, dtype=torch.float64))
    u = torch.randn(*shapes[0], 3, dtype=torch.float64)
    y = torch.randn(*shapes[1], 7, dtype=torch.float64)
    torch.testing.assert_close(frame.coordinates(y), y @ matrix)
    torch.testing.assert_close(frame.add(y, u), y + u @ matrix.mT)
    torch.testing.assert_close(frame.replace(y, u), u @ matrix.mT + y - y @ matrix @ matrix.mT)
    weight = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(frame.fold(weight), weight @ matrix)


@given(st.integers(0, 2**31), FRAMES, st.booleans())
def test_map_in_a_frame_is_autograd_of_the_potential(seed, kind, skips):
    torch.manual_seed(seed)
    brenier = perturb(BrenierMap(7, 0.7, (16, 12, 8), input_skips=skips).double(), 0.5)
    frame = make_frame(kind, torch.Size([7]), 3).double()
    u = torch.randn(2, 5, 3, dtype=torch.float64)
    x = frame.add(u.new_zeros(2, 5, 7), u).requires_grad_()
    (expected,) = torch.autograd.grad(brenier.potential(x).sum(), x)
    torch.testing.assert_close(brenier(u, frame=frame), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", INVERSE_LIPSCHITZ_DECODERS)
def test_decoding_without_gradients_is_the_same(name):
    decoder = build(name)
    z = torch.randn(2, 5, LATENT, dtype=torch.float64)
    with torch.inference_mode():
        fast = decoder(z)
    torch.testing.assert_close(fast, decoder(z), rtol=0, atol=0)


@pytest.mark.parametrize("name", SMOOTH)
def test_first_and_second_derivatives(name):
    decoder = build(name)
    z = torch.randn(3, LATENT, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(decoder, (z,))
    assert torch.autograd.gradgradcheck(decoder, (z,))


@pytest.mark.parametrize("name", SMOOTH)
def test_function_transforms(name):
    decoder = build(name)
    z = torch.randn(4, LATENT, dtype=torch.float64)
    expected = decoder(z)
    torch.testing.assert_close(vmap(decoder)(z), expected, rtol=1e-10, atol=1e-10)
    parameters = dict(decoder.named_parameters())
    gradients = jacrev(lambda values: functional_call(decoder, values, (z,)).sum())(parameters)
    slow = torch.autograd.grad(expected.sum(), list(parameters.values()), allow_unused=True)
    for fast, value in zip(gradients.values(), slow, strict=True):
        torch.testing.assert_close(fast, torch.zeros_like(fast) if value is None else value, rtol=1e-9, atol=1e-9)
