"""Which plate is over the data where the data are along another dimension or plates have one size."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_within
from torch.distributions import Dirichlet, Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import collapse_summary, evidence, kl_divergence, kl_per_dimension

Y = torch.linspace(-1.0, 2.0, 36).reshape(12, 3).T.contiguous()  # 12 data as columns


def by_columns(global_size):
    """A model of columns whose first entries are observed, and a plate of global sites."""

    def program(y, observe):
        with pyro.plate("feat", global_size):
            pyro.sample("w", dist.Normal(0.0, 1.0 if observe else 0.5))
        with pyro.plate("data", y.shape[1]):
            if observe:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=y[0])
            else:
                pyro.sample("z", dist.Normal(y[0] / 2, 0.5))

    return lambda y: program(y, True), lambda y: program(y, False)


@pytest.mark.parametrize("global_size", [3, 12, 5])
@pytest.mark.parametrize("plate", [None, "data"])
def test_the_plate_of_what_is_observed_is_over_the_data(global_size, plate):
    model, guide = by_columns(global_size)
    exact = exact_kl(Normal(Y[0] / 2, 0.5), Normal(0.0, 1.0))
    for y in (Y, Y[:1]):
        for measure in (kl_divergence, kl_per_dimension):
            torch.testing.assert_close(measure(model, guide, y, site="z", plate=plate).values, exact)
    summary = collapse_summary(model, guide, Y, num_samples=30, plate=plate, measures=["kl"], seed=0)
    assert summary.attrs["num_data"] == 12
    assert float(summary.kl_total.sel(site="z")) == pytest.approx(float(exact.mean()), abs=1e-5)
    assert f"{float(exact.mean()):.3g} nats in all" in summary.attrs["verdict"]


def test_parts_of_data_along_another_dimension_are_refused():
    model, guide = by_columns(3)
    for plate in (None, "data"):
        with pytest.raises(ValueError, match="12 data"):
            kl_divergence(model, guide, Y, site="z", batch_size=2, plate=plate)


WORDS = torch.arange(48).reshape(6, 8) % 10  # of 8 documents
TOPICS = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
COUNTS = torch.linspace(0.5, 4.0, 24).reshape(8, 3)


def lda(words):
    with pyro.plate("documents", words.shape[1]):
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("words", len(words)):
            pyro.sample("w", dist.Categorical(theta @ TOPICS), obs=words)


def lda_guide(words):
    with pyro.plate("documents", words.shape[1]):
        pyro.sample("theta", dist.Dirichlet(COUNTS))


def test_words_by_documents():
    exact = exact_kl(Dirichlet(COUNTS), Dirichlet(torch.ones(3)))
    torch.testing.assert_close(kl_divergence(lda, lda_guide, WORDS, plate="documents").values, exact)
    bounds = evidence(lda, lda_guide, WORDS, plate="documents", num_samples=20_000, seed=0)
    # The mean of a product of topics under Dirichlet(1, 1, 1) is 2! n_1! n_2! n_3! / (2 + 6)!.
    topics = torch.cartesian_prod(*[torch.arange(3)] * len(WORDS))
    counts = torch.nn.functional.one_hot(topics).sum(1)
    log_mean = (counts + 1.0).lgamma().sum(1) + torch.tensor(3.0).lgamma() - torch.tensor(9.0).lgamma()
    log_words = TOPICS.log()[topics[..., None], WORDS].sum(1)
    exact = (log_words + log_mean[:, None]).logsumexp(0)
    assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)
    with pytest.raises(ValueError, match=r"got \['words', 'documents'\]; name the plate"):
        kl_divergence(lda, lda_guide, WORDS)


def test_a_named_plate_of_latent_sites_alone():
    # Ratings that share the factors of their users: only the name tells the users from the ratings.
    user = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    loc = torch.tensor([0.5, -1.0, 2.0])

    def model(ratings):
        with pyro.plate("users", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("ratings", len(ratings)):
            pyro.sample("x", dist.Normal(z[..., user], 1.0), obs=ratings)

    def guide(ratings):
        with pyro.plate("users", 3):
            pyro.sample("z", dist.Normal(loc, 0.5))

    values = kl_divergence(model, guide, torch.zeros(7), plate="users").values
    torch.testing.assert_close(values, exact_kl(Normal(loc, 0.5), Normal(0.0, 1.0)))
