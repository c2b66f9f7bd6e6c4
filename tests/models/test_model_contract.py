"""What every model here is as a Pyro program: the contract of model and guide, and of the methods that all have."""

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import EVENT, LATENT, perturb
from helpers.models import EVERY_KIND as ONE_OF_EACH
from helpers.models import MODELS, NUM_DATA
from pyro import poutine
from pyro.infer import SVI, Predictive
from pyro.poutine.util import prune_subsample_sites

from pyro_ilvae import VAE, AnnealedELBO, SequentialVAE, from_pyro_svi, likelihoods
from pyro_ilvae.diagnostics import collapse_summary

ADAM = {"lr": 1e-2}


def every_model():
    """All of them, and in a fast run one of each."""
    fast, slow = ONE_OF_EACH.values(), pytest.mark.slow
    cases = [pytest.param(case, id=name, marks=() if case in fast else slow) for name, case in MODELS.items()]
    return pytest.mark.parametrize("case", cases)


def one_of_each(*only):
    chosen = {name: case for name, case in ONE_OF_EACH.items() if not only or name in only}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


def left_where_they_were(step, model):
    """The parameters that some steps did not move."""
    before = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(3):
        step()
    return [name for name, value in model.named_parameters() if torch.equal(before[name], value)]


def torch_step(model, loss_fn, x):
    optimizer = torch.optim.Adam(model.parameters(), **ADAM)

    def step():
        optimizer.zero_grad()
        loss_fn(x).backward()
        optimizer.step()

    return step


# What each method returns, for those that a model has.
METHODS = {
    "encode": lambda model, x, **options: model.encode(x, **options),
    "reconstruct": lambda model, x, **options: model.reconstruct(x, **options),
    "predict_component": lambda model, x, **options: model.predict_component(x, **options),
    "sample_prior": lambda model, x, **options: model.sample_prior(5, **options),
    "sample_component": lambda model, x, **options: model.sample_component(1, 5, **options),
    "sample": lambda model, x, **options: model.sample(model.encode(x)[0], **options),
    "search": lambda model, x, **options: model.search(model.encode(x)[0], **options),
    "interpolate": lambda model, x, **options: model.interpolate(x[0], x[1], **options),
}


def results(model, x, names=tuple(METHODS), **options):
    """What the methods return, each as a tuple of tensors."""
    values = {name: METHODS[name](model, x, **options) for name in names if hasattr(model, name)}
    return {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}


def assert_equal(some, others):
    assert some.keys() == others.keys()
    for name in some:
        assert all(map(torch.equal, some[name], others[name])), name


@every_model()
def test_sites_and_plates(case):
    model = case.build(data_size=30)
    guide_trace = poutine.trace(model.guide).get_trace(case.x)
    trace = prune_subsample_sites(poutine.trace(poutine.replay(model.model, trace=guide_trace)).get_trace(case.x))
    for one, sites in ((trace, case.sites), (prune_subsample_sites(guide_trace), case.guide_sites)):
        one.compute_log_prob()
        assert {name for name, node in one.nodes.items() if node["type"] == "sample"} == set(sites)
        for site in sites:
            assert one.nodes[site]["fn"].event_shape == case.sites[site]
            assert [(frame.name, frame.full_size) for frame in one.nodes[site]["cond_indep_stack"]] == [("data", 30)]
            assert one.nodes[site]["log_prob"].shape == (NUM_DATA,)
            assert one.nodes[site]["scale"] == 30 / NUM_DATA
    assert trace.nodes["x"]["is_observed"]


@every_model()
def test_every_parameter_is_trained_and_evaluation_needs_no_gradients(case):
    model = case.build(data_size=NUM_DATA)
    svi = SVI(model.model, model.guide, pyro.optim.Adam(ADAM), case.objectives[0]())
    assert not left_where_they_were(lambda: svi.step(case.x), model)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert svi.evaluate_loss(case.x) > 0


@every_model()
def test_torch_optimizer_trains_with_global_and_local_parameters(case, local_params):
    model = case.build()
    loss_fn = AnnealedELBO(case.objectives[-1](max_plate_nesting=1), beta=0.5)(model.model, model.guide)
    assert not left_where_they_were(torch_step(model, loss_fn, case.x), model)
    assert bool(pyro.get_param_store()) != local_params


@one_of_each()
def test_vectorized_particles_agree_with_a_loop(case):
    model, losses = case.build(), {}
    for vectorize in (True, False):
        elbo = case.objectives[-1](num_particles=10, vectorize_particles=vectorize)
        draws = torch.tensor([elbo.loss(model.model, model.guide, case.x) for _ in range(8)])
        losses[vectorize] = draws.mean(), draws.var() / 8
    difference = abs(losses[True][0] - losses[False][0])
    assert difference < 5 * (losses[True][1] + losses[False][1]).sqrt()


def site_densities(function, values, **arguments):
    """The log density of each datum at each site, at latent values that are given."""
    trace = poutine.trace(poutine.condition(function, data=values)).get_trace(**arguments)
    trace.compute_log_prob()
    sites = [name for name, node in prune_subsample_sites(trace).nodes.items() if node["type"] == "sample"]
    return {name: trace.nodes[name]["log_prob"] for name in sites}


@every_model()
@torch.no_grad()
def test_particles_on_the_left_are_a_loop_over_them(case):
    model, x = case.build().double(), case.data(torch.float64)
    values = case.latent_values(4, NUM_DATA, dtype=torch.float64)

    def plated(function):
        def of_particles(x):
            with pyro.plate("particles", 4, dim=-2):
                return function(x)

        return of_particles

    for function, sites in ((model.model, case.sites), (model.guide, case.guide_sites)):
        together = site_densities(plated(function), values, x=x)
        alone = [site_densities(function, {name: value[i] for name, value in values.items()}, x=x) for i in range(4)]
        assert together.keys() == alone[0].keys() == set(sites)
        for name, value in together.items():
            torch.testing.assert_close(value.expand(4, NUM_DATA), torch.stack([each[name] for each in alone]))


@every_model()
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(case, parallel):
    model = case.build()
    posterior = Predictive(model.model, guide=model.guide, num_samples=7, parallel=parallel)
    assert posterior(case.x)["x"].numel() == 7 * case.x.numel()
    unconditioned = Predictive(poutine.uncondition(model.model), num_samples=7, parallel=parallel)(case.x)
    assert unconditioned["x"].shape == (7, *case.x.shape)
    for prior in (Predictive(model.model, num_samples=7, parallel=parallel), posterior):
        shapes = {name: value.shape for name, value in prior(num_data=5).items()}
        assert shapes == {name: (7, 5, *event_shape) for name, event_shape in case.sites.items()}


@one_of_each()
@torch.no_grad()
def test_without_data_guide_is_the_prior(case):
    model = perturb(case.build())
    values = case.latent_values(4)

    def joint(function, y=values["y"]):
        found = site_densities(function, values | {"y": y}, num_data=4)
        return sum(density for name, density in found.items() if name != "x")

    if "y" in set(case.sites) - set(case.guide_sites):
        prior = torch.stack([joint(model.model, torch.full((4,), y)) for y in range(3)]).logsumexp(0)
    else:
        prior = joint(model.model)
    torch.testing.assert_close(joint(model.guide), prior)
    assert model.model().shape == (1, *case.sites["x"])
    assert model.guide().shape == (1, LATENT)


@one_of_each("vae", "sequential")
@torch.no_grad()
def test_prior_is_the_standard_normal(case):
    trace = poutine.trace(case.build().model).get_trace(num_data=4)
    torch.testing.assert_close(trace.nodes["z"]["fn"].mean, torch.zeros(4, LATENT))
    torch.testing.assert_close(trace.nodes["z"]["fn"].variance, torch.ones(4, LATENT))


class OtherPrior:
    """A prior N(20, 0.1^2) for the class that comes after it."""

    def _prior(self):
        return dist.Normal(20.0 * torch.ones(LATENT), 0.1).to_event(1)


class VAEWithOtherPrior(OtherPrior, VAE):
    pass


class SequentialVAEWithOtherPrior(OtherPrior, SequentialVAE):
    pass


@pytest.mark.parametrize(("name", "kind"), [("vae", VAEWithOtherPrior), ("sequential", SequentialVAEWithOtherPrior)])
def test_a_subclass_may_have_another_prior(name, kind):
    case = ONE_OF_EACH[name]
    model, standard = case.build(kind=kind), case.build()
    standard.load_state_dict(model.state_dict())
    codes = [
        poutine.trace(function).get_trace(num_data=5).nodes["z"]["value"] for function in (model.model, model.guide)
    ]
    codes.append(poutine.trace(model.model).get_trace(case.x).nodes["z"]["value"])
    model.decoder.register_forward_pre_hook(lambda module, arguments: codes.append(arguments[0]))
    if name == "sequential":
        model.decoder.begin = lambda z, begin=model.decoder.begin: codes.append(z) or begin(z)
    model.sample_prior(5)
    assert len(codes) > 3
    assert all(((z - 20).abs() < 1).all() for z in codes)
    losses = []
    for one in (model, standard):
        pyro.clear_param_store()
        losses.append(case.objectives[0](num_particles=10).loss(one.model, one.guide, case.x))
    # q(z | x) is many standard deviations away from what it is compared with.
    assert losses[0] > 10 * losses[1]


@every_model()
@torch.no_grad()
def test_minibatch_elbo_is_unbiased_for_the_data_set(case):
    """The mean over all batches of one size, at the same latent values, is the ELBO of the data set exactly."""
    model, x = case.build(data_size=NUM_DATA).double(), case.data(torch.float64)
    values = case.latent_values(NUM_DATA, dtype=torch.float64)

    def elbo(rows):
        data = {name: value[rows] for name, value in values.items()}
        model_trace, guide_trace = (
            poutine.trace(poutine.condition(function, data=data)).get_trace(x[rows])
            for function in (model.model, model.guide)
        )
        return model_trace.log_prob_sum() - guide_trace.log_prob_sum()

    expected = elbo(torch.arange(NUM_DATA))
    for batch_size in (1, 3, 4, 6):
        batches = [elbo(rows) for rows in torch.arange(NUM_DATA).split(batch_size)]
        torch.testing.assert_close(torch.stack(batches).mean(), expected)


@one_of_each()
@torch.no_grad()
def test_minibatch_loss_is_scaled_to_the_data_set(case):
    model, unscaled = case.build(data_size=NUM_DATA), case.build(data_size=None)
    unscaled.load_state_dict(model.state_dict())
    for objective in case.objectives:
        losses = []
        for one in (model, unscaled):
            pyro.set_rng_seed(1)
            losses.append(objective(num_particles=3).loss(one.model, one.guide, case.x[:4]))
        assert losses[0] == pytest.approx(3 * losses[1])


LIKELIHOODS = {
    "bernoulli": (likelihoods.Bernoulli, torch.randint(2, (NUM_DATA, *EVENT))),
    "bernoulli-bool": (likelihoods.Bernoulli, torch.rand(NUM_DATA, *EVENT) > 0.5),
    "poisson": (likelihoods.Poisson, torch.randint(9, (NUM_DATA, *EVENT))),
    "negative-binomial": (likelihoods.NegativeBinomial, torch.randint(9, (NUM_DATA, *EVENT)).float()),
    "negative-binomial-of-entries": (
        lambda: likelihoods.NegativeBinomial(torch.ones(EVENT)),
        torch.randint(9, (NUM_DATA, *EVENT)).double(),
    ),
    "zero-inflated-poisson": (likelihoods.ZeroInflatedPoisson, torch.randint(9, (NUM_DATA, *EVENT))),
    "zero-inflated-negative-binomial": (
        lambda: likelihoods.ZeroInflatedNegativeBinomial(torch.ones(EVENT), torch.full(EVENT, 0.5)),
        torch.randint(9, (NUM_DATA, *EVENT)).double(),
    ),
    "continuous-bernoulli": (likelihoods.ContinuousBernoulli, torch.rand(NUM_DATA, *EVENT)),
    "continuous-bernoulli-int": (likelihoods.ContinuousBernoulli, torch.randint(2, (NUM_DATA, *EVENT))),
    "normal-bool": (likelihoods.Normal, torch.rand(NUM_DATA, *EVENT) > 0.5),
    "normal-learned": (lambda: likelihoods.Normal(1.0, "learned"), torch.randn(NUM_DATA, *EVENT)),
    "categorical": (lambda: likelihoods.Categorical(2), torch.randint(2, (NUM_DATA, *EVENT[:1]))),
    "student-t": (lambda: lambda eta, x=None: dist.StudentT(4.0, eta, 0.5), torch.randn(NUM_DATA, *EVENT)),
}


@one_of_each("vae", "mixture-factor", "mixture-components", "mixture-summed-out")
@pytest.mark.parametrize(("likelihood", "x"), LIKELIHOODS.values(), ids=LIKELIHOODS.keys())
def test_every_likelihood_trains(case, likelihood, x):
    encoder = case.encoder(LATENT, event_shape=x.shape[1:])
    model = case.build(likelihood=likelihood(), encoder=encoder)
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-3}), case.objectives[-1]())
    assert torch.tensor([svi.step(x) for _ in range(3)]).isfinite().all()
    # Of categories, the mean is their probabilities.
    assert model.reconstruct(x).shape == (NUM_DATA, *EVENT)
    draws = results(model, x, ("sample_prior", "sample_component"))
    assert all(value.shape == (5, *x.shape[1:]) for (value,) in draws.values())


# State.


@every_model()
def test_state_dict_pickle_and_copy_restore_the_fitted_model(case, local_params):
    model = case.build()
    torch_step(model, case.objectives[-1]()(model.model, model.guide), case.x)()

    def evaluated(one):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        return results(one.eval(), case.x)

    expected = evaluated(model)
    restored = case.build()
    restored.load_state_dict(model.state_dict())
    for other in (restored, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(evaluated(other), expected)


@every_model()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(case, dtype):
    model, x = case.build().to(dtype), case.data(dtype)
    assert case.objectives[-1]().differentiable_loss(model.model, model.guide, x).dtype == dtype
    tokens = not x.is_floating_point()
    for name, values in results(model, x).items():
        expected = torch.long if tokens and name != "encode" else dtype
        assert [value.dtype for value in values] == [expected] * len(values), name
        assert not any(value.requires_grad for value in values), name


@one_of_each()
@torch.no_grad()
def test_device_is_that_of_the_parameters(case):
    """On a default device without memory, whatever was made there would be lost or refused."""
    model, found = perturb(case.build(data_size=30)), []
    for device in ("cpu", "meta"):
        with torch.device(device):
            pyro.set_rng_seed(1)
            found.append(results(model, case.x))
            for name, function in (("model", model.model), ("guide", model.guide)):
                traces = [poutine.trace(function).get_trace(case.x), poutine.trace(function).get_trace(num_data=5)]
                # Pyro makes the indices of its plates on the default device.
                found[-1][name] = tuple(trace.log_prob_sum(lambda site, _: site in case.sites) for trace in traces)
    assert_equal(*found)


@every_model()
def test_a_second_model_under_the_names_of_the_first_is_told(case):
    name = "another model's '(decoder|component_l)"
    for expectation in (warnings.catch_warnings(), pytest.warns(UserWarning, match=name)):
        model = case.build()
        svi = SVI(model.model, model.guide, pyro.optim.Adam(ADAM), case.objectives[-1]())
        with expectation:
            svi.step(case.x)


# Methods.


def with_batch_statistics_and_dropout(encoder):
    width = encoder.network[0].out_features
    encoder.network.insert(1, torch.nn.BatchNorm1d(width))
    encoder.network.insert(2, torch.nn.Dropout(0.5))
    return encoder


@one_of_each()
def test_methods_run_in_evaluation_mode(case):
    model = case.build(encoder=with_batch_statistics_and_dropout(case.encoder(LATENT)))
    before = copy.deepcopy(model.state_dict())
    runs = []
    for mode in (model.train, model.train, model.eval):
        mode()
        modes = [module.training for module in model.modules()]
        pyro.set_rng_seed(1)
        runs.append(results(model, case.x))
        assert [module.training for module in model.modules()] == modes
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])
    collapse_summary(model.train().model, model.guide, case.x, num_samples=2)
    # The unit of a constant in nats is NaN where it has none.
    after = model.state_dict()
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)
    assert all(module.training for module in model.modules())


@every_model()
def test_methods_do_not_depend_on_the_batch_size(case):
    model = case.build()

    def values(**options):
        found = results(model, case.x, ("encode", "reconstruct", "search"), **options)
        if case.x.is_floating_point():
            # The latent values are drawn at once.
            found |= results(model, case.x, ("sample_prior", "sample_component"), seed=1, mean=True, **options)
        return found

    whole = values()
    for batch_size in (1, 5, 100):
        batched = values(batch_size=batch_size)
        assert whole.keys() == batched.keys()
        for name in whole:
            for value, other in zip(whole[name], batched[name], strict=True):
                torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
                assert not other.requires_grad
        assert model.sample_prior(7, batch_size=batch_size).shape == (7, *case.sites["x"])


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *((name, "sample_prior") for name in ONE_OF_EACH),
        *((name, "sample_component") for name in ONE_OF_EACH if name.startswith("mixture")),
        ("mixture-summed-out", "predict_component"),
        ("sequential", "sample"),
    ],
)
def test_draws_have_a_seed(case, name):
    case = ONE_OF_EACH[case]
    model = perturb(case.build())
    pyro.set_rng_seed(5)
    state = torch.get_rng_state()
    first, again, other = (METHODS[name](model, case.x, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    drawn = [METHODS[name](model, case.x) for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.set_rng_state(state)
    assert torch.equal(METHODS[name](model, case.x), drawn[0])
    for seed in (1.5, "1", True):
        with pytest.raises(ValueError, match=f"seed .*{seed}"):
            METHODS[name](model, case.x, seed=seed)


@one_of_each()
def test_draws_for_arviz_have_every_latent_site(case):
    model = case.build()
    fit = from_pyro_svi((model.model, model.guide), model_args=(case.x,), num_samples=3)
    for group in ("posterior", "prior"):
        for site in set(case.sites) - {"x"}:
            assert fit[group][site].dims[:3] == ("chain", "draw", "data")
            assert fit[group][site].shape == (1, 3, NUM_DATA, *case.sites[site])
    assert fit["posterior_predictive"]["x"].shape == (1, 3, *case.x.shape)
    assert fit["log_likelihood"]["x"].shape == (1, 3, NUM_DATA)


# Errors.


def wrong_data(case):
    if case.x.is_floating_point():
        return case.x.double() / 3, case.x.to(torch.complex64)
    return case.x.float(), case.x > 0


@one_of_each()
def test_refuses_data(case):
    model = case.build(data_size=NUM_DATA)
    wrong = [
        (case.x[:0], "with N >= 1"),
        *((x, f"dtype .*got {x.dtype}") for x in wrong_data(case)),
    ]
    for function in (model.model, model.guide, model.encode, model.reconstruct):
        for x, message in wrong:
            with pytest.raises(ValueError, match=f"site 'x' .*{message}"):
                function(x)
    for function in (model.model, model.guide):
        with pytest.raises(ValueError, match="Expected at most data_size = 12 data at site 'x', got 24"):
            function(torch.cat([case.x, case.x]))


@one_of_each()
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_refuses_sizes(case, value):
    model = case.build()
    calls = {
        "data_size": [lambda: case.build(data_size=value)],
        "num_data": [lambda: model.model(num_data=value), lambda: model.guide(num_data=value)],
        "num_samples": [lambda: model.sample_prior(value)],
        "batch_size": [
            lambda name=name: METHODS[name](model, case.x, batch_size=value)
            for name in METHODS
            if hasattr(model, name) and name != "interpolate"
        ],
    }
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(ValueError, match=f"{name} .*{value}"):
                function()


@one_of_each()
def test_refuses_parts_that_disagree(case):
    with pytest.raises(ValueError, match=rf"one latent_dim, got decoder.latent_dim = {LATENT}, encoder.latent_dim = 2"):
        case.build(encoder=case.encoder(2))
