"""Data that come in batches from a loader: the results of all data, in the memory of a batch, or an error."""

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from helpers.identity_decoder import DECODER, model
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from pyro_ilvae import from_pyro_svi
from pyro_ilvae.diagnostics import (
    active_units,
    collapse_summary,
    evidence,
    fisher_bound,
    guide_fisher_divergence,
    kl_divergence,
    kl_per_dimension,
    mutual_information,
    posterior_fisher_divergence,
    posterior_fisher_divergence_of_draws,
)

X = torch.linspace(-2.0, 3.0, 11)
DRAWS = {"z": X / 2 + torch.randn(50, 11)}


def guide(x, shift=0.0):
    """The exact posterior: weights are equal, and no result depends on the draws but by its own error."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x - shift) / 2, 0.5**0.5))


def loader(*tensors, batch_size=4, **options):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, **options)


LOADERS = {
    "loader": loader(X),
    "last batch dropped by nobody": loader(X, batch_size=3),
    "tuples": [(X[:5],), (X[5:],)],
    "mappings": [{"x": X[:5]}, {"x": X[5:]}],
    "arrays": DataLoader([(x,) for x in X.numpy()], batch_size=4, collate_fn=lambda rows: np.concatenate(rows)),
    "workers": loader(X, num_workers=1),
}
RESULTS = {
    "kl_divergence": lambda x, **more: kl_divergence(model, guide, x, **more).values,
    "kl_per_dimension": lambda x, **more: kl_per_dimension(model, guide, x, **more).values,
    "active_units": lambda x, **more: active_units(model, guide, x, **more).variances,
    "evidence": lambda x, **more: evidence(model, guide, x, num_samples=7, **more).log_likelihood,
    "guide_fisher_divergence": lambda x, **more: guide_fisher_divergence(model, guide, x, **more).values,
    "collapse_summary": lambda x, **more: torch.tensor(
        collapse_summary(model, guide, x, measures=["kl", "evidence"], **more).log_likelihood.item()
    ),
    "posterior_fisher_divergence_of_draws": lambda x, **more: (
        posterior_fisher_divergence_of_draws(model, DRAWS, x, **more).values
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("name", RESULTS)
def test_results_are_those_of_all_data(name, kind):
    expected = RESULTS[name](X)
    torch.testing.assert_close(RESULTS[name](LOADERS[kind]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(RESULTS[name](LOADERS[kind], batch_size=2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("data", [loader(X), loader(X, shuffle=True), X])
def test_sampled_results_are_right_in_any_order(data):
    divergence = posterior_fisher_divergence(model, guide, data, num_samples=500, seed=0)
    assert abs(float(divergence.values.mean()) - float((X**2 / 4 + 0.5).mean())) < 0.2
    bound = fisher_bound(model, guide, data, decoder=DECODER, num_samples=50, seed=0)
    torch.testing.assert_close(bound.ratio, torch.ones(11))  # K = D and a linear decoder of slope 1
    information = mutual_information(model, guide, data, num_samples=400, seed=0)
    exact = mutual_information(model, guide, X, num_samples=400, seed=1)
    error = math.hypot(information.mutual_information_se, exact.mutual_information_se)
    assert abs(information.mutual_information - exact.mutual_information) < 5 * error
    assert information.limit == pytest.approx(math.log(11))
    assert information.mean_kl == pytest.approx(exact.mean_kl)


def test_a_subsample_of_a_loader_has_the_law_of_a_subsample_of_tensors():
    def mean(data):
        return np.mean(
            [mutual_information(model, guide, data, num_samples=20, aggregate_size=3, seed=s)[0] for s in range(60)]
        )

    assert mean(loader(X)) == pytest.approx(mean(X), rel=0.15)
    one_batch, tensors = (
        mutual_information(model, guide, data, num_samples=20, aggregate_size=3, seed=4) for data in ([(X,)], X)
    )
    assert one_batch[:6] == pytest.approx(tensors[:6], rel=1e-4)


def test_keyword_arguments_are_shared_or_of_a_batch():
    expected = evidence(model, guide, X - 0.5).log_likelihood
    for data, shared in (
        (loader(X), {"shift": 0.5}),
        ([{"x": X[:5], "shift": 0.5}, {"x": X[5:], "shift": 0.5}], None),
        (loader(X, torch.full_like(X, 0.5)), None),  # lists of two arguments
    ):
        found = evidence(model, guide, data, model_kwargs=shared).log_likelihood
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"names in model_kwargs that no batch of model_args has, got \['x'\]"):
        evidence(model, guide, [{"x": X}], model_kwargs={"x": X})


class Watched:
    """Batches that exist one at a time."""

    def __init__(self, num_batches):
        self.num_batches, self.alive, self.most = num_batches, 0, 0

    def __iter__(self):
        for _ in range(self.num_batches):
            yield (torch.randn(1000),)


def test_no_more_than_a_batch_is_in_memory():
    largest = []

    def watching(x):
        largest.append(len(x))
        model(x)

    result = evidence(watching, guide, Watched(5), num_samples=3)
    assert len(result.elbo) == 5000
    assert max(largest) == 1000


def moving(x):
    class Moving:
        calls = 0

        def __iter__(self):
            self.calls += 1
            yield (x + 0.1 * self.calls,)

    return Moving()


class Shrinking:
    def __init__(self):
        self.sizes = iter(range(11, 0, -1))

    def __iter__(self):
        yield (X[: next(self.sizes)],)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: mutual_information(model, guide, data, aggregate_size=4), "same batches in the same order"),
        (lambda data: posterior_fisher_divergence_of_draws(model, DRAWS, data), "same batches in the same order"),
    ],
)
def test_a_second_iteration_has_to_give_the_same_data(call, message):
    for data in (loader(X, shuffle=True), moving(X)):
        pyro.set_rng_seed(0)
        with pytest.raises(ValueError, match=message):
            call(data)
    call(loader(X))


def test_the_number_of_data_has_to_stay():
    with pytest.raises(ValueError, match="model_args to give the same data in each iteration, got 11 data and then 10"):
        mutual_information(model, guide, Shrinking())


def shared_model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def shared_guide(x):
    pyro.sample("loc", dist.Normal(0.0, 0.1))


@pytest.mark.parametrize(
    "diagnostic", [evidence, kl_divergence, kl_per_dimension, guide_fisher_divergence, active_units]
)
def test_data_that_share_a_site_are_taken_all_at_once(diagnostic):
    with pytest.raises(ValueError, match=r"all data in one call where data share sites|in a plate over the 4 data"):
        diagnostic(shared_model, shared_guide, loader(X))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((x for x in [X]), TypeError, "got generator, whose batches can be read only once"),
        (zip([X], [X], strict=True), TypeError, "got zip, whose batches can be read only once"),
        (iter([X]), TypeError, "read only once: pass a DataLoader or a list of tuples"),
        ([X, X], TypeError, "got list of tensors: pass a tuple for one call with all of them, or a list of tuples"),
        ([X.numpy(), X.numpy()], TypeError, "got list of tensors: pass a tuple"),
        (TensorDataset(X), TypeError, "got TensorDataset: pass a DataLoader of it"),
        ({"x": X}, TypeError, "got dict: pass keyword arguments as model_kwargs"),
        (None, TypeError, "got NoneType"),
        (3.0, TypeError, "got float"),
        ("abc", TypeError, "got a str"),
        ({1, 2}, TypeError, "got set"),
        (torch.nn.ModuleList([torch.nn.Linear(1, 1)]), TypeError, "got ModuleList"),
        (DataLoader, TypeError, "got the class DataLoader"),
        (lambda: X, TypeError, "got function"),
        (scipy.sparse.csr_matrix(X.numpy()), TypeError, r"make it dense with .toarray\(\)"),
        (pd.DataFrame({"a": ["x"]}), TypeError, "got a DataFrame of dtype object"),
        (["a", "b"], TypeError, "got a list of dtype <U1"),
        ([[1.0, 2.0], [3.0]], TypeError, "got a list that is none"),
        (pack_sequence([X]), TypeError, "got PackedSequence"),
        (loader(X[:0]), ValueError, "at least one batch in model_args, got none"),
        ([(X[:0],)], ValueError, "at least one datum in model_args, got none"),
        ([{1: X}], TypeError, "a batch of model_args to be a mapping from names, got the key 1"),
        (loader(X, X, X), TypeError, "model_args and model_kwargs that model and guide can be called with"),
        ([(X,), (X.numpy(),)], TypeError, r"model_args\[0\] to be a tensor .* convert it with torch.as_tensor"),
    ],
)
@pytest.mark.parametrize("diagnostic", [evidence, mutual_information])
def test_refuses_what_are_no_batches(diagnostic, data, error, message):
    with pytest.raises(error, match="model_args") as raised:
        diagnostic(model, guide, data)
    assert raised.match(message)


@pytest.mark.parametrize("value", [X.numpy(), X.tolist(), pd.Series(X.numpy()), X.numpy()[::-1][::-1]])
def test_numbers_are_taken_for_a_tensor(value):
    torch.testing.assert_close(evidence(model, guide, value).elbo, evidence(model, guide, X).elbo, rtol=1e-4, atol=1e-4)


def test_conversion_takes_no_loader():
    with pytest.raises(TypeError, match=r"model_args .* got DataLoader: all data are needed in one call here, as tens"):
        from_pyro_svi((model, guide), loader(X))
