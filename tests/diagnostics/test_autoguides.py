"""The diagnostics on AutoGuides, also with constrained sites, against closed forms and quadrature."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_within
from helpers.factor_models import N
from helpers.latent_structures import data_plate, shared_log_marginal, shared_model
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
    init_to_sample,
)
from pyro.nn import PyroModule
from torch.distributions import MultivariateNormal, Normal, biject_to
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import UnavailableError, active_units, evidence, kl_divergence, kl_per_dimension


def scalar_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("build", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_guides_whose_density_is_at_an_auxiliary_site(build):
    x = torch.randn(N)
    guide = build(scalar_model, init_loc_fn=init_to_sample, init_scale=0.5)
    guide(x)
    with torch.no_grad():
        loc = guide.median(x)["z"]
    kl = kl_per_dimension(scalar_model, guide, x)
    assert kl.estimator == "analytic"
    torch.testing.assert_close(kl.values, exact_kl(Normal(loc, 0.5), Normal(0.0, 1.0)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(active_units(scalar_model, guide, x).variances, loc.var(), rtol=1e-4, atol=1e-4)


def test_points_are_refused():
    x = torch.randn(N)
    guide = AutoDelta(scalar_model)
    guide(x)
    for measure in (kl_per_dimension, kl_divergence, active_units):
        with pytest.raises(UnavailableError, match="got a Delta"):
            measure(scalar_model, guide, x)


def test_guide_with_parameters_of_its_own():
    guide = AutoNormalMessenger(scalar_model)
    x = torch.randn(N)
    svi = SVI(scalar_model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(x)
    kl = kl_per_dimension(scalar_model, guide, x)
    draws = poutine.trace(guide).get_trace(x).nodes["z"]["fn"].sample((20_000,))
    expected = exact_kl(Normal(draws.mean(0), draws.std(0)), Normal(0.0, 1.0))
    torch.testing.assert_close(kl.values.mean(), expected.mean(), atol=0.05, rtol=0)
    assert not kl.values.requires_grad
    assert not active_units(scalar_model, guide, x).variances.requires_grad


JOINT = (AutoMultivariateNormal, AutoLowRankMultivariateNormal)


GAUSSIAN = (AutoNormal, AutoDiagonalNormal, *JOINT)


def perturbed(guide, x, size=0.3):
    """The guide with parameters that have moved from where they begin."""
    pyro.clear_param_store()
    guide(x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return guide


def one_site(prior):
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z if prior.event_dim == 0 else z.sum(-1), 1.0), obs=x)

    return model


def unconstrained_blocks(guide, x, dims):
    """The Gaussian of each datum's unconstrained value, from the parameters of the guide."""
    if isinstance(guide, AutoNormal):
        loc, scale = guide.locs.z, guide.scales.z
        return MultivariateNormal(loc.reshape(-1, dims), scale.reshape(-1, dims).square().diag_embed())
    joint = guide.get_posterior(x)
    full = joint.variance.diag() if isinstance(guide, AutoDiagonalNormal) else joint.covariance_matrix
    blocks = full.reshape(len(x), dims, len(x), dims)
    return MultivariateNormal(
        joint.mean.reshape(-1, dims), torch.stack([blocks[n, :, n] for n in range(len(x))]) + 1e-7 * torch.eye(dims)
    )


def quadrature_kl(q, prior):
    """KL(q || p) of a Gaussian over unconstrained values to a prior over constrained ones, in one or two dimensions."""
    dims, step = q.event_shape[0], 0.02 if q.event_shape[0] == 1 else 0.05
    axis = torch.arange(-9, 9, step, dtype=torch.float64)
    u = torch.cartesian_prod(*[axis] * dims).reshape(-1, dims)
    transform = biject_to(prior.support)
    points = u if transform.domain.event_dim == 1 or prior.event_dim == 1 else u[:, 0]
    values = transform(points)
    jacobian = transform.log_abs_det_jacobian(points, values)
    jacobian = jacobian.sum(-1) if jacobian.dim() > 1 else jacobian
    log_p = prior.log_prob(values.float()) + jacobian
    log_q = MultivariateNormal(q.mean.double(), q.covariance_matrix.double()).log_prob(u[:, None])
    return (log_q.exp() * (log_q - log_p[:, None])).sum(0).mul(step**dims).float()


PRIORS = {
    "normal": dist.Normal(0.5, 2.0),
    "log-normal": dist.LogNormal(0.2, 0.7),
    "gamma": dist.Gamma(2.0, 1.5),
    "beta": dist.Beta(2.0, 3.0),
    "uniform": dist.Uniform(-1.0, 2.0),
    "half-normal": dist.HalfNormal(1.5),
    "dirichlet": dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
    "normal-vector": dist.Normal(torch.tensor([0.0, 1.0]), 0.8).to_event(1),
    "log-normal-vector": dist.LogNormal(torch.tensor([0.0, 1.0]), 0.8).to_event(1),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("build", GAUSSIAN)
def test_kl_of_a_constrained_site(build, prior):
    x = torch.randn(4)
    model = one_site(prior)
    guide = perturbed(build(model, init_scale=0.3), x)
    dims = 2 if prior.event_dim else 1
    q = unconstrained_blocks(guide, x, dims)
    kl = kl_divergence(model, guide, x, num_samples=3000)
    assert_within(kl.values, quadrature_kl(q, prior), kl.standard_errors, atol=2e-4)
    name = type(prior).__name__
    if name in ("LogNormal", "Normal") or (prior.event_dim and build not in JOINT and name != "Dirichlet"):
        assert kl.estimator == "analytic"
    if name == "Dirichlet":
        with pytest.raises(UnavailableError, match="site 'z' to factorize"):
            kl_per_dimension(model, guide, x)
        return
    each = kl_per_dimension(model, guide, x, num_samples=3000)
    if dims == 1:
        assert_within(each.values, quadrature_kl(q, prior), each.standard_errors, atol=2e-4)
    else:
        base = prior.base_dist if name == "Independent" else prior
        loc, scale = (
            (base.base_dist.loc, base.base_dist.scale) if hasattr(base, "base_dist") else (base.loc, base.scale)
        )
        expected = exact_kl(Normal(q.mean, q.stddev), Normal(loc, scale))
        assert each.estimator == "analytic"
        torch.testing.assert_close(each.values, expected, rtol=1e-3, atol=1e-4)


def hierarchical(x):
    with data_plate(x):
        r = pyro.sample("r", dist.LogNormal(0.2, 0.7))
        z = pyro.sample("z", dist.Normal(r.log()[..., None] + torch.zeros(2), 1.0).to_event(1))
        if x.isfinite().all():
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def with_shared(x):
    a = pyro.sample("a", dist.Beta(2.0, 2.0))
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        if x.isfinite().all():
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def in_parts(model):
    guide = AutoGuideList(model)
    first, *rest = ("r", "z") if model is hierarchical else ("a", "z")
    guide.append(AutoNormal(poutine.block(model, expose=[first]), init_scale=0.5))
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=rest), init_scale=0.5))
    return guide


BUILDERS = {
    **{build.__name__: lambda model, build=build: build(model, init_scale=0.5) for build in GAUSSIAN},
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=[20]),
    "AutoNormalMessenger": lambda model: AutoNormalMessenger(model, init_scale=0.5),
    "AutoHierarchicalNormalMessenger": lambda model: AutoHierarchicalNormalMessenger(model, init_scale=0.5),
    "AutoStructured": lambda model: AutoStructured(model, conditionals="mvn", dependencies="linear", init_scale=0.5),
    "AutoGuideList": in_parts,
}


@pytest.mark.slow
@pytest.mark.parametrize("model", [hierarchical, with_shared])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_joint_kl_is_that_of_pyro(build, model):
    x, size = torch.randn(4), 4000
    guide = build(model)
    perturbed(guide, x, 0.1 if isinstance(guide, AutoIAFNormal) else 0.3)
    kl = kl_divergence(model, guide, x, num_samples=size, seed=0)
    local = type(guide).__name__ in ("AutoNormal", "AutoNormalMessenger", "AutoHierarchicalNormalMessenger")
    assert kl.values.shape == ((4,) if local and model is hierarchical else (1,))
    # The ELBO of a model without likelihood; a NaN takes it out.
    elbo = Trace_ELBO(num_particles=size, vectorize_particles=True, max_plate_nesting=1)
    expected = elbo.loss(model, guide, torch.full((4,), torch.nan))
    error = (2 * kl.standard_errors.square().sum()).sqrt()
    assert_within(kl.values.sum(), torch.tensor(expected), error)
    again = [kl_divergence(model, guide, x, num_samples=50, seed=seed) for seed in range(2)]
    assert not torch.equal(again[0].values, again[1].values)
    bounds = evidence(model, guide, x, num_samples=size, seed=0)
    assert bounds.elbo.shape == kl.values.shape
    error = (2 * bounds.elbo_standard_errors.square().sum()).sqrt()
    assert_within(bounds.elbo.sum(), torch.tensor(-elbo.loss(model, guide, x)), error)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_kl_of_each_site_of_an_autoguide(build):
    x = torch.randn(4)
    guide = perturbed(build(hierarchical), x)
    if isinstance(guide, AutoIAFNormal | AutoStructured):
        for measure in (kl_divergence, kl_per_dimension, active_units):
            with pytest.raises(UnavailableError, match=f"site 'z' alone, got {type(guide).__name__}"):
                measure(hierarchical, guide, x, site="z")
        return
    r = kl_divergence(hierarchical, guide, x, site="r")
    draws = _draws(guide, x, 20000)
    fitted = exact_kl(Normal(draws["r"].log().mean(0), draws["r"].log().std(0)), Normal(0.2, 0.7))
    assert r.estimator == "analytic"
    torch.testing.assert_close(r.values, fitted, atol=0.05, rtol=0.05)
    z = kl_divergence(hierarchical, guide, x, site="z", num_samples=2000)
    if not isinstance(guide, AutoHierarchicalNormalMessenger):  # whose z is not normal on its own
        covariance = torch.stack([draws["z"][:, n].mT.cov() for n in range(4)])
        gap = (draws["z"] - draws["r"].log()[..., None]).square().sum(-1).mean(0)
        entropy = MultivariateNormal(torch.zeros(4, 2), covariance).entropy()
        expected = 0.5 * gap + 2 * 0.9189385 - entropy
        assert ((z.values - expected).abs() < 5 * z.standard_errors + 0.02 * expected.abs() + 0.03).all()
    units = active_units(hierarchical, guide, x, site="z", num_samples=2000)
    assert ((units.variances - draws["z"].mean(0).var(0)).abs() < 0.05 * units.variances + 0.02).all()


@pytest.mark.parametrize("model", [hierarchical, with_shared])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_autoguides_draw_many_particles_at_once(build, model):
    x = torch.randn(4)
    guide = perturbed(build(model), x)
    calls = []

    def counted(x):
        calls.append(1)
        model(x)

    evidence(counted, guide, x, num_samples=1000)
    assert len(calls) < 20


def _draws(guide, x, size):
    with pyro.plate("many", size, dim=-2), torch.no_grad():
        return {name: value.squeeze() for name, value in guide(x).items() if name in ("r", "z")}


@pytest.mark.parametrize("build", JOINT)
def test_kl_of_a_joint_guide_over_inner_plates_is_that_of_all_data(build):
    x = torch.randn(2, 3)

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = perturbed(build(model, init_scale=0.5), x)
    joint = guide.get_posterior(x)
    kl = kl_divergence(model, guide, x, num_samples=5000)
    full = MultivariateNormal(joint.mean, joint.covariance_matrix)
    assert_within(kl.values, exact_kl(full, MultivariateNormal(torch.zeros(6), torch.eye(6)))[None], kl.standard_errors)
    marginals = exact_kl(Normal(joint.mean, joint.stddev), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_per_dimension(model, guide, x).values, marginals.reshape(2, 3), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="batch_size=None"):
        kl_divergence(model, perturbed(build(model), x[:1]), x, batch_size=1)


def test_laplace_approximation_of_a_gaussian_is_exact():
    x = torch.randn(5)
    guide = AutoLaplaceApproximation(shared_model)
    guide(x)
    with pytest.raises(UnavailableError, match=r"a point for each of \['a', 'z'\]"):
        evidence(shared_model, guide, x)
    covariance = torch.ones(6, 6)
    covariance[1:, 1:] += torch.eye(5)  # of a and z
    gain = torch.linalg.solve(covariance[1:, 1:] + 0.49 * torch.eye(5), covariance[1:])
    with torch.no_grad():
        guide.loc.copy_(x @ gain)
    laplace = guide.laplace_approximation(x)
    bounds = evidence(shared_model, laplace, x, num_samples=5)
    torch.testing.assert_close(bounds.elbo, shared_log_marginal(x)[None], atol=1e-3, rtol=1e-3)
    posterior = MultivariateNormal(x @ gain, covariance - covariance[:, 1:] @ gain)
    kl = kl_divergence(shared_model, laplace, x, num_samples=5000)
    assert_within(
        kl.values, exact_kl(posterior, MultivariateNormal(torch.zeros(6), covariance))[None], kl.standard_errors
    )
    a = kl_divergence(shared_model, laplace, x, site="a", num_samples=2000)
    expected = exact_kl(Normal(posterior.mean[0], posterior.stddev[0]), Normal(0.0, 1.0))[None]
    assert_within(a.values, expected, a.standard_errors, rtol=1e-3)


def test_points_among_the_sites():
    x = torch.randn(4)
    guide = AutoGuideList(shared_model)
    guide.append(AutoDelta(poutine.block(shared_model, expose=["a"])))
    guide.append(AutoDiagonalNormal(poutine.block(shared_model, expose=["z"]), init_scale=0.5))
    guide(x)
    with torch.no_grad():
        guide[0].a.fill_(0.7)
    loc = guide[1].loc.detach()
    kl = kl_divergence(shared_model, guide, x, site="z")
    torch.testing.assert_close(kl.values, exact_kl(Normal(loc, 0.5), Normal(0.7, 1.0)), rtol=1e-3, atol=1e-4)
    for call in (lambda: kl_divergence(shared_model, guide, x), lambda: evidence(shared_model, guide, x)):
        with pytest.raises(UnavailableError, match=r"for each of \['a'\]"):
            call()
    with pytest.raises(UnavailableError, match="site 'a' from a distribution, got a Delta"):
        kl_per_dimension(shared_model, guide, x, site="a")


def test_autoguide_inside_a_module():
    class Both(PyroModule):
        def __init__(self):
            super().__init__()
            self.posterior = AutoDiagonalNormal(one_site(PRIORS["log-normal"]), init_scale=0.5)

        def forward(self, x):
            return self.posterior(x)

    x = torch.randn(4)
    both = Both()
    both(x)
    kl = kl_per_dimension(one_site(PRIORS["log-normal"]), both, x)
    loc = both.posterior.loc.detach()
    torch.testing.assert_close(kl.values, exact_kl(Normal(loc, 0.5), Normal(0.2, 0.7)), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_fresh_guide_can_be_trained_after_it_was_looked_at(local_params):
    x = torch.randn(5) + 3
    model = one_site(PRIORS["normal"])
    guide = AutoNormal(model)
    assert not evidence(model, guide, x).elbo.requires_grad
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(num_particles=10, vectorize_particles=True))
    for _ in range(150):
        svi.step(x)
    bounds = evidence(model, guide, x)
    assert (bounds.elbo > Normal(0.5, 5**0.5).log_prob(x) - 0.1).all()


def test_autoguide_with_parameters_for_each_datum_in_batches():
    x = torch.randn(7)
    prior = PRIORS["normal"]

    def model(index, x):
        with pyro.plate("data", 7, subsample=index):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model, create_plates=lambda index, _: pyro.plate("data", 7, subsample=index), init_scale=0.3)
    guide(torch.arange(7), x)
    with torch.no_grad():
        guide.locs.z.add_(torch.randn(7))
    expected = exact_kl(Normal(guide.locs.z.detach(), 0.3), Normal(0.5, 2.0))
    for batch_size in (None, 3):
        kl = kl_per_dimension(model, guide, (torch.arange(7), x), batch_size=batch_size)
        torch.testing.assert_close(kl.values, expected, rtol=1e-4, atol=1e-5)


def test_sites_of_the_guide_alone_are_refused():
    x = torch.randn(3)

    def guide(x):
        with data_plate(x):
            pyro.sample("y", dist.Bernoulli(0.5))
            pyro.sample("Z", dist.Normal(0.0, 1.0))

    def model(x):
        with data_plate(x):
            y = pyro.sample("y", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"among \['y'\], got 'Z'"):
        evidence(model, guide, x)
