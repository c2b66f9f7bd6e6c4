"""An encoder with a least KL divergence: its bound, gradients and priors, and the models that take it."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from helpers.models import (
    TOKENS,
    X,
    hierarchy_with,
    layer_of,
    mixture_with,
    sequence_encoder,
    sequential_with,
    vae_with,
)
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from pyro_ilvae import VAE, AnnealedELBO, GraphSVI, JointOptim, Layer, MLPEncoder, likelihoods
from pyro_ilvae.infer.remedies import MinimumKLEncoder


class Fixed(nn.Module):
    """Returns a location and a scale, whatever the data are."""

    def __init__(self, loc, scale):
        super().__init__()
        self.loc, self.scale = nn.Parameter(loc), nn.Parameter(scale)

    def forward(self, x):
        return self.loc, self.scale


def inner(**more):
    sizes = {"event_shape": X.shape[1:], "latent_dim": 3, "hidden_features": (6,)}
    return MLPEncoder(**(sizes | more))


LOCS = st.sampled_from([0.0, -0.0, 1e-30, -1e-8, 0.01, -0.3, 1.0, -30.0])
SCALES = st.sampled_from([1e-6, 0.01, 0.5, 0.9, 0.999, 1.0, 1.001, 1.3, 5.0, 1e3])


@given(loc=LOCS, scale=SCALES, delta=st.sampled_from([1e-3, 0.1, 1.0, 20.0]), double=st.booleans())
def test_the_divergence_is_at_least_delta_and_gradients_are_finite(loc, scale, delta, double):
    dtype = torch.float64 if double else torch.float32
    fixed = Fixed(torch.full((4, 5), loc, dtype=dtype), torch.full((4, 5), scale, dtype=dtype))
    new_loc, new_scale = MinimumKLEncoder(fixed, delta)(torch.zeros(4, 2))
    kl = kl_divergence(Normal(new_loc, new_scale), Normal(0.0, 1.0))
    assert (kl >= delta / 5 * (1 - 1e-5)).all()
    assert (new_scale == fixed.scale).all()
    assert ((new_loc < 0) == (fixed.loc < 0)).all()
    new_loc.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in fixed.parameters() if parameter.grad is not None)


def test_the_value_by_hand():
    loc, scale, delta = 0.3, 0.8, 2.0
    lacking = 2 * delta / 2 - (scale**2 - 1 - 2 * math.log(scale))
    added = (lacking + math.sqrt(lacking**2 + (delta / 2) ** 2)) / 2
    found, _ = MinimumKLEncoder(Fixed(torch.tensor([loc, -loc]), torch.full((2,), scale)), delta)(torch.zeros(1))
    expected = math.sqrt(loc**2 + added)
    torch.testing.assert_close(found, torch.tensor([expected, -expected]))


def test_a_posterior_far_from_the_prior_stays():
    loc, scale = torch.full((3, 2), 5.0), torch.full((3, 2), 0.01)
    found, _ = MinimumKLEncoder(Fixed(loc, scale), 0.1)(torch.zeros(1))
    torch.testing.assert_close(found, loc, rtol=1e-4, atol=0)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(1)
    loc, scale = torch.randn(6, 3, dtype=torch.float64), torch.rand(6, 3, dtype=torch.float64) + 0.3
    encoder = MinimumKLEncoder(lambda x: (x[..., :3], x[..., 3:]), 0.6)
    assert torch.autograd.gradcheck(encoder, torch.cat([loc, scale], -1).requires_grad_())


def test_no_nats_are_the_encoder_itself():
    own = inner()
    for one, other in zip(MinimumKLEncoder(own, 0)(X), own(X), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("delta", [0.3, 6.0])
def test_another_prior(delta):
    prior = Independent(Normal(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, 1.0, 7.0])), 1)
    encoder = MinimumKLEncoder(inner(), delta, prior=prior)
    kl = kl_divergence(Normal(*encoder(X)), prior.base_dist)
    assert (kl >= delta / 3 * (1 - 1e-5)).all()
    assert kl.min().item() < delta / 3 * 2 + 3
    copied = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(copied(X)[0], encoder(X)[0])
    with pytest.raises(ValueError, match="prior to be a Normal"):
        MinimumKLEncoder(inner(), 1.0, prior=torch.distributions.Laplace(0.0, 1.0))


class OtherPrior(VAE):
    def _prior(self):
        return pyro.distributions.Normal(self._prior_loc + 1, 2.0).to_event(1)


def test_models_with_another_prior_refuse_it():
    encoder = MinimumKLEncoder(inner(), 1.0)
    with pytest.raises(ValueError, match=r"encoder with a bound to the prior of site 'z', got a MinimumKLEncoder"):
        vae_with(kind=OtherPrior, encoder=encoder).guide(X)
    prior = Independent(Normal(torch.ones(3), torch.full((3,), 2.0)), 1)
    of_prior = MinimumKLEncoder(inner(), 1.0, prior=prior)
    pyro.clear_param_store()
    vae_with(kind=OtherPrior, encoder=of_prior).guide(X)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="the prior that it was given"):
        vae_with(encoder=MinimumKLEncoder(inner(), 1.0, prior=prior)).guide(X)
    for form in ("factor", "summed-out"):
        with pytest.raises(ValueError, match="for a prior that is a mixture"):
            mixture_with(form, encoder=MinimumKLEncoder(inner(), 1.0))
    with pytest.raises(ValueError, match="num_components = 3"):
        MinimumKLEncoder(inner(num_components=3), 1.0)
    with pytest.raises(ValueError, match="encoder without a bound"):
        hierarchy_with("top_down", encoder=MinimumKLEncoder(inner(), 1.0))


def test_the_top_layer_of_a_hierarchy_takes_it():
    layer = layer_of(3, 2)
    bounded = Layer(layer.decoder, MinimumKLEncoder(layer.encoder, 1.0), layer.noise)
    for inference in ("bottom_up", "top_down"):
        hierarchy = hierarchy_with(inference, layers=[bounded])
        kl = kl_divergence(Normal(*hierarchy.encode(X, site="z2")), Normal(0.0, 1.0)).sum(-1)
        assert (kl > 1 - 1e-5).all()
    upper = layer_of(2, 2)
    with pytest.raises(ValueError, match=r"layers\[0\]\.encoder without a bound"):
        hierarchy_with("top_down", layers=[bounded, upper])


@pytest.mark.parametrize("kind", ["vae", "context", "mask", "sequential"])
def test_the_bound_holds_while_models_are_trained(kind, local_params):
    arguments, data = {}, X
    if kind == "vae":
        model = vae_with(encoder=MinimumKLEncoder(inner(), 2.0))
    elif kind == "context":
        model = vae_with(encoder=MinimumKLEncoder(inner(context_dim=2), 2.0))
        arguments = {"context": torch.randn(len(X), 2)}
    elif kind == "mask":
        encoder = MinimumKLEncoder(inner(takes_mask=True), 2.0)
        model = vae_with(encoder=encoder, likelihood=likelihoods.Normal(0.5), missing="ignore")
        data = X.clone()
        data[0, :1] = torch.nan
    else:
        model, data = sequential_with(encoder=MinimumKLEncoder(sequence_encoder(), 2.0)), TOKENS
    loss = AnnealedELBO(TraceMeanField_ELBO())(model.model, model.guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss(data, **arguments).backward()
        optimizer.step()
    kl = kl_divergence(Normal(*model.encode(data, **arguments)), Normal(0.0, 1.0)).sum(-1)
    assert (kl > 2 - 1e-5).all()


def test_graph_steps_and_copies():
    steps = []
    for kind in (SVI, GraphSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        vae = vae_with(encoder=MinimumKLEncoder(inner(), 2.0))
        elbo = AnnealedELBO(TraceMeanField_ELBO(), 0.5)
        more = {} if kind is SVI else {"compile": False}
        svi = kind(vae.model, vae.guide, JointOptim(torch.optim.Adam, {"lr": 0.02}), elbo, **more)
        losses = torch.tensor([float(svi.step(X)) for _ in range(6)])
        steps.append([losses, *(value.detach() for value in vae.parameters())])
        assert kind is SVI or svi.runs == "graph"
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)
    other = MinimumKLEncoder(inner(), 2.0)
    other.load_state_dict(vae.encoder.state_dict())
    for same in (other, copy.deepcopy(vae.encoder)):
        assert torch.equal(same(X)[0], vae.encoder(X)[0])


def test_a_prior_of_another_number_of_dimensions_is_refused():
    prior = torch.distributions.Normal(torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="prior of 2 dimensions"):
        MinimumKLEncoder(MLPEncoder(latent_dim=2, event_shape=6), delta=1.0, prior=prior)
    encoder = MinimumKLEncoder(lambda x: (x, x.exp()), delta=1.0, prior=prior)
    assert encoder(torch.zeros(5, 3))[0].shape == (5, 3)
    with pytest.raises(ValueError, match="prior of 2 dimensions"):
        encoder(torch.zeros(5, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [1e-8, 1e-6, 1e-4])
def test_rounding_leaves_the_bound_where_scales_are_close_to_the_priors(dtype, delta):
    away = torch.cat([torch.zeros(1), torch.logspace(-7, -1, 400)])
    scale = torch.cat([1 + away, 1 - away]).to(dtype)[:, None].expand(-1, 2)
    loc, scale = MinimumKLEncoder(lambda x: (0 * x, x), delta=delta)(scale)
    posterior, prior = Normal(loc.double(), scale.double()), Normal(torch.zeros(2).double(), 1.0)
    assert loc.dtype == dtype
    # In double precision a formula for what lies above 0 has 16 digits of 1.
    assert (kl_divergence(posterior, prior).sum(-1) >= delta * (1 - 1e-6)).all()
