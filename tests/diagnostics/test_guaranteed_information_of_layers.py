"""What each layer of a hierarchy guarantees, against exact informations: Gaussian ones and quadrature."""

import math
from itertools import pairwise

import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import EVENT, LATENT, perturb
from helpers.informations import Frame
from helpers.models import X, hierarchy_with, layer_of
from pyro.nn import PyroSample
from torch.distributions import Normal

from pyro_ilvae import VAE, HierarchicalVAE, Layer, MLPEncoder, ProjectedDecoder, likelihoods, mlp
from pyro_ilvae.diagnostics import collapse_summary, guaranteed_information
from pyro_ilvae.models import hierarchical


def guaranteed(vae, site, **options):
    return guaranteed_information(vae, site=site, **{"seed": 0, "num_samples": 20} | options)


def encoder_of(below, above):
    return MLPEncoder(event_shape=below, latent_dim=above, hidden_features=(4,))


def linear(dims, *, orthogonal=False, scales=(0.5, 2.0)):
    """A linear hierarchy from x up, with the exact covariance of each site, in double precision."""
    frames, noises, layers = [], [], []
    for below, above in pairwise(dims):
        matrix = torch.randn(above, above, dtype=torch.float64)
        matrix = 0.8 * torch.linalg.qr(matrix).Q if orthogonal else 0.5 * (matrix @ matrix.mT) + 0.1 * torch.eye(above)
        frames.append(Frame(matrix.double(), below, symmetric=not orthogonal))
        scale = torch.empty(below, dtype=torch.float64).uniform_(*scales)
        noises.append(likelihoods.Normal(0.7 if orthogonal else scale).double())
    for frame, noise in zip(frames[1:], noises[1:], strict=True):
        layers.append(Layer(frame, encoder_of(*frame_sizes(frame)), noise))
    vae = HierarchicalVAE(frames[0], encoder_of(*frame_sizes(frames[0])), noises[0], layers).double()
    covariances = [torch.eye(dims[-1], dtype=torch.float64)]
    for frame, noise in zip(reversed(frames), reversed(noises), strict=True):
        slope = frame.frame @ frame.matrix
        of_noise = noise.scale.detach().double().expand(len(slope)).square().diag()
        covariances.append(slope @ covariances[-1] @ slope.mT + of_noise)
    return vae, covariances[::-1]


def frame_sizes(frame):
    return frame.event_shape[0], frame.latent_dim


def exact_information(vae, covariances, number):
    """I(z_number; what is below) = h(below) - h(noise), for 0 at x."""
    noise = vae.likelihood if number == 0 else vae.layers[number - 1].noise
    below = covariances[number]
    log_noise = 2 * noise.scale.detach().double().expand(len(below)).log().sum()
    return 0.5 * float(torch.linalg.slogdet(below)[1] - log_noise)


@pytest.mark.parametrize("dims", [(6, 4, 3), (5, 4, 3, 2), (4, 3, 3), (3, 3, 3, 1), (2, 1, 1)])
@pytest.mark.parametrize("draw", range(3))
@torch.no_grad()
def test_bounds_of_gaussian_hierarchies_are_below_the_information(dims, draw):
    vae, covariances = linear(dims)
    for number, site in enumerate(vae.latent_sites):
        found, exact = guaranteed(vae, site), exact_information(vae, covariances, number)
        assert found.reason is None
        assert 0 < found.floor <= found.by_jacobian * (1 + 1e-9)
        assert found.by_jacobian <= exact * (1 + 1e-9)
        assert found.floor_se == 0
        assert found.by_jacobian_se < 1e-6  # the slope is the same everywhere
        own = covariances[number + 1]
        power = math.exp(float(torch.linalg.slogdet(own)[1]) / len(own))
        assert found.entropy_power <= power * (1 + 1e-9)
        assert found.nats_per_dimension == pytest.approx(found.floor / len(own))
        # I(z_j; below | z_-j), exact: x given z_-j has the noise and what z_j adds given z_-j.
        frame = vae.decoder if number == 0 else vae.layers[number - 1].decoder
        noise = vae.likelihood if number == 0 else vae.layers[number - 1].noise
        scaled = (frame.frame @ frame.matrix) / noise.scale.detach().double().reshape(-1, 1)
        given = 1 / torch.linalg.inv(own).diagonal()
        information = 0.5 * torch.log1p(given * scaled.square().sum(0))
        assert (found.per_coordinate <= information * (1 + 1e-9)).all()


@pytest.mark.parametrize("dims", [(3, 3, 3), (2, 2, 2, 2), (6, 4, 3), (5, 3, 1)])
@torch.no_grad()
def test_bounds_are_tight_for_steps_that_only_turn(dims):
    """The top site's bound is its information; so is that of all sites where no layer is narrower."""
    vae, covariances = linear(dims, orthogonal=True)
    for number, site in reversed(list(enumerate(vae.latent_sites))):
        found = guaranteed(vae, site)
        exact = exact_information(vae, covariances, number)
        power = math.exp(float(torch.linalg.slogdet(covariances[number + 1])[1]) / len(covariances[number + 1]))
        if number + 2 >= len(vae.latent_sites):  # no site above, or one whose information is known exactly
            assert found.entropy_power == pytest.approx(power)
        if len(set(dims[number + 1 :])) == 1:
            assert found.floor == pytest.approx(exact, rel=1e-6)
            assert found.by_jacobian == pytest.approx(exact, rel=1e-6)


@torch.no_grad()
def test_the_formula_for_one_scale():
    vae = hierarchy_with("top_down", layers=[layer_of(LATENT, 2, kappa=0.4, scale=0.7)])
    perturb(vae, 0.2)
    sigma, slope = vae.layers[0].noise.scale, vae.layers[0].decoder.inverse_lipschitz
    power = ((slope**2 + sigma**2) ** 2 * sigma ** (2 * (LATENT - 2))) ** (1 / LATENT)
    found = guaranteed(vae, "z1")
    assert found.entropy_power == pytest.approx(float(power), rel=1e-5)
    ratio = vae.decoder.inverse_lipschitz**2 * power / vae.likelihood.scale**2
    assert found.floor == pytest.approx(LATENT / 2 * math.log1p(float(ratio)), rel=1e-5)
    # Nats follow the noise: kappa for each dimension of the top, whatever the weights and the scale have become.
    assert guaranteed(vae, "z2").floor == pytest.approx(2 * 0.4, rel=1e-5)


def on_the_line(seed):
    """A hierarchy of one number each, with weights moved at random."""
    torch.manual_seed(seed)
    decoders = [
        perturb(ProjectedDecoder(mlp(1, (4,), 1), latent_dim=1, event_shape=1, inverse_lipschitz=constant), 0.7)
        for constant in (0.6, 0.9, 0.4)
    ]
    layers = [
        Layer(decoder, encoder_of(1, 1), likelihoods.Normal(scale))
        for decoder, scale in zip(decoders[1:], (0.8, 0.5), strict=True)
    ]
    return HierarchicalVAE(decoders[0], encoder_of(1, 1), likelihoods.Normal(0.7), layers).double()


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_bounds_against_quadrature(seed):
    vae = on_the_line(seed)
    above, log_mass = torch.linspace(-8, 8, 2001, dtype=torch.float64), None
    log_mass = Normal(0.0, 1.0).log_prob(above).log_softmax(0)
    steps = [(layer.decoder, float(layer.noise.scale)) for layer in reversed(vae.layers)]
    for site, (decoder, sigma) in zip(("z3", "z2", "z1"), [*steps, (vae.decoder, 0.7)], strict=True):
        means = decoder(above[:, None])[:, 0]
        inside = means[log_mass > -60]
        below = torch.linspace(float(inside.min()) - 9 * sigma, float(inside.max()) + 9 * sigma, 2001).double()
        log_density = (Normal(means, sigma).log_prob(below[:, None]) + log_mass).logsumexp(1)
        step = float(below[1] - below[0])
        assert float(log_density.exp().sum()) * step == pytest.approx(1, abs=1e-3)
        entropy = -float((log_density.exp() * log_density).nan_to_num().sum()) * step
        information = entropy - 0.5 * math.log(2 * math.pi * math.e * sigma**2)
        found = guaranteed(vae, site, num_samples=2000)
        assert 0 < found.floor <= found.by_jacobian <= information + 5 * found.by_jacobian_se
        above, log_mass = below, log_density.log_softmax(0)


def test_standard_errors_by_the_jacobian():
    vae = on_the_line(1)
    for site in vae.latent_sites:
        found = [guaranteed(vae, site, num_samples=100, seed=seed) for seed in range(40)]
        spread = torch.tensor([each.by_jacobian for each in found]).std()
        assert 0.7 < spread / torch.tensor([each.by_jacobian_se for each in found]).mean() < 1.4
        assert len({each.floor for each in found}) == 1


def test_a_layer_without_a_guarantee_has_a_reason_and_leaves_the_others_theirs():
    plain = layer_of(2, 1, kappa=None, scale=0.5)
    vae = hierarchy_with("top_down", layers=[layer_of(LATENT, 2), plain])
    assert "carries inverse_lipschitz" in guaranteed(vae, "z3").reason
    below = guaranteed(vae, "z2")
    assert below.entropy_power == pytest.approx(0.25)  # that of the noise alone
    assert below.floor == pytest.approx(math.log1p(0.25 * math.expm1(2 * 0.5)), rel=1e-5)
    binary = hierarchy_with("top_down", likelihood=likelihoods.Bernoulli())
    assert "Normal noise, got Bernoulli" in guaranteed(binary, "z1").reason
    assert guaranteed(binary, "z2").reason is None
    vae.layers[1].noise.log_scale = PyroSample(dist.Normal(0.0, 1.0))
    assert "drawn from a prior" in guaranteed(vae, "z2").reason


def test_another_prior_of_the_top_site():
    vae = hierarchy_with("bottom_up")
    narrow = guaranteed(vae, "z2", prior=dist.Normal(torch.zeros(2), 0.5).to_event(1))
    assert narrow.entropy_power == pytest.approx(0.25)
    below = guaranteed(vae, "z1", prior=dist.Normal(torch.zeros(2), 0.5).to_event(1))
    assert below.floor < guaranteed(vae, "z1").floor
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([[-3.0] * 2, [3.0] * 2]), 1.0).to_event(1)
    )
    assert guaranteed(vae, "z1", prior=mixture, num_samples=500).by_jacobian > below.by_jacobian


@pytest.mark.parametrize("inference", ["bottom_up", "top_down"])
def test_summary_of_collapse_has_what_each_site_is_guaranteed(inference):
    vae = hierarchy_with(inference)
    summary = collapse_summary(vae.model, vae.guide, X, num_samples=30, seed=0)
    for site in vae.latent_sites:
        expected = guaranteed(vae, site, num_samples=30)
        own = summary.sel(site=site)
        assert float(own.guaranteed_nats) == pytest.approx(expected.by_jacobian)
        assert float(own.guaranteed_floor) == pytest.approx(expected.floor)
    plain = hierarchy_with(inference, layers=[layer_of(LATENT, 2, kappa=None)])
    summary = collapse_summary(plain.model, plain.guide, X, num_samples=5, measures=["guaranteed_information"])
    assert summary.guaranteed_floor.isnull().sel(site="z2")
    assert not summary.guaranteed_floor.isnull().sel(site="z1")
    assert not summary.note.sel(site="z2").item()


class OtherSteps(HierarchicalVAE):
    """A subclass whose sites are not those of its layers."""

    def _site_given(self, t, above, factors):
        return dist.Normal(super()._site_given(t, above, factors).mean, 3.0).to_event(1)


def test_summary_of_a_model_that_draws_its_sites_in_another_way(monkeypatch):
    monkeypatch.setattr(hierarchical, "_product", lambda prior, loc, scale: (loc, scale))
    standard = hierarchy_with("bottom_up")
    vae = OtherSteps(standard.decoder, standard.encoder, standard.likelihood, standard.layers)
    summary = collapse_summary(vae.model, vae.guide, X, num_samples=5, measures=["guaranteed_information"])
    assert summary.guaranteed_floor.isnull().all()
    assert all("density of the model's layers" in note for note in summary.note.values)


def test_the_site_has_to_be_said_where_there_are_several_and_nowhere_else():
    vae = hierarchy_with("bottom_up")
    for site in (None, "z", 1):
        with pytest.raises(ValueError, match=r"site to be one of \('z1', 'z2'\).* got"):
            guaranteed(vae, site)
    assert guaranteed(vae.model, "z2").floor == guaranteed(vae, "z2").floor
    single = VAE(vae.decoder, vae.encoder, vae.likelihood)
    for one, parts in ((single, ()), (vae.decoder, (vae.likelihood,))):
        with pytest.raises(ValueError, match="Expected site=None"):
            guaranteed_information(one, *parts, site="z1")
    assert single.event_shape == EVENT
