"""The annealing handler and the annealed objectives, against closed forms and against Pyro's own."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from torch.distributions import kl_divergence

from pyro_ilvae import AnnealedELBO, anneal, schedules
from pyro_ilvae.infer import AnnealMessenger, NonFiniteLossError


def quiet_trace_enum(**options):
    """TraceEnum_ELBO, which otherwise warns that nothing here is enumerated."""
    return TraceEnum_ELBO(strict_enumeration_warning=False, **({"max_plate_nesting": 1} | options))


BASES = [Trace_ELBO, TraceMeanField_ELBO, quiet_trace_enum, TraceGraph_ELBO, RenyiELBO]
BETAS = [0.0, 0.3, 1.0, 2.0]
X = torch.tensor([0.5, -1.0, 2.0])
Q = dist.Normal(torch.tensor([0.3, -0.5, 1.0]), torch.tensor([0.5, 1.5, 0.7]))


def model(x, data_size=3):
    with pyro.plate("data", data_size, subsample=torch.arange(len(x))):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def guide(x, data_size=3):
    loc = pyro.param("loc", Q.loc.clone())
    scale = pyro.param("scale", Q.scale.clone(), constraint=dist.constraints.positive)
    with pyro.plate("data", data_size, subsample=torch.arange(len(x))):
        pyro.sample("z", dist.Normal(loc[: len(x)], scale[: len(x)]))


def expected_loss(beta):
    """E_q[-log p(x | z)] + beta KL(q || p), in closed form."""
    reconstruction = -dist.Normal(Q.loc, 0.8).log_prob(X) + Q.scale**2 / (2 * 0.8**2)
    divergence = kl_divergence(torch.distributions.Normal(Q.loc, Q.scale), torch.distributions.Normal(0.0, 1.0))
    return float((reconstruction + beta * divergence).sum())


def annealed(elbo, fn=model, proposal=guide, **kwargs):
    loss = elbo.loss_and_grads(fn, proposal, X, **kwargs)
    pyro.infer.util.zero_grads([p.unconstrained() for p in pyro.get_param_store().values()])
    return loss


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("base", BASES[:-1])
def test_closed_form(base, beta):
    elbo = AnnealedELBO(base(num_particles=20000, vectorize_particles=True, max_plate_nesting=1), beta)
    # A draw's loss has a standard deviation of at most 7 here: this is six standard errors.
    assert annealed(elbo) == pytest.approx(expected_loss(beta), abs=0.3)
    assert elbo.loss(model, guide, X) == pytest.approx(expected_loss(1.0), abs=0.3)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("base", BASES[:-1])
def test_a_single_draw(base, beta):
    pyro.set_rng_seed(2)
    loss = annealed(AnnealedELBO(base(), beta))
    pyro.set_rng_seed(2)
    z = poutine.trace(guide).get_trace(X).nodes["z"]["value"].detach()
    divergence = (Q.log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)).sum()
    if base is TraceMeanField_ELBO:
        divergence = torch.tensor(expected_loss(1.0) - expected_loss(0.0))
    expected = -dist.Normal(z, 0.8).log_prob(X).sum() + beta * divergence
    assert loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_beta_one_is_the_base_objective(base):
    for name in ("loss", "loss_and_grads", "differentiable_loss"):
        if not hasattr(base(), name):
            continue
        losses, gradients = [], []
        for elbo in (base(num_particles=3), AnnealedELBO(base(num_particles=3), beta=1.0)):
            pyro.clear_param_store()
            pyro.set_rng_seed(7)
            loss = getattr(elbo, name)(model, guide, X)
            if name == "differentiable_loss":
                loss.backward()
            losses.append(float(torch.as_tensor(loss).detach()))
            gradients.append([p.unconstrained().grad for p in pyro.get_param_store().values()])
        assert losses[0] == losses[1]
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_renyi_weights_are_tempered(alpha, beta):
    elbo = AnnealedELBO(RenyiELBO(alpha=alpha, num_particles=5, vectorize_particles=True, max_plate_nesting=1), beta)
    pyro.set_rng_seed(3)
    loss = elbo.loss_and_grads(model, guide, X)
    pyro.set_rng_seed(3)
    z = Q.loc + Q.scale * torch.randn(5, 3)
    weights = dist.Normal(z, 0.8).log_prob(X) + beta * (dist.Normal(0.0, 1.0).log_prob(z) - Q.log_prob(z))
    # Pyro takes the log-mean-exp for each datum of an independent plate.
    expected = -(((1 - alpha) * weights).logsumexp(0) - math.log(5)).sum() / (1 - alpha)
    assert loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("base", BASES[:-1])
def test_gradient_is_that_of_the_annealed_objective(base):
    elbo = AnnealedELBO(base(num_particles=20000, vectorize_particles=True, max_plate_nesting=1), beta=0.25)
    elbo.loss_and_grads(model, guide, X)
    gradient = pyro.param("loc").unconstrained().grad
    expected = (Q.loc - X) / 0.8**2 + 0.25 * Q.loc
    torch.testing.assert_close(gradient, expected, atol=0.06, rtol=0)


@pytest.mark.parametrize("base", BASES)
def test_evaluation_is_not_annealed_and_moves_nothing(base):
    beta = schedules.linear(0.0, 1.0, 10)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), AnnealedELBO(base(num_particles=2), beta))
    plain = SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), base(num_particles=2))
    svi.step(X)
    for _ in range(3):
        pyro.set_rng_seed(1)
        ours = svi.evaluate_loss(X)
        pyro.set_rng_seed(1)
        assert ours == plain.evaluate_loss(X)
    assert beta.value == 0.0


def test_scales_of_plates_are_multiplied():
    with anneal(beta=0.5):
        trace = poutine.trace(poutine.scale(model, scale=2.0)).get_trace(X[:1])
    assert trace.nodes["z"]["scale"] == 3 * 2 * 0.5
    assert trace.nodes["x"]["scale"] == 3 * 2


@pytest.mark.parametrize("use", ["wrapper", "decorator", "context"])
@pytest.mark.parametrize("beta", [0.5, torch.tensor(0.5), schedules.constant(0.5)])
def test_handler_forms(use, beta):
    if use == "wrapper":
        trace = poutine.trace(anneal(model, beta)).get_trace(X)
    elif use == "decorator":
        trace = poutine.trace(anneal(beta=beta)(model)).get_trace(X)
    else:
        with anneal(beta=beta):
            trace = poutine.trace(model).get_trace(X)
    trace.compute_log_prob()
    assert float(trace.nodes["z"]["scale"]) == 0.5
    assert trace.nodes["x"]["scale"] == 1.0
    expected = 0.5 * dist.Normal(0.0, 1.0).log_prob(trace.nodes["z"]["value"])
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], expected)


def two_latents(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


@pytest.mark.parametrize(
    ("arguments", "scales"),
    [
        ({"beta": 0.5}, (0.5, 0.5)),
        ({"beta": {"z": 0.5}}, (1.0, 0.5)),
        ({"beta": {"a": 0.1, "z": schedules.constant(0.2)}}, (0.1, 0.2)),
        ({"beta": {"a": 0.1}}, (0.1, 1.0)),
    ],
)
def test_named_sites(arguments, scales):
    trace = poutine.trace(anneal(two_latents, **arguments)).get_trace(X)
    assert (trace.nodes["a"]["scale"], trace.nodes["z"]["scale"]) == scales


@pytest.mark.parametrize("build", [AutoNormal, AutoMultivariateNormal, AutoNormalMessenger, AutoDelta])
def test_autoguides(build):
    proposal = build(two_latents)
    proposal(X)
    # At beta = 0 what is left is the reconstruction alone.
    pyro.set_rng_seed(6)
    loss = AnnealedELBO(Trace_ELBO(), beta=0.0).loss_and_grads(two_latents, proposal, X)
    pyro.set_rng_seed(6)
    if build is AutoNormalMessenger:
        proposal(X)
        trace, _ = proposal.get_traces()
    else:
        trace = poutine.trace(poutine.replay(two_latents, poutine.trace(proposal).get_trace(X))).get_trace(X)
    expected = -dist.Normal(trace.nodes["z"]["value"].detach(), 0.8).log_prob(X).sum()
    assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("build", [AutoNormal, AutoMultivariateNormal])
def test_named_sites_whose_density_is_elsewhere_are_refused(build):
    proposal = build(two_latents)
    with pytest.raises(ValueError, match=r"sites whose density is their own, got \['z'\].*auxiliary"):
        annealed(AnnealedELBO(Trace_ELBO(), beta={"z": 0.5}), two_latents, proposal)
    with pytest.raises(ValueError, match="sites whose density is their own"):
        anneal(proposal, beta={"z": 0.5})(X)


def test_unknown_sites_are_refused():
    with pytest.raises(ValueError, match=r"latent sites of model or guide, got \['y'\]; the latent sites are \['z'\]"):
        annealed(AnnealedELBO(Trace_ELBO(), beta={"y": 0.5, "z": 0.5}))
    with pytest.raises(ValueError, match=r"got \['typo'\]"):
        anneal(model, beta={"typo": 0.5})(X)
    with pytest.raises(ValueError, match=r"got \['typo'\]"), anneal(beta={"typo": 0.5}):
        model(X)
    with pytest.raises(ValueError, match=r"got \['x'\]"):
        annealed(AnnealedELBO(Trace_ELBO(), beta={"x": 0.5}))


MEANS = torch.tensor([-1.0, 1.0])
Q_Y = torch.tensor([0.7, 0.3])


def mixture(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("x", dist.Normal(MEANS[y], 1.0), obs=x)


def mixture_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(pyro.param("q", Q_Y, constraint=dist.constraints.simplex)))


@pytest.mark.parametrize("beta", BETAS)
def test_sites_enumerated_in_the_guide(beta):
    elbo = AnnealedELBO(TraceEnum_ELBO(max_plate_nesting=1), beta)
    loss = annealed(elbo, mixture, config_enumerate(mixture_guide))
    log_likelihood = dist.Normal(MEANS[:, None], 1.0).log_prob(X)
    divergence = (Q_Y * (Q_Y / 0.5).log()).sum()
    expected = -(Q_Y[:, None] * log_likelihood).sum() + beta * 3 * divergence
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_sites_enumerated_in_the_model_cannot_have_another_scale():
    with pytest.raises(ValueError, match="Expected sites enumerated in the model to have the scale of the sites that"):
        annealed(AnnealedELBO(TraceEnum_ELBO(max_plate_nesting=1), 0.5), config_enumerate(mixture), lambda x: None)

    @config_enumerate
    def with_latent(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("c", dist.Normal(MEANS[y], 1.0), obs=x)
            z = pyro.sample("z", dist.Normal(0.0, 1.0), infer={"enumerate": None})
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    loss = annealed(AnnealedELBO(TraceEnum_ELBO(max_plate_nesting=1), {"z": 0.5}), with_latent, guide)
    assert math.isfinite(loss)


@pytest.mark.parametrize("elbo", [JitTrace_ELBO(), TraceTailAdaptive_ELBO(num_particles=2), Trace_ELBO])
def test_refuses_objectives_without_a_meaning_for_beta(elbo):
    with pytest.raises(ValueError, match="Expected"):
        AnnealedELBO(elbo, beta=0.5)


@pytest.mark.parametrize(
    "beta", [-0.1, float("nan"), float("inf"), "1", None, True, torch.tensor([0.5, 0.5]), schedules.constant(-1.0)]
)
def test_refuses_betas(beta):
    for build in (lambda: AnnealedELBO(Trace_ELBO(), beta), lambda: anneal(model, beta), lambda: AnnealMessenger(beta)):
        with pytest.raises(ValueError, match="Expected beta to be a finite number >= 0"):
            build()
    with pytest.raises(ValueError, match="Expected beta of site 'z'"):
        anneal(model, {"z": beta})


@pytest.mark.parametrize("build", [schedules.linear, schedules.cosine, schedules.cyclical])
@pytest.mark.parametrize(("start", "end"), [(0.0, -1.0), (1.0, -1e-3)])
def test_refuses_schedules_that_become_negative(build, start, end):
    beta = build(start, end, 10)
    for apply in (lambda beta: AnnealedELBO(Trace_ELBO(), beta), lambda beta: anneal(model, beta), AnnealMessenger):
        with pytest.raises(ValueError, match=rf"Expected beta = {build.__name__}\(.* at every step .* >= 0, got {end}"):
            apply(beta)
        with pytest.raises(ValueError, match="Expected beta of site 'z' = "):
            apply({"z": beta})


def test_module_form_and_pickle():
    elbo = pickle.loads(pickle.dumps(AnnealedELBO(TraceMeanField_ELBO(num_particles=4), beta=0.5)))
    assert elbo.num_particles == 4
    loss_fn = elbo(model, guide)
    loss = loss_fn(X)
    loss.backward()
    assert pyro.param("loc").unconstrained().grad is not None
    with pytest.raises(ValueError, match="differentiable loss, got RenyiELBO"):
        AnnealedELBO(RenyiELBO()).differentiable_loss(model, guide, X)


def broken_model(x):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        rate = pyro.param("rate", torch.tensor(1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)
        pyro.factor("penalty", rate.log() * torch.ones(3))


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_loss_that_is_not_finite_stops_with_step_site_and_state(validate):
    beta = schedules.linear(0.1, 1.0, 10)
    svi = SVI(broken_model, guide, pyro.optim.Adam({"lr": 0.1}), AnnealedELBO(Trace_ELBO(), beta))
    for _ in range(4):
        svi.step(X)
        beta.step()
    with torch.no_grad():
        pyro.param("rate").fill_(-1.0)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    rng_state = torch.get_rng_state()
    with (
        pyro.validation_enabled(validate),
        pytest.raises(
            NonFiniteLossError, match=r"Expected a finite loss, got .* at step 4, at site 'penalty'"
        ) as error,
    ):
        svi.step(X)
    assert (error.value.step, error.value.site) == (4, "penalty")
    for name, value in pyro.get_param_store().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        assert not value.unconstrained().grad.any()
    # The search for the site gives the random numbers back.
    after = torch.get_rng_state()
    torch.set_rng_state(rng_state)
    poutine.trace(guide).get_trace(X)
    assert torch.equal(torch.get_rng_state(), after)


def test_error_survives_the_way_back_from_another_process():
    error = pickle.loads(pickle.dumps(NonFiniteLossError("Expected", 3, "x")))
    assert (str(error), error.step, error.site) == ("Expected", 3, "x")


def test_gradient_that_is_not_finite_stops_before_the_optimizer():
    def kink(x):
        # sqrt at 0 has a finite value and an infinite slope.
        root = pyro.param("root", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(root.sqrt(), 1.0).expand([3]).to_event(1), obs=x)

    svi = SVI(kink, lambda x: None, pyro.optim.Adam({"lr": 0.1}), AnnealedELBO(Trace_ELBO()))
    with pytest.raises(NonFiniteLossError, match=r"Expected finite gradients, got NaN or infinity for \['root'\]"):
        svi.step(X)
    assert pyro.param("root") == 0.0


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("validate", [True, False])
def test_differentiable_loss_checks_too(validate):
    pyro.param("rate", torch.tensor(-1.0))
    with pyro.validation_enabled(validate), pytest.raises(NonFiniteLossError, match="site 'penalty'"):
        AnnealedELBO(Trace_ELBO()).differentiable_loss(broken_model, guide, X)
