"""Vectors and matrices whose entries are one variable are one unit, as a category is."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import active_units, collapse_summary


def pair(prior, posterior):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", prior)
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", posterior(x))

    return model, guide


CLASSES = 100
IDENTIFIED = 30 * torch.eye(CLASSES)


@pytest.mark.parametrize(("family", "mean"), [(dist.OneHotCategorical, True), (dist.Categorical, False)])
def test_a_one_hot_vector_is_judged_as_its_category(family, mean):
    model, guide = pair(family(logits=torch.zeros(CLASSES)), lambda x: family(logits=IDENTIFIED))
    summary = collapse_summary(model, guide, torch.zeros(CLASSES), measures=["kl", "active_units"])
    assert summary.unit.values.tolist() == ["c"]
    assert summary.kl.item() == pytest.approx(math.log(CLASSES), rel=1e-4)
    assert summary.attrs["verdict"] == "active: 0 of 1 units hold less than 0.01 nats, 1 active; 4.61 nats in all"
    if mean:
        assert summary.active_units.item() == 1
        # 100 different corners, each with a squared distance of 0.99 from their mean.
        assert summary.mean_variance.item() == pytest.approx(1.0, rel=1e-4)
        units = active_units(model, guide, torch.zeros(CLASSES))
        assert units.variances.shape == ()
        assert units.num_active == 1


def test_independent_one_hot_vectors_have_divergences_and_verdicts_of_their_own():
    logits = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    prior = dist.OneHotCategorical(logits=torch.zeros(2, 3)).to_event(1)
    model, guide = pair(prior, lambda x: dist.OneHotCategorical(logits=logits.expand(len(x), 2, 3)).to_event(1))
    summary = collapse_summary(model, guide, torch.zeros(4), measures=["kl", "active_units"])
    assert summary.unit.values.tolist() == ["c[0]", "c[1]"]
    expected = exact_kl(dist.Categorical(logits=logits), dist.Categorical(logits=torch.zeros(2, 3)))
    assert summary.kl.values.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert summary.verdict.values.tolist() == ["collapsed", "active"]
    assert summary.collapsed_fraction.values.tolist() == [1.0, 0.0]


PRIORS = {
    "dirichlet": (dist.Dirichlet(torch.ones(4)), lambda s: dist.Dirichlet(s * torch.ones(4))),
    "wishart": (
        dist.Wishart(torch.tensor(5.0), torch.eye(3)),
        lambda s: dist.Wishart(torch.tensor(5.0), s**0.5 * torch.eye(3)),
    ),
    "lkj": (dist.LKJCholesky(3, 1.0), lambda s: dist.LKJCholesky(3, s)),
}


@pytest.mark.filterwarnings("ignore:Singular sample detected:UserWarning")
@pytest.mark.parametrize(("prior", "posterior"), PRIORS.values(), ids=PRIORS)
def test_a_constrained_vector_or_matrix_is_one_unit(prior, posterior):
    for strength, words in ((1.0, {"collapsed"}), (4.0, {"active"})):
        model, guide = pair(prior, lambda x, s=strength: posterior(s).expand([len(x)]))
        options = {"measures": ["kl", "active_units"], "num_samples": 400, "seed": 0}
        summary = collapse_summary(model, guide, torch.zeros(4), **options)
        assert summary.unit.values.tolist() == ["c"]
        assert set(summary.verdict.values) == words
        assert summary.kl.item() == pytest.approx(summary.kl_total.item(), abs=1e-6)
        assert summary.active_units.item() == 0
