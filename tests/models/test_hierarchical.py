"""The model with layers: against the same model and guides written by hand, and closed forms of linear ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import EVENT, LATENT, perturb
from helpers.estimates import assert_within
from helpers.models import X, hierarchy_with, layer_of
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import MultivariateNormal

from pyro_ilvae import (
    VAE,
    AnnealedELBO,
    HierarchicalVAE,
    Layer,
    MLPDecoder,
    MLPEncoder,
    Nats,
    from_pyro_svi,
    likelihoods,
    schedules,
)
from pyro_ilvae.diagnostics import active_units, evidence, kl_divergence, kl_per_dimension
from pyro_ilvae.models import hierarchical

GUIDES = ("bottom_up", "top_down")
both = pytest.mark.parametrize("inference", GUIDES)


def three_layers(inference, **options):
    layers = [layer_of(LATENT, 2, event_dim=1), layer_of(2, 1)]
    return perturb(hierarchy_with(inference, layers=layers, **options), 0.3).double()


# The same in plain Pyro.


def by_hand(vae, weights):
    """Model and guides of two steps above the decoder, the sites weighted."""
    lower, upper = vae.layers

    def weighted(name, loc, scale):
        with poutine.scale(scale=weights[name]):
            return pyro.sample(name, dist.Normal(loc, scale).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            z3 = weighted("z3", torch.zeros(len(x), 1).to(x), torch.ones(1).to(x))
            z2 = weighted("z2", upper.decoder(z3), upper.noise.scale)
            z1 = weighted("z1", lower.decoder(z2), lower.noise.scale)
            pyro.sample("x", dist.Normal(vae.decoder(z1), vae.likelihood.scale).to_event(len(EVENT)), obs=x)

    def bottom_up(x):
        with pyro.plate("data", len(x)):
            z1 = weighted("z1", *vae.encoder(x))
            z2 = weighted("z2", *lower.encoder(z1))
            weighted("z3", *upper.encoder(z2))

    def top_down(x):
        m1, s1 = vae.encoder(x)
        m2, s2 = lower.encoder(m1)
        m3, s3 = upper.encoder(m2)
        with pyro.plate("data", len(x)):
            z3 = weighted("z3", m3, s3)
            z2 = weighted("z2", *times(upper.decoder(z3), upper.noise.scale, m2, s2))
            weighted("z1", *times(lower.decoder(z2), lower.noise.scale, m1, s1))

    return model, bottom_up if vae.inference == "bottom_up" else top_down


def times(loc, scale, other_loc, other_scale):
    """The product of two Normal densities, by their precisions."""
    precisions = scale**-2, other_scale**-2
    total = precisions[0] + precisions[1]
    return (loc * precisions[0] + other_loc * precisions[1]) / total, total**-0.5


@both
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("beta", [None, {"z1": 0.7, "z2": 0.3, "z3": 1.7}])
def test_loss_and_gradients_are_those_of_plain_pyro(inference, objective, beta):
    if inference == "bottom_up" and objective is TraceMeanField_ELBO:
        pytest.skip("wrong for this guide, and refused")
    found = []
    with pyro.settings.context(module_local_params=True):
        vae = three_layers(inference)
        x = X.double()
        elbo = objective(num_particles=2) if beta is None else AnnealedELBO(objective(num_particles=2), beta)
        for loss, pair in (
            (elbo, (vae.model, vae.guide)),
            (objective(num_particles=2), by_hand(vae, beta or dict.fromkeys(("z1", "z2", "z3"), 1.0))),
        ):
            pyro.set_rng_seed(1)
            value = loss.differentiable_loss(*pair, x)
            found.append((value, *torch.autograd.grad(value, list(vae.parameters()))))
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-8)


def test_one_weight_may_follow_a_schedule():
    vae, beta = hierarchy_with("top_down"), schedules.linear(0.0, 1.0, num_steps=4)
    annealed, plain = AnnealedELBO(Trace_ELBO(), beta={"z1": 1.0, "z2": beta}), Trace_ELBO()
    losses = []
    for _ in range(5):
        pyro.set_rng_seed(1)
        losses.append(annealed.differentiable_loss(vae.model, vae.guide, X).item())
        beta.step()
    steps = torch.tensor(losses).diff()
    torch.testing.assert_close(steps, steps[:1].expand(4), rtol=1e-3, atol=1e-3)
    assert steps[0] != 0
    pyro.set_rng_seed(1)
    assert losses[-1] == pytest.approx(plain.loss(vae.model, vae.guide, X), rel=1e-5)


# Objectives.


def test_the_bottom_up_guide_refuses_divergences_in_closed_form():
    vae = hierarchy_with("bottom_up")
    for objective in (TraceMeanField_ELBO(), AnnealedELBO(TraceMeanField_ELBO(), 0.5)):
        with pytest.raises(ValueError, match=r"from draws for a bottom-up guide.* got TraceMeanField_ELBO; use Trace_"):
            objective.differentiable_loss(vae.model, vae.guide, X)


# Closed forms.


class Affine(PyroModule):
    """A linear map, as a decoder or, with a scale, as an encoder."""

    def __init__(self, matrix, scale=None):
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.scale = scale
        sizes = matrix.shape if scale is None else matrix.shape[::-1]
        self.event_shape, self.latent_dim = torch.Size(sizes[:1]), sizes[1]

    def forward(self, z):
        loc = z @ self.matrix.mT
        return loc if self.scale is None else (loc, self.scale.expand_as(loc))


def linear_hierarchy(inference, *, off=0.0):
    """A linear model whose exact posterior is one of both guides, and the covariance of its data."""
    frame = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64)).Q
    slope, noise, upper_slope, upper_noise = 1.5, 0.8, 0.9, 0.6
    step = upper_slope * torch.eye(3, 2, dtype=torch.float64)
    of_z1 = step @ step.mT + upper_noise**2 * torch.eye(3, dtype=torch.float64)
    factor = (noise / slope) ** 2  # the variance of what x says about z1
    if inference == "bottom_up":
        spread = of_z1.diagonal()
        share, posterior = spread / (spread + factor), spread * factor / (spread + factor)
        seen = upper_noise**2  # z2 is read off a value of z1
    else:
        share, posterior = torch.ones(3, dtype=torch.float64), torch.full((3,), factor, dtype=torch.float64)
        seen = upper_noise**2 + factor  # or off what x says about z1
    of_z2 = 1 / (1 + upper_slope**2 / seen)
    encoder = Affine(share[:, None] * frame.mT / slope + off, posterior.sqrt())
    upper = Affine(of_z2 * step.mT / seen, torch.tensor(of_z2**0.5, dtype=torch.float64))
    layer = Layer(Affine(step), upper, likelihoods.Normal(upper_noise).double())
    vae = HierarchicalVAE(
        Affine(slope * frame), encoder, likelihoods.Normal(noise).double(), [layer], inference=inference
    ).double()
    return vae, slope**2 * frame @ of_z1 @ frame.mT + noise**2 * torch.eye(5, dtype=torch.float64)


def mean_and_error(objective, vae, x):
    elbo = objective(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    losses = torch.tensor([elbo.loss(vae.model, vae.guide, x) for _ in range(10)])
    return losses.mean(), losses.var() / 10


@pytest.mark.filterwarnings("ignore:Failed to verify mean field restriction")
@torch.no_grad()
def test_divergences_in_closed_form_are_right_from_the_top_down_alone(monkeypatch):
    # With the check taken out, to see that it is needed.
    monkeypatch.setattr(hierarchical, "refuse_closed_form", lambda *_: None)
    gaps = {}
    for inference in GUIDES:
        vae, _ = linear_hierarchy(inference, off=0.1)
        x = torch.randn(6, 5, dtype=torch.float64)
        found = [mean_and_error(objective, vae, x) for objective in (Trace_ELBO, TraceMeanField_ELBO)]
        gaps[inference] = float(abs(found[0][0] - found[1][0]) / (found[0][1] + found[1][1]) ** 0.5)
    assert gaps["top_down"] < 4
    assert gaps["bottom_up"] > 30


@both
@torch.no_grad()
def test_elbo_is_the_evidence_where_the_guide_is_exact(inference):
    x = torch.randn(6, 5, dtype=torch.float64)
    for off in (0.0, 0.1):
        vae, covariance = linear_hierarchy(inference, off=off)
        exact = MultivariateNormal(torch.zeros_like(x), covariance).log_prob(x)
        if off:
            bounds = evidence(vae.model, vae.guide, x, num_samples=5000, seed=0)
            assert (bounds.elbo < exact - 0.01).all()
            assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)
        else:  # every draw has the same weight
            for num_particles in (1, 3):
                loss = Trace_ELBO(num_particles=num_particles).loss(vae.model, vae.guide, x)
                assert loss == pytest.approx(-float(exact.sum()), rel=1e-7)


@both
@torch.no_grad()
def test_diagnostics_of_a_linear_hierarchy(inference):
    """The joint KL is the sum of the sites' parts, and the mean of z2 varies as the model says."""
    vae, covariance = linear_hierarchy(inference)
    x = MultivariateNormal(torch.zeros(5, dtype=torch.float64), covariance).sample((4000,))
    joint = kl_divergence(vae.model, vae.guide, x, num_samples=50, seed=0)
    own = [kl_per_dimension(vae.model, vae.guide, x, site=site, num_samples=50, seed=0) for site in ("z1", "z2")]
    total = sum(kl.values.sum(-1).mean() for kl in own)
    assert float(joint.values.mean()) == pytest.approx(float(total), abs=0.02)
    # Of the exact posterior it is I(z1; x), because z2 adds nothing to what z1 says about x.
    of_x = 0.5 * (torch.linalg.slogdet(covariance)[1] - 5 * math.log(0.8**2))
    assert float(joint.values.mean()) == pytest.approx(float(of_x), abs=0.05)
    units = active_units(vae.model, vae.guide, x, site="z2", num_samples=10, seed=0)
    seen = 0.6**2 + (0.8 / 1.5) ** 2
    torch.testing.assert_close(
        units.variances, torch.full((2,), 0.81 / (0.81 + seen)).to(units.variances), atol=0.05, rtol=0
    )


@torch.no_grad()
def test_draws_have_the_covariance_of_the_model():
    vae, covariance = linear_hierarchy("top_down")
    for draws in (
        vae.sample_prior(40_000, seed=0),
        Predictive(vae.model, num_samples=40_000, parallel=True)()["x"][:, 0],
    ):
        torch.testing.assert_close(draws.T.cov(), covariance, atol=0.06, rtol=0)
    means_of_x = vae.sample_prior(40_000, mean=True, seed=0)
    torch.testing.assert_close(means_of_x.T.cov(), covariance - 0.64 * torch.eye(5), atol=0.06, rtol=0)


# Methods.


@both
@torch.no_grad()
def test_codes_are_given_the_means_of_the_sites_drawn_before(inference):
    vae, x = three_layers(inference), X.double()
    lower, upper = vae.layers
    m1, s1 = vae.encoder(x)
    m2, s2 = lower.encoder(m1)
    m3, s3 = upper.encoder(m2)
    expected = {"z3": (m3, s3), "z2": (m2, s2), "z1": (m1, s1)}
    if inference == "top_down":
        expected["z2"] = times(upper.decoder(m3), upper.noise.scale, m2, s2)
        expected["z1"] = times(lower.decoder(expected["z2"][0]), lower.noise.scale, m1, s1)
    for site, code in expected.items():
        for own, value in zip(vae.encode(x, site=site, batch_size=5), code, strict=True):
            torch.testing.assert_close(own, value)
    assert all(map(torch.equal, vae.encode(x), vae.encode(x, site="z1")))
    torch.testing.assert_close(vae.reconstruct(x), vae.decoder(expected["z1"][0]))
    down = lower.decoder(upper.decoder(m3))
    torch.testing.assert_close(vae.reconstruct(x, site="z3", batch_size=5), vae.decoder(down))


def test_sizes_and_sites():
    vae = three_layers("top_down")
    assert vae.latent_sites == ("z1", "z2", "z3")
    assert vae.latent_dims == (LATENT, 2, 1)
    assert vae.prior.event_shape == (1,)
    assert "latent_dims=(3, 2, 1)" in repr(vae)
    assert "inference='top_down'" in repr(vae)
    assert len({name.split(".")[1] for name in vae.state_dict() if name.startswith("layers.")}) == 2


@torch.no_grad()
def test_layers_start_at_about_the_scale_of_the_prior():
    for kappa, scale in ((0.1, 0.9), (0.5, 0.6), (1.0, 0.37)):
        vae = hierarchy_with("top_down", layers=[layer_of(LATENT, 2, kappa=kappa, scale=scale)])
        vae.initialize(X, seed=0)
        z1 = vae._prior_draws(torch.Size([20_000]))
        variances, mean = z1.var(0), z1.mean(0)
        assert ((variances[:2] > 0.8) & (variances[:2] < 2.2)).all(), variances
        assert float(variances[2]) == pytest.approx(scale**2, rel=0.1)  # what lies beside the frame is noise
        assert mean.abs().max() < 0.1
        # The first coordinates, in which the decoder below has the leading directions of the data.
        torch.testing.assert_close(vae.layers[0].decoder.coordinates(torch.eye(3))[:2].abs(), torch.eye(2))
    plain = hierarchy_with("top_down", layers=[Layer(Affine(torch.eye(3, 2)), encoder_of(3, 2), normal())])
    plain.initialize(X, seed=0)  # a layer whose decoder has no start keeps its values
    with pytest.raises(TypeError, match="decoder with a method initialize"):
        HierarchicalVAE(Affine(torch.eye(8, 3)), encoder_of(8, 3), normal(), [layer_of(3, 2)]).initialize(
            torch.randn(9, 8)
        )


# Priors on weights, constants in nats, guides of Pyro.


@both
def test_a_prior_on_a_weight_of_a_layer(inference):
    vae = hierarchy_with(inference, layers=[layer_of(LATENT, 2, kappa=None)])
    first = vae.layers[0].decoder.network[0]
    first.weight = PyroSample(dist.Normal(0.0, 0.5).expand([8, 2]).to_event(2))
    name = "layers.0.decoder.network.0.weight"
    trace = poutine.trace(vae.model).get_trace(X)
    assert trace.nodes[name]["value"].shape == (8, 2)
    assert not trace.nodes[name]["cond_indep_stack"]
    pyro.clear_param_store()

    def guide(x):
        loc = pyro.param("loc", torch.zeros(8, 2))
        weight = pyro.sample(name, dist.Normal(loc, 0.1).to_event(2))
        # The top-down guide draws the weight from its prior, unless it is given.
        with poutine.block(hide=[name]), poutine.condition(data={name: weight}):
            vae.guide(x)

    for one in (guide, vae.guide) if inference == "top_down" else (guide,):
        for vectorize in (False, True):
            pyro.clear_param_store()
            elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
            assert math.isfinite(SVI(vae.model, one, pyro.optim.Adam({"lr": 1e-2}), elbo).step(X))
    draws = Predictive(vae.model, num_samples=4, parallel=True)(num_data=5)
    assert draws["z1"].shape == (4, 5, LATENT)
    assert vae.sample_prior(3).shape == (3, *EVENT)


@both
def test_a_prior_on_the_noise_of_a_layer(inference):
    vae = hierarchy_with(inference)
    vae.layers[0].noise.log_scale = PyroSample(dist.Normal(-0.5, 0.2))
    name = "layers.0.noise.log_scale"
    for parallel in (False, True):
        draws = Predictive(vae.model, num_samples=4, parallel=parallel)(num_data=5)
        assert draws[name].numel() == 4
        assert draws["z1"].shape == (4, 5, LATENT)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)

    def guide(x):
        pyro.sample(name, dist.Delta(pyro.param("log_scale", torch.tensor(-0.5))))
        vae.guide(x)

    one = guide if inference == "bottom_up" else vae.guide
    assert math.isfinite(SVI(vae.model, one, pyro.optim.Adam({"lr": 1e-2}), elbo).step(X))


def test_a_constant_in_nats_follows_the_noise_of_its_layer():
    vae = hierarchy_with("top_down")
    layer = vae.layers[0]
    before = layer.decoder.inverse_lipschitz
    with torch.no_grad():
        layer.noise.log_scale += 1.0
    assert layer.decoder.inverse_lipschitz == pytest.approx(math.e * before)
    assert layer.decoder.nats == pytest.approx(0.5)
    layer.noise = likelihoods.Normal(0.6)
    with pytest.raises(ValueError, match="Expected noise to be the one of the decoder's inverse_lipschitz"):
        vae.model(X)


def test_values_for_each_datum():
    vae = hierarchy_with("top_down", data_size=len(X))
    guide = AutoNormal(vae.model, create_plates=vae.create_plates)
    svi = SVI(vae.model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(X)
    before = {site: getattr(guide.locs, site).detach().clone() for site in vae.latent_sites}
    index = torch.tensor([7, 2, 5])
    svi.step(X[index], index=index)
    for site, value in before.items():
        moved = (getattr(guide.locs, site) != value).any(-1).nonzero().flatten()
        assert set(index.tolist()) <= set(moved.tolist())
    with pytest.raises(ValueError, match="pass index="):
        svi.step(X[index])
    # Of one site alone, values for each datum are seen too.
    own = nn.Parameter(torch.zeros(len(X), 2))

    def held(x):
        with pyro.plate("data", len(X), subsample_size=len(x)) as rows:
            pyro.sample("z2", dist.Normal(pyro.param("own", own)[rows], 1.0).to_event(1))
            pyro.sample("z1", dist.Normal(*vae.encoder(x)).to_event(1))

    with pytest.raises(ValueError, match=r"draws z2 for .*pass index="):
        Trace_ELBO().loss(vae.model, held, X[index])


@both
def test_draws_for_arviz(inference):
    vae = three_layers(inference)
    fit = from_pyro_svi((vae.model, vae.guide), model_args=(X.double(),), num_samples=4, seed=0)
    assert {site: fit["posterior"][site].shape for site in vae.latent_sites} == {
        "z1": (1, 4, len(X), LATENT),
        "z2": (1, 4, len(X), 2),
        "z3": (1, 4, len(X), 1),
    }


# Bad inputs.


def normal():
    return likelihoods.Normal(0.5)


def encoder_of(below, above):
    return MLPEncoder(event_shape=below, latent_dim=above, hidden_features=(4,))


def decoder_of(below, above):
    return MLPDecoder(latent_dim=above, event_shape=below, hidden_features=(4,))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((decoder_of(3, 2), encoder_of(3, 2), likelihoods.Bernoulli()), TypeError, "noise to be such as"),
        ((decoder_of(3, 2), encoder_of(3, 2), 0.5), TypeError, "noise to be such as"),
        ((decoder_of(3, 2), encoder_of(3, 2), likelihoods.Normal(1.0, "optimal")), ValueError, "noise .* optimal"),
        (
            (encoder_of(3, 2), decoder_of(3, 2), normal()),
            TypeError,
            "which is a encoder|which is an encoder|MLPDecoder",
        ),
        ((decoder_of(3, 2), encoder_of(3, 1), normal()), ValueError, "one latent_dim, got decoder.latent_dim = 2"),
        ((nn.Linear(2, 3), nn.Linear(3, 4), normal()), ValueError, "latent_dim as an argument"),
        ((MLPDecoder(latent_dim=2, event_shape=3, context_dim=1), encoder_of(3, 2), normal()), ValueError, "context"),
    ],
)
def test_parts_of_a_layer_that_do_not_fit(parts, error, message):
    with pytest.raises(error, match=message):
        Layer(*parts)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([], ValueError, "at least one Layer, got none: a VAE is"),
        (3, TypeError, "layers to be a list of Layer"),
        (layer_of(3, 2), TypeError, "layers to be a list of Layer"),
        ([decoder_of(3, 2)], TypeError, r"as layers\[0\]"),
        (
            [layer_of(4, 2)],
            ValueError,
            r"layers\[0\] with decoder.event_shape \(3,\), the shape of site 'z1', got \(4,\)",
        ),
        ([layer_of(3, 2), layer_of(3, 1)], ValueError, r"layers\[1\] with decoder.event_shape \(2,\).*site 'z2'"),
        ([Layer(decoder_of(3, 2), encoder_of(4, 2), normal())], ValueError, r"encoder.event_shape \(3,\)"),
        (
            [Layer(decoder_of(3, 2), encoder_of(3, 2), likelihoods.Normal(torch.ones(2)))],
            ValueError,
            r"layers\[0\] with a noise scale of one number or of shape \(3,\)",
        ),
    ],
)
def test_layers_that_do_not_fit(layers, error, message):
    with pytest.raises(error, match=message):
        HierarchicalVAE(decoder_of(8, 3), encoder_of(8, 3), normal(), layers)


def test_wrong_results_of_the_parts_of_a_layer_name_it():
    class Other(nn.Module):
        latent_dim = 2

        def __init__(self, result):
            super().__init__()
            self.result = result

        def forward(self, z):
            return self.result(z)

    for result, error, message in (
        (lambda z: z, TypeError, "encoder of a layer to return a tuple"),
        (lambda z: (z, z), ValueError, r"encoder of a layer to return location and scale of shape \(12, 2\)"),
    ):
        vae = hierarchy_with("top_down", layers=[Layer(decoder_of(3, 2), Other(result), normal())])
        pyro.clear_param_store()
        with pytest.raises(error, match=message):
            vae.guide(X)
    vae = hierarchy_with("top_down", layers=[Layer(Other(lambda z: None), encoder_of(3, 2), normal())])
    with pytest.raises(TypeError, match="decoder of a layer to return a tensor"):
        vae.model(X)
    vae = hierarchy_with("top_down", layers=[Layer(Other(lambda z: z), encoder_of(3, 2), normal())])
    with pytest.raises(ValueError, match=r"decoder of a layer to return .*shape \(\.\.\., 3\)"):
        vae.model(X)


def test_other_choices_are_refused():
    vae = hierarchy_with("top_down")
    with pytest.raises(ValueError, match="inference to be one of"):
        hierarchy_with("sideways")
    for method in (vae.encode, vae.reconstruct):
        with pytest.raises(ValueError, match="site to be one of"):
            method(X, site="z")
    other = likelihoods.Normal(0.5)
    with pytest.raises(ValueError, match="Expected noise to be the one"):
        Layer(layer_of(3, 2).decoder, encoder_of(3, 2), other)
    vae.decoder.inverse_lipschitz = Nats(0.5, vae.layers[0].noise)
    with pytest.raises(ValueError, match="Expected likelihood to be the one"):
        vae.model(X)
    assert not isinstance(vae, VAE)  # whose site is z
