"""Components that are known for a part of the data: the bound by hand, gradients, draws and wrong labels."""

import pyro
import pytest
import torch
from helpers.decoders import EVENT, perturb
from helpers.mixtures_by_hand import bound_at, bound_by_hand, drawn
from helpers.models import FORMS, mixture_with
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, Predictive, TraceEnum_ELBO

from pyro_ilvae import AnnealedELBO, GraphSVI, JointOptim, MixtureVAE, MLPDecoder, MLPEncoder, diagnostics, likelihoods
from pyro_ilvae.models._labels import LabelledCategorical

X = torch.randn(5, *EVENT, generator=torch.Generator(torch.get_default_device()).manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@given(labels=st.lists(st.integers(-1, 2), min_size=5, max_size=5), beta=st.floats(0.0, 3.0), seed=st.integers(0, 99))
def test_bound_is_that_by_hand(form, labels, beta, seed):
    pyro.clear_param_store()
    torch.manual_seed(seed)
    mixture = perturb(mixture_with(form, data_size=15, weights="learned"), 0.3).double()
    labels = torch.tensor(labels)
    betas = (beta, beta) if form == "summed-out" else (beta, 0.7)
    weights = beta if form == "summed-out" else dict(zip("yz", betas, strict=True))
    annealed = AnnealedELBO(TraceEnum_ELBO(max_plate_nesting=1), beta=weights)
    z = drawn(mixture, X, 1, y=labels)
    expected = 3 * bound_by_hand(mixture, X, z, *betas, labels=labels).sum()
    bound = bound_at(annealed, mixture, X, 1, y=labels)
    torch.testing.assert_close(bound, expected)
    parameters = list(mixture.parameters())
    gradients, by_hand = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (bound, expected))
    for own, other in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(*(torch.zeros(()) if g is None else g for g in (own, other)), check_dtype=False)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_label_nothing_changes(form):
    mixture = mixture_with(form).double()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    unknown = bound_at(elbo, mixture, X, 1, y=torch.full((5,), -1))
    torch.testing.assert_close(unknown, bound_at(elbo, mixture, X, 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_particles", [1, 4])
def test_particles_and_graphs_take_labels(form, num_particles):
    labels = torch.tensor([0, -1, 2, 1, -1])
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=num_particles, vectorize_particles=num_particles > 1)
    losses = []
    for kind, options in ((SVI, {}), (GraphSVI, {"compile": False})):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        mixture = perturb(mixture_with(form), 0.1)
        pyro.set_rng_seed(0)
        svi = kind(mixture.model, mixture.guide, JointOptim(torch.optim.SGD, {"lr": 1e-5}), elbo, **options)
        losses.append([float(svi.step(X.float(), y=y)) for y in (labels, labels, labels.flip(0), labels, labels)])
    assert svi.runs == "graph"
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_data_of_known_components_are_drawn():
    mixture = mixture_with("factor")
    labels = torch.tensor([0, -1, 2, 1])
    for parallel in (False, True):
        draws = Predictive(mixture.model, num_samples=50, parallel=parallel)(y=labels, num_data=4)
        y = draws["y"].reshape(50, 4)
        assert (y[:, labels >= 0] == labels[labels >= 0]).all()
        assert y[:, 1].unique().numel() == 3
    guide = Predictive(mixture.guide, num_samples=50)(X.float(), y=torch.tensor([0, 1, 2, 1, 0]))
    assert (guide["y"].reshape(50, 5) == torch.tensor([0, 1, 2, 1, 0])).all()


@pytest.mark.parametrize("form", ["factor", "components"])
def test_diagnostics_take_labels(form):
    mixture = mixture_with(form)
    labels = torch.tensor([0, 1, 2, 1, -1])
    pair, x = (mixture.model, mixture.guide), X.float()
    kl = diagnostics.kl_divergence(*pair, x, site="y", model_kwargs={"y": labels}).values
    # A known component of three equally probable ones is worth log 3 nats.
    torch.testing.assert_close(kl[:4], torch.tensor(3.0).log().expand(4))
    pyro.set_rng_seed(0)
    bounds = diagnostics.evidence(*pair, x, model_kwargs={"y": labels}, num_samples=200)
    assert bounds.elbo.isfinite().all()
    both = diagnostics.evidence(*pair, x, model_kwargs={"y": labels}, num_samples=200, batch_size=2)
    torch.testing.assert_close(bounds.log_likelihood, both.log_likelihood, rtol=0.1, atol=0.5)


@pytest.mark.slow
def test_labels_name_the_components():
    """Three clusters with labels for half of the data: the other half then has the numbers of the labels."""
    for seed in range(3):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        truth = torch.arange(300) % 3
        x = torch.tensor([[0.0, 4.0], [4.0, 0.0], [-4.0, -4.0]])[truth] + torch.randn(300, 2)
        labels = torch.where(torch.arange(300) < 150, truth, -1)
        decoder = MLPDecoder(latent_dim=2, event_shape=2, hidden_features=(16,), linear_path=True)
        encoder = MLPEncoder(event_shape=2, latent_dim=2, hidden_features=(16,))
        mixture = MixtureVAE(decoder, encoder, likelihoods.Normal(1.0), 3, data_size=300)
        mixture.initialize(x)
        optim = JointOptim(torch.optim.Adam, {"lr": 1e-2})
        svi = SVI(mixture.model, mixture.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
        for _ in range(400):
            svi.step(x, y=labels)
        found = mixture.predict_component(x).argmax(-1)
        assert (found == truth)[150:].float().mean() > 0.95


def test_logits_of_each_particle_have_the_labels_of_all():
    prior = LabelledCategorical(torch.randn(4, 1, 3), torch.tensor([0, -1, 2]))
    assert prior.batch_shape == (4, 3)
    assert (prior.sample()[:, [0, 2]] == torch.tensor([0, 2])).all()
    values = prior.enumerate_support()
    log_prob = prior.log_prob(values)
    assert (log_prob[1:, :, 0] < -1e10).all()
    torch.testing.assert_close(log_prob[:, :, 1].exp().sum(0), torch.ones(4))
    assert prior.expand([2, 4, 3]).log_prob(values.unsqueeze(1).expand(3, 2, 4, 3)).shape == (3, 2, 4, 3)


WRONG = {
    "floats": (torch.zeros(5), "y to hold ints"),
    "shape": (torch.zeros(4, dtype=torch.int64), r"of shape \(5,\)"),
    "too large": (torch.tensor([0, 1, 2, 3, 0]), "y to hold labels .* from 0 to 2, or -1"),
    "too small": (torch.tensor([0, 1, -2, 2, 0]), "y to hold labels .* from 0 to 2, or -1"),
    "words": (["a"] * 5, "Expected y"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("form", FORMS)
def test_wrong_labels_are_refused(form, name):
    mixture = mixture_with(form)
    labels, words = WRONG[name]
    for function in (mixture.model, mixture.guide):
        with pytest.raises((ValueError, TypeError), match=words):
            pyro.poutine.enum(function, first_available_dim=-2)(X.float(), y=labels)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", ["factor", "summed-out"])
def test_components_that_start_at_clusters_have_the_numbers_of_the_labels(form, seed):
    """Whatever numbers k-means gives them, and with few labels, of which one is wrong."""
    torch.manual_seed(seed)
    true = torch.randint(3, (90,))
    x = torch.randn(90, *EVENT) + 20 * torch.randn(3, *EVENT)[true]
    mixture = mixture_with(form)
    labels = torch.full((90,), -1)
    for component in range(3):
        labels[(true == component).nonzero()[:4, 0]] = component
    labels[(true == 2).nonzero()[5, 0]] = 1
    members = mixture.initialize_components(x, seed=seed, y=labels)
    without = mixture.initialize_components(x, seed=seed)
    assert diagnostics.cluster_agreement(members, without).accuracy == 1  # the same clusters
    loc, _ = mixture.encode(x) if form == "summed-out" else mixture.encoder(x)
    mixture.initialize_components(x, seed=seed, y=labels)
    assert (members[labels >= 0] == labels[labels >= 0]).sum() >= 12
    for component in range(3):
        torch.testing.assert_close(mixture.component_loc[component], loc[members == component].mean(0))


def test_wrong_labels_of_clusters():
    mixture = mixture_with("factor")
    for wrong in (torch.tensor([0, 1]), torch.tensor([0, 1, 2, 3, 0]), torch.zeros(5)):
        with pytest.raises(ValueError, match="Expected y"):
            mixture.initialize_components(X.float(), y=wrong)
