"""A measure of each kind against quadrature, for priors that are not N(0, I)."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_errors_are_right, assert_near, within
from helpers.fisher_models import Linear
from torch import nn

from pyro_ilvae import InverseLipschitzDecoder, MixtureVAE, MLPEncoder, diagnostics, likelihoods
from pyro_ilvae.diagnostics import collapse_summary

WEIGHT = torch.tensor([[1.2, 0.3], [-0.4, 0.9], [0.5, 0.7]])
X = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
C = torch.tensor([[0.5], [-1.0], [2.0], [0.0]])  # covariates
LOCS, SCALES = torch.tensor([[2.0, -1.0], [-1.5, 0.5]]), torch.tensor([[0.5, 1.0], [0.8, 0.3]])
ODDS = torch.tensor([0.3, 0.7])


def component(y=None):
    locs, scales = (LOCS, SCALES) if y is None else (LOCS[y], SCALES[y])
    return dist.Normal(locs, scales).to_event(1)


PRIORS = {
    "scaled and shifted": lambda c: dist.Normal(torch.tensor([1.0, -0.5]), torch.tensor([0.4, 1.8])).to_event(1),
    "correlated": lambda c: dist.MultivariateNormal(torch.tensor([0.5, -1.0]), torch.tensor([[1.0, 0.9], [0.9, 1.5]])),
    "mixture": lambda c: dist.MixtureSameFamily(dist.Categorical(ODDS), component()),
    "enumerated component": lambda c: dist.MixtureSameFamily(dist.Categorical(ODDS), component()),
    "learned": lambda c: dist.Normal(
        pyro.param("loc", torch.tensor([-0.7, 0.2])), pyro.param("log_scale", torch.tensor([0.5, -0.8])).exp()
    ).to_event(1),
    "per datum": lambda c: dist.Normal(c * torch.tensor([1.0, -0.5]), 0.4 + c.abs() / 2).to_event(1),
}


class Model(nn.Module):
    """Binary data of a linear decoder, whose Fisher information depends on z."""

    def __init__(self, name, scale=(0.5, 0.8), move=1.0):
        super().__init__()
        self.name, self.prior, self.scale, self.move = name, PRIORS[name], torch.tensor(scale), move
        self.decoder, self.likelihood = Linear(WEIGHT), likelihoods.Bernoulli()

    def model(self, x, c):
        with pyro.plate("data", len(x)):
            if self.name == "enumerated component":
                z = pyro.sample("code", component(pyro.sample("y", dist.Categorical(ODDS))))
            else:
                z = pyro.sample("code", self.prior(c))
            pyro.sample("picture", self.likelihood(self.decoder(z)).to_event(1), obs=x)

    def posterior(self, x):
        loc = self.move * (x @ torch.tensor([[1.0, 0.2], [-0.5, 0.7], [0.3, -0.9]]))
        return dist.Normal(loc, self.scale.expand_as(loc)).to_event(1)

    def guide(self, x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("code", self.posterior(x))


AXIS = torch.linspace(-9.0, 9.0, 361, dtype=torch.float64)
GRID = torch.stack(torch.meshgrid(AXIS, AXIS, indexing="ij"), -1).reshape(-1, 1, 2)
CELL = float(AXIS[1] - AXIS[0]) ** 2


def log_prior(model, z):
    """The log prior at points of the grid for each datum, (points, N)."""
    torch.set_default_dtype(torch.float32)
    return model.prior(C).log_prob(z).double().expand(len(z), len(X))


def quadrature(model):
    """What is to be right, each of shape (N,), from the densities on the grid."""
    z = GRID.clone().requires_grad_()
    prior = log_prior(model, z)
    (score,) = torch.autograd.grad(prior.sum(), z, retain_graph=True)
    if prior.shape[1] > 1 and model.name == "per datum":
        score = torch.stack(
            [torch.autograd.grad(prior[:, n].sum(), z, retain_graph=True)[0][:, 0] for n in range(len(X))], 1
        )
    else:
        score = score / len(X)
    with torch.no_grad():
        prior, z = prior.detach(), z.detach()
        q = model.posterior(X).log_prob(z).double()
        loc, scale = model.posterior(X).base_dist.loc.double(), model.scale.double()
        weights = WEIGHT.double()
        eta = z @ weights.mT
        log_likelihood = (X.double() * eta - nn.functional.softplus(eta)).sum(-1)
        log_joint = prior + log_likelihood
        evidence = log_joint.logsumexp(0) + math.log(CELL)
        posterior = (log_joint - evidence).exp() * CELL
        information = eta.sigmoid() * (-eta).sigmoid()
        trace = (information * weights.square().sum(1)).sum(-1)
        aggregate = q.logsumexp(1, keepdim=True) - math.log(len(X))
        guide_score = (loc - z) / scale**2

        def mean(log_density, values):
            return (log_density.exp() * values).sum(0) * CELL

        return {
            "kl": mean(q, q - prior),
            "evidence": evidence,
            "guide_fisher": mean(q, (guide_score - score).square().sum(-1)),
            "posterior_fisher": (posterior * (((X.double() - eta.sigmoid()) @ weights).square().sum(-1))).sum(0),
            "model_fisher": mean(prior, trace),
            "smallest": mean(prior, information.amin(-1).expand_as(prior)),
            "information": mean(q, q - aggregate),
            "aggregate_kl": mean(aggregate, aggregate - prior),
        }


CALL = ((X, C),)


@pytest.fixture(params=PRIORS, scope="module")
def known(request):
    model = Model(request.param)
    return model, quadrature(model)


def test_kl(known):
    model, exact = known
    kl = diagnostics.kl_divergence(model.model, model.guide, (X, C), num_samples=4000, seed=0)
    within(kl.values, exact["kl"].float(), kl.standard_errors)


def test_kl_of_each_dimension_is_that_of_the_marginals(known):
    model, _ = known
    kl = diagnostics.kl_per_dimension(model.model, model.guide, (X, C), num_samples=4000, seed=0)
    density = log_prior(model, GRID).exp().reshape(len(AXIS), len(AXIS), -1) * float(AXIS[1] - AXIS[0])
    own = model.posterior(X).base_dist
    for j in range(2):
        marginal = density.sum(1 - j).clamp(min=1e-300)
        q = dist.Normal(own.loc[:, j], own.scale[:, j]).log_prob(AXIS[:, None]).double()
        exact = (q.exp() * (q - marginal.log())).sum(0) * float(AXIS[1] - AXIS[0])
        within(kl.values[:, j], exact.float(), kl.standard_errors[:, j])


def test_mutual_information_and_the_aggregate_posterior(known):
    model, exact = known
    result = diagnostics.mutual_information(model.model, model.guide, (X, C), num_samples=4000, seed=0)
    assert_near(result.mutual_information, result.mutual_information_se, exact["information"].mean())
    if model.name == "per datum":
        assert math.isnan(result.aggregate_kl)  # there is no prior of all data
    else:
        assert_near(result.aggregate_kl, result.aggregate_kl_se, exact["aggregate_kl"].mean())
        assert_near(result.mean_kl, result.mean_kl_se, exact["kl"].mean())


def test_guide_fisher_divergence(known):
    model, exact = known
    fisher = diagnostics.guide_fisher_divergence(model.model, model.guide, (X, C), num_samples=4000, seed=0)
    within(fisher.values, exact["guide_fisher"].float(), fisher.standard_errors)


def test_evidence_and_the_exact_posteriors_fisher_divergence(known):
    model, exact = known
    wide = Model(model.name, scale=(2.0, 2.0), move=0.3)
    bounds = diagnostics.evidence(wide.model, wide.guide, (X, C), num_samples=20000, seed=0)
    within(bounds.log_likelihood, exact["evidence"].float(), bounds.log_likelihood_standard_errors)
    fisher = diagnostics.posterior_fisher_divergence(wide.model, wide.guide, (X, C), num_samples=20000, seed=0)
    within(fisher.values, exact["posterior_fisher"].float(), fisher.standard_errors)


def test_summary(known):
    model, exact = known
    summary = collapse_summary(model.model, model.guide, (X, C), num_samples=3000, batch_size=3, seed=0)
    assert_near(float(summary.model_fisher), float(summary.model_fisher_se), exact["model_fisher"].mean())
    floor = 2 * model.decoder.inverse_lipschitz**2 * exact["smallest"].mean()
    assert float(summary.model_fisher_floor) == pytest.approx(float(floor), rel=0.05)
    assert summary.model_fisher >= summary.model_fisher_floor
    assert float(summary.kl_total.sel(site="code")) == pytest.approx(float(exact["kl"].mean()), rel=0.1)
    assert "unknown" not in summary.verdict.sel(unit=["code[0]", "code[1]"]).values
    variances = model.posterior(X).base_dist.loc.var(0)
    torch.testing.assert_close(
        torch.tensor(summary.mean_variance.sel(unit=["code[0]", "code[1]"]).values),
        variances.double(),
        atol=1e-5,
        rtol=0,
    )


def test_a_posterior_that_is_the_prior_is_collapsed_whatever_the_prior(known):
    model, _ = known

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("code", model.prior(c).expand([len(x)]))

    summary = collapse_summary(model.model, guide, (X, C), measures=["kl"], num_samples=20, seed=0)
    assert summary.verdict.sel(unit=summary.unit_site == "code").values.tolist() in (["collapsed"] * 2, ["collapsed"])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_samples", [3, 6000])
def test_model_fisher_where_the_prior_has_a_prior(shared, num_samples):
    # z = scale * N(0, I) with a scale of two values, one for each datum or one for all of them.
    model = Model("learned")

    def sampled(x, c):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.7)) if shared else None
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 0.7)) if scale is None else scale
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale[..., None]).to_event(1))
            pyro.sample("x", model.likelihood(model.decoder(z)).to_event(1), obs=x)

    def guide(x, c):
        if shared:
            pyro.sample("scale", dist.LogNormal(0.2, 0.3))
        with pyro.plate("data", len(x)):
            if not shared:
                pyro.sample("scale", dist.LogNormal(0.2, 0.3).expand([len(x)]))
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    options = {"num_samples": num_samples, "measures": ["decoder"], "seed": 0}
    summary = collapse_summary(sampled, guide, (X, C), **options)
    log_scale = torch.linspace(-4.0, 4.0, 200, dtype=torch.float64)
    weights = dist.Normal(0.0, 0.7).log_prob(log_scale).softmax(0)
    # W z is Normal with the scale times the norms of the rows of W: the means of p (1 - p) by Gauss-Hermite quadrature.
    points = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    noise = dist.Normal(0.0, 1.0).log_prob(points).softmax(0)
    norms = WEIGHT.double().norm(dim=1)
    eta = log_scale.exp()[:, None, None] * norms[:, None] * points
    exact = (weights[:, None] * ((eta.sigmoid() * (-eta).sigmoid()) * noise).sum(-1) * norms**2).sum()
    if num_samples > 3:
        assert_near(float(summary.model_fisher), float(summary.model_fisher_se), exact)
        assert float(summary.model_fisher_se) < 0.01 * exact
    assert summary.model_fisher.item() > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["guide", "model"])
def test_model_fisher_of_a_mixture_is_of_its_components(form):
    decoder = InverseLipschitzDecoder(latent_dim=2, event_shape=5, inverse_lipschitz=(1.5, 1.5), map_features=(8,))
    encoder = MLPEncoder(event_shape=5, latent_dim=2, hidden_features=(8,))
    mixture = MixtureVAE(decoder, encoder, likelihoods.Bernoulli(), 3, data_size=100, enumerate_in=form)
    mixture.component_loc.data = torch.tensor([[6.0, 0.0], [-6.0, 0.0], [0.0, 6.0]])
    x = torch.rand(30, 5).round()
    summary = collapse_summary(mixture.model, mixture.guide, x, num_samples=1500, measures=["kl", "decoder"], seed=0)
    right = diagnostics.mean_fisher_divergence(
        decoder, likelihoods.Bernoulli(), sampler=lambda n: mixture._prior().sample((n,)), num_samples=5000, seed=0
    )
    error = math.hypot(float(summary.model_fisher_se), right.total_se)
    assert_near(float(summary.model_fisher), error, right.total)
    assert float(summary.model_fisher_floor) == pytest.approx(right.floor, rel=0.3)
    assert "unknown" not in summary.verdict.sel(unit=summary.unit_site == "z").values


def test_a_model_that_cannot_draw_its_own_data_has_a_note_in_place_of_the_divergence():
    model = Model("learned")

    def improper(x, c):
        with pyro.plate("data", len(x)):
            flat = dist.ImproperUniform(dist.constraints.real_vector, (), (2,))
            z = pyro.sample("z", flat.expand([len(x)]))
            pyro.sample("x", model.likelihood(model.decoder(z)).to_event(1), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    summary = collapse_summary(improper, guide, (X, C), num_samples=5, measures=["decoder"])
    assert "model_fisher" not in summary
    assert "model_fisher: Expected a model that draws its own data" in summary.notes


@pytest.mark.slow
def test_errors_of_the_model_fisher_count_what_data_share():
    model, pair = Model("learned"), (X.repeat(25, 1), C.repeat(25, 1))

    def sampled(x, c):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.7))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale[..., None]).to_event(1))
            pyro.sample("x", model.likelihood(model.decoder(z)).to_event(1), obs=x)

    def guide(x, c):
        pyro.sample("scale", dist.LogNormal(0.2, 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    def call(seed):
        summary = collapse_summary(sampled, guide, pair, num_samples=50, measures=["decoder"], seed=seed)
        return torch.tensor([float(summary.model_fisher)]), torch.tensor([float(summary.model_fisher_se)])

    assert_errors_are_right(call, repeats=100)
