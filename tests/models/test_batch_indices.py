"""The numbers of a batch's data: a guide with a value for each datum learns the values of these data and no others."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import NUM_DATA, ONE_OF_EACH, sequential_with, vae_with
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.poutine.util import prune_subsample_sites

from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, from_pyro_svi, likelihoods
from pyro_ilvae.diagnostics import kl_divergence

N, K, D, SIGMA, BATCH = 30, 2, 5, 0.5, 6


def linear_vae(data_size=N):
    """A model whose posterior is known, with weights that are not trained, its data, and the posterior means of z."""
    generator = torch.Generator().manual_seed(0)
    decoder = torch.nn.Linear(K, D, bias=False)
    torch.nn.init.orthogonal_(decoder.weight, gain=1.5)
    encoder = MLPEncoder(event_shape=D, latent_dim=K, hidden_features=(4,))
    vae = VAE(decoder, encoder, likelihoods.Normal(SIGMA), data_size=data_size, event_shape=D).eval()
    for parameter in vae.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(N, K, generator=generator) @ decoder.weight.T + SIGMA * torch.randn(N, D, generator=generator)
    precision = torch.eye(K) + decoder.weight.T @ decoder.weight / SIGMA**2
    return vae, x, torch.linalg.solve(precision, decoder.weight.T @ x.T / SIGMA**2).T


class MAP(EasyGuide):
    def guide(self, x, index=None):
        with self.plate("data", N, subsample=index, dim=-1):
            self.map_estimate("z")


def parameter_by_hand(x, index=None):
    loc = pyro.param("loc", torch.zeros(N, K))
    with pyro.plate("data", N, subsample_size=len(x), subsample=index) as rows:
        pyro.sample("z", dist.Delta(loc[rows], event_dim=1))


def in_a_list(vae):
    guide = AutoGuideList(vae.model, create_plates=vae.create_plates)
    guide.append(AutoDelta(vae.model))
    return guide


def plate_by_hand(x, index=None):
    return pyro.plate("data", N, subsample=index)


# Each with the name of the parameter that holds the values of z.
GUIDES = {
    "normal": (lambda vae: AutoNormal(vae.model, create_plates=vae.create_plates), "AutoNormal.locs.z"),
    "delta": (lambda vae: AutoDelta(vae.model, create_plates=vae.create_plates), "AutoDelta.z"),
    "plate": (lambda vae: AutoDelta(vae.model, create_plates=plate_by_hand), "AutoDelta.z"),
    "list": (in_a_list, "AutoGuideList.0.z"),
    "easy": (lambda vae: MAP(vae.model), "MAP.z"),
    "by-hand": (lambda vae: parameter_by_hand, "loc"),
    "messenger": (lambda vae: AutoNormalMessenger(vae.model), "locs.z"),
}


@pytest.mark.parametrize(("build", "name"), GUIDES.values(), ids=GUIDES.keys())
def test_a_step_moves_the_values_of_the_batch_and_no_others(build, name):
    vae, x, _ = linear_vae()
    svi = SVI(vae.model, build(vae), pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
    svi.step(x[:BATCH], index=torch.arange(BATCH))
    for index in torch.randperm(N).split(BATCH):
        before = pyro.param(name).detach().clone()
        svi.step(x[index], index=index)
        assert (pyro.param(name) != before).any(-1).nonzero().flatten().tolist() == sorted(index.tolist())


@pytest.mark.parametrize("build", [GUIDES["delta"], GUIDES["normal"], GUIDES["by-hand"]])
def test_random_batches_lead_to_the_posterior_means(build):
    vae, x, means = linear_vae()
    guide, name = build[0](vae), build[1]
    # The gain makes J^T J a multiple of I, so that the mode and the mean of a Gaussian are found at once.
    optimizer = pyro.optim.PyroLRScheduler(
        torch.optim.lr_scheduler.ExponentialLR,
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.99},
    )
    svi = SVI(vae.model, guide, optimizer, Trace_ELBO())
    for _ in range(100):
        for index in torch.randperm(N).split(BATCH):
            svi.step(x[index], index=index)
        optimizer.step()
    assert (pyro.param(name) - means).square().mean().sqrt() < (0.15 if "Normal" in name else 0.01)


WITHOUT = {
    **{name: build for name, (build, _) in GUIDES.items() if name != "easy"},
    "own-batch": lambda vae: AutoNormal(vae.model),
    "positions": lambda vae: AutoDiagonalNormal(vae.model),
    "laplace": lambda vae: AutoLaplaceApproximation(vae.model),
    "structured": lambda vae: AutoStructured(vae.model, conditionals="mvn"),
}


def losses(vae, guide, *batches):
    return [Trace_ELBO().loss(vae.model, guide, x, **options) for x, options in batches]


@pytest.mark.parametrize("build", WITHOUT.values(), ids=WITHOUT.keys())
def test_batches_whose_numbers_are_not_given_are_refused(build):
    vae, x, _ = linear_vae()
    with pytest.raises(ValueError, match=r"pass index=|of 30 data"):
        losses(vae, build(vae), (x[:BATCH], {}), (x[BATCH : 2 * BATCH], {}))


@pytest.mark.parametrize("name", ["own-batch", "positions", "laplace", "structured"])
def test_a_guide_that_draws_its_own_batch_is_refused(name):
    vae, x, _ = linear_vae()
    index = torch.arange(BATCH) + 3
    with pytest.raises(ValueError, match=r"index = |numbers \[3, 4, 5\]"):
        losses(vae, WITHOUT[name](vae), (x[index], {"index": index}))
    guide = AutoStructured(vae.model, conditionals="delta", create_plates=vae.create_plates)
    with pytest.raises(ValueError, match="values for the 6 positions of a batch"):
        losses(vae, guide, (x[index], {"index": index}))


@pytest.mark.parametrize("build", WITHOUT.values(), ids=WITHOUT.keys())
def test_all_data_need_no_numbers_and_keep_their_order(build):
    vae, x, _ = linear_vae()
    guide = build(vae)
    losses(vae, guide, (x, {}), (x, {"index": torch.arange(N)}))
    order = torch.arange(N).flip(0)
    with pytest.raises(ValueError, match=r"index = 0 \.\.\. 29|numbers \[29, 28, 27\]"):
        losses(vae, guide, (x[order], {"index": order}))


def test_all_data_are_refused_where_the_guide_draws_some():
    vae, x, _ = linear_vae()
    guide = AutoNormal(vae.model)
    guide(x[:BATCH])
    with pytest.raises(ValueError, match=r"draws z for 30 of 30 data .* got one that draws it for 6 of 30"):
        losses(vae, guide, (x, {}))
    batch_only, whole = linear_vae(data_size=None)[0], AutoNormal(vae.model)
    whole(x)
    with pytest.raises(ValueError, match=r"draws z for 6 of 6 data .* got one that draws it for 30 of 30"):
        losses(batch_only, whole, (x[:BATCH], {}))


def held(loc):
    """A guide that takes z from ``loc``, a function of the plate's indices."""

    def guide(x, index=None, **plate):
        with pyro.plate("data", N, **(plate or {"subsample_size": len(x)})) as rows:
            pyro.sample("z", dist.Normal(loc(rows), 1.0).to_event(1))

    return guide


def first(guide):
    return lambda x, index=None: guide(x, subsample=torch.arange(len(x)))


LEAF, EMBEDDING = torch.zeros(N, K, requires_grad=True), torch.nn.Embedding(N, K)
HELD = {
    "leaf": held(lambda rows: LEAF[rows]),
    "flat": held(lambda rows: pyro.param("flat", torch.zeros(N * K)).reshape(N, K)[rows]),
    "transposed": held(lambda rows: pyro.param("transposed", torch.zeros(K, N))[:, rows].T),
    "shifted": held(lambda rows: 0.1 + pyro.param("loc", torch.zeros(N, K)).index_select(0, rows)),
    "each": held(lambda rows: torch.stack([pyro.param(f"loc{int(row)}", torch.zeros(K)) for row in rows])),
    "embedding": held(lambda rows: pyro.module("embedding", EMBEDDING)(rows)),
    "first": first(held(lambda rows: pyro.param("loc", torch.zeros(N, K))[rows])),
    "first embedding": first(held(lambda rows: EMBEDDING(rows))),
    "positions": first(held(lambda rows: pyro.param("positions", torch.zeros(BATCH, K)))),
}


@pytest.mark.parametrize("guide", HELD.values(), ids=HELD.keys())
@pytest.mark.parametrize("told", [False, True])
def test_values_of_other_data_are_refused_however_they_are_held(guide, told):
    vae, x, _ = linear_vae()
    index = torch.arange(N).flip(0)[:BATCH]
    with pytest.raises(ValueError, match="got one that draws it for numbers"):
        losses(vae, guide, (x[index], {"index": index} if told else {}))


def test_values_of_positions_are_refused_beside_the_right_numbers():
    vae, x, _ = linear_vae()
    guide = held(lambda rows: pyro.param("positions", torch.zeros(BATCH, K)))
    index = torch.arange(N).flip(0)[:BATCH]
    with pytest.raises(ValueError, match="values for the 6 positions of a batch"):
        losses(vae, lambda x, index: guide(x, subsample=index), (x[index], {"index": index}))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("size", [4, 12])
def test_amortized_guides_may_have_layers_as_wide_as_the_data_set(grad, size):
    sizes = {"event_shape": 4, "latent_dim": 2, "hidden_features": (size,)}
    vae, other = (
        VAE(MLPDecoder(**sizes), MLPEncoder(**sizes), likelihoods.Normal(), data_size=size),
        MLPEncoder(**sizes),
    )

    def guide(x, index=None):
        pyro.module("other", other)
        with pyro.plate("data", size, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(*other(x)).to_event(1))

    x, index = torch.rand(size, 4), torch.arange(size).flip(0)
    with torch.set_grad_enabled(grad):
        for one in (vae.guide, guide):
            losses(vae, one, (x, {"index": index}), (x[:3], {"index": index[:3]}), (x[:3], {}))
    shared = held(lambda rows: pyro.param("shared", torch.zeros(2)))
    losses(linear_vae()[0], shared, (linear_vae()[1][:3], {}))


def test_an_amortized_guide_may_draw_indices_that_it_does_not_use():
    vae, x, _ = linear_vae()

    def guide(x):
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(*vae.encoder(x)).to_event(1))

    found = [torch.tensor([Trace_ELBO().loss(vae.model, one, x[:5]) for _ in range(400)]) for one in (guide, vae.guide)]
    error = (sum(values.var() for values in found) / 400).sqrt()
    assert abs(found[0].mean() - found[1].mean()) < 5 * error

    def outside(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*vae.encoder(x)).to_event(1))

    with pytest.raises(ValueError, match=r"draws z for 5 of 30 data .* got one that draws it for 5 of 5"):
        Trace_ELBO().loss(vae.model, outside, x[:5])


EVERY_MODEL = pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=ONE_OF_EACH.keys())


@EVERY_MODEL
@torch.no_grad()
def test_the_plate_is_held_at_the_numbers_and_nothing_else_changes(case):
    model, index = case.build(data_size=30), torch.randperm(30)[:NUM_DATA]
    guide_trace = poutine.trace(model.guide).get_trace(case.x, index=index)
    replayed = poutine.replay(model.model, trace=guide_trace)
    trace = poutine.trace(replayed).get_trace(case.x, index=index.tolist())
    assert torch.equal(guide_trace.nodes["data"]["value"], index)
    assert torch.equal(trace.nodes["data"]["value"], index)
    latent = set(case.sites) - {"x"}
    values = {name: node["value"] for name, node in prune_subsample_sites(trace).nodes.items() if name in latent}
    plain = poutine.trace(poutine.condition(model.model, data=values)).get_trace(case.x)
    torch.testing.assert_close(plain.log_prob_sum(), trace.log_prob_sum())


@EVERY_MODEL
def test_objectives_predictions_and_draws_for_arviz_take_the_numbers(case):
    model, index = case.build(data_size=30), torch.randperm(30)[:NUM_DATA].numpy()
    for objective in case.objectives:
        svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-3}), objective(num_particles=2))
        assert svi.step(case.x, index=index) > 0
        particles = objective(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
        assert particles.loss(model.model, model.guide, case.x, index=index) > 0
    for parallel in (False, True):
        draws = Predictive(model.model, guide=model.guide, num_samples=3, parallel=parallel)(case.x, index=index)
        assert draws["x"].numel() == 3 * case.x.numel()
    fit = from_pyro_svi((model.model, model.guide), model_args=(case.x,), model_kwargs={"index": index}, num_samples=3)
    for site in set(case.sites) - {"x", "y"}:
        assert fit["posterior"][site].shape[:3] == (1, 3, NUM_DATA)


def test_an_enumerated_model_beside_values_for_each_datum():
    case = ONE_OF_EACH["mixture-summed-out"]
    mixture = case.build(data_size=30)
    guide = AutoNormal(poutine.block(mixture.model, hide=["y"]), create_plates=mixture.create_plates)
    svi = SVI(mixture.model, guide, pyro.optim.Adam({"lr": 1e-2}), TraceEnum_ELBO(max_plate_nesting=1))
    svi.step(case.x, index=torch.arange(NUM_DATA))
    before, index = pyro.param("AutoNormal.locs.z").detach().clone(), torch.arange(NUM_DATA) + 15
    svi.step(case.x, index=index)
    moved = (pyro.param("AutoNormal.locs.z") != before).any(-1)
    assert moved.nonzero().flatten().tolist()[-NUM_DATA:] == index.tolist()
    with pytest.raises(ValueError, match="pass index="):
        svi.step(case.x)


@pytest.mark.parametrize("batch_size", [None, 7])
@torch.no_grad()
def test_diagnostics_are_about_the_data_of_the_numbers(batch_size):
    vae, x, _ = linear_vae()
    guide = AutoNormal(vae.model, create_plates=vae.create_plates)
    guide(x)
    guide.locs.z_unconstrained.copy_(torch.arange(N)[:, None].expand(N, K) / 10)
    loc, scale = guide.locs.z, guide.scales.z
    exact = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)
    index = torch.randperm(N)[:20]
    found = kl_divergence(vae.model, guide, x[index], model_kwargs={"index": index}, batch_size=batch_size, seed=0)
    torch.testing.assert_close(found.values.to(exact.dtype), exact[index], rtol=1e-4, atol=1e-4)


INDICES = {
    "shape": torch.arange(3),
    "two dimensions": torch.arange(NUM_DATA)[:, None],
    "a number": 3,
    "range": torch.arange(NUM_DATA) + 20,
    "negative": torch.arange(NUM_DATA) - 1,
    "repeated": torch.zeros(NUM_DATA, dtype=torch.long),
    "float": torch.arange(float(NUM_DATA)),
    "bool": torch.ones(NUM_DATA, dtype=torch.bool),
    "complex": torch.arange(NUM_DATA) + 0j,
    "string": "a",
    "strings": ["a"] * NUM_DATA,
}


@EVERY_MODEL
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
def test_wrong_numbers_are_refused(case, index):
    model = case.build(data_size=30)
    for function in (model.model, model.guide, model.create_plates):
        with pytest.raises((ValueError, TypeError), match="Expected index"):
            function(case.x, index=index)


def test_numbers_need_data_of_a_data_set():
    for model, arguments in ((vae_with(), {}), (sequential_with(), {}), (vae_with(data_size=30), {"x": None})):
        x = ONE_OF_EACH["sequential" if hasattr(model, "vocab_size") else "vae"].x
        with pytest.raises(ValueError, match="Expected index=None without"):
            model.model(**{"x": x, "index": torch.arange(NUM_DATA)} | arguments)
