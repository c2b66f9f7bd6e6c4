"""What is special to the variational autoencoder: its parts, priors on its weights, and what it refuses."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import DECODERS, EVENT, LATENT
from helpers.models import X, vae_with
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample

from pyro_ilvae import (
    VAE,
    ConvEncoder,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    from_pyro_svi,
    likelihoods,
    mlp,
)


@pytest.mark.slow
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
    for _ in range(2):  # nothing below a last layer that starts with 0 moves in the first step
        optimizer.zero_grad()
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


def parameter_of(decoder, name):
    """The module that holds a parameter of the decoder's (outer) ICNN, and the parameter's name in it."""
    icnn = decoder.map.icnn if hasattr(decoder, "map") else decoder.outer.icnn
    return (icnn.hidden_weights[0], "raw") if name == "raw" else (icnn, name)


@pytest.mark.slow
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


def test_analytic_and_sampled_kl_agree():
    vae = vae_with()
    analytic = TraceMeanField_ELBO(num_particles=4000, vectorize_particles=True).loss(vae.model, vae.guide, X)
    sampled = Trace_ELBO(num_particles=4000, vectorize_particles=True).loss(vae.model, vae.guide, X)
    assert analytic == pytest.approx(sampled, rel=5e-3)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0], r"Expected x of shape \(..., 4, 2\), got \(4, 2\)|Expected data at site 'x'"),
        (X[:, :3], r"Expected x of shape \(..., 4, 2\), got \(12, 3, 2\)"),
        (X.clone().fill_(float("nan")), "Expected finite data at site 'x', got 96 NaN"),
    ],
)
def test_refuses_data(x, message):
    vae = vae_with(data_size=12)
    with pytest.raises(ValueError, match=message):
        Trace_ELBO().loss(vae.model, vae.guide, x)


def test_event_shape_of_a_decoder_may_be_a_number():
    decoder = torch.nn.Linear(LATENT, 8)
    decoder.latent_dim, decoder.event_shape = LATENT, 8
    vae = VAE(decoder, MLPEncoder(event_shape=8, latent_dim=LATENT, hidden_features=(4,)), likelihoods.Normal())
    assert vae.event_shape == (8,)
    assert vae.reconstruct(torch.randn(3, 8)).shape == (3, 8)


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
            lambda: ConvEncoder(event_shape=(8,), latent_dim=2),
            r"Expected event_shape \(H, W\) or \(C, H, W\), got \(8,\)",
        ),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.slow
def test_large_counts_train():
    x = torch.distributions.NegativeBinomial(0.2, logits=torch.tensor(9.0)).sample((12, *EVENT))
    for likelihood in (
        likelihoods.Poisson(),
        likelihoods.NegativeBinomial(torch.ones(EVENT)),
        likelihoods.ZeroInflatedPoisson(),
        likelihoods.ZeroInflatedNegativeBinomial(),
    ):
        pyro.clear_param_store()
        encoder = MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(16,), input_transform=torch.log1p)
        vae = VAE(DECODERS["projected-mlp"](), encoder, likelihood)
        svi = SVI(vae.model, vae.guide, pyro.optim.ClippedAdam({"lr": 1e-2}), Trace_ELBO())
        losses = [svi.step(x) for _ in range(100)]
        assert losses[-1] < losses[0]
