"""Missing entries: left out of density and gradient, seen by the encoder, imputed; and what is refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import EVENT, LATENT, perturb
from helpers.models import FORMS, NUM_COMPONENTS, enumerated_in
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyro_ilvae import (
    VAE,
    ConvEncoder,
    GraphSVI,
    JointOptim,
    MixtureVAE,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    from_pyro_svi,
    likelihoods,
)
from pyro_ilvae.diagnostics import collapse_summary, evidence, fisher_bound, posterior_fisher_divergence

N, D = 12, 6
LIKELIHOODS = {
    "normal": (lambda: likelihoods.Normal(0.5), lambda: torch.randn(N, D)),
    "normal-features": (lambda: likelihoods.Normal(torch.rand(D) + 0.5), lambda: torch.randn(N, D)),
    "bernoulli": (likelihoods.Bernoulli, lambda: torch.bernoulli(torch.rand(N, D))),
    "continuous": (likelihoods.ContinuousBernoulli, lambda: torch.rand(N, D)),
    "poisson": (likelihoods.Poisson, lambda: torch.poisson(3 * torch.rand(N, D))),
    "negative-binomial": (likelihoods.NegativeBinomial, lambda: torch.poisson(3 * torch.rand(N, D))),
    "categorical": (lambda: likelihoods.Categorical(3), lambda: torch.randint(0, 3, (N, D))),
}
EVERY_LIKELIHOOD = pytest.mark.parametrize("name", LIKELIHOODS)


def a_mask(seed=0, share=0.3):
    mask = torch.rand(N, D, generator=torch.Generator().manual_seed(seed)) > share
    mask[:, 0] = True
    return mask


def build(name="normal", *, missing="ignore", takes_mask=True, kind=None, **options):
    make, data = LIKELIHOODS[name]
    torch.manual_seed(0)
    event_shape = (D, 3) if name == "categorical" else (D,)
    decoder = MLPDecoder(latent_dim=2, event_shape=event_shape, hidden_features=(8,))
    own = NUM_COMPONENTS if kind == "components" else None
    encoder = MLPEncoder(event_shape=D, latent_dim=2, hidden_features=(8,), takes_mask=takes_mask, num_components=own)
    if kind in FORMS:
        model = MixtureVAE(
            decoder, encoder, make(), NUM_COMPONENTS, enumerate_in=enumerated_in(kind), missing=missing, **options
        )
    else:
        model = VAE(decoder, encoder, make(), missing=missing, **options)
    return perturb(model, 0.1), data()


def density(model, x, z, **given):
    trace = poutine.trace(poutine.condition(model.model, {"z": z})).get_trace(x, **given)
    trace.compute_log_prob()
    return trace.nodes["x"]["log_prob"]


# The density.


@EVERY_LIKELIHOOD
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_density_is_of_the_other_entries_alone(name, seed):
    model, x = build(name)
    mask, z = a_mask(seed, 0.5), torch.randn(N, 2)
    fn = model.likelihood(model.decoder(z))
    expected = torch.where(mask, fn.log_prob(x), 0.0).sum(-1)
    torch.testing.assert_close(density(model, x, z, mask=mask), expected)
    other = torch.where(mask, x, x.flip(0))
    torch.testing.assert_close(density(model, other, z, mask=mask), expected, rtol=0, atol=0)
    if x.is_floating_point():
        gaps = torch.where(mask, x, torch.nan)
        torch.testing.assert_close(density(model, gaps, z), expected, rtol=0, atol=0)
        torch.testing.assert_close(density(model, gaps, z, mask=mask.roll(1, 0) | mask), expected, rtol=0, atol=0)


@EVERY_LIKELIHOOD
def test_missing_entries_of_a_datum_change_no_other_datum_and_no_gradient(name):
    model, x = build(name)
    gradients = []
    for own in (x, torch.where(a_mask(), x, x.flip(0))):
        pyro.set_rng_seed(0)
        loss = Trace_ELBO().differentiable_loss(model.model, model.guide, own, mask=a_mask())
        gradients.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)
        assert one.isfinite().all()
    z, one_less = torch.randn(N, 2), a_mask()
    one_less[4, 1:4] = False
    before, after = density(model, x, z, mask=a_mask()), density(model, x, z, mask=one_less)
    assert torch.equal(before[torch.arange(N) != 4], after[torch.arange(N) != 4])


def test_all_entries_there_is_the_model_without_a_mask():
    model, x = build()
    for kind in ("model", "guide"):
        for mask in (torch.ones(N, D, dtype=torch.bool), None):
            assert getattr(model, kind)(x, mask=mask).isfinite().all()
    z = torch.randn(N, 2)
    plain, _ = build(missing="raise", takes_mask=True)
    torch.testing.assert_close(density(model, x, z), density(plain, x, z))
    torch.testing.assert_close(model.encode(x)[0], plain.encode(x)[0])


def test_elbo_of_a_linear_gaussian_model_against_its_closed_form():
    """At the exact posterior of the observed entries the ELBO is their log density, which is Normal."""
    torch.manual_seed(0)
    weight, offset, scale = torch.randn(D, 2).double(), torch.randn(D).double(), 0.7

    class Linear(torch.nn.Module):
        latent_dim, event_shape = 2, torch.Size([D])

        def forward(self, z):
            return z @ weight.T + offset

    class Exact(torch.nn.Module):
        latent_dim = 2

        def forward(self, x, mask):
            rows = mask[..., None] * weight  # a feature that is missing says nothing
            precision = torch.eye(2).double() + rows.mT @ rows / scale**2
            mean = torch.linalg.solve(precision, (rows.mT @ (x - offset)[..., None] / scale**2)[..., 0])
            return mean, precision

    x = torch.randn(N, D).double()
    mask = a_mask(share=0.5)
    gaps = torch.where(mask, x, torch.nan)
    model = VAE(Linear(), Exact(), likelihoods.Normal(scale), missing="ignore").double()

    def guide(x):
        mean, precision = model.encoder(torch.where(mask, x, 5.0), mask)
        with pyro.plate("data", N):
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))

    expected = 0.0
    for row, there in zip(x, mask, strict=True):
        rows = weight[there]
        covariance = rows @ rows.T + scale**2 * torch.eye(len(rows)).double()
        expected += dist.MultivariateNormal(offset[there], covariance).log_prob(row[there])
    for seed in range(3):  # the same for every draw
        pyro.set_rng_seed(seed)
        assert -Trace_ELBO().loss(model.model, guide, gaps) == pytest.approx(float(expected), rel=1e-6)


def test_optimal_scale_is_of_the_entries_that_are_there(local_params):
    for scale in (1.0, torch.ones(D)):
        pyro.clear_param_store()
        make = likelihoods.Normal(scale, estimate="optimal")
        eta, x, mask = torch.randn(N, D), torch.randn(N, D), a_mask(share=0.5)
        mask[:, 3] = False
        found = make(eta, x, mask).common_scale
        squares = torch.where(mask, (x - eta).square(), 0.0)
        if isinstance(scale, float):
            torch.testing.assert_close(found, (squares.sum() / mask.sum()).sqrt())
        else:
            expected = (squares.sum(0) / mask.sum(0).clamp(min=1)).sqrt()
            torch.testing.assert_close(found, torch.where(mask.any(0), expected, torch.ones(D)))
        decoder = ProjectedDecoder(
            MLPDecoder(latent_dim=2, event_shape=D), latent_dim=2, event_shape=D, map_features=(4,)
        )
        model = VAE(decoder, MLPEncoder(event_shape=D, latent_dim=2, takes_mask=True), make)
        loss = Trace_ELBO().differentiable_loss(model.model, model.guide, x, mask=a_mask())
        assert loss.isfinite()
        assert make.scale.isfinite().all()


# The encoder, and what follows.


@pytest.mark.parametrize("kind", ["vae", *FORMS])
def test_methods_see_values_and_mask(kind):
    model, x = build(kind=kind)
    mask = a_mask()
    gaps = torch.where(mask, x, torch.nan)
    for name in ("encode", "reconstruct", "predict_component"):
        if hasattr(model, name):
            options = {"seed": 0} if name == "predict_component" else {}
            by_mask = torch.stack([*getattr(model, name)(x, mask=mask, **options)])
            torch.testing.assert_close(torch.stack([*getattr(model, name)(gaps, **options)]), by_mask)
            loader = [{"x": gaps[:5]}, {"x": x[5:], "mask": mask[5:]}]
            if name != "predict_component":
                torch.testing.assert_close(torch.stack([*getattr(model, name)(loader)]), by_mask)
            assert by_mask.isfinite().all()
    other = torch.ones(N, D, dtype=torch.bool)
    assert not torch.allclose(model.encode(x, mask=other)[0], model.encode(x, mask=mask)[0])
    if kind == "vae":
        expected = model.encoder(x.nan_to_num(), mask=mask)[0]
        torch.testing.assert_close(model.encode(x, mask=mask)[0], expected)


def test_imputation_is_closer_than_the_mean():
    """A feature that two others determine is found from them where it is missing."""
    torch.manual_seed(0)
    z = torch.randn(800, 1)
    x = z * torch.tensor([1.0, -1.0, 0.5, 2.0, 1.0, -2.0]) + 0.1 * torch.randn(800, D)
    mask = torch.rand(800, D) > 0.3
    mask[:, 0] |= ~mask.any(1)
    gaps = torch.where(mask, x, torch.nan)
    decoder = ProjectedDecoder(
        MLPDecoder(latent_dim=1, event_shape=D, hidden_features=(16,)), latent_dim=1, event_shape=D, map_features=(8,)
    )
    encoder = MLPEncoder(event_shape=D, latent_dim=1, hidden_features=(32,), takes_mask=True)
    model = VAE(decoder, encoder, likelihoods.Normal(0.3, "learned"), missing="ignore", data_size=800)
    model.initialize(gaps)
    svi = SVI(model.model, model.guide, JointOptim(torch.optim.Adam, {"lr": 3e-3}), TraceMeanField_ELBO())
    for _ in range(300):
        svi.step(gaps[torch.randperm(800)[:100]])
    error = (model.reconstruct(gaps) - x)[~mask].square().mean()
    of_mean = (torch.nanmean(gaps, 0) - x)[~mask].square().mean()
    assert error < 0.25 * of_mean
    assert model.reconstruct(gaps).isfinite().all()


def test_start_from_data_is_near_the_start_without_gaps():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(D, 2)).Q
    x = 3 * torch.randn(3000, 2) @ directions.T + 0.1 * torch.randn(3000, D) + 2
    starts = []
    for options in ({}, {"mask": torch.rand(3000, D) > 0.1}):
        decoder = ProjectedDecoder(
            MLPDecoder(latent_dim=2, event_shape=D), latent_dim=2, event_shape=D, map_features=(4,)
        )
        model = VAE(decoder, MLPEncoder(event_shape=D, latent_dim=2, takes_mask=True), likelihoods.Normal(0.1))
        model.initialize(x, seed=0, **options)
        columns = decoder.frame.embed(torch.eye(2)).detach()
        starts.append((decoder(torch.zeros(1, 2)).detach(), columns.T @ columns))
    torch.testing.assert_close(starts[0][0], starts[1][0], rtol=0, atol=0.2)
    torch.testing.assert_close(starts[0][1], starts[1][1], rtol=0, atol=0.1)


def test_graph_steps_are_those_of_svi_for_other_masks_in_each_step():
    def run(kind, **options):
        pyro.clear_param_store()
        model, x = build(data_size=30)
        pyro.set_rng_seed(0)
        optimizer = JointOptim(torch.optim.Adam, {"lr": 1e-2})
        svi = kind(model.model, model.guide, optimizer, TraceMeanField_ELBO(), **options)
        losses = [float(svi.step(torch.where(a_mask(seed), x, torch.nan))) for seed in range(8)]
        return torch.tensor(losses), getattr(svi, "runs", None)

    expected, _ = run(SVI)
    found, runs = run(GraphSVI, compile=False)
    assert runs == "graph"
    torch.testing.assert_close(found, expected)


def test_diagnostics_and_export():
    model, x = build()
    gaps = torch.where(a_mask(), x, torch.nan)
    summary = collapse_summary(model.model, model.guide, gaps, seed=0)
    loc, scale = model.encode(gaps)
    kl = 0.5 * (loc**2 + scale**2) - scale.log() - 0.5
    torch.testing.assert_close(torch.as_tensor(summary["kl"].values).float(), kl.mean(0))
    found = evidence(model.model, model.guide, gaps, num_samples=3000, seed=0)
    by_mask = evidence(model.model, model.guide, x, model_kwargs={"mask": a_mask()}, num_samples=3000, seed=0)
    torch.testing.assert_close(found.log_likelihood, by_mask.log_likelihood)
    alone = evidence(model.model, model.guide, gaps[2:3], num_samples=3000, seed=1)
    assert float(alone.log_likelihood[0]) == pytest.approx(float(found.log_likelihood[2]), abs=0.3)
    assert posterior_fisher_divergence(model.model, model.guide, gaps, num_samples=50).values.isfinite().all()
    fit = from_pyro_svi((model.model, model.guide), gaps, num_samples=5)
    assert (fit["observed_data"]["x"].isnull().values == ~a_mask().numpy()).all()
    assert fit["posterior_predictive"]["x"].notnull().all()
    with pytest.raises(ValueError, match="Expected finite data at site"):
        from_pyro_svi((build(missing="raise")[0].model, model.guide), gaps, num_samples=5)


def test_bound_of_the_fisher_divergence_with_gaps():
    """Where K = D, each datum has F >= L^2 E ||s||^2, with the score s of the entries that are there."""
    decoder = ProjectedDecoder(
        MLPDecoder(latent_dim=3, event_shape=3), latent_dim=3, event_shape=3, map_features=(8,), inverse_lipschitz=0.7
    )
    encoder = MLPEncoder(event_shape=3, latent_dim=3, takes_mask=True)
    model = perturb(VAE(decoder, encoder, likelihoods.Normal(0.5), missing="ignore"))
    x = torch.randn(8, 3)
    x[torch.arange(8), torch.arange(8) % 3] = torch.nan
    bound = fisher_bound(model.model, model.guide, x, num_samples=200, seed=0)
    assert (bound.ratio >= 1 - 1e-4).all()


# What is refused.


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(N, D), "mask to hold booleans"),
        (torch.ones(N, D - 1, dtype=torch.bool), "mask of shape"),
        (torch.ones(D, dtype=torch.bool), "mask of shape"),
        (torch.ones(N, 1, dtype=torch.bool), "mask of shape"),
        ("ab", "mask to be a tensor"),
        (torch.zeros(N, D, dtype=torch.bool), "at least one entry of each datum at site 'x'"),
        (torch.arange(N)[:, None].expand(N, D) != 3, "row 3"),
    ],
)
@pytest.mark.parametrize("kind", ["vae", "summed-out"])
def test_wrong_masks_name_the_argument_and_the_site(kind, mask, message):
    model, x = build(kind=kind)
    for name in ("model", "guide", "encode", "reconstruct", "create_plates", "initialize"):
        if name == "model" and kind != "vae":  # which needs an objective that enumerates
            continue
        with pytest.raises((ValueError, TypeError), match=f"Expected.*{message}"):
            getattr(model, name)(x, mask=mask)


def test_gaps_where_none_are_expected():
    model, x = build(missing="raise")
    gaps = torch.where(a_mask(), x, torch.nan)
    for call in (model.model, model.guide, model.encode):
        with pytest.raises(ValueError, match="Expected finite data at site 'x'"):
            call(gaps)
        assert call(gaps, mask=a_mask()) is not None
        with pytest.raises(ValueError, match="Expected finite data at site 'x'"):
            call(torch.full_like(x, torch.inf), mask=a_mask())
    with pytest.raises(ValueError, match="takes_mask"):
        build(takes_mask=False)
    without, _ = build(missing="raise", takes_mask=False)
    with pytest.raises(ValueError, match="takes_mask"):
        without.encode(x, mask=a_mask())
    with pytest.raises(ValueError, match="mask=None"):
        without.encoder(x, mask=a_mask())
    with pytest.raises(ValueError, match="mask=None without x"):
        model.model(mask=a_mask())
    with pytest.raises(ValueError, match="missing"):
        build(missing="drop")


def test_data_of_one_dimension_are_told_apart():
    model, _ = build()
    with pytest.raises(ValueError, match="Expected data at site 'x' of shape"):
        model.encode(torch.zeros(D))
    with pytest.raises(ValueError, match="Expected x of shape"):
        model.encode(torch.zeros(D + 1))


def test_what_is_guaranteed_is_said_where_no_entry_is_missing():
    decoder = ProjectedDecoder(MLPDecoder(latent_dim=2, event_shape=D), latent_dim=2, event_shape=D, map_features=(4,))
    encoder = MLPEncoder(event_shape=D, latent_dim=2, takes_mask=True)
    model, x = VAE(decoder, encoder, likelihoods.Normal(0.5), missing="ignore"), torch.randn(N, D)
    summary = collapse_summary(model.model, model.guide, x, seed=0)
    assert summary["guaranteed_floor"].notnull().all()
    summary = collapse_summary(model.model, model.guide, torch.where(a_mask(), x, torch.nan), seed=0)
    assert summary["guaranteed_floor"].isnull().all()
    assert "missing entries" in str(summary.note.values)


def test_a_likelihood_without_a_support():
    """What stands in place of a missing entry is an entry of the same datum, which any support has."""
    decoder = MLPDecoder(latent_dim=2, event_shape=D, hidden_features=(8,))
    encoder = MLPEncoder(event_shape=D, latent_dim=2, hidden_features=(8,), takes_mask=True)
    model = VAE(decoder, encoder, lambda eta, x=None: dist.LogNormal(eta, 1.0), missing="ignore")
    x = torch.rand(N, D) + 0.1
    expected = torch.where(a_mask(), dist.LogNormal(model.decoder(torch.zeros(N, 2)), 1.0).log_prob(x), 0.0).sum(-1)
    torch.testing.assert_close(density(model, torch.where(a_mask(), x, torch.nan), torch.zeros(N, 2)), expected)
    with pytest.raises(TypeError, match="natural_parameters"):
        model.initialize(torch.where(a_mask(), x, torch.nan))


def test_a_scale_that_is_first_seen_later_starts_there():
    likelihood, x = likelihoods.Normal(torch.ones(3), estimate="optimal"), 100 * torch.randn(1000, 3)
    mask = torch.ones(1000, 3, dtype=torch.bool)
    mask[:, 1] = False
    likelihood(torch.zeros(1000, 3), x, mask)
    assert likelihood.num_updates.tolist() == [1, 0, 1]
    likelihood(torch.zeros(1000, 3), x)
    torch.testing.assert_close(likelihood.scale, x.square().mean(0).sqrt())


def test_images_with_gaps():
    encoder = ConvEncoder(event_shape=EVENT, latent_dim=LATENT, channels=(4,), hidden_features=(8,), takes_mask=True)
    decoder = MLPDecoder(latent_dim=LATENT, event_shape=EVENT, hidden_features=(8,))
    model = VAE(decoder, encoder, likelihoods.Bernoulli(), missing="ignore")
    x = torch.bernoulli(torch.rand(5, *EVENT))
    x[:, 0, 0] = torch.nan
    assert model.reconstruct(x).shape == x.shape
    assert Trace_ELBO().loss(model.model, model.guide, x) > 0
