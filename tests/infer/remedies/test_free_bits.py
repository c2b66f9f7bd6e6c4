"""Free bits: the objective by hand, for models of users and of this package, and what it refuses."""

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch.distributions import Normal, kl_divergence

from pyro_ilvae import VAE, AnnealedELBO, GraphSVI, JointOptim, MLPDecoder, MLPEncoder, likelihoods, schedules
from pyro_ilvae.infer.remedies import FreeBitsELBO

N, K, D, SIZE = 7, 4, 3, 21
MEAN_FIELD = TraceMeanField_ELBO
OBJECTIVES = [Trace_ELBO, TraceMeanField_ELBO, lambda **more: TraceEnum_ELBO(strict_enumeration_warning=False, **more)]


class Pair:
    """A model and a guide of a user's, with a prior other than N(0, I), and their divergences by hand."""

    def __init__(self, dtype=torch.float64, mask=None):
        self.x = torch.randn(N, D, dtype=dtype)
        self.weight = torch.randn(D, K, dtype=dtype)
        self.loc, self.scale = torch.randn(K, dtype=dtype), torch.rand(K, dtype=dtype) + 0.5
        self.prior = torch.linspace(-1, 1, K, dtype=dtype), torch.linspace(0.5, 2, K, dtype=dtype)
        self.mask = mask
        self.handlers = [] if mask is None else [poutine.mask(mask=mask)]

    def plate(self):
        return pyro.plate("data", SIZE, subsample=torch.arange(N))

    def model(self, x):
        with self.plate(), poutine.mask(mask=True if self.mask is None else self.mask):
            z = pyro.sample("z", dist.Normal(*self.prior).to_event(1))
            pyro.sample("x", dist.Normal((z @ self.weight.T).tanh(), 1.0).to_event(1), obs=x)

    def posterior(self):
        loc = pyro.param("loc", self.loc)
        scale = pyro.param("scale", self.scale, constraint=dist.constraints.positive)
        return self.x @ self.weight * 0.1 + loc, scale.expand(N, K)

    def guide(self, x):
        with self.plate(), poutine.mask(mask=True if self.mask is None else self.mask):
            pyro.sample("z", dist.Normal(*self.posterior()).to_event(1))

    def divergences(self):
        """The mean divergence of each dimension over the data that are there, and the weight of all of them."""
        there = torch.ones(N, dtype=torch.bool) if self.mask is None else self.mask
        values = kl_divergence(Normal(*self.posterior()), Normal(*self.prior))[there]
        return values.mean(0), SIZE / N * there.sum()


def value_and_gradients(elbo, model, guide, *args, seed=1):
    pyro.set_rng_seed(seed)
    loss = elbo.differentiable_loss(model, guide, *args)
    parameters = sorted(pyro.get_param_store()._params.items())
    gradients = torch.autograd.grad(loss, [value for _, value in parameters], allow_unused=True)
    return [loss.detach(), *(value for value in gradients if value is not None)]


def assert_close(found, expected, tolerance=1e-6):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", OBJECTIVES, ids=["Trace", "MeanField", "Enum"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("beta", [None, 0.0, 0.3, 2.0])
def test_the_loss_is_the_elbo_and_what_the_groups_lack(make, masked, beta):
    pair = Pair(mask=torch.arange(N) % 3 != 0 if masked else None)
    for groups, sizes in [("dimension", 1), (1, 1), (2, 2), (3, 3), ("site", K), (9, K)]:
        elbo, free = make(), FreeBitsELBO(make(), 0.7, groups=groups)
        if beta is not None:
            elbo, free = AnnealedELBO(elbo, beta), AnnealedELBO(free, beta)
        found = value_and_gradients(free, pair.model, pair.guide, pair.x)
        pyro.set_rng_seed(1)
        loss = elbo.differentiable_loss(pair.model, pair.guide, pair.x)
        divergences, weight = pair.divergences()
        means = torch.stack([group.sum() for group in divergences.split(sizes)])
        expected = loss + (1.0 if beta is None else beta) * weight * (means.clamp(min=0.7) - means).sum()
        parameters = [value for _, value in sorted(pyro.get_param_store()._params.items())]
        assert_close(found, [expected.detach(), *torch.autograd.grad(expected, parameters)])


@pytest.mark.parametrize("make", OBJECTIVES, ids=["Trace", "MeanField", "Enum"])
def test_no_free_nats_are_the_plain_elbo(make):
    pair = Pair()
    expected = value_and_gradients(make(), pair.model, pair.guide, pair.x)
    for nats in (0, 1e-12, {"z": 0.0}):
        assert_close(value_and_gradients(FreeBitsELBO(make(), nats), pair.model, pair.guide, pair.x), expected)


def test_dimensions_below_the_free_nats_have_no_gradient_of_their_divergence():
    pair = Pair()
    free = FreeBitsELBO(MEAN_FIELD(), 1e6)
    pair.weight = torch.zeros_like(pair.weight)  # x tells nothing, so that all gradients come from the divergence
    _, *gradients = value_and_gradients(free, pair.model, pair.guide, pair.x)
    assert all(gradient.abs().max() < 1e-8 for gradient in gradients)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("make", OBJECTIVES, ids=["Trace", "MeanField", "Enum"])
def test_particles_are_averaged(make, vectorized):
    pair = Pair()
    settings = {"num_particles": 3, "vectorize_particles": vectorized, "max_plate_nesting": 1}
    found = value_and_gradients(FreeBitsELBO(make(**settings), 0.7), pair.model, pair.guide, pair.x)
    pyro.set_rng_seed(1)
    loss = make(**settings).differentiable_loss(pair.model, pair.guide, pair.x)
    divergences, weight = pair.divergences()
    expected = loss + weight * (0.7 - divergences).relu().sum()
    torch.testing.assert_close(found[0], expected.detach())


def test_steps_add_up_gradients_as_the_differentiable_loss_has_them():
    pair = Pair()
    free = FreeBitsELBO(MEAN_FIELD(), 0.7)
    expected = value_and_gradients(free, pair.model, pair.guide, pair.x)
    pyro.set_rng_seed(1)
    loss = free.loss_and_grads(pair.model, pair.guide, pair.x)
    gradients = [value.grad for _, value in sorted(pyro.get_param_store()._params.items())]
    assert_close([torch.tensor(loss, dtype=torch.float64), *gradients], expected)


def test_evaluation_is_the_elbo_itself():
    pair = Pair()
    free = FreeBitsELBO(MEAN_FIELD(), 3.0)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({}), free)
    pyro.set_rng_seed(2)
    expected = MEAN_FIELD().loss(pair.model, pair.guide, pair.x)
    for evaluate in (svi.evaluate_loss, lambda x: AnnealedELBO(free, 0.5).loss(pair.model, pair.guide, x)):
        pyro.set_rng_seed(2)
        assert evaluate(pair.x) == pytest.approx(expected, rel=1e-6)
    for elbo in (free, AnnealedELBO(free, 0.5)):
        module = elbo(pair.model, pair.guide)
        pyro.set_rng_seed(2)
        trained = module(pair.x)
        module.eval()
        pyro.set_rng_seed(2)
        assert module(pair.x).item() == pytest.approx(expected, rel=1e-6)
        assert abs(trained.item() - expected) > 1


def test_names_and_numbers_of_sites():
    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 2):
                pyro.sample("v", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z * w[0], 1.0), obs=torch.ones(N))

    def guide():
        q = dist.Normal(pyro.param("m", torch.tensor([0.1, -0.3])), 0.9).to_event(1)
        pyro.sample("w", q)
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(pyro.param("l", torch.tensor(0.4)), 0.8))
            with pyro.plate("inner", 2):
                pyro.sample("v", dist.Gamma(pyro.param("a", torch.tensor(2.5)), 1.0))

    w = kl_divergence(Normal(torch.tensor([0.1, -0.3]), 0.9), Normal(0.0, 1.0))
    z = kl_divergence(Normal(torch.tensor(0.4), 0.8), Normal(0.0, 1.0))
    v = kl_divergence(dist.Gamma(2.5, 1.0), dist.Gamma(2.0, 1.0))
    short = {"w": (2 - w).sum(), "z": N * (2 - z), "v": 2 * N * (2 - v)}
    cases = [
        ({"nats": 2.0}, short["z"] + short["v"]),
        ({"nats": 2.0, "sites": ["w"]}, short["w"]),
        ({"nats": {"w": 2.0, "z": 1.0}}, short["w"] + N * (1 - z)),
        ({"nats": {"w": 2.0}, "groups": "site"}, 2 - w.sum()),
        ({"nats": {"w": 2.0, "v": 0.0}}, short["w"]),
    ]
    pyro.set_rng_seed(0)
    plain = MEAN_FIELD().differentiable_loss(model, guide)
    for arguments, expected in cases:
        pyro.set_rng_seed(0)
        loss = FreeBitsELBO(MEAN_FIELD(), **arguments).differentiable_loss(model, guide)
        torch.testing.assert_close(loss - plain, expected, rtol=1e-5, atol=1e-4)
    for wrong in ({"nats": {"u": 1.0}}, {"nats": {"x": 1.0}}, {"nats": 1.0, "sites": ["z", "u"]}):
        with pytest.raises(ValueError, match="name latent sites of both"):
            FreeBitsELBO(MEAN_FIELD(), **wrong).differentiable_loss(model, guide)


@pytest.mark.parametrize("make", [Trace_ELBO, TraceMeanField_ELBO])
def test_an_auto_normal_guide(make):
    x = torch.randn(N)

    def model(x):
        w = pyro.sample("w", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.ones(2), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) * w, 1.0), obs=x)

    guide = pyro.infer.autoguide.AutoNormal(model)
    guide(x)
    losses = []
    for elbo in (make(max_plate_nesting=1), FreeBitsELBO(make(max_plate_nesting=1), 3.0)):
        pyro.set_rng_seed(0)
        losses.append(elbo.differentiable_loss(model, guide, x))
    kl = kl_divergence(Normal(guide.locs.z, guide.scales.z), Normal(1.0, 2.0)).mean(0)
    torch.testing.assert_close(losses[1] - losses[0], N * (3 - kl).relu().sum(), rtol=1e-4, atol=1e-4)


def test_distributions_over_wholes_are_one_group():
    covariance = torch.tensor([[1.0, 0.5], [0.5, 2.0]])
    q, p = dist.MultivariateNormal(torch.ones(2), covariance), dist.MultivariateNormal(torch.zeros(2), torch.eye(2))

    def model():
        with pyro.plate("data", N):
            pyro.sample("z", p)

    def guide():
        pyro.param("unused", torch.zeros(()))
        with pyro.plate("data", N):
            pyro.sample("z", q)

    pyro.set_rng_seed(0)
    plain = MEAN_FIELD().differentiable_loss(model, guide)
    pyro.set_rng_seed(0)
    loss = FreeBitsELBO(MEAN_FIELD(), 5.0, groups="site").differentiable_loss(model, guide)
    torch.testing.assert_close(loss - plain, N * (5 - kl_divergence(q, p)))
    with pytest.raises(ValueError, match=r"factorize over the dimensions at site 'z', got MultivariateNormal"):
        FreeBitsELBO(MEAN_FIELD(), 5.0).differentiable_loss(model, guide)


def vae(dtype=torch.float32):
    decoder = MLPDecoder(latent_dim=2, event_shape=5, hidden_features=(6,))
    encoder = MLPEncoder(latent_dim=2, event_shape=5, hidden_features=(6,))
    return VAE(decoder, encoder, likelihoods.Normal(0.5), data_size=40).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("annealed", [False, True])
def test_graph_steps_are_steps_of_svi(dtype, annealed):
    x = torch.randn(12, 5, dtype=dtype)
    steps = []
    for kind in (SVI, GraphSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model = vae(dtype)
        elbo, beta = FreeBitsELBO(MEAN_FIELD(), 0.4), schedules.linear(0.1, 1.0, num_steps=6)
        elbo = AnnealedELBO(elbo, beta) if annealed else elbo
        more = {} if kind is SVI else {"compile": False}
        svi = kind(model.model, model.guide, JointOptim(torch.optim.Adam, {"lr": 0.02}), elbo, **more)
        losses = []
        for _ in range(8):
            losses.append(torch.as_tensor(svi.step(x), dtype=dtype))
            beta.step()
        steps.append([torch.stack(losses), *(value.detach().clone() for value in model.parameters())])
        assert kind is SVI or svi.runs == "graph"
    assert_close(*steps, tolerance=1e-4 if dtype == torch.float32 else 1e-7)


def test_copies_and_settings():
    free = FreeBitsELBO(TraceEnum_ELBO(num_particles=2), {"z": 0.5}, groups=2)
    assert free.num_particles == 2
    for copied in (copy.deepcopy(free), pickle.loads(pickle.dumps(free)), copy.deepcopy(AnnealedELBO(free, 0.5)).elbo):
        assert repr(copied) == repr(free) == "FreeBitsELBO(TraceEnum_ELBO, nats={'z': 0.5}, groups=2)"
    text = "AnnealedELBO(FreeBitsELBO(TraceEnum_ELBO, nats={'z': 0.5}, groups=2), beta=0.5)"
    assert repr(AnnealedELBO(free, 0.5)) == text


@pytest.mark.parametrize(
    ("elbo", "got"),
    [
        (RenyiELBO(), "a RenyiELBO"),
        (TraceGraph_ELBO(), "a TraceGraph_ELBO"),
        (JitTrace_ELBO(), "a JitTrace_ELBO"),
        (Trace_ELBO, "the class Trace_ELBO"),
        (AnnealedELBO(Trace_ELBO(), 0.5), "write AnnealedELBO"),
        (FreeBitsELBO(Trace_ELBO(), 0.5), "a FreeBitsELBO"),
        (None, "a NoneType"),
    ],
)
def test_other_objectives_are_refused(elbo, got):
    with pytest.raises(ValueError, match=got):
        FreeBitsELBO(elbo, 0.5)


def refused(model, guide, match, elbo=MEAN_FIELD, **arguments):
    with pytest.raises(ValueError, match=match):
        FreeBitsELBO(elbo(), 0.5, **arguments).differentiable_loss(model, guide)


def test_what_has_no_formula_is_refused_by_name():
    def model(kind=None):
        with pyro.plate("data", N):
            pyro.sample("z", kind or dist.Normal(0.0, 1.0))

    refused(model, lambda: model(dist.StudentT(3.0)), "formula at site 'z', got StudentT and Normal")
    refused(model, lambda: model(dist.Delta(torch.tensor(0.0))), "densities at site 'z'")
    refused(model, lambda: model(dist.Normal(0.0, 1.0).mask(False)), "densities at site 'z'")
    auto = pyro.infer.autoguide
    for kind, prior in [
        (auto.AutoDiagonalNormal, None),
        (auto.AutoDelta, None),
        (auto.AutoNormal, dist.Gamma(2.0, 1.0)),
    ]:
        pyro.clear_param_store()
        own = partial(model, prior)
        guide = kind(own)
        guide()
        refused(own, guide, "densities at site 'z'", Trace_ELBO)
    refused(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)), lambda: pyro.sample("w", dist.Normal(0.0, 1.0)), "plate")

    def in_a_loop():
        for i in pyro.plate("data", 2):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    refused(in_a_loop, in_a_loop, "a sequential one at site 'z_0'")
    pyro.param("some", torch.zeros(()))

    def other_order():
        with pyro.plate("data", N):
            below = pyro.sample("below", dist.Normal(pyro.param("some"), 1.0))
            pyro.sample("above", dist.Normal(below, 1.0))

    def layers():
        with pyro.plate("data", N):
            above = pyro.sample("above", dist.Normal(0.0, 1.0))
            pyro.sample("below", dist.Normal(above, 1.0))

    refused(layers, other_order, "site 'below' before", Trace_ELBO)
