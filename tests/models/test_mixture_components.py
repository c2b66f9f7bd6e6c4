"""The components of the mixture VAE as parameters: what is learned, priors on them, and what they share with others."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import DECODERS, EVENT, LATENT, perturb
from helpers.models import ENUMERATED, FORMS, X, mixture_with
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample
from torch.distributions import Categorical, kl_divergence

from pyro_ilvae import VAE, AnnealedELBO, MixtureVAE, MLPEncoder, diagnostics, from_pyro_svi, likelihoods


def trained_by(step, mixture):
    """Every parameter has moved."""
    before = {key: value.clone() for key, value in mixture.named_parameters()}
    for _ in range(3):
        step()
    assert not [key for key, value in mixture.named_parameters() if torch.equal(before[key], value)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("weights", "scales"), [("fixed", "learned"), ("learned", "fixed")])
def test_torch_optimizer_trains_what_is_learned(form, weights, scales, local_params):
    mixture = mixture_with(form, weights=weights, scales=scales)
    names = {name for name, _ in mixture.named_parameters()}
    assert ("component_logits" in names, "component_log_scale" in names) == (weights == "learned", scales == "learned")
    loss_fn = AnnealedELBO(TraceEnum_ELBO(max_plate_nesting=1), beta=0.5)(mixture.model, mixture.guide)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=1e-2)

    def step():
        optimizer.zero_grad()
        loss_fn(X).backward()
        optimizer.step()

    trained_by(step, mixture)
    assert bool(pyro.get_param_store()) != local_params
    assert weights == "learned" or torch.equal(mixture.component_logits, torch.zeros(3))
    assert scales == "learned" or torch.equal(mixture.component_log_scale, torch.zeros(3, LATENT))


def test_optimal_scale_with_y_summed_out():
    mixture = mixture_with("summed-out", likelihood=likelihoods.Normal(0.5, "optimal"))
    svi = SVI(mixture.model, mixture.guide, pyro.optim.Adam({"lr": 1e-2}), TraceEnum_ELBO())
    assert torch.tensor([svi.step(X) for _ in range(3)]).isfinite().all()


def own_prior(mixture):
    prior = dist.Normal(0.0, 1.0).expand([3, LATENT]).to_event(2)
    mixture.component_loc = PyroSample(prior)
    return mixture


@pytest.mark.parametrize("vectorize", [False, True])
def test_prior_on_the_components_with_an_automatic_guide(vectorize):
    model = own_prior(mixture_with("summed-out")).model
    guide = AutoNormal(poutine.block(model, hide=["y"]))
    elbo = TraceEnum_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    assert torch.tensor([svi.step(X) for _ in range(3)]).isfinite().all()
    assert guide.median(X)["component_loc"].shape == (3, LATENT)
    fit = from_pyro_svi((model, guide), model_args=(X,), num_samples=2)
    assert fit["posterior"]["component_loc"].shape == (1, 2, 3, LATENT)
    assert fit["posterior"]["y"].shape == (1, 2, 12)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("vectorize", [False, True])
def test_prior_on_the_components_beside_the_own_guide(form, vectorize):
    mixture = own_prior(mixture_with(form))

    def guide(x):
        loc = pyro.param("component_mean", torch.zeros(3, LATENT))
        pyro.sample("component_loc", dist.Normal(loc, 0.1).to_event(2))
        return mixture.guide(x)

    elbo = TraceEnum_ELBO(num_particles=2, vectorize_particles=vectorize)
    svi = SVI(mixture.model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    assert torch.tensor([svi.step(X) for _ in range(3)]).isfinite().all()
    assert pyro.param("component_mean").abs().min() > 0


@pytest.mark.parametrize("form", FORMS[1:])
@torch.no_grad()
def test_batched_components_are_a_loop_over_them(form):
    """Draws of the components along the left dimensions, as of vectorized particles, with one for the plate."""
    mixture = mixture_with(form).double()
    values, z = torch.randn(5, 1, 3, LATENT).double(), torch.randn(5, 12, LATENT).double()
    y = torch.randint(3, (5, 12))

    def densities(loc, y, z):
        mixture.component_loc = PyroSample(lambda self: loc)
        for function in (mixture.model, mixture.guide):
            trace = poutine.trace(poutine.condition(function, data={"y": y, "z": z})).get_trace(X.double())
            trace.compute_log_prob()
            yield from (trace.nodes[name]["log_prob"] for name in ("y", "z", "x") if name in trace.nodes)

    loop = zip(*(densities(values[i, 0], y[i], z[i]) for i in range(5)), strict=True)
    for batched, ones in zip(densities(values, y, z), loop, strict=True):
        torch.testing.assert_close(batched.expand(5, 12), torch.stack(ones))


def test_refuses_a_prior_where_the_guide_reads_the_components():
    mixture = mixture_with("factor")
    mixture.component_loc = PyroSample(dist.Normal(0.0, 1.0).expand([3, LATENT]).to_event(2))
    for call in (mixture.guide, mixture.encode, mixture.initialize_components):
        with pytest.raises(ValueError, match=r"Expected components without a prior in .*\['component_loc'\]"):
            call(X)
    mixture = mixture_with("summed-out")
    mixture.component_loc = PyroSample(dist.Normal(0.0, 1.0).expand([3, LATENT]).to_event(2))
    with pytest.raises(ValueError, match="Expected components without a prior in initialize_components"):
        mixture.initialize_components(X)


@pytest.mark.parametrize("form", ["factor", "summed-out"])
def test_a_second_mixture_of_the_same_parts_is_told(form):
    first = mixture_with(form)
    options = {"num_components": 3, "enumerate_in": first.enumerate_in}
    vae = VAE(first.decoder, first.encoder, first.likelihood)
    mixtures = [MixtureVAE(first.decoder, first.encoder, first.likelihood, **options) for _ in range(2)]
    with warnings.catch_warnings():
        SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(X)
        SVI(mixtures[0].model, mixtures[0].guide, pyro.optim.Adam({"lr": 1e-2}), TraceEnum_ELBO()).step(X)
    with pytest.warns(UserWarning, match="another model's 'component_l"):
        SVI(mixtures[1].model, mixtures[1].guide, pyro.optim.Adam({"lr": 1e-2}), TraceEnum_ELBO()).step(X)
    other = MixtureVAE(first.decoder, first.encoder, likelihoods.Normal(0.5, "learned"), **options)
    other.component_loc, other.component_log_scale = mixtures[0].component_loc, mixtures[0].component_log_scale
    with pytest.warns(UserWarning, match=r"another model's 'likelihood.log_scale'"):
        other.guide(X)


def test_a_vae_refuses_an_encoder_of_components():
    vae = VAE(
        DECODERS["plain"](),
        MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(4,), num_components=3),
        likelihoods.Normal(),
    )
    for call in (vae.guide, vae.encode):
        with pytest.raises(ValueError, match="Expected encoder to return location and scale"):
            call(X)


@pytest.mark.parametrize("form", ENUMERATED)
def test_divergence_of_the_components(form):
    mixture = perturb(mixture_with(form, weights="learned"), 0.3)
    kl = diagnostics.kl_divergence(mixture.model, mixture.guide, X, site="y")
    assert kl.estimator == "analytic"
    prior = Categorical(logits=mixture.component_logits.detach())
    exact = kl_divergence(Categorical(mixture.predict_component(X)), prior)
    torch.testing.assert_close(kl.values, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_summary_of_collapse(form):
    mixture = mixture_with(form)
    summary = diagnostics.collapse_summary(mixture.model, mixture.guide, X[:6], num_samples=3)
    assert set(summary.site.values) == {"y", "z"}
    assert summary.elbo <= summary.log_likelihood
    if form in ENUMERATED:
        assert summary.kl.sel(unit="y") > 0
