"""The mixture VAE as a Pyro program: the contract of model and guide."""

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import DECODERS, EVENT, LATENT, perturb
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample
from pyro.poutine.util import prune_subsample_sites
from test_mixture import ENUMERATED, FORMS, mixture_with
from torch.distributions import Categorical, kl_divergence

from pyro_ilvae import VAE, AnnealedELBO, MixtureVAE, MLPEncoder, diagnostics, from_pyro_svi, likelihoods

X = torch.randn(12, *EVENT, generator=torch.Generator().manual_seed(0))


def trained_by(step, mixture):
    """Every parameter has moved."""
    before = {key: value.clone() for key, value in mixture.named_parameters()}
    for _ in range(3):
        step()
    assert not [key for key, value in mixture.named_parameters() if torch.equal(before[key], value)]


@pytest.mark.parametrize("form", FORMS)
def test_sites_and_plates(form):
    mixture = mixture_with(form, data_size=30)
    guide_trace = poutine.trace(mixture.guide).get_trace(X)
    trace = prune_subsample_sites(poutine.trace(poutine.replay(mixture.model, trace=guide_trace)).get_trace(X))
    guide_trace = prune_subsample_sites(guide_trace)
    for one, names in ((trace, "yzx"), (guide_trace, "yz" if form in ENUMERATED else "z")):
        one.compute_log_prob()
        assert {node for node in one.nodes if one.nodes[node]["type"] == "sample"} == set(names)
        for site in names:
            assert one.nodes[site]["fn"].event_shape == {"y": (), "z": (LATENT,), "x": EVENT}[site]
            assert [(frame.name, frame.full_size) for frame in one.nodes[site]["cond_indep_stack"]] == [("data", 30)]
            assert one.nodes[site]["log_prob"].shape == (12,)
            assert one.nodes[site]["scale"] == 30 / 12
    assert trace.nodes["x"]["is_observed"]


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "factor") for name in DECODERS), *(("projected-mlp", form) for form in FORMS[1:])]
)
def test_every_parameter_is_trained_and_evaluation_needs_no_gradients(name, form):
    mixture = mixture_with(form, name, weights="learned")
    svi = SVI(mixture.model, mixture.guide, pyro.optim.Adam({"lr": 1e-2}), TraceEnum_ELBO())
    trained_by(lambda: svi.step(X), mixture)
    with torch.inference_mode():
        assert svi.evaluate_loss(X) > 0


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


@pytest.mark.parametrize("form", FORMS)
def test_vectorized_particles_agree_with_a_loop(form):
    mixture, losses = mixture_with(form), {}
    for vectorize in (True, False):
        elbo = TraceEnum_ELBO(num_particles=10, vectorize_particles=vectorize)
        draws = torch.tensor([elbo.loss(mixture.model, mixture.guide, X) for _ in range(8)])
        losses[vectorize] = draws.mean(), draws.var() / 8
    difference = abs(losses[True][0] - losses[False][0])
    assert difference < 5 * (losses[True][1] + losses[False][1]).sqrt()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(form, parallel):
    mixture = mixture_with(form)
    posterior = Predictive(mixture.model, guide=mixture.guide, num_samples=7, parallel=parallel)
    assert posterior(X)["x"].numel() == 7 * X.numel()
    unconditioned = Predictive(poutine.uncondition(mixture.model), num_samples=7, parallel=parallel)(X)
    assert unconditioned["x"].shape == (7, 12, *EVENT)
    for prior in (Predictive(mixture.model, num_samples=7, parallel=parallel), posterior):
        draws = prior(num_data=5)
        shapes = {name: value.shape for name, value in draws.items()}
        assert shapes == {"y": (7, 5), "z": (7, 5, LATENT), "x": (7, 5, *EVENT)}


@pytest.mark.parametrize("form", FORMS)
def test_without_data_guide_is_the_prior(form):
    mixture = perturb(mixture_with(form, weights="learned"))
    trace = poutine.trace(mixture.guide).get_trace(num_data=4)
    z = torch.randn(4, LATENT)
    prior = dist.Normal(mixture.component_loc, mixture.component_log_scale.exp()).to_event(1)
    if form in ENUMERATED:
        y = trace.nodes["y"]["value"]
        torch.testing.assert_close(trace.nodes["y"]["fn"].probs, mixture.component_logits.softmax(-1).expand(4, 3))
        expected = prior.log_prob(z[:, None])[range(4), y]
    else:
        expected = (mixture.component_logits.log_softmax(-1) + prior.log_prob(z[:, None])).logsumexp(-1)
    torch.testing.assert_close(trace.nodes["z"]["fn"].log_prob(z), expected)
    assert mixture.model().shape == (1, *EVENT)


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_pickle_and_copy_restore_the_fitted_model(form, local_params):
    mixture = mixture_with(form, weights="learned")
    optimizer = torch.optim.Adam(mixture.parameters(), lr=1e-2)
    TraceEnum_ELBO()(mixture.model, mixture.guide)(X).backward()
    optimizer.step()

    def evaluated(one):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        return one.reconstruct(X), one.predict_component(X), *one.encode(X), one.sample_prior(3)

    expected = evaluated(mixture)
    restored = mixture_with(form, weights="learned")
    restored.load_state_dict(mixture.state_dict())
    for other in (restored, copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):
        assert all(map(torch.equal, evaluated(other), expected))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(form, dtype):
    mixture, x = mixture_with(form).to(dtype), X.to(dtype)
    assert TraceEnum_ELBO().differentiable_loss(mixture.model, mixture.guide, x).dtype == dtype
    values = (*mixture.encode(x), mixture.reconstruct(x), mixture.predict_component(x), mixture.sample_component(0))
    assert all(value.dtype == dtype for value in values)
    assert not any(value.requires_grad for value in values)


@pytest.mark.parametrize("form", [*ENUMERATED, "summed-out"])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
@torch.no_grad()
def test_minibatch_bound_is_unbiased_for_the_data_set(form, batch_size):
    mixture, x = mixture_with(form, data_size=12).double(), X.double()
    values = {"y": torch.randint(3, (12,)), "z": torch.randn(12, LATENT, dtype=x.dtype)}

    def bound(rows):
        data = {name: value[rows] for name, value in values.items()}
        model, guide = (poutine.condition(function, data=data) for function in (mixture.model, mixture.guide))
        return (
            poutine.trace(model).get_trace(x[rows]).log_prob_sum()
            - poutine.trace(guide).get_trace(x[rows]).log_prob_sum()
        )

    batches = [bound(rows) for rows in torch.arange(12).split(batch_size)]
    torch.testing.assert_close(torch.stack(batches).mean(), bound(torch.arange(12)))


@pytest.mark.parametrize(
    ("likelihood", "x"),
    [
        (likelihoods.Bernoulli(), torch.randint(2, (12, *EVENT))),
        (likelihoods.Poisson(), torch.randint(9, (12, *EVENT))),
        (likelihoods.NegativeBinomial(), torch.randint(9, (12, *EVENT)).float()),
        (likelihoods.Categorical(2), torch.randint(2, (12, 4))),
        (likelihoods.Normal(1.0, "learned"), X),
        (lambda eta, x=None: dist.StudentT(4.0, eta, 0.5), X),
    ],
)
@pytest.mark.parametrize("form", ["factor", "components", "summed-out"])
def test_every_likelihood_trains(likelihood, x, form):
    encoder = MLPEncoder(
        event_shape=x.shape[1:],
        latent_dim=LATENT,
        hidden_features=(8,),
        num_components=3 if form == "components" else None,
    )
    mixture = mixture_with(form, likelihood=likelihood, encoder=encoder)
    svi = SVI(mixture.model, mixture.guide, pyro.optim.Adam({"lr": 1e-3}), TraceEnum_ELBO())
    assert torch.tensor([svi.step(x) for _ in range(3)]).isfinite().all()
    assert mixture.reconstruct(x).shape[0] == 12
    assert mixture.sample_prior(2).shape == mixture.sample_component(2, 2).shape == (2, *x.shape[1:])


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


@pytest.mark.parametrize("form", ["components", "summed-out"])
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


@pytest.mark.parametrize("form", ["components", "summed-out"])
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
    parts = (first.decoder, first.encoder, 3, first.likelihood)
    options = {"enumerate_in": first.enumerate_in}
    vae = VAE(first.decoder, first.encoder, first.likelihood)
    mixtures = [MixtureVAE(*parts, **options) for _ in range(2)]
    with warnings.catch_warnings():
        SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(X)
        SVI(mixtures[0].model, mixtures[0].guide, pyro.optim.Adam({"lr": 1e-2}), TraceEnum_ELBO()).step(X)
    with pytest.warns(UserWarning, match="another model's 'component_l"):
        SVI(mixtures[1].model, mixtures[1].guide, pyro.optim.Adam({"lr": 1e-2}), TraceEnum_ELBO()).step(X)
    other = MixtureVAE(*parts[:3], likelihoods.Normal(0.5, "learned"), **options)
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_draws_for_arviz_have_both_sites(form, batch_size):
    mixture = mixture_with(form)
    fit = from_pyro_svi((mixture.model, mixture.guide), model_args=(X,), num_samples=3, batch_size=batch_size)
    for group in ("posterior", "prior"):
        assert fit[group]["y"].dims == ("chain", "draw", "data")
        assert fit[group]["z"].shape == (1, 3, 12, LATENT)
    assert fit["posterior_predictive"]["x"].shape == (1, 3, 12, *EVENT)
    assert fit["log_likelihood"]["x"].shape == (1, 3, 12)


@pytest.mark.parametrize("form", ENUMERATED)
def test_divergence_of_the_components(form):
    mixture = perturb(mixture_with(form, weights="learned"), 0.3)
    kl = diagnostics.kl_divergence(mixture.model, mixture.guide, X, site="y")
    assert kl.estimator == "analytic"
    prior = Categorical(logits=mixture.component_logits.detach())
    exact = kl_divergence(Categorical(mixture.predict_component(X)), prior)
    torch.testing.assert_close(kl.values, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_summary_of_collapse(form):
    mixture = mixture_with(form)
    summary = diagnostics.collapse_summary(mixture.model, mixture.guide, X[:6], num_samples=3)
    assert set(summary.site.values) == {"y", "z"}
    assert summary.elbo <= summary.log_likelihood
    if form in ENUMERATED:
        assert summary.kl.sel(unit="y") > 0
