"""Compiled modules compute what they did, and a compiler that fails is only a warning."""

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from objects import DECODERS, EVENT, LATENT
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroSample

from pyro_ilvae import (
    VAE,
    InverseLipschitzDecoder,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    compiled,
    likelihoods,
    mlp,
)

# PyTorch's compiler looks at each tensor's gradient, and its own dependencies are behind their time.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def broken(graph, inputs):
    raise RuntimeError("no compiler on this machine")


def vae():
    decoder = ProjectedDecoder(mlp(LATENT, (8,), 8), LATENT, EVENT, 0.5)
    return VAE(decoder, MLPEncoder(EVENT, LATENT, (8,)), likelihoods.Normal(0.3))


# One of each kind: each compilation takes seconds.
@pytest.mark.parametrize("name", ["composition-random", "projected-conv", "plain"])
def test_values_and_gradients_are_equal(name):
    decoder = DECODERS[name]()
    z = torch.randn(6, LATENT)
    expected = decoder(z)
    expected.square().sum().backward()
    gradients = {key: value.grad.clone() for key, value in decoder.named_parameters() if value.grad is not None}
    decoder.zero_grad()
    keys = list(decoder.state_dict())
    assert compiled(decoder, backend="aot_eager") is decoder
    actual = decoder(z)
    actual.square().sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(dict(decoder.named_parameters())[key].grad, gradient, rtol=1e-4, atol=1e-5, msg=key)
    with torch.no_grad():
        torch.testing.assert_close(decoder(z), expected.detach(), rtol=1e-5, atol=1e-6)
    assert list(decoder.state_dict()) == keys
    assert decoder(torch.randn(2, 3, LATENT)).shape == (2, 3, *EVENT)


def test_training_is_equal():
    losses, stores = [], []
    for compile_it in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(1)
        model = vae()
        if compile_it:
            compiled(model.decoder, backend="aot_eager")
            compiled(model.encoder, backend="aot_eager")
        svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
        x = torch.randn(6, *EVENT, generator=torch.Generator().manual_seed(2))
        losses.append([svi.step(x) for _ in range(3)])
        stores.append(sorted(pyro.get_param_store().keys()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert stores[0] == stores[1]


def test_a_compiler_that_fails_is_a_warning_and_the_module_runs():
    decoder = MLPDecoder(LATENT, EVENT)
    z = torch.randn(6, LATENT)
    expected = decoder(z)
    compiled(decoder, backend=broken)
    with pytest.warns(UserWarning, match="torch.compile failed for MLPDecoder, which runs as before"):
        torch.testing.assert_close(decoder(z), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(decoder(z), expected)  # once


def test_the_failure_leaves_one_site_for_each_prior():
    decoder = InverseLipschitzDecoder(LATENT, EVENT, 0.7, (8,))
    decoder.outer.icnn.slope = PyroSample(dist.Normal(torch.zeros(8), 1.0).to_event(1))
    compiled(decoder, backend=broken)
    with pytest.warns(UserWarning, match="torch.compile failed"):
        trace = pyro.poutine.trace(decoder).get_trace(torch.randn(6, LATENT))
    assert trace.nodes["outer.icnn.slope"]["type"] == "sample"


def test_errors_of_the_module_are_its_own():
    decoder = compiled(MLPDecoder(LATENT, EVENT), backend="aot_eager")
    with pytest.raises(ValueError, match="Expected z of shape"):
        decoder(torch.randn(6, LATENT + 1))


def test_the_constant_may_change():
    decoder = compiled(InverseLipschitzDecoder(LATENT, EVENT, 0.5, (8,)), backend="aot_eager")
    z = torch.randn(6, LATENT)
    for constant in (0.5, 1.0, 3.0):
        decoder.inverse_lipschitz = constant
        expected = copy.deepcopy(decoder)(z)
        torch.testing.assert_close(decoder(z), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_not_compiled(duplicate):
    decoder = compiled(MLPDecoder(LATENT, EVENT), backend=broken)
    z = torch.randn(6, LATENT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert duplicate(decoder)(z).shape == (6, *EVENT)


def test_rejects_what_is_no_module():
    with pytest.raises(ValueError, match=r"Expected module to be a torch\.nn\.Module"):
        compiled(torch.sin)
