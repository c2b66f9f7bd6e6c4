"""Lists of tensors as data, the words of errors, and how often draws of batches are compared."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.distributions import Beta
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae._programs import Runs
from pyro_ilvae.diagnostics import evidence, kl_divergence

FLIPS = [torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0)]


def coin(flips):
    fairness = pyro.sample("f", dist.Beta(10.0, 10.0))
    for i in range(len(flips)):
        pyro.sample(f"x_{i}", dist.Bernoulli(fairness), obs=flips[i])


def coin_guide(flips):
    pyro.sample("f", dist.Beta(12.0, 11.0))  # the exact posterior


def test_a_list_of_tensors_is_one_call():
    exact = exact_kl(Beta(12.0, 11.0), Beta(10.0, 10.0))
    torch.testing.assert_close(kl_divergence(coin, coin_guide, (FLIPS,)).values, exact.reshape(1))
    bounds = evidence(coin, coin_guide, (FLIPS,), num_samples=5)
    log_p = torch.tensor(10 / 20 * 11 / 21 * 10 / 22).log()
    torch.testing.assert_close(bounds.elbo, log_p.reshape(1), atol=1e-4, rtol=1e-4)
    with pytest.raises(TypeError, match=r"model_args\[0\] to be a tensor over .*, got list of 3 values"):
        kl_divergence(coin, coin_guide, (FLIPS,), batch_size=2)


def test_a_list_of_tensors_in_a_plate():
    def model(rows):
        x = torch.stack(list(rows))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(rows):
        with pyro.plate("data", len(rows)):
            pyro.sample("z", dist.Normal(torch.stack(list(rows)) / 2, 0.5**0.5))

    expected = kl_divergence(model, guide, torch.stack(FLIPS)).values
    torch.testing.assert_close(kl_divergence(model, guide, (FLIPS,)).values, expected)


X = torch.linspace(-1.0, 1.0, 15)


def in_plate(x, size, observe):
    with pyro.plate("data", *size):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0) if observe else dist.Normal(x / 2, 0.5**0.5))
        if observe:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_errors_of_plates_come_without_a_table():
    def model(x):
        in_plate(x, [len(x)], True)

    guide = AutoNormal(model)
    guide(X)
    with pytest.raises(ValueError, match="one size in model and guide") as caught:
        kl_divergence(model, guide, X[:4])
    assert "Trace Shapes" not in str(caught.value)


def test_errors_of_the_model_keep_their_table():
    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        raise ValueError("other words")

    with pytest.raises(ValueError, match="Trace Shapes"):
        kl_divergence(model, model, X)


def test_one_datum_and_a_guide_with_values_for_others():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(X, 1.0))

    with pytest.raises(ValueError, match="a guide that holds values for each datum"):
        kl_divergence(model, guide, X[:1])


@pytest.mark.parametrize(("num_batches", "most"), [(1, 1), (5, 4), (15, 5)])
def test_draws_of_equal_batches_are_compared_in_some_of_them(monkeypatch, num_batches, most):
    calls = []
    original = Runs.same_alone

    def counted(self, run, together=None, *args, **kwargs):
        calls.append(together is not None)
        return original(self, run, together, *args, **kwargs)

    monkeypatch.setattr(Runs, "same_alone", counted)
    bounds = evidence(
        lambda x: in_plate(x, [len(x)], True),
        lambda x: in_plate(x, [len(x)], False),
        X,
        batch_size=15 // num_batches,
        num_samples=50,
    )
    torch.testing.assert_close(bounds.elbo, dist.Normal(0.0, 2**0.5).log_prob(X), atol=1e-4, rtol=1e-4)
    assert sum(calls) == most


def test_guides_without_values_of_their_own_are_tried_at_other_indices_once():
    runs = []

    def model(x):
        in_plate(x, [100, len(x)], True)

    def guide(x):
        runs.append(len(x))
        in_plate(x, [100, len(x)], False)

    counts = []
    for batches in (1, 3):
        runs.clear()
        kl_divergence(model, guide, X[: 5 * batches], batch_size=5)
        counts.append(len(runs))
    first, rest = counts[0], counts[1] - counts[0]
    assert rest == 2 * (first - 2)


def test_values_by_indices_are_found_in_each_size_of_batches():
    values = torch.linspace(-1.0, 1.0, 100)

    def guide(x):
        with pyro.plate("data", 100, len(x)) as index:
            pyro.sample("z", dist.Normal(values[index], 1.0))

    with pytest.raises(ValueError, match="Expected the indices of the data in model_args"):
        kl_divergence(lambda x: in_plate(x, [100, len(x)], True), guide, X, batch_size=5)
