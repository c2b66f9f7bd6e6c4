"""The variational autoencoder as a Pyro program: the contract of model and guide, and its own methods."""

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import DECODERS, EVENT, LATENT
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample
from pyro.poutine.util import prune_subsample_sites

from pyro_ilvae import (
    VAE,
    AnnealedELBO,
    ConvEncoder,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    from_pyro_svi,
    likelihoods,
    mlp,
)
from pyro_ilvae.diagnostics import collapse_summary

X = torch.randn(12, *EVENT, generator=torch.Generator().manual_seed(0))


def vae_with(name="projected-mlp", data_size=None, likelihood=None, encoder=None):
    return VAE(
        DECODERS[name](),
        encoder or MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(16,)),
        likelihood or likelihoods.Normal(0.5, "learned"),
        data_size=data_size,
    )


@pytest.mark.parametrize("name", DECODERS)
def test_sites_and_plates(name):
    vae = vae_with(name)
    guide_trace = poutine.trace(vae.guide).get_trace(X)
    trace = prune_subsample_sites(poutine.trace(poutine.replay(vae.model, trace=guide_trace)).get_trace(X))
    trace.compute_log_prob()
    assert {node for node in trace.nodes if trace.nodes[node]["type"] == "sample"} == {"z", "x"}
    for site, event_shape in (("z", (LATENT,)), ("x", EVENT)):
        assert trace.nodes[site]["fn"].event_shape == event_shape
        assert [frame.name for frame in trace.nodes[site]["cond_indep_stack"]] == ["data"]
        assert trace.nodes[site]["log_prob"].shape == (12,)
    assert trace.nodes["x"]["is_observed"]


@pytest.mark.parametrize("name", DECODERS)
def test_every_parameter_is_trained_and_evaluation_needs_no_gradients(name):
    vae = vae_with(name, data_size=len(X))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    before = {key: value.clone() for key, value in vae.named_parameters()}
    for _ in range(3):
        svi.step(X)
    assert not [key for key, value in vae.named_parameters() if torch.equal(before[key], value)]
    with torch.inference_mode():
        assert svi.evaluate_loss(X) > 0


@pytest.mark.parametrize("name", DECODERS)
def test_parts_may_have_been_tried_out_before(name, local_params):
    backbone = mlp(LATENT, (4,), 8)
    backbone(torch.zeros(1, LATENT))
    decoder = (
        DECODERS[name]()
        if name != "projected-mlp"
        else ProjectedDecoder(backbone, latent_dim=LATENT, event_shape=EVENT)
    )
    encoder, likelihood = (
        MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(4,)),
        likelihoods.Normal(0.5, "learned"),
    )
    likelihood(decoder(encoder(X)[0]))
    vae = VAE(decoder, encoder, likelihood)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    before = {key: value.clone() for key, value in vae.named_parameters()}
    Trace_ELBO()(vae.model, vae.guide)(X).backward()
    optimizer.step()
    assert not [key for key, value in vae.named_parameters() if torch.equal(before[key], value)]
    if not local_params:
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        before = {key: value.clone() for key, value in vae.named_parameters()}
        svi.step(X)
        assert not [key for key, value in vae.named_parameters() if torch.equal(before[key], value)]


def test_plain_modules_are_trained_too():
    decoder = torch.nn.Sequential(torch.nn.Linear(LATENT, 8), torch.nn.Unflatten(-1, EVENT))
    vae = VAE(
        decoder,
        MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(4,)),
        likelihoods.Normal(),
        event_shape=EVENT,
    )
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    before = decoder[0].weight.clone()
    svi.step(X)
    assert not torch.equal(before, decoder[0].weight)


@pytest.mark.parametrize("name", DECODERS)
def test_vectorized_particles_agree_with_a_loop(name):
    vae = vae_with(name)
    losses = {}
    for vectorize in (True, False):
        elbo = Trace_ELBO(num_particles=200, vectorize_particles=vectorize)
        draws = torch.tensor([elbo.loss(vae.model, vae.guide, X) for _ in range(4)])
        losses[vectorize] = draws.mean(), draws.std() / 2
    difference = abs(losses[True][0] - losses[False][0])
    assert difference < 5 * (losses[True][1] + losses[False][1]) + 1e-3 * abs(losses[True][0])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(name, parallel):
    vae = vae_with(name)
    posterior = Predictive(vae.model, guide=vae.guide, num_samples=7, parallel=parallel)
    draws = posterior(X)
    assert draws["x"].shape[-2:] == EVENT
    assert draws["x"].numel() == 7 * X.numel()
    unconditioned = Predictive(poutine.uncondition(vae.model), num_samples=7, parallel=parallel)(X)
    assert unconditioned["x"].shape[-3:] == (12, *EVENT)
    prior = Predictive(vae.model, num_samples=7, parallel=parallel)(num_data=5)
    assert prior["x"].shape[-3:] == (5, *EVENT)
    assert prior["z"].shape[-2:] == (5, LATENT)


def test_without_data_guide_is_the_prior():
    vae = vae_with()
    trace = poutine.trace(vae.guide).get_trace(num_data=4)
    fn = trace.nodes["z"]["fn"]
    torch.testing.assert_close(fn.mean, torch.zeros(4, LATENT))
    torch.testing.assert_close(fn.variance, torch.ones(4, LATENT))
    assert vae.model().shape == (1, *EVENT)


@pytest.mark.parametrize("name", ["plain", "composition-random", "projected-conv"])
def test_torch_optimizer_trains_with_global_and_local_parameters(name, local_params):
    vae = vae_with(name)
    loss_fn = AnnealedELBO(Trace_ELBO(), beta=0.5)(vae.model, vae.guide)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    before = {key: value.clone() for key, value in vae.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn(X).backward()
        optimizer.step()
    assert not [key for key, value in vae.named_parameters() if torch.equal(before[key], value)]
    assert bool(pyro.get_param_store()) != local_params


@pytest.mark.parametrize("name", DECODERS)
def test_state_dict_pickle_and_copy_restore_the_fitted_model(name, local_params):
    vae = vae_with(name)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    Trace_ELBO()(vae.model, vae.guide)(X).backward()
    optimizer.step()
    expected = vae.reconstruct(X)
    restored = vae_with(name)
    restored.load_state_dict(vae.state_dict())
    pyro.clear_param_store()
    for other in (restored, copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        pyro.clear_param_store()
        torch.testing.assert_close(other.reconstruct(X), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(name, dtype):
    vae = vae_with(name).to(dtype)
    x = X.to(dtype)
    assert Trace_ELBO().differentiable_loss(vae.model, vae.guide, x).dtype == dtype
    assert all(value.dtype == dtype for value in (*vae.encode(x), vae.reconstruct(x), vae.sample_prior(3)))


def parameter_of(decoder, name):
    """The module that holds a parameter of the decoder's (outer) ICNN, and the parameter's name in it."""
    icnn = decoder.map.icnn if hasattr(decoder, "map") else decoder.outer.icnn
    return (icnn.hidden_weights[0], "raw") if name == "raw" else (icnn, name)


@pytest.mark.parametrize("name", ["composition-identity", "composition-random", "projected-mlp", "projected-conv"])
@pytest.mark.parametrize("weight", ["input_weight", "bias", "raw", "output_weight_raw", "slope"])
def test_prior_on_a_decoder_weight(name, weight):
    vae = vae_with(name)
    module, attribute = parameter_of(vae.decoder, weight)
    shape = getattr(module, attribute).shape
    setattr(module, attribute, PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))))
    guide = AutoNormal(vae.model)
    svi = SVI(vae.model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert torch.tensor([svi.step(X) for _ in range(3)]).isfinite().all()
    [site] = [key for key in guide.median(X) if key.endswith(attribute)]
    assert guide.median(X)[site].shape == shape
    vectorized = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    assert torch.tensor(vectorized.loss(vae.model, guide, X)).isfinite()
    for parallel in (False, True):
        draws = Predictive(vae.model, guide=guide, num_samples=5, parallel=parallel)(X)
        assert draws[site].numel() == 5 * shape.numel()
        assert draws["x"].numel() == 5 * X.numel()
    fit = from_pyro_svi((vae.model, guide), model_args=(X,), num_samples=2)
    assert fit["posterior"][site].shape == (1, 2, *shape)


@pytest.mark.parametrize("weight", ["input_weight", "bias", "raw", "output_weight_raw", "slope"])
def test_batched_weights_are_a_loop_over_them(weight):
    """Draws of a weight along the left dimensions, as of vectorized particles, with a dimension 1 for the plate."""
    for name in ("composition-random", "projected-mlp"):
        decoder = DECODERS[name]().double()
        module, attribute = parameter_of(decoder, weight)
        values = torch.randn(5, 1, *getattr(module, attribute).shape, dtype=torch.float64)
        z = torch.randn(5, 7, LATENT, dtype=torch.float64)
        setattr(module, attribute, PyroSample(lambda self, values=values: values))
        batched = decoder(z)
        for i in range(5):
            setattr(module, attribute, PyroSample(lambda self, value=values[i, 0]: value))
            torch.testing.assert_close(batched[i], decoder(z[i]), rtol=1e-9, atol=1e-9)


def elbo_at(vae, x, z):
    """The ELBO's terms as Pyro scales them, at given latent values."""
    model_trace = poutine.trace(poutine.condition(vae.model, data={"z": z})).get_trace(x)
    guide_trace = poutine.trace(poutine.condition(vae.guide, data={"z": z})).get_trace(x)
    return model_trace.log_prob_sum() - guide_trace.log_prob_sum()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 6])
@torch.no_grad()
def test_minibatch_elbo_is_unbiased_for_the_data_set(batch_size):
    vae = vae_with(data_size=len(X)).double()
    x, z = X.double(), torch.randn(12, LATENT, dtype=torch.float64)
    # The mean over all batches of one size, with the same latent values, is the ELBO of the data set exactly.
    batches = [elbo_at(vae, *batch) for batch in zip(x.split(batch_size), z.split(batch_size), strict=True)]
    torch.testing.assert_close(torch.stack(batches).mean(), elbo_at(vae, x, z))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@torch.no_grad()
def test_minibatch_loss_is_scaled_to_the_data_set(elbo):
    vae, unscaled = vae_with(data_size=len(X)), vae_with(data_size=None)
    unscaled.load_state_dict(vae.state_dict())
    losses = []
    for one in (vae, unscaled):
        pyro.set_rng_seed(1)
        losses.append(elbo(num_particles=3).loss(one.model, one.guide, X[:4]))
    assert losses[0] == pytest.approx(3 * losses[1])


def test_analytic_and_sampled_kl_agree():
    vae = vae_with()
    analytic = TraceMeanField_ELBO(num_particles=4000, vectorize_particles=True).loss(vae.model, vae.guide, X)
    sampled = Trace_ELBO(num_particles=4000, vectorize_particles=True).loss(vae.model, vae.guide, X)
    assert analytic == pytest.approx(sampled, rel=5e-3)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_methods_do_not_depend_on_the_batch_size(batch_size):
    vae = vae_with(
        "projected-conv", encoder=ConvEncoder(event_shape=EVENT, latent_dim=LATENT, channels=(4,), hidden_features=(8,))
    )
    for whole, batched in zip(vae.encode(X), vae.encode(X, batch_size), strict=True):
        torch.testing.assert_close(whole, batched)
    torch.testing.assert_close(vae.reconstruct(X), vae.reconstruct(X, batch_size))
    assert vae.sample_prior(7, batch_size).shape == (7, *EVENT)
    assert not vae.sample_prior(2, mean=True).requires_grad


@pytest.mark.parametrize(
    ("likelihood", "x"),
    [
        (likelihoods.Bernoulli(), torch.randint(2, (12, *EVENT))),
        (likelihoods.Bernoulli(), torch.rand(12, *EVENT) > 0.5),
        (likelihoods.Poisson(), torch.randint(9, (12, *EVENT))),
        (likelihoods.NegativeBinomial(), torch.randint(9, (12, *EVENT)).float()),
        (likelihoods.ContinuousBernoulli(), torch.rand(12, *EVENT)),
        (likelihoods.ContinuousBernoulli(), torch.randint(2, (12, *EVENT))),
        (likelihoods.Normal(), torch.rand(12, *EVENT) > 0.5),
        (likelihoods.Categorical(2), torch.randint(2, (12, 4))),
        (lambda eta, x=None: dist.StudentT(4.0, eta, 0.5), X),
    ],
)
def test_every_likelihood_trains(likelihood, x):
    vae = VAE(
        DECODERS["projected-mlp"](),
        MLPEncoder(event_shape=x.shape[1:], latent_dim=LATENT, hidden_features=(8,)),
        likelihood,
    )
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert torch.tensor([svi.step(x) for _ in range(3)]).isfinite().all()
    assert vae.reconstruct(x).shape[0] == 12
    assert vae.sample_prior(2).shape == (2, *x.shape[1:])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.double(), "Expected data at site 'x' of dtype torch.float32, as the model, got torch.float64"),
        (X.to(torch.complex64), "of dtype torch.float32, as the model, got torch.complex64"),
        (X[0], r"Expected x of shape \(..., 4, 2\), got \(4, 2\)|Expected data at site 'x'"),
        (X[:, :3], r"Expected x of shape \(..., 4, 2\), got \(12, 3, 2\)"),
        (X[:0], "with N >= 1"),
        (X.numpy(), "as a tensor of shape"),
        (X.clone().fill_(float("nan")), "Expected finite data at site 'x', got 96 NaN"),
        (torch.cat([X, X]), "Expected at most data_size = 12 data at site 'x', got 24"),
    ],
)
def test_refuses_data(x, message):
    vae = vae_with(data_size=12)
    with pytest.raises(ValueError, match=message):
        Trace_ELBO().loss(vae.model, vae.guide, x)


def test_model_names_the_shape_that_its_likelihood_expects():
    vae = vae_with(encoder=MLPEncoder(event_shape=(3, 2), latent_dim=LATENT, hidden_features=(4,)))
    with pytest.raises(ValueError, match=r"Expected data at site 'x' of shape \(N, 4, 2\), got \(12, 3, 2\)"):
        vae.model(X[:, :3])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: VAE(DECODERS["plain"](), MLPEncoder(event_shape=8, latent_dim=2), likelihoods.Normal()),
            "Expected one latent_dim, got",
        ),
        (
            lambda: VAE(torch.nn.Linear(3, 8), MLPEncoder(event_shape=8, latent_dim=3), likelihoods.Normal()),
            "Expected event_shape as an argument",
        ),
        (
            lambda: VAE(
                MLPDecoder(latent_dim=3, event_shape=8),
                MLPEncoder(event_shape=8, latent_dim=3),
                likelihoods.Normal(),
                event_shape=9,
            ),
            "Expected one event_shape",
        ),
        (
            lambda: VAE(
                MLPDecoder(latent_dim=3, event_shape=8),
                MLPEncoder(event_shape=8, latent_dim=3),
                likelihoods.Normal(),
                data_size=0,
            ),
            "data_size",
        ),
        (lambda: vae_with().model(num_data=0), "num_data"),
        (lambda: vae_with().encode(X, batch_size=0), "batch_size"),
        (lambda: vae_with().sample_prior(0), "num_samples"),
        (
            lambda: ConvEncoder(event_shape=(8,), latent_dim=2),
            r"Expected event_shape \(H, W\) or \(C, H, W\), got \(8,\)",
        ),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_methods_run_in_evaluation_mode():
    encoder = MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(16,))
    encoder.network.insert(1, torch.nn.BatchNorm1d(16))
    encoder.network.insert(2, torch.nn.Dropout(0.5))
    vae = vae_with(encoder=encoder)
    before = copy.deepcopy(vae.state_dict())
    for whole, again in zip(vae.encode(X), vae.encode(X), strict=True):
        assert torch.equal(whole, again)
    vae.reconstruct(X)
    collapse_summary(vae.model, vae.guide, X, num_samples=2)
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())
    assert all(module.training for module in vae.modules())


def test_a_second_model_under_the_names_of_the_first_is_told():
    for expectation in (warnings.catch_warnings(), pytest.warns(UserWarning, match="another model's 'decoder.")):
        vae = vae_with()
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        with expectation:
            svi.step(X)


def test_large_counts_train():
    x = torch.distributions.NegativeBinomial(0.2, logits=torch.tensor(9.0)).sample((12, *EVENT))
    for likelihood in (likelihoods.Poisson(), likelihoods.NegativeBinomial()):
        pyro.clear_param_store()
        encoder = MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(16,), input_transform=torch.log1p)
        vae = VAE(DECODERS["projected-mlp"](), encoder, likelihood)
        svi = SVI(vae.model, vae.guide, pyro.optim.ClippedAdam({"lr": 1e-2}), Trace_ELBO())
        losses = [svi.step(x) for _ in range(100)]
        assert losses[-1] < losses[0]
