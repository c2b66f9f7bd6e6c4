"""A step as one graph takes the same steps as SVI, for each model, objective and kind of guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import MODELS, ONE_OF_EACH
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import constraints

from pyro_ilvae import VAE, AnnealedELBO, JointOptim, MLPEncoder, ProjectedDecoder, likelihoods, mlp, schedules
from pyro_ilvae.infer.graph_svi import GraphSVI

X_OF_VAE = ONE_OF_EACH["vae"].x
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


# SGD for some models: Adam takes a gradient of 0, up to rounding, for a gradient like all others.
SGD = (torch.optim.SGD, {"lr": 1e-4})
ADAM = (torch.optim.Adam, {"lr": 1e-2, "fused": True})


def trained(kind, build, objective, batches, *, num_steps=12, optim=SGD, **options):
    """What is left after some steps: the SVI, its losses and the parameters."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = build()
    pyro.set_rng_seed(1)
    beta = schedules.linear(0.0, 1.0, num_steps=6)
    svi = kind(model, guide, JointOptim(*optim), objective(beta), **options)
    losses = []
    for step in range(num_steps):
        losses.append(float(svi.step(*batches[step % len(batches)])))
        beta.step()
    return svi, losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def check_same_steps(build, objective, batches, *, runs="graph", **settings):
    """Raise unless a graph and SVI take the same steps; return the SVI of the graph."""
    _, losses, parameters = trained(SVI, build, objective, batches, **settings)
    svi, own_losses, own_parameters = trained(GraphSVI, build, objective, batches, compile=False, **settings)
    assert svi.runs == runs, svi._reason
    assert own_losses == pytest.approx(losses, rel=1e-4)
    assert own_parameters.keys() == parameters.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(own_parameters[name], value, rtol=1e-3, atol=1e-4, msg=name)
    return svi


def plain(kind):
    return lambda beta: kind()


def annealed(kind):
    return lambda beta: AnnealedELBO(kind(), beta)


# A graph is recorded in seconds, so not every decoder has its turn in the fast tests.
NAMES = [
    pytest.param(name, marks=() if model in ONE_OF_EACH.values() else pytest.mark.slow)
    for name, model in MODELS.items()
]


@pytest.mark.parametrize("name", NAMES)
def test_every_model_takes_the_steps_of_svi(name):
    model = MODELS[name]
    half = len(model.x) // 2

    def build():
        module = model.build(data_size=len(model.x))
        return module.model, module.guide

    for i, objective in enumerate(model.objectives):
        batches = [(model.x[:half],), (model.x[half:],)] + [(model.x[: half - 1],)] * (i == 0)
        optim = SGD if "transformer" in name else ADAM
        svi = check_same_steps(build, (annealed, plain)[i](objective), batches, optim=optim)
        assert len(svi._cache.graphs) == 1 + (i == 0)  # one for each shape


def test_gradients_have_the_strides_that_fused_optimizers_expect():
    def build():
        sizes = {"latent_dim": 2, "event_shape": 6}
        decoder = ProjectedDecoder(mlp(2, (8,), 6), **sizes, train_frame=True)  # whose QR gives columns
        vae = VAE(decoder, MLPEncoder(**sizes, hidden_features=(8,)), likelihoods.Normal(0.5, "learned"))
        return vae.model, vae.guide

    check_same_steps(build, plain(TraceMeanField_ELBO), [(torch.randn(30, 6),)], optim=ADAM)


def regression(x):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal((x[:, :2] * weight).sum(-1), scale), obs=x[:, 2])


def subsampled(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x), subsample_size=5) as index:
        pyro.sample("x", dist.Normal(loc, 1.0).expand([3]).to_event(1), obs=x[index])


def with_parameters(x):
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    shares = pyro.param("shares", torch.full((3,), 1 / 3), constraint=constraints.simplex)
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z * shares, scale).to_event(1), obs=x)


def counts(x):
    """A site without a pathwise derivative."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        number = pyro.sample("number", dist.Poisson(rate))
        pyro.sample("x", dist.Normal(number[:, None], 1.0).expand([len(x), 3]).to_event(1), obs=x)


def guide_of_counts(x):
    a = pyro.param("a", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Gamma(a, 1.0))
        pyro.sample("number", dist.Poisson(a))


class Network(PyroModule):
    """Drawn weights, and layers with a state and with draws of their own."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 4)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([4, 2]).to_event(2))
        self.layers = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))

    def forward(self, x):
        mean = self.layers(self.linear(x[:, :2])).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 2])


def clusters(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[..., y], 1.0), obs=x[:, 0])


def with_guide(model, kind, **options):
    def build():
        built = model() if isinstance(model, type) else model
        return built, kind(pyro.poutine.block(built, hide=["y"]), **options)

    return build


PROGRAMS = {
    "AutoNormal": (with_guide(regression, AutoNormal), plain(Trace_ELBO)),
    "AutoNormal, mean field": (with_guide(regression, AutoNormal), annealed(TraceMeanField_ELBO)),
    "AutoDelta": (with_guide(regression, AutoDelta), plain(Trace_ELBO)),
    "AutoMultivariateNormal": (with_guide(regression, AutoMultivariateNormal), annealed(Trace_ELBO)),
    "low rank": (with_guide(regression, AutoLowRankMultivariateNormal, rank=1), plain(Trace_ELBO)),
    "subsample": (with_guide(subsampled, AutoNormal), annealed(Trace_ELBO)),
    "parameters": (with_guide(with_parameters, AutoNormal), annealed(Trace_ELBO)),
    "particles": (with_guide(regression, AutoNormal), lambda beta: Trace_ELBO(num_particles=3)),
    "vectorized": (
        with_guide(regression, AutoNormal),
        lambda beta: AnnealedELBO(Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1), beta),
    ),
    "score function": (lambda: (counts, guide_of_counts), plain(Trace_ELBO)),
    "network": (with_guide(Network, AutoNormal), annealed(Trace_ELBO)),
    "enumeration": (with_guide(clusters, AutoDelta), plain(TraceEnum_ELBO)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_any_model_of_pyro_takes_the_steps_of_svi(name):
    build, objective = PROGRAMS[name]
    check_same_steps(build, objective, [(X,)])


@pytest.mark.slow
def test_compiled_graphs_take_the_steps_of_svi_and_are_shared_by_equal_models():
    def build():
        module = ONE_OF_EACH["vae"].build(data_size=len(X_OF_VAE))
        return module.model, module.guide

    batches = [(X_OF_VAE,)]
    _, losses, parameters = trained(SVI, build, annealed(TraceMeanField_ELBO), batches, num_steps=200)
    runs = []
    for _ in range(2):
        svi, own_losses, own_parameters = trained(
            GraphSVI, build, annealed(TraceMeanField_ELBO), batches, num_steps=200
        )
        assert svi.runs == "compiled graph"
        assert own_losses == pytest.approx(losses, rel=1e-3)
        for name, value in parameters.items():
            torch.testing.assert_close(own_parameters[name], value, rtol=1e-3, atol=1e-5, msg=name)
        runs += [graph._run for graph in svi._cache.graphs.values()]
    assert runs[0] is runs[1]
    assert torch.distributions.Distribution._validate_args


@pytest.mark.slow
def test_compiled_graphs_know_which_buffers_share_memory():
    """Compiled code that writes to a buffer reads its views anew."""
    losses = []
    for kind, options in ((SVI, {}), (GraphSVI, {})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        part = nn.Module()
        part.register_buffer("a", torch.zeros(2))
        part.register_buffer("b", torch.zeros(2))

        def model(x, part=part):
            part.a.add_(0.5)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)) + part.b.sum(), 1.0), obs=x)

        svi = kind(model, lambda x: None, JointOptim(*ADAM), Trace_ELBO(), **options)
        losses.append([float(svi.step(X[:, 0])) for _ in range(4)])
        part.b = part.a.view(2)
        losses[-1] += [float(svi.step(X[:, 0])) for _ in range(4)]
    assert svi.runs == "compiled graph", svi._reason
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_another_dtype_of_autocast_has_a_graph_of_its_own():
    losses = []
    for kind, options in ((SVI, {}), (GraphSVI, {"compile": False})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = ONE_OF_EACH["vae"].build(data_size=len(X_OF_VAE))
        svi = kind(vae.model, vae.guide, JointOptim(*SGD), TraceMeanField_ELBO(), **options)
        losses.append([])
        for dtype in (torch.bfloat16,) * 4 + (torch.float16,) * 4:
            with torch.autocast("cpu", dtype):
                losses[-1].append(float(svi.step(X_OF_VAE)))
    assert svi.runs == "graph"
    assert len(svi._cache.graphs) == 2
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
