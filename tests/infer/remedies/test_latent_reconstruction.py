"""The latent reconstruction loss: its value by hand, for models of users and of this package, and what it refuses."""

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import TOKENS, X, hierarchy_with, mixture_with, sequential_with, vae_with
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyro_ilvae import AnnealedELBO, GraphSVI, JointOptim, MLPDecoder, MLPEncoder, likelihoods
from pyro_ilvae.infer.remedies import FreeBitsELBO, LatentReconstruction

N = len(X)


def losses_of(models, guide, elbo, *args, **kwargs):
    """The losses of several models with the same draws."""
    elbo.differentiable_loss(models[0], guide, *args, **kwargs)  # which counts plates, by a draw
    found = []
    for model in models:
        pyro.set_rng_seed(4)
        found.append(elbo.differentiable_loss(model, guide, *args, **kwargs))
    return found


@pytest.mark.parametrize(
    "likelihood", [likelihoods.Normal(0.5, "learned"), likelihoods.Poisson(), likelihoods.Bernoulli()]
)
@pytest.mark.parametrize("particles", [None, True, False])
def test_the_term_by_hand(likelihood, particles):
    vae = vae_with(likelihood=likelihood, data_size=3 * N).double()
    x = (X.double() > 0).double()
    settings = {} if particles is None else {"num_particles": 4, "vectorize_particles": particles}
    elbo = Trace_ELBO(max_plate_nesting=1, **settings)
    handled = LatentReconstruction(vae.encoder, weight=0.7)(vae.model)
    terms = []

    def spy(x):
        with poutine.trace() as capture:
            handled(x)
        z, fn = capture.trace.nodes["z"]["value"], capture.trace.nodes["x"]["fn"]
        terms.append(0.7 * 3 * (z - vae.encoder(fn.mean)[0]).square().sum())
        factor = capture.trace.nodes["z_reconstruction"]
        assert factor["scale"] == 3
        assert factor["fn"].batch_shape[-1:] == (N,)

    spied, plain = losses_of([spy, vae.model], vae.guide, elbo, x)
    expected = sum(terms[-(1 if particles in (None, True) else 4) :]) / (1 if particles is None else 4)
    torch.testing.assert_close(spied - plain, expected)


def test_gradients_reach_guide_encoder_and_decoder():
    vae = vae_with(likelihood=likelihoods.Poisson()).double()
    x = torch.poisson(X.double().exp())
    handled = LatentReconstruction(vae.encoder, weight=0.7)(vae.model)
    one, other = losses_of([handled, vae.model], vae.guide, TraceMeanField_ELBO(), x)
    pyro.set_rng_seed(4)
    z = dist.Normal(*vae.encoder(x)).rsample()
    expected = 0.7 * (z - vae.encoder(vae.likelihood(vae.decoder(z)).mean)[0]).square().sum()
    torch.testing.assert_close(one - other, expected)
    parameters = list(vae.parameters())
    found = torch.autograd.grad(one - other, parameters, allow_unused=True)
    by_hand = torch.autograd.grad(expected, parameters, allow_unused=True)
    for gradient, own in zip(found, by_hand, strict=True):
        if own is not None:
            torch.testing.assert_close(gradient, own, rtol=1e-6, atol=1e-8)
    assert sum(own is not None for own in by_hand) > 4


def test_no_weight_is_the_model_itself():
    vae = vae_with()
    handled = LatentReconstruction(vae.encoder, weight=0)(vae.model)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), AnnealedELBO(TraceMeanField_ELBO(), 0.3)):
        assert torch.equal(*losses_of([handled, vae.model], vae.guide, elbo, X))
    assert "z_reconstruction" not in poutine.trace(handled).get_trace(X)


def test_beta_leaves_the_term_alone():
    vae = vae_with().double()
    x = X.double()
    handled = LatentReconstruction(vae.encoder, weight=2.0)(vae.model)
    terms = []
    for beta in (0.0, 0.5, 3.0):
        for elbo in (TraceMeanField_ELBO(), FreeBitsELBO(TraceMeanField_ELBO(), 0.1)):
            one, other = losses_of([handled, vae.model], vae.guide, AnnealedELBO(elbo, beta), x)
            terms.append((one - other).detach())
    torch.testing.assert_close(torch.stack(terms), terms[0].expand(6))


class OwnEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x), torch.ones(())


def test_a_users_own_model_with_masks_and_other_names():
    weight = torch.randn(3, 2)
    mask = torch.tensor([True, False, True, True, False])
    encoder = OwnEncoder()

    def model(data):
        with pyro.plate("rows", 5), poutine.mask(mask=mask), poutine.scale(scale=2.0):
            code = pyro.sample("code", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("value", dist.Gamma((code @ weight.T).exp(), 2.0).to_event(1), obs=data)

    handled = LatentReconstruction(encoder, weight=0.3, latent="code", observed="value")(model)
    trace = poutine.trace(handled).get_trace(torch.ones(5, 3))
    trace.compute_log_prob()
    code = trace.nodes["code"]["value"]
    distances = (code - encoder.layer((code @ weight.T).exp() / 2)).square().sum(-1)
    expected = -0.3 * 2 * (distances * mask).sum()
    torch.testing.assert_close(trace.nodes["code_reconstruction"]["log_prob_sum"], expected)


def test_as_a_context_manager_and_a_decorator():
    vae = vae_with()
    handler = LatentReconstruction(vae.encoder, weight=0.3)
    with handler:
        one = poutine.trace(vae.model).get_trace(X)
    two = poutine.trace(handler(lambda x: vae.model(x))).get_trace(X)
    for trace in (one, two):
        assert "z_reconstruction" in trace
    assert (handler._drawn, handler._context) == (None, None)
    assert repr(handler) == "LatentReconstruction(MLPEncoder, weight=0.3, latent='z', observed='x')"
    handled = copy.deepcopy(handler(vae.model))
    assert "z_reconstruction" in poutine.trace(handled).get_trace(X)
    assert pickle.loads(pickle.dumps(handler)).weight == 0.3


def test_draws_of_the_prior_have_no_term():
    vae = vae_with()
    handled = LatentReconstruction(vae.encoder, weight=0.3)(vae.model)
    assert "z_reconstruction" not in poutine.trace(handled).get_trace(num_data=4)
    drawn = Predictive(handled, num_samples=3, parallel=True)(num_data=4)
    assert drawn["x"].shape[:2] == (3, 4)


@pytest.mark.parametrize("labels", [False, True])
def test_the_encoder_gets_the_context_of_the_model(labels):
    encoder = MLPEncoder(latent_dim=3, event_shape=X.shape[1:], context_dim=4, takes_mask=True, hidden_features=(5,))
    decoder = MLPDecoder(latent_dim=3, event_shape=X.shape[1:], context_dim=4, hidden_features=(5,))
    network = torch.nn.Embedding(6, 4) if labels else None
    vae = vae_with(decoder=decoder, encoder=encoder, likelihood=likelihoods.Normal(0.5), context_network=network)
    context = torch.arange(N) % 6 if labels else torch.randn(N, 4)
    mask = torch.rand(X.shape) < 0.8
    handled = LatentReconstruction(vae.encoder, weight=0.3)(vae.model)
    fixed = LatentReconstruction(vae.encoder, weight=0.3)(partial(vae.model, context=context))
    scaled = LatentReconstruction(vae.encoder, weight=0.3)(poutine.mask(vae.model, mask=True))
    for call in (
        lambda: handled(X, context, mask=mask),
        lambda: handled(X, context=context, mask=mask),
        lambda: fixed(X, mask=mask),
        lambda: scaled(X, context, mask=mask),
    ):
        nodes = poutine.trace(call).get_trace().nodes
        z = nodes["z"]["value"]
        given = network(context) if labels else context
        own = vae.encoder(vae.decoder(z, given), given)[0]
        expected = -0.3 * (z - own).square().sum(-1)
        torch.testing.assert_close(nodes["z_reconstruction"]["fn"].log_factor, expected)
    handler = LatentReconstruction(vae.encoder, weight=0.3)
    handler(vae.model)(X, context, mask=mask)
    assert (handler._drawn, handler._context) == (None, None)
    with pytest.raises(ValueError, match="context"), LatentReconstruction(vae.encoder, weight=0.3):
        vae.model(X, context)
    assert "z_reconstruction" not in poutine.trace(handled).get_trace(context=context)


def test_other_models():
    hierarchy = hierarchy_with("top_down")
    handled = LatentReconstruction(hierarchy.encoder, weight=0.3, latent="z1")(hierarchy.model)
    one, other = losses_of([handled, hierarchy.model], hierarchy.guide, Trace_ELBO(), X)
    assert one.item() > other.item()
    pyro.clear_param_store()
    for form in ("factor", "summed-out"):
        mixture = mixture_with(form)
        handled = LatentReconstruction(mixture.encoder, weight=0.3)(mixture.model)
        one, other = losses_of([handled, mixture.model], mixture.guide, TraceEnum_ELBO(), X)
        assert one.item() > other.item()
        pyro.clear_param_store()
    mixture = mixture_with("components")
    with pytest.raises(ValueError, match="return a location and a scale"):
        LatentReconstruction(mixture.encoder, weight=0.3)(mixture.model)(X)


def test_what_is_refused_by_name():
    sequential = sequential_with()
    with pytest.raises(ValueError, match="a likelihood with a mean at site 'x', got a TokenSequence"):
        LatentReconstruction(sequential.encoder, weight=0.3)(sequential.model)(TOKENS)
    vae = vae_with()
    with pytest.raises(ValueError, match="latent site 'u' before site 'x'"):
        LatentReconstruction(vae.encoder, weight=0.3, latent="u")(vae.model)(X)
    with pytest.raises(ValueError, match="location of shape"):
        LatentReconstruction(lambda x: (torch.zeros(N, 7), torch.ones(N, 7)), weight=0.3)(vae.model)(X)

    def categorical(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(N, 2), 1.0).to_event(2))
        pyro.sample("x", dist.Categorical(logits=z).to_event(1), obs=x)

    with pytest.raises(ValueError, match="mean at site 'x', got a Categorical"):
        LatentReconstruction(vae.encoder, weight=0.3)(categorical)(torch.zeros(N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_graph_steps_are_steps_of_svi(dtype):
    steps = []
    for kind in (SVI, GraphSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        vae = vae_with().to(dtype)
        model = LatentReconstruction(vae.encoder, weight=0.5)(vae.model)
        elbo = AnnealedELBO(TraceMeanField_ELBO(), 0.5)
        more = {} if kind is SVI else {"compile": False}
        svi = kind(model, vae.guide, JointOptim(torch.optim.Adam, {"lr": 0.02}), elbo, **more)
        losses = torch.tensor([float(svi.step(X.to(dtype))) for _ in range(6)])
        steps.append([losses, *(value.detach() for value in vae.parameters())])
        assert kind is SVI or svi.runs == "graph"
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)
