"""Where nothing is guaranteed although a first look says so, what the reasons say, and what it takes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import perturb
from pyro.nn import PyroSample

from pyro_ilvae import (
    InverseLipschitzDecoder,
    MixtureVAE,
    MLPDecoder,
    MLPEncoder,
    Nats,
    ProjectedDecoder,
    SequenceDecoder,
    SequenceEncoder,
    SequentialVAE,
    likelihoods,
    mlp,
)
from pyro_ilvae.diagnostics import collapse_summary, guaranteed_information
from pyro_ilvae.diagnostics._engine.decoding import jacobian
from pyro_ilvae.distributions import IsotropicNormal

N, K, D = 30, 2, 6
NORMAL = likelihoods.Normal(0.5)


def projected(constant=0.7, features=D, **more):
    backbone = MLPDecoder(latent_dim=K, event_shape=features, hidden_features=(8,), **more)
    decoder = ProjectedDecoder(backbone, latent_dim=K, event_shape=features, inverse_lipschitz=constant, **more)
    return perturb(decoder, 0.5)


def standard():
    return dist.Normal(torch.zeros(K), 1.0).to_event(1)


# Noise


def test_noise_is_looked_at_for_all_draws():
    decoder = projected()
    edge = float(decoded_draws(decoder).max()) - 1e-4  # passed by one of a thousand draws

    def noise(eta):
        return dist.Normal(eta, torch.where(eta > edge, 50.0, 0.5))

    for size in (None, 7):
        result = guaranteed_information(decoder, noise, samples_per_pass=size, seed=0)
        assert "the same for all z, got another one from function" in result.reason


def decoded_draws(decoder):
    """What the decoder makes of the draws of seed 0, of which the first rows leave out the largest entry."""
    seen = []

    def noise(eta):
        seen.append(eta)
        return NORMAL(eta)

    guaranteed_information(decoder, noise, seed=0)
    assert seen[0].max() < torch.cat(seen).max()
    return torch.cat(seen)


def test_noise_of_one_entry_among_many_is_looked_at():
    decoder = projected(features=500)

    def noise(eta):
        scale = torch.full_like(eta, 0.5)
        scale[..., 3] *= 1 + 0.01 * eta[..., 3].tanh()
        return dist.Normal(eta, scale)

    assert "the same for all z" in guaranteed_information(decoder, noise).reason


@pytest.mark.parametrize("construction", ["projected", "composition"])
def test_drawn_noise_is_the_reason_for_a_decoder_that_follows_it(construction):
    likelihood = likelihoods.Normal(0.5, estimate="learned")
    likelihood.log_scale = PyroSample(dist.Normal(0.0, 1.0))
    decoder = projected(Nats(0.5, likelihood))
    if construction == "composition":
        decoder = InverseLipschitzDecoder(latent_dim=K, event_shape=D, inverse_lipschitz=Nats(0.5, likelihood))
    assert "whose scale is drawn from a prior" in guaranteed_information(decoder, likelihood).reason


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (lambda eta: dist.MultivariateNormal(eta, torch.eye(D)), "got MultivariateNormal for data of shape (6,) from"),
        (lambda eta: dist.Normal(eta[..., :3], eta[..., 3:].exp()), "got Normal for data of shape (3,) from function"),
        (lambda eta: dist.Normal(eta, 0.5).mask(eta > 0), "got MaskedDistribution for data of shape (6,)"),
    ],
    ids=["correlated", "scale from the decoder", "masked"],
)
def test_names_the_distribution_that_is_no_such_noise(noise, message):
    reason = guaranteed_information(projected(), noise).reason
    assert message in reason
    assert "Normal noise in each of the (6,) entries" in reason
    assert "noise unit" not in reason


def test_of_a_language_model_the_noise_is_the_reason_and_not_its_history():
    sizes = {"latent_dim": K, "event_shape": 9, "context_dim": 16}
    decoder = ProjectedDecoder(MLPDecoder(**sizes, hidden_features=(8,)), **sizes, frame="centered")
    model = SequentialVAE(SequenceDecoder("gru", decoder), SequenceEncoder(vocab_size=9, latent_dim=K))
    reason = guaranteed_information(model).reason
    assert "Normal noise, got Categorical" in reason
    assert "given" not in reason


def test_noise_of_half_precision_is_normal():
    result = guaranteed_information(projected().half(), NORMAL)
    assert result.floor == pytest.approx(math.log(1 + 0.7**2 / 0.5**2), rel=2e-3)


# Priors


@pytest.mark.parametrize(
    "prior",
    [
        dist.Normal(torch.zeros(K), 0.01).to_event(1).mask(False),
        dist.Normal(torch.zeros(K), 0.01).mask(torch.tensor([True, False])).to_event(1),
    ],
)
def test_a_prior_with_a_mask_has_no_density(prior):
    assert "got one with a mask" in guaranteed_information(projected(), NORMAL, prior=prior).reason


def test_a_prior_without_draws_guarantees_nothing():
    prior = dist.ImproperUniform(dist.constraints.real_vector, (), (K,))
    assert "can be drawn from, got ImproperUniform" in guaranteed_information(projected(), NORMAL, prior=prior).reason


class Written(torch.nn.Module):
    """A model whose attribute prior is N(0, I), and whose z is drawn from what ``latent`` says."""

    def __init__(self, latent, prior=None):
        super().__init__()
        self.decoder, self.likelihood, self.latent, self.prior = projected(), NORMAL, latent, prior or standard()

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.latent(x))
            pyro.sample("x", self.likelihood(self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            with pyro.poutine.block(), pyro.poutine.trace() as traced:
                self.latent(x)
            if "above" in traced.trace.nodes:
                pyro.sample("above", dist.Normal(x[:, :K], 1.0).to_event(1))
            pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1))


def above(_):
    return 0.1 * pyro.sample("above", standard())


SMALL = dist.Laplace(torch.zeros(K), 0.1).to_event(1)


def of_site(model, guide):
    more = {"measures": ["guaranteed_information"], "num_samples": 100, "seed": 0}
    return collapse_summary(model, guide, torch.randn(N, D), **more).sel(site="z")


@pytest.mark.parametrize(
    "latent",
    [
        lambda x: dist.Normal(x[:, :K], 0.05).to_event(1),
        lambda x: dist.Normal(above(x), 0.05).to_event(1),
        lambda _: SMALL,
    ],
    ids=["of data", "of a layer above", "another one"],
)
def test_the_attribute_prior_counts_only_where_z_is_drawn_from_it(latent):
    written = Written(latent)
    summary = of_site(written.model, written.guide)
    assert math.isnan(summary.guaranteed_nats)
    assert "Expected site 'z' to be drawn from the attribute prior" in summary.note.item()


def beside(_):
    pyro.sample("above", standard())
    return standard()


@pytest.mark.parametrize(
    ("latent", "prior"), [(lambda _: SMALL, SMALL), (beside, None)], ids=["without a formula", "beside another site"]
)
def test_the_attribute_prior_counts_where_z_is_drawn_from_it(latent, prior):
    written = Written(latent, prior)
    summary = of_site(written.model, written.guide)
    expected = guaranteed_information(written.model)
    assert float(summary.guaranteed_floor) == pytest.approx(expected.floor, rel=1e-6)


def test_components_with_a_prior_guarantee_nothing():
    encoder = MLPEncoder(event_shape=D, latent_dim=K, hidden_features=(8,))
    mixture = MixtureVAE(projected(), encoder, NORMAL, 3, data_size=N, enumerate_in="model")
    mixture.component_log_scale = PyroSample(dist.Normal(torch.zeros(3, K), 2.0).to_event(2))

    def guide(x):
        pyro.sample("component_log_scale", dist.Normal(torch.zeros(3, K), 0.1).to_event(2))
        return mixture.guide(x)

    summary = of_site(mixture.model, guide)
    assert math.isnan(summary.guaranteed_nats)
    assert "to be drawn from the attribute prior" in summary.note.item()


# What it takes


@pytest.mark.parametrize("context_dim", [None, 3])
def test_the_jacobian_of_a_projected_decoder_needs_no_backbone(context_dim):
    likelihood = likelihoods.Normal(torch.linspace(0.2, 1.5, D), estimate="learned")
    decoder = projected(Nats(0.5, likelihood), context_dim=context_dim)
    likelihood.log_scale.data.add_(0.3 * torch.randn(D))
    given = decoder if context_dim is None else decoder.given(torch.randn(context_dim))
    z = torch.randn(5, K)
    torch.testing.assert_close(jacobian(given._channel, z), jacobian(lambda at: given.coordinates(given(at)), z))
    rows = []
    decoder.backbone.register_forward_hook(lambda *arguments: rows.append(len(arguments[1][0])))
    result = guaranteed_information(given, likelihood, num_samples=100)
    assert result.nats_per_dimension == pytest.approx(0.5, rel=1e-5)
    assert sum(rows) < 2 * 100


class Squeezed(ProjectedDecoder):
    """A decoder that breaks the constant it inherits."""

    def forward(self, z, context=None):
        return super().forward(0.1 * z, context)


def test_a_class_that_overrides_forward_is_looked_at_itself():
    decoder = Squeezed(mlp(K, (8,), D), latent_dim=K, event_shape=D, inverse_lipschitz=5.0)
    assert (
        "keeps the constant that it carries, got a Jacobian of Squeezed"
        in guaranteed_information(decoder, NORMAL).reason
    )


def test_noise_of_one_scale_may_come_in_any_form():
    decoder = projected()
    forms = [
        likelihoods.Normal(0.5),
        lambda eta: dist.Normal(eta, 0.5),
        lambda eta: dist.Normal(eta, 0.5).to_event(1),
        lambda eta: IsotropicNormal(eta, torch.tensor(0.5)),
        likelihoods.Normal(torch.full((D,), 0.5)),
    ]
    floors = [guaranteed_information(decoder, form, num_samples=5).floor for form in forms]
    assert floors == pytest.approx([math.log(1 + 0.7**2 / 0.25)] * len(forms), rel=1e-5)
