"""Ceilings beside guarantees: information, stretching and Fisher divergence of decoders with a Lipschitz constant."""

import math

import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import perturb
from helpers.informations import information, information_on_the_line
from scipy.optimize import minimize
from torch import nn

from pyro_ilvae import (
    VAE,
    BiLipschitzMap,
    HierarchicalVAE,
    Layer,
    MixtureVAE,
    MLPDecoder,
    MLPEncoder,
    Nats,
    ProjectedDecoder,
    likelihoods,
)
from pyro_ilvae.diagnostics import fisher_bound, guaranteed_information, lipschitz_audit
from pyro_ilvae.diagnostics._engine.information_bounds import capacity

CORRELATED = dist.MultivariateNormal(
    torch.zeros(2, dtype=torch.float64), torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
)
UNEQUAL = dist.Normal(torch.zeros(2, dtype=torch.float64), torch.tensor([0.5, 1.3], dtype=torch.float64)).to_event(1)
MIXTURE = dist.MixtureSameFamily(
    dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)),
    dist.Normal(
        torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.float64),
        torch.tensor([[0.3, 0.5], [0.6, 0.4]], dtype=torch.float64),
    ).to_event(1),
)


class Linear(nn.Module):
    """f(z) = A z, with the Lipschitz constant that it has or claims to have."""

    def __init__(self, matrix, lipschitz=None):
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        values = torch.linalg.svdvals(matrix)
        self.event_shape, self.latent_dim = torch.Size([len(matrix)]), matrix.shape[1]
        self.inverse_lipschitz = float(values[-1])
        self.lipschitz = float(values[0]) if lipschitz is None else lipschitz

    def forward(self, z):
        return z @ self.matrix.mT

    def coordinates(self, y):
        return y @ torch.linalg.qr(self.matrix.detach()).Q


def bilipschitz(latent_dim=2, low=0.4, high=2.5, perturbation=0.5):
    return perturb(BiLipschitzMap(latent_dim, low, high).double(), perturbation)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("perturbation", [0.0, 0.5, 3.0])
def test_information_on_the_line_is_between_floor_and_ceiling(perturbation, sigma):
    decoder = bilipschitz(1, perturbation=perturbation)
    result = guaranteed_information(decoder, likelihoods.Normal(sigma))
    exact = information_on_the_line(decoder, sigma)
    assert result.floor == pytest.approx(0.5 * math.log(1 + 0.4**2 / sigma**2))
    assert result.ceiling == pytest.approx(0.5 * math.log(1 + 2.5**2 / sigma**2))
    assert result.floor <= exact <= result.ceiling
    assert result.by_jacobian <= exact + 4 * result.by_jacobian_se
    assert (result.reason, result.ceiling_reason) == (None, None)


@pytest.mark.parametrize("prior", [None, CORRELATED, UNEQUAL, MIXTURE])
def test_information_in_the_plane_is_between_floor_and_ceiling(prior):
    decoder, standard = bilipschitz(), dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    result = guaranteed_information(decoder, likelihoods.Normal(0.6), prior=prior)
    found = information(decoder, 0.6, prior or standard, nodes=201)
    assert result.floor <= found.value + 4 * found.error
    assert result.ceiling >= found.value - 4 * found.error
    variance = (prior or standard).variance.sum()
    assert result.ceiling == pytest.approx(math.log(1 + 2.5**2 * float(variance) / (2 * 0.6**2)))


def test_ceiling_is_the_information_of_a_linear_map():
    decoder = BiLipschitzMap(3, 0.5, 2.0).double()
    with torch.no_grad():
        decoder.hidden_shift.fill_(60.0)
    result = guaranteed_information(decoder, likelihoods.Normal(0.7), seed=0)
    assert result.ceiling == pytest.approx(1.5 * math.log(1 + 4 / 0.49), rel=1e-6)
    assert result.by_jacobian == pytest.approx(result.ceiling, rel=1e-6)
    decoder.lipschitz = 0.5
    result = guaranteed_information(decoder, likelihoods.Normal(0.7), seed=0)
    assert result.floor == pytest.approx(result.ceiling, rel=1e-6)


@pytest.mark.parametrize("features", [2, 5])
def test_ceiling_of_a_decoder_with_a_scale_for_each_feature(features):
    decoder = Linear(torch.randn(features, 2, dtype=torch.float64))
    scale = torch.linspace(0.3, 1.5, features, dtype=torch.float64)
    result = guaranteed_information(decoder, lambda eta: dist.Normal(eta, scale))
    own = decoder.matrix.detach() / scale[:, None]
    exact = 0.5 * float(torch.logdet(torch.eye(2, dtype=torch.float64) + own.mT @ own))
    assert result.floor <= exact <= result.ceiling


@pytest.mark.parametrize("power", [0.0, 1e-3, 0.5, 3.0, 100.0])
def test_capacity_is_the_best_share_of_the_power(power):
    noise = torch.tensor([0.5, 0.2, 2.0, 0.2], dtype=torch.float64)

    def lost(share):
        return -0.5 * sum(math.log1p(max(part, 0.0) / own) for part, own in zip(share, noise.tolist(), strict=True))

    limits = {"bounds": [(0, power)] * 4, "constraints": {"type": "eq", "fun": lambda share: sum(share) - power}}
    best = minimize(lost, [power / 4] * 4, method="SLSQP", options={"ftol": 1e-12}, **limits)
    assert capacity(power, noise) == pytest.approx(-best.fun, rel=1e-5, abs=1e-9)
    same = torch.full((7,), 0.3, dtype=torch.float64)
    assert capacity(power, same) == pytest.approx(3.5 * math.log1p(power / 2.1))


@pytest.mark.parametrize(("kappa", "most"), [(0.1, 0.1), (0.5, 2.0)])
def test_constants_of_nats_are_floor_and_ceiling_in_nats(kappa, most):
    likelihood = likelihoods.Normal(0.3)
    low, high = (Nats(value, likelihood).constant() for value in (kappa, most))
    result = guaranteed_information(BiLipschitzMap(4, low, high), likelihood)
    assert (result.floor, result.ceiling) == (pytest.approx(4 * kappa, rel=1e-5), pytest.approx(4 * most, rel=1e-5))


def test_ceilings_of_models():
    encoder = MLPEncoder(event_shape=2, latent_dim=2, hidden_features=(4,))
    likelihood = likelihoods.Normal(0.5, "learned")
    vae = VAE(BiLipschitzMap(2, 0.5, 2.0), encoder, likelihood)
    assert guaranteed_information(vae).ceiling == pytest.approx(math.log(1 + 4 / 0.25))
    assert "ceiling 2.83" in repr(guaranteed_information(vae))
    mixture = MixtureVAE(BiLipschitzMap(2, 0.5, 2.0), encoder, likelihoods.Normal(0.5), 3)
    power = 4 * float(mixture.prior.variance.detach().sum())
    assert guaranteed_information(mixture).ceiling == pytest.approx(math.log(1 + power / 0.5), rel=1e-5)
    given = BiLipschitzMap(2, 0.5, 2.0).given(offset=3.0)
    assert guaranteed_information(given, likelihood).ceiling == pytest.approx(math.log(1 + 4 / 0.25))


def test_layers_have_a_ceiling_at_the_top():
    noise = likelihoods.Normal(0.5)
    layer = Layer(BiLipschitzMap(2, 0.5, 2.0), MLPEncoder(event_shape=2, latent_dim=2, hidden_features=(4,)), noise)
    encoder = MLPEncoder(event_shape=2, latent_dim=2, hidden_features=(4,))
    model = HierarchicalVAE(BiLipschitzMap(2, 0.5, 2.0), encoder, likelihoods.Normal(0.5), [layer])
    assert guaranteed_information(model, site="z2").ceiling == pytest.approx(math.log(1 + 4 / 0.25))
    below = guaranteed_information(model, site="z1")
    assert below.ceiling is None
    assert below.floor > 0
    assert "variance has a formula" in below.ceiling_reason


def test_no_ceiling_has_a_reason():
    sizes = {"latent_dim": 2, "event_shape": 5}
    result = guaranteed_information(ProjectedDecoder(MLPDecoder(**sizes), **sizes), likelihoods.Normal(0.5))
    assert (result.ceiling, result.reason) == (None, None)
    assert result.ceiling_reason == "Expected a decoder that carries lipschitz, got ProjectedDecoder"
    assert "ceiling" not in repr(result)
    cauchy = dist.StudentT(torch.tensor(1.5, dtype=torch.float64)).expand([2]).to_event(1)
    flow = dist.TransformedDistribution(UNEQUAL, [dist.transforms.ExpTransform()])
    for prior in (cauchy, flow):
        result = guaranteed_information(bilipschitz(), likelihoods.Normal(0.5), prior=prior)
        assert (result.ceiling, result.reason) == (None, None)
        assert result.ceiling_reason.startswith("Expected a prior whose variance is finite and has a formula, got ")
    result = guaranteed_information(bilipschitz(), likelihoods.Bernoulli())
    assert result.ceiling is None
    assert result.ceiling_reason == result.reason


def test_false_constants_are_refuted():
    decoder = Linear(torch.diag(torch.tensor([3.0, 1.0])), lipschitz=2.0)
    result = guaranteed_information(decoder, likelihoods.Normal(0.5))
    assert "farther from each other than lipschitz = 2 allows" in result.reason
    audit = lipschitz_audit(decoder, num_samples=50)
    assert (audit.lipschitz, audit.largest) == (2.0, pytest.approx(3.0, rel=1e-3))
    vae = VAE(decoder, MLPEncoder(event_shape=2, latent_dim=2, hidden_features=(4,)), likelihoods.Normal(0.5))
    decoder.lipschitz = 1.0
    with pytest.raises(ValueError, match="does not keep the constant lipschitz"):
        fisher_bound(vae.model, vae.guide, torch.randn(20, 2), num_samples=10)


@pytest.mark.parametrize("perturbation", [0.0, 0.5, 3.0])
def test_audits_stay_between_the_constants(perturbation):
    decoder = bilipschitz(3, perturbation=perturbation)
    audit = lipschitz_audit(decoder, num_samples=60, num_worst=5, steps=30)
    assert audit.certified == 0.4
    assert audit.lipschitz == 2.5
    assert audit.smallest >= 0.4 * (1 - 1e-6)
    assert audit.singular_value <= audit.largest <= 2.5 * (1 + 1e-6)
    moved = decoder(audit.largest_pair).detach()
    ratio = float((moved[0] - moved[1]).norm() / (audit.largest_pair[0] - audit.largest_pair[1]).norm())
    assert ratio == pytest.approx(audit.largest, rel=0.2)
    assert "lipschitz 2.5; largest" in repr(audit).replace(",", ";")


def test_an_audit_climbs_to_the_steepest_place():
    """z + 2 tanh(z - 4) has its steepest place where the prior hardly draws."""

    class Steep(nn.Module):
        latent_dim, lipschitz = 1, 3.0

        def forward(self, z):
            return z + 2 * (z - 4).tanh()

    audit = lipschitz_audit(Steep(), num_samples=50, num_worst=5, seed=0)
    assert audit.largest == pytest.approx(3.0, rel=1e-2)
    assert audit.largest_pair.mean() == pytest.approx(4.0, abs=0.2)
    assert audit.certified is None
    assert lipschitz_audit(lambda z: 2 * z, latent_dim=2, num_samples=20).largest is None


def test_fisher_divergence_is_at_most_its_bound_times_the_ratio_of_constants():
    decoder = bilipschitz()
    encoder = MLPEncoder(event_shape=2, latent_dim=2, hidden_features=(8,)).double()
    vae = VAE(decoder, encoder, likelihoods.Normal(0.5)).double()
    result = fisher_bound(vae.model, vae.guide, 2 * torch.randn(30, 2, dtype=torch.float64), num_samples=50)
    assert (result.ratio >= 1 - 1e-9).all()
    assert (result.ratio <= (2.5 / 0.4) ** 2 + 1e-9).all()
