"""Weights of named sites: an auxiliary site and the sites computed from it hold one density, which has one weight."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.infer.reparam import LocScaleReparam

from pyro_ilvae import AnnealedELBO, anneal, schedules

X = torch.tensor([1.5, 0.3])


def model(x):
    t = pyro.sample("t", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(t, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def guides_of(*parts):
    def build(fn):
        guide = AutoGuideList(fn)
        for part, name in parts:
            guide.append(part(poutine.block(fn, expose=[name])))
        return guide

    return build


def at(parameters, name):
    return getattr(parameters, name).detach()


def log_normal(guide, t, z):
    """The log densities of t, and of z given t, of guides with a Normal for log t and for each z."""
    locs, scales = guide.locs, guide.scales
    return {
        "t": dist.Normal(at(locs, "t"), at(scales, "t")).log_prob(t.log()) - t.log(),
        "z": dist.Normal(at(locs, "z"), at(scales, "z")).log_prob(z).sum(),
    }


def linear(guide, t, z):
    """The same for AutoStructured, whose z is shifted by a linear function of log t."""
    u = (t.log() - at(guide.locs, "t")).reshape(1)
    loc = at(guide.locs, "z") + guide.deps.z.t(u).detach()
    scale_of_t, scale_of_z = at(guide.scales, "t"), at(guide.scales, "z")
    return {
        "t": dist.Normal(at(guide.locs, "t"), scale_of_t).log_prob(t.log()).sum() - t.log(),
        "z": dist.Normal(loc, scale_of_z).log_prob(z).sum(),
    }


def point(guide, t, z):
    return {"t": torch.tensor(0.0), "z": torch.tensor(0.0)}


def joint_and_point(guide, t, z):
    posterior = guide[0].get_posterior()
    return {"t": posterior.log_prob(t.log().reshape(1)).detach() - t.log(), "z": torch.tensor(0.0)}


JOINT = {
    "_AutoMultivariateNormal_latent": AutoMultivariateNormal,
    "_AutoDiagonalNormal_latent": AutoDiagonalNormal,
    "_AutoLowRankMultivariateNormal_latent": AutoLowRankMultivariateNormal,
    "_AutoIAFNormal_latent": lambda fn: AutoIAFNormal(fn, hidden_dim=[4]),
    "_AutoLaplaceApproximation_latent": AutoLaplaceApproximation,
    "_AutoGaussianDense_latent": AutoGaussian,
}
# A guide, its densities, and the sites that must be weighted together.
FACTORS = {
    "normal": (AutoNormal, log_normal, [{"t", "t_unconstrained"}, {"z", "z_unconstrained"}]),
    "structured": (lambda fn: AutoStructured(fn, conditionals="normal"), linear, [{"t", "t_aux"}, {"z", "z_aux"}]),
    "point": (AutoDelta, point, [{"t"}, {"z"}]),
    "messenger": (AutoNormalMessenger, log_normal, [{"t"}, {"z"}]),
    "joint and point": (
        guides_of((AutoMultivariateNormal, "t"), (AutoDelta, "z")),
        joint_and_point,
        [{"t", "_AutoGuideList.0_latent"}, {"z"}],
    ),
}


def built(build):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = build(model)
    guide(X)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return guide


def run(guide):
    """The names of the guide's sites, and the values of t and z, under the seed of ``loss``."""
    pyro.set_rng_seed(1)
    if isinstance(guide, poutine.messenger.Messenger):
        guide(X)
        nodes = guide.get_traces()[1].nodes
    else:
        nodes = poutine.trace(guide).get_trace(X).nodes
    names = [name for name, node in nodes.items() if node["type"] == "sample" and name not in ("data", "x")]
    return names, nodes["t"]["value"].detach(), nodes["z"]["value"].detach()


def loss(fn, guide, beta, base=Trace_ELBO, **options):
    pyro.set_rng_seed(1)
    return AnnealedELBO(base(**options), beta).loss_and_grads(fn, guide, X)


def subsets(names):
    return [set(some) for size in range(1, len(names) + 1) for some in itertools.combinations(names, size)]


@pytest.mark.parametrize("kind", FACTORS)
def test_each_subset_of_an_autoguide_is_refused_or_weights_the_log_ratios_of_its_variables(kind):
    build, densities, together = FACTORS[kind]
    guide = built(build)
    names, t, z = run(guide)
    log_q = densities(guide, t, z)
    log_p = {"t": dist.LogNormal(0.0, 1.0).log_prob(t), "z": dist.Normal(t, 1.0).log_prob(z).sum()}
    likelihood = dist.Normal(z, 0.7).log_prob(X).sum()
    for named in subsets(names):
        beta = dict.fromkeys(named, 0.25)
        if any(named & group and not group <= named for group in together):
            with pytest.raises(ValueError, match=r"sites whose density is their own, got .*with the same beta"):
                loss(model, guide, beta)
            continue
        weights = {name: 0.25 if name in named else 1.0 for name in ("t", "z")}
        expected = -likelihood + sum(weight * (log_q[name] - log_p[name]) for name, weight in weights.items())
        assert loss(model, guide, beta) == pytest.approx(float(expected), rel=1e-4), named


@pytest.mark.parametrize("latent", JOINT)
def test_a_joint_guide_is_weighted_as_a_whole_or_not_at_all(latent):
    guide = built(JOINT[latent])
    names, _, z = run(guide)
    assert set(names) == {latent, "t", "z"}
    for named in subsets(names):
        if named == set(names):
            expected = -dist.Normal(z, 0.7).log_prob(X).sum()
            assert loss(model, guide, dict.fromkeys(named, 0.0)) == pytest.approx(float(expected), rel=1e-4)
        else:
            with pytest.raises(ValueError, match=f"shared by the auxiliary site '{latent}' and by \\['t', 'z'\\]"):
                loss(model, guide, dict.fromkeys(named, 0.0))


@pytest.mark.parametrize("options", [{"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}])
@pytest.mark.parametrize("base", [Trace_ELBO, RenyiELBO])
@pytest.mark.parametrize("build", [AutoNormal, AutoMultivariateNormal, AutoHierarchicalNormalMessenger])
def test_naming_all_sites_is_one_beta_for_all(build, base, options):
    guide = built(build)
    names, _, _ = run(guide)
    options = options | {"max_plate_nesting": 1}
    beta = schedules.constant(0.3)
    assert loss(model, guide, dict.fromkeys(names, beta), base, **options) == loss(model, guide, beta, base, **options)
    with pytest.raises(ValueError, match="latent sites of model or guide, got \\['y'\\]"):
        loss(model, guide, {"y": 0.3}, base, **options)


def test_sites_of_one_density_need_one_beta():
    guide = built(AutoNormal)
    with pytest.raises(ValueError, match=r"Expected one beta for the density that is shared by .*'t': 0.5"):
        loss(model, guide, {"t": 0.5, "t_unconstrained": 0.25})
    beta = {"t": schedules.constant(0.5), "t_unconstrained": torch.tensor(0.5)}
    assert loss(model, guide, beta) == loss(model, guide, {"t": 0.5, "t_unconstrained": 0.5})


def noise(x, how):
    """A guide that computes t from noise without parameters, and draws z by itself, from t, or from the noise."""
    loc = pyro.param("loc", torch.tensor([0.2, 0.1, -0.3]))
    fn = {"coin": dist.Bernoulli(0.5), "category": dist.Categorical(torch.ones(2))}.get(how, dist.Normal(0.0, 1.0))
    u = pyro.sample("u", fn, infer={"is_auxiliary": True})
    value = (0.5 * u + loc[0]).exp()
    log_density = -value.log() - torch.tensor(0.5).log()
    t = pyro.sample("t", dist.Delta((u > 0).float() + 0.5 if how == "rounded" else value, log_density))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc[1:] + {"t": t, "u": u}.get(how, 0.0), 0.5))


@pytest.mark.parametrize(
    ("how", "accepted"),
    [
        ("alone", [{"z"}, {"t", "u"}, {"t", "u", "z"}]),
        ("t", [{"z"}, {"t", "u"}, {"t", "u", "z"}]),
        ("u", [{"t", "u", "z"}]),
        ("coin", [{"z"}, {"t", "u"}, {"t", "u", "z"}]),
        ("category", [{"t", "u", "z"}]),  # autograd does not follow an int
        ("rounded", [{"z"}, {"t", "u"}, {"t", "u", "z"}]),
    ],
)
def test_what_depends_on_an_auxiliary_site_is_found_in_any_guide(how, accepted):
    def guide(x):
        noise(x, how)

    for named in subsets(["t", "u", "z"]):
        if named in accepted:
            loss(model, guide, dict.fromkeys(named, 0.5))
        else:
            with pytest.raises(ValueError, match="density is their own"):
                loss(model, guide, dict.fromkeys(named, 0.5))


def test_an_auxiliary_site_larger_than_its_namesake_is_not_determined_by_it():
    def guide(x):
        u = pyro.sample("t_aux", dist.Normal(torch.zeros(3), 1.0).to_event(1), infer={"is_auxiliary": True})
        loc = pyro.param("loc", torch.tensor(0.1))
        pyro.sample("t", dist.Delta((u[0] + loc).exp(), -u[0] - loc))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(u[1:] + loc))

    for named in subsets(["t_aux", "t", "z"])[:-1]:
        with pytest.raises(ValueError, match="shared by the auxiliary site 't_aux' and by \\['t', 'z'\\]"):
            loss(model, guide, dict.fromkeys(named, 0.5))
    loss(model, guide, dict.fromkeys(["t_aux", "t", "z"], 0.5))


def test_an_auxiliary_site_that_nothing_depends_on_has_no_counterpart():
    def guide(x):
        pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("t", dist.LogNormal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match="got 'u', an auxiliary site of which no site of the guide is a function"):
        loss(model, guide, {"u": 0.5})
    loss(model, guide, {"t": 0.5})


def test_without_gradients_the_sites_of_an_autoguide_are_still_known():
    guide = built(AutoNormal)
    with torch.no_grad():
        anneal(guide, beta={"t": 0.5, "t_unconstrained": 0.5})(X)
        with pytest.raises(ValueError, match=r"Also name \['t_unconstrained'\]"):
            anneal(guide, beta={"t": 0.5})(X)
    joint = built(AutoMultivariateNormal)
    with torch.no_grad(), pytest.raises(ValueError, match=r"Also name \['z'\]"):
        anneal(joint, beta={"t": 0.5, "_AutoMultivariateNormal_latent": 0.5})(X)


def test_a_reparameterized_site_is_named_by_its_latent_site():
    decentered = poutine.reparam(model, config={"z": LocScaleReparam(0.0)})
    guide = AutoDelta(decentered)
    with pytest.raises(ValueError, match=r"'z' is observed or deterministic and computed from \['z_decentered'\]"):
        loss(decentered, guide, {"z": 0.5})
    with pytest.raises(ValueError, match=r"got \['x'\].*'x' is observed or deterministic$"):
        loss(decentered, guide, {"x": 0.5})
    z = run_of_decentered(decentered, guide)
    expected = loss(decentered, guide, 1.0) + 0.5 * float(dist.Normal(0.0, 1.0).log_prob(z).sum())
    assert loss(decentered, guide, {"z_decentered": 0.5}) == pytest.approx(expected, rel=1e-5)


def run_of_decentered(fn, guide):
    pyro.set_rng_seed(1)
    return poutine.trace(guide).get_trace(X).nodes["z_decentered"]["value"].detach()


@pytest.mark.filterwarnings("ignore:Found")
def test_sites_that_only_model_or_guide_has_are_refused():
    def only_t(x):
        pyro.sample("t", dist.LogNormal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    def with_more(x):
        only_t(x)
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for guide, site in ((only_t, "z"), (with_more, "w")):
        with pytest.raises(ValueError, match=f"sites of both model and guide, got \\['{site}'\\]"):
            loss(model, guide, {site: 0.5, "t": 0.5})


@pytest.mark.parametrize("beta", [{}, {1: 0.5}])
def test_mappings_name_sites(beta):
    for build in (lambda: AnnealedELBO(Trace_ELBO(), beta), lambda: anneal(model, beta)):
        with pytest.raises(
            (ValueError, TypeError), match=r"Expected beta to (name at least one site|map names of sites)"
        ):
            build()
