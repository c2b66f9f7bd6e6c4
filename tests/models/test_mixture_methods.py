"""The mixture VAE's methods: moments and draws, components put on clusters, and what is refused."""

import copy
import sys

import pyro
import pytest
import torch
from helpers.conjugate_mixtures import Datum, conjugate
from helpers.decoders import DECODERS, LATENT, perturb
from helpers.models import FORMS, X, mixture_encoder, mixture_with
from pyro import poutine
from torch.distributions import Categorical, Normal

from pyro_ilvae import MixtureVAE, likelihoods


def assert_same_moments(draws, others):
    """The means, and the means of squares, of two sets of draws are within 5 standard errors of each other."""
    for power in (1, 2):
        one, two = draws**power, others**power
        errors = (one.var(0) / len(one) + two.var(0) / len(two)).sqrt()
        assert ((one.mean(0) - two.mean(0)).abs() <= 5 * errors + 1e-6).all()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_encode_gives_the_moments_of_the_guide(form):
    mixture = perturb(mixture_with(form, weights="learned"), 0.3).double()
    x, count = X[:3].double(), 4000
    trace = poutine.trace(mixture.guide).get_trace(x.repeat(count, 1, 1))
    draws = trace.nodes["z"]["value"].reshape(count, 3, LATENT)
    mean, scale = mixture.encode(x)
    errors = [draws.std(0) / count**0.5, draws.square().std(0) / count**0.5]
    assert ((draws.mean(0) - mean).abs() <= 5 * errors[0]).all()
    assert ((draws.square().mean(0) - mean**2 - scale**2).abs() <= 5 * errors[1]).all()
    probs = mixture.predict_component(x, num_samples=count)
    torch.testing.assert_close(probs.sum(-1), torch.ones(3).double())
    prior = Normal(mixture.component_loc, mixture.component_log_scale.exp())
    if form == "summed-out":
        joint = mixture.component_logits + prior.log_prob(draws.unsqueeze(-2)).sum(-1)
        chosen = joint.softmax(-1)
    else:
        chosen = torch.nn.functional.one_hot(trace.nodes["y"]["value"].reshape(count, 3), 3).double()
    assert ((chosen.mean(0) - probs).abs() <= 5 * (2 / count) ** 0.5 * chosen.std(0) + 5 / count).all()


def test_draws_of_the_prior_and_of_a_component():
    mixture, count = conjugate(), 4000
    loc, scale = mixture.component_loc.detach(), mixture.component_log_scale.detach().exp()
    for mean, noise in ((True, 0.0), (False, 0.5)):
        y = Categorical(logits=mixture.component_logits.detach()).sample((count,))
        every = Normal(loc, (scale**2 + noise**2).sqrt()).sample((count,))
        for c in range(3):
            assert_same_moments(mixture.sample_component(c, count, mean=mean), every[:, c])
        assert_same_moments(mixture.sample_prior(count, mean=mean), every[range(count), y])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_probabilities_do_not_depend_on_the_batch_size(form, batch_size):
    mixture = perturb(mixture_with(form, weights="learned"), 0.3)
    probs = [mixture.predict_component(X, batch_size=size, num_samples=500) for size in (None, batch_size)]
    # Where y is summed out they are averages over draws of z.
    tolerance = 0.5 * 5 * (2 / 500) ** 0.5 if form == "summed-out" else 1e-5
    assert ((probs[0] - probs[1]).abs() <= tolerance).all()


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_need_draws_where_y_is_summed_out_only(form):
    mixture, before = mixture_with(form), torch.get_rng_state()
    mixture.predict_component(X)
    assert torch.equal(torch.get_rng_state(), before) == (form != "summed-out")


@pytest.mark.parametrize("form", ["factor", "summed-out"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_clusters_do_not_depend_on_the_batch_size_or_the_training_mode(form, batch_size):
    mixture = mixture_with(form)
    clusters = mixture.initialize_components(X, batch_size=batch_size, seed=1)
    assert torch.equal(clusters, mixture.initialize_components(X, seed=1))
    mixture.encoder.network.insert(1, torch.nn.BatchNorm1d(8))
    mixture.encoder.network.insert(2, torch.nn.Dropout(0.5))
    before = copy.deepcopy(mixture.state_dict())
    clusters = mixture.initialize_components(X, seed=1)
    assert all(module.training for module in mixture.modules())
    changed = {key for key, value in mixture.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"component_loc", "component_log_scale"}
    assert torch.equal(mixture.eval().initialize_components(X, seed=1), clusters)


CENTERS = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])


LABELS = torch.tensor([0] * 40 + [1] * 60 + [2] * 100)


CLUSTERED = CENTERS[LABELS] + torch.tensor([1.0, 0.5]) * torch.randn(
    200, 2, generator=torch.Generator(torch.get_default_device()).manual_seed(1)
)


@pytest.mark.parametrize("weights", ["fixed", "learned"])
@pytest.mark.parametrize("scales", ["fixed", "learned"])
@pytest.mark.parametrize("enumerate_in", ["guide", "model"])
def test_components_are_put_on_clusters(weights, scales, enumerate_in):
    options = {"latent_dim": 2, "event_shape": 2, "weights": weights, "scales": scales, "enumerate_in": enumerate_in}
    mixture = MixtureVAE(
        torch.nn.Identity(), Datum(0.5), num_components=3, likelihood=likelihoods.Normal(0.5), **options
    )
    clusters = mixture.initialize_components(CLUSTERED, batch_size=30)
    assert clusters.shape == (200,)
    order = torch.stack([clusters[label == LABELS].mode().values for label in range(3)])
    assert torch.equal(order[LABELS], clusters)
    members = [CLUSTERED[label == LABELS] for label in range(3)]
    torch.testing.assert_close(mixture.component_loc[order].data, torch.stack([part.mean(0) for part in members]))
    spread = torch.stack([part.var(0, correction=0) for part in members])
    # Locations spread by the factor's scale too, and posteriors fill what they spread over.
    spread = spread + 0.25 if enumerate_in == "model" else (spread - 0.25).maximum(0.1 * spread)
    expected = spread.sqrt() if scales == "learned" else torch.ones(3, 2)
    torch.testing.assert_close(mixture.component_log_scale[order].exp().data, expected)
    expected = torch.tensor([0.2, 0.3, 0.5]) if weights == "learned" else torch.ones(3) / 3
    torch.testing.assert_close(mixture.component_logits[order].softmax(-1).data, expected)
    if enumerate_in == "guide":
        assert torch.equal(mixture.predict_component(CLUSTERED).argmax(-1), clusters)


@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_scales_of_the_clusters_are_those_of_a_conjugate_model(noise):
    """What was drawn with the prior's scales and noise on top is given the prior's scales back."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    scale = torch.tensor([1.5, 0.5])
    size = 30_000
    z = 30 * CENTERS[torch.arange(size) % 3] + scale * torch.randn(size, 2, generator=generator)
    x = z + noise * torch.randn(size, 2, generator=generator)
    mixture = conjugate(noise=noise)
    mixture.initialize_components(x, seed=1)
    # The variance of n draws has a relative error of sqrt(2 / n), here of both variances together.
    error = 5 * (scale**2 + noise**2) * (2 / (size / 3)) ** 0.5
    assert ((mixture.component_log_scale.data.exp().square() - scale**2).abs() <= error).all()


def test_equal_data_in_a_cluster_have_a_density():
    mixture = conjugate()
    mixture.initialize_components(CENTERS.repeat(4, 1))
    assert mixture.component_log_scale.isfinite().all()
    assert mixture.predict_component(CENTERS).isfinite().all()


def test_no_clusters_for_an_encoder_of_components():
    with pytest.raises(ValueError, match="Expected encoder to return location and scale"):
        mixture_with("components").initialize_components(X)


def test_seeds_of_the_clusters():
    mixture = conjugate(num_components=20)
    results = []
    for seed in (1, 1, 2, None, None):
        pyro.set_rng_seed(3)
        before = torch.get_rng_state()
        results.append(mixture.initialize_components(CLUSTERED, restarts=1, seed=seed))
        assert torch.equal(torch.get_rng_state(), before) == (seed is not None)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[3], results[4])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", [1, 2])
def test_fewer_different_data_than_components_are_refused(size):
    for x in (CLUSTERED[:size], CLUSTERED[:size].repeat(5, 1)):
        mixture = conjugate()
        before = copy.deepcopy(mixture.state_dict())
        with pytest.raises(ValueError, match=f"at least num_components = 3 different encoded data, got {size}"):
            mixture.initialize_components(x)
        assert all(torch.equal(value, before[key]) for key, value in mixture.state_dict().items())


def test_clusters_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="initialize_components needs scikit-learn"):
        conjugate().initialize_components(CLUSTERED)


class Shapes(torch.nn.Module):
    """An encoder that returns ones of given shapes for each datum."""

    def __init__(self, *shapes):
        super().__init__()
        self.shapes = shapes

    def forward(self, x):
        return tuple(torch.ones(len(x), *shape) for shape in self.shapes)


@pytest.mark.parametrize("form", ["factor", "summed-out"])
@pytest.mark.parametrize(
    "shapes",
    [
        ((3,),),
        ((1,), (1,)),
        ((3,), (1,)),
        ((4,), (4,)),
        ((), ()),
        ((3,), (3,), (3,)),
        ((2,), (2, 3), (2, 3)),
        ((3,), (3, 3), (3, 1)),
        ((3,), (3, 3), (3, 3), (3,)),
    ],
)
def test_refuses_encoders_of_other_shapes(form, shapes):
    mixture = mixture_with(form, encoder=Shapes(*shapes))
    calls = [lambda: mixture.guide(X), lambda: mixture.encode(X), lambda: mixture.predict_component(X)]
    for call in (*calls, lambda: mixture.initialize_components(X)):
        with pytest.raises(ValueError, match="Expected encoder to return"):
            call()


def test_refuses_posteriors_of_components_where_y_is_summed_out():
    mixture = mixture_with("summed-out", encoder=Shapes((3,), (3, 3), (3, 3)))
    with pytest.raises(ValueError, match="Expected encoder to return location and scale"):
        mixture.guide(X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixture_with("factor", num_components=0), "num_components to be an int >= 1"),
        (lambda: mixture_with("factor", weights="free"), "weights to be one of 'fixed', 'learned', got 'free'"),
        (lambda: mixture_with("factor", scales=1.0), "scales to be one of 'learned', 'fixed', got 1.0"),
        (lambda: MixtureVAE(DECODERS["plain"](), mixture_encoder("factor"), likelihoods.Normal(), 3, enumerate_in="y"),
         "enumerate_in to be one of 'guide', 'model', got 'y'"),
        (lambda: mixture_with("factor", encoder=mixture_encoder("components", num_components=2)),
         "an encoder with num_components = 3, got 2"),
        (lambda: mixture_with("summed-out", encoder=mixture_encoder("components")),
         "an encoder with num_components = None, got 3"),
        (lambda: mixture_with("factor", likelihood=likelihoods.Normal(1.0, "optimal")), "a fixed or learned scale"),
        (lambda: mixture_with("factor").predict_component(X, num_samples=0), "num_samples"),
        (lambda: mixture_with("factor").sample_component(0, 0), "num_samples"),
        (lambda: mixture_with("factor").sample_component(3), "component to be an int from 0 to 2, got 3"),
        (lambda: mixture_with("factor").sample_component(-1), "component to be an int from 0 to 2, got -1"),
        (lambda: mixture_with("factor").sample_component(True), "component to be an int from 0 to 2, got True"),
        (lambda: mixture_with("factor").initialize_components(X, restarts=0), "restarts"),
    ],
)  # fmt: skip
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
