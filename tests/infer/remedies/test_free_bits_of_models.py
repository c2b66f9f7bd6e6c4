"""Free bits in the models of this package: components, layers, sequences and missing entries."""

import pyro
import pytest
import torch
from helpers.models import TOKENS, X, hierarchy_with, mixture_with, sequential_with, vae_with
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormalMessenger
from torch.distributions import Categorical, Normal, kl_divergence

from pyro_ilvae import VAE, AnnealedELBO, GraphSVI, JointOptim, MLPEncoder, likelihoods
from pyro_ilvae.infer.remedies import FreeBitsELBO

N = len(X)


def difference(elbo, nats, model, *args, **kwargs):
    """What free bits add to the loss, with the same draws."""
    losses = []
    elbo.differentiable_loss(model.model, model.guide, *args, **kwargs)  # which counts plates, by a draw
    for own in (elbo, FreeBitsELBO(elbo, nats)):
        pyro.set_rng_seed(5)
        losses.append(own.differentiable_loss(model.model, model.guide, *args, **kwargs).detach())
    return losses[1] - losses[0]


@pytest.mark.parametrize("form", ["factor", "components"])
@pytest.mark.parametrize("labelled", [False, True])
def test_components_of_the_guide_weigh_the_divergences(form, labelled):
    mixture = mixture_with(form, data_size=3 * N).double()
    x = X.double()
    y = torch.arange(N) % 4 - 1 if labelled else None
    with torch.no_grad():
        given = mixture._given(x)
        logits, loc, scale = mixture._posterior(given)
        prior_logits, prior_loc, prior_scale = (part.detach() for part in mixture._components())
        loc, scale = loc.detach(), scale.detach()
    if labelled:
        logits = torch.where((y >= 0)[:, None], (torch.arange(3) != y[:, None]) * -80.0, logits)
    probs = logits.softmax(-1)
    of_z = (probs.unsqueeze(-1) * kl_divergence(Normal(loc, scale), Normal(prior_loc, prior_scale))).sum(1).mean(0)
    of_y = kl_divergence(Categorical(logits=logits), Categorical(logits=prior_logits)).mean(0)
    arguments = {"y": y} if labelled else {}
    for nats, expected in [
        ({"z": 50.0}, (50 - of_z).relu().sum()),
        ({"y": 9.0}, 9 - of_y),
        (9.0, (9 - of_z).relu().sum() + 9 - of_y),
        ({"z": float(of_z.mean())}, (of_z.mean() - of_z).relu().sum()),
    ]:
        found = difference(TraceEnum_ELBO(), nats, mixture, x, **arguments)
        torch.testing.assert_close(found, 3 * N * expected, rtol=1e-9, atol=1e-7)


def test_components_of_the_model_alone_are_refused():
    mixture = mixture_with("summed-out")
    with pytest.raises(ValueError, match="site 'z' that depends on enumerated sites of the guide before it alone"):
        difference(TraceEnum_ELBO(), 1.0, mixture, X)


def test_gradients_of_a_mixture_are_those_of_the_objective_by_hand():
    mixture = mixture_with("components").double()
    x, size = X.double(), float(N)
    elbo = FreeBitsELBO(TraceEnum_ELBO(), {"z": 0.2})
    pyro.set_rng_seed(5)
    found = elbo.differentiable_loss(mixture.model, mixture.guide, x)
    pyro.set_rng_seed(5)
    loss = TraceEnum_ELBO().differentiable_loss(mixture.model, mixture.guide, x)
    logits, loc, scale = mixture._posterior(mixture._given(x))
    _, prior_loc, prior_scale = mixture._components()
    divergences = kl_divergence(Normal(loc, scale), Normal(prior_loc, prior_scale))
    mean = (logits.softmax(-1).unsqueeze(-1) * divergences).sum(1).mean(0)
    expected = loss + size * (mean.clamp(min=0.2) - mean).sum()
    parameters = list(mixture.parameters())
    for one, other in zip(
        torch.autograd.grad(found, parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_each_layer_has_divergences_given_the_draws_above():
    hierarchy = hierarchy_with("top_down").double()
    x = X.double()
    pyro.set_rng_seed(5)
    guide = poutine.trace(hierarchy.guide).get_trace(x)
    model = poutine.trace(poutine.replay(hierarchy.model, guide)).get_trace(x)
    expected = 0
    for site in hierarchy.latent_sites:
        q, p = (trace.nodes[site]["fn"].base_dist for trace in (guide, model))
        expected = expected + N * (3 - kl_divergence(q, p).mean(0)).relu().sum()
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        torch.testing.assert_close(difference(elbo, 3.0, hierarchy, x), expected.detach())
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="site 'z1' before"):
        difference(Trace_ELBO(), 3.0, hierarchy_with("bottom_up"), X)


def test_sequences_and_missing_entries():
    sequential = sequential_with()
    kl = kl_divergence(Normal(*sequential.encode(TOKENS)), Normal(0.0, 1.0)).mean(0)
    found = difference(TraceMeanField_ELBO(), 0.5, sequential, TOKENS)
    torch.testing.assert_close(found, len(TOKENS) * (0.5 - kl).relu().sum(), rtol=1e-4, atol=1e-3)
    encoder = MLPEncoder(event_shape=X.shape[1:], latent_dim=3, hidden_features=(4,), takes_mask=True)
    pyro.clear_param_store()
    vae = vae_with(encoder=encoder, missing="ignore", likelihood=likelihoods.Normal(0.5))
    x = X.clone()
    x[2:4, :1] = torch.nan
    kl = kl_divergence(Normal(*vae.encode(x)), Normal(0.0, 1.0)).mean(0)
    found = difference(TraceMeanField_ELBO(), 0.5, vae, x)
    torch.testing.assert_close(found, N * (0.5 - kl).relu().sum(), rtol=1e-4, atol=1e-3)


class OtherPrior(VAE):
    """A VAE with another prior than N(0, I)."""

    def _prior(self):
        return pyro.distributions.Normal(self._prior_loc + 1, 2.0).to_event(1)


def test_another_prior():
    vae = vae_with(kind=OtherPrior)
    kl = kl_divergence(Normal(*vae.encode(X)), Normal(1.0, 2.0)).mean(0)
    found = difference(TraceMeanField_ELBO(), 0.7, vae, X)
    torch.testing.assert_close(found, N * (0.7 - kl).relu().sum(), rtol=1e-4, atol=1e-3)


def test_graph_steps_of_a_mixture():
    steps = []
    for kind in (SVI, GraphSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        mixture = mixture_with("components")
        elbo = AnnealedELBO(FreeBitsELBO(TraceEnum_ELBO(), {"z": 0.4}), {"y": 0.5, "z": 0.5})
        more = {} if kind is SVI else {"compile": False}
        svi = kind(mixture.model, mixture.guide, JointOptim(torch.optim.Adam, {"lr": 0.02}), elbo, **more)
        losses = torch.tensor([float(svi.step(X)) for _ in range(6)])
        steps.append([losses, *(value.detach() for value in mixture.parameters())])
        assert kind is SVI or svi.runs == "graph"
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)


def test_components_of_a_users_own_model():
    """Two enumerated sites, the second of which depends on the first, in guide and model."""
    x = torch.randn(5)
    q1 = torch.tensor([0.3, 0.7])
    q2 = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    loc, prior = torch.randn(2, 3), torch.randn(3)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(0.8))
        with pyro.plate("data", 5):
            a = pyro.sample("a", pyro.distributions.Categorical(q1), infer={"enumerate": "parallel"})
            b = pyro.sample("b", pyro.distributions.Categorical(q2[a]), infer={"enumerate": "parallel"})
            pyro.sample("z", pyro.distributions.Normal(loc[a, b], scale))

    def model(x):
        with pyro.plate("data", 5):
            pyro.sample("a", pyro.distributions.Categorical(torch.ones(2)))
            b = pyro.sample("b", pyro.distributions.Categorical(torch.ones(3)))
            z = pyro.sample("z", pyro.distributions.Normal(prior[b], 1.0))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    given = kl_divergence(Normal(loc, 0.8), Normal(prior, 1.0))
    of_z = (q1[:, None] * q2 * given).sum()
    of_b = (q1 * kl_divergence(Categorical(q2), Categorical(torch.ones(3)))).sum()
    for nats, expected in [({"z": 9.0}, 9 - of_z), ({"b": 9.0}, 9 - of_b)]:
        losses = []
        for elbo in (TraceEnum_ELBO(), FreeBitsELBO(TraceEnum_ELBO(), nats)):
            pyro.set_rng_seed(5)
            losses.append(elbo.differentiable_loss(model, guide, x).detach())
        torch.testing.assert_close(losses[1] - losses[0], 5 * expected)


def test_other_ways_to_enumerate_are_refused():
    def pair(infer):
        def guide():
            pyro.param("some", torch.zeros(()))
            with pyro.plate("data", 1):
                y = pyro.sample("y", pyro.distributions.Categorical(torch.ones(2)), infer=infer)
                pyro.sample("z", pyro.distributions.Normal(y + pyro.param("some"), 1.0))

        return guide

    for infer in ({"enumerate": "sequential"}, {"enumerate": "parallel", "num_samples": 4}):
        guide = pair(infer)
        with pytest.raises(ValueError, match="over all values, got site 'y'"):
            FreeBitsELBO(TraceEnum_ELBO(), 1.0).differentiable_loss(pair({}), guide)


def test_masks_by_component_are_refused():
    def pair(kind):
        def function():
            scale = pyro.param("scale", torch.tensor(0.8)) if kind == "guide" else 1.0
            with pyro.plate("data", 5):
                y = pyro.sample("y", pyro.distributions.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
                with poutine.mask(mask=y == 0):
                    pyro.sample("z", pyro.distributions.Normal(0.0, scale))

        return function

    with pytest.raises(ValueError, match="scale and mask of site 'z' that have the shape"):
        FreeBitsELBO(TraceEnum_ELBO(), 1.0).differentiable_loss(pair("model"), pair("guide"))


class OwnGuide(AutoNormalMessenger):
    """A guide that runs the model, with a Normal for each datum."""

    def get_posterior(self, name, prior):
        return pyro.distributions.Normal(pyro.param("loc", torch.tensor(0.3)), 0.5).expand(prior.batch_shape)


def test_a_guide_that_runs_the_model():
    def model(x):
        with pyro.plate("data", 10, subsample=torch.arange(5)):
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(5), 2.0))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    guide, x = OwnGuide(model), torch.randn(5)
    losses = []
    for elbo in (Trace_ELBO(max_plate_nesting=1), FreeBitsELBO(Trace_ELBO(max_plate_nesting=1), 3.0)):
        pyro.set_rng_seed(5)
        losses.append(elbo.differentiable_loss(model, guide, x))
    kl = kl_divergence(Normal(0.3, 0.5), Normal(0.0, 2.0))
    torch.testing.assert_close(losses[1] - losses[0], 10 * (3 - kl))
