"""What the conversion of a variational fit takes, leaves as it was and refuses, and what ArviZ does with the result."""

import warnings

import numpy as np
import pyro
import pytest
import torch
from helpers.arviz_groups import SAMPLED, assert_same, az, values
from helpers.plain_pyro_models import (
    Regression,
    conjugate_guide,
    conjugate_model,
    hierarchical_model,
)
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoNormal,
)

from pyro_ilvae.io_pyro import from_pyro_svi

# What may be passed, and what is left as it was


def test_svi_and_pair_agree():
    x = torch.randn(5)
    guide = AutoNormal(conjugate_model)
    svi = SVI(conjugate_model, guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())
    for _ in range(5):
        svi.step(x)
    arguments = {"model_args": (x,), "num_samples": 6, "seed": 2}
    assert_same(from_pyro_svi(svi, **arguments), from_pyro_svi((conjugate_model, guide), **arguments))
    keywords = {"model_kwargs": {"x": x}, "num_samples": 6, "seed": 2}
    assert_same(from_pyro_svi(svi, **arguments), from_pyro_svi(svi, **keywords))
    assert_same(from_pyro_svi(svi, **arguments), from_pyro_svi(svi, x, num_samples=6, seed=2))


def test_functions_bound_methods_and_modules_agree():
    module = Regression()
    x, y = torch.randn(5, 2), torch.randn(5)
    guide = AutoNormal(module.model)
    guide(x, y)
    arguments = {"model_args": (x, y), "num_samples": 6, "samples_per_pass": 1, "seed": 2}
    bound = from_pyro_svi((module.model, guide), **arguments)
    assert_same(bound, from_pyro_svi((module, guide), **arguments))
    assert_same(bound, from_pyro_svi((poutine.scale(module.model, scale=2.0), guide), **arguments))
    module.eval()
    assert_same(bound, from_pyro_svi((lambda *args: module.model(*args), guide), **arguments))
    assert bound["posterior"]["linear.weight"].shape == (1, 6, 1, 2)


@pytest.mark.parametrize("fail", [False, True])
def test_modules_are_left_as_they_were(fail):
    module = Regression()
    module.norm.train()
    module.linear.eval()
    guide = AutoNormal(module)
    arguments = {"model_args": (torch.randn(5, 2), torch.randn(5)), "num_samples": 4}
    from_pyro_svi((module, guide), **arguments)
    modes = [part.training for part in module.modules()]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    dims = {"unknown": ["a"]} if fail else {}
    with pytest.raises(ValueError, match="Expected dims") if fail else warnings.catch_warnings():
        from_pyro_svi((module, guide), dims=dims, **arguments)
    assert [part.training for part in module.modules()] == modes == [True, False, True, True]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_a_guide_first_called_by_the_conversion_can_be_fitted():
    x = torch.tensor([1.0, 2.0, 4.0])
    guide = AutoNormal(conjugate_model)
    from_pyro_svi((conjugate_model, guide), model_args=(x,), num_samples=4, samples_per_pass=3)
    svi = SVI(conjugate_model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    before = guide.median()["mu"].item()
    for _ in range(100):
        svi.step(x)
    assert abs(guide.median()["mu"].item() - 7 / 4) < abs(before - 7 / 4)


@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_a_seed_fixes_the_draws_and_leaves_the_random_state(samples_per_pass):
    x = torch.randn(2, 3, 2)
    guide = AutoNormal(hierarchical_model)
    guide(x)
    arguments = {
        "model_args": (x,),
        "num_samples": 6,
        "samples_per_pass": samples_per_pass,
        "num_importance_samples": 2,
    }
    before = pyro.util.get_rng_state()
    first = from_pyro_svi((hierarchical_model, guide), seed=5, **arguments)
    after = pyro.util.get_rng_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["random"] == after["random"]
    np.testing.assert_array_equal(before["numpy"][1], after["numpy"][1])
    torch.randn(3)
    assert_same(first, from_pyro_svi((hierarchical_model, guide), seed=5, **arguments))
    other = from_pyro_svi((hierarchical_model, guide), seed=6, **arguments)
    assert not np.isin(values(other, "posterior")["scale"], values(first, "posterior")["scale"]).any()


def test_without_a_seed_the_draws_are_those_of_the_global_random_state():
    arguments = {"model_args": (torch.randn(5),), "num_samples": 6}
    fits = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        fits.append(from_pyro_svi((conjugate_model, conjugate_guide), **arguments))
    assert_same(*fits)
    next_fit = from_pyro_svi((conjugate_model, conjugate_guide), **arguments)
    assert not np.isin(values(next_fit, "posterior")["mu"], values(fits[0], "posterior")["mu"]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_dtype_is_that_of_the_draws(dtype, samples_per_pass):
    x = torch.randn(5, dtype=dtype)
    guide = AutoNormal(conjugate_model)
    fit = from_pyro_svi((conjugate_model, guide), model_args=(x,), num_samples=6, samples_per_pass=samples_per_pass)
    expected = np.dtype(str(dtype).removeprefix("torch."))
    for group in [*SAMPLED, "observed_data"]:
        assert {array.dtype for array in values(fit, group).values()} == {expected}


def test_a_run_of_the_model_has_at_most_samples_per_pass_draws():
    sizes = set()

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        sizes.add(mu.numel())
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    from_pyro_svi((model, conjugate_guide), model_args=(torch.zeros(3),), num_samples=10, samples_per_pass=4)
    assert sizes == {1, 2, 4}


@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_no_gradients_are_recorded(samples_per_pass):
    recording = []

    def model(x):
        recording.append(torch.is_grad_enabled())
        conjugate_model(x)

    def guide(x):
        recording.append(torch.is_grad_enabled())
        conjugate_guide(x)

    from_pyro_svi((model, guide), model_args=(torch.zeros(3),), num_samples=6, samples_per_pass=samples_per_pass)
    assert not any(recording)
    assert torch.is_grad_enabled()


def test_groups_can_be_left_out():
    arguments = {"model_args": (torch.randn(5),), "num_samples": 2}
    fit = from_pyro_svi(
        (conjugate_model, conjugate_guide),
        prior=False,
        posterior_predictive=False,
        log_likelihood=False,
        **arguments,
    )
    assert all(group in fit for group in ["posterior", "observed_data"])
    assert not any(group in fit for group in SAMPLED[1:])


# ArviZ


@pytest.fixture
def fitted():
    """The exact posterior of ``conjugate_model``."""
    return from_pyro_svi(
        (conjugate_model, conjugate_guide), model_args=(torch.randn(30),), num_samples=400, samples_per_pass=400
    )


def test_arviz_reads_the_result(fitted):
    kind = "InferenceData" if az.__version__.startswith("0.") else "DataTree"
    assert type(fitted).__name__ == kind
    for group in SAMPLED:
        attributes = fitted[group].attrs
        assert attributes["inference_library"] == "pyro"
        assert attributes["inference_library_version"] == pyro.__version__
        assert "R-hat" in attributes["sample_note"]
    assert "R-hat" in fitted.attrs["sample_note"]


def test_summary(fitted):
    table = az.summary(fitted, round_to="none")
    assert list(table.index) == ["mu"]
    assert table["mean"].item() == pytest.approx(values(fitted, "posterior")["mu"].mean(), rel=1e-4)


def test_loo(fitted):
    result = az.loo(fitted, pointwise=True)
    # Close to the in-sample value, less about one parameter.
    log_likelihood = values(fitted, "log_likelihood")["x"].astype(float)
    in_sample = np.log(np.exp(log_likelihood).mean((0, 1))).sum()
    elpd = getattr(result, "elpd_loo", None) or result.elpd
    assert 0.2 < in_sample - elpd < 3


def test_plot_forest(fitted):
    from matplotlib import pyplot as plt

    az.plot_forest(fitted)
    assert plt.get_fignums()
    plt.close("all")


# Errors


def test_every_latent_site_has_to_be_in_the_guide():
    def model(x):
        conjugate_model(x)
        pyro.sample("kind", dist.Categorical(torch.ones(3)))

    with pytest.raises(ValueError, match=r"Expected the guide to sample every latent .* not marked .* 'kind'"):
        from_pyro_svi((model, conjugate_guide), model_args=(torch.zeros(3),))
    with pytest.raises(ValueError, match=r"Expected the guide to sample every latent site of the model, .* 'mu'"):
        from_pyro_svi((conjugate_model, lambda x: None), model_args=(torch.zeros(3),))


def test_an_improper_prior_can_be_left_out_but_not_drawn_from():
    def model(x):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.positive, (), ()))
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.LogNormal(0.0, 1.0))

    arguments = {"model_args": (torch.tensor(1.0),), "num_samples": 4}
    assert from_pyro_svi((model, guide), prior=False, **arguments)["posterior"]["mu"].shape == (1, 4)
    with pytest.raises(ValueError, match="Expected a model whose sites can be sampled, or prior=False"):
        from_pyro_svi((model, guide), **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_draws_have_to_be_finite(value, samples_per_pass):
    def guide(x):
        pyro.sample("mu", dist.Delta(torch.tensor(value)))

    with pytest.raises(ValueError, match="Expected finite draws at site 'mu' of posterior"):
        from_pyro_svi((conjugate_model, guide), model_args=(torch.zeros(3),), samples_per_pass=samples_per_pass)

    def model(x):
        conjugate_model(x)
        pyro.deterministic("ratio", torch.tensor(value))

    with pytest.raises(ValueError, match="Expected finite draws at site 'ratio' of posterior"):
        from_pyro_svi((model, conjugate_guide), model_args=(torch.zeros(3),), num_samples=2)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_samples": 0}, ValueError, "Expected num_samples"),
        ({"num_samples": True}, ValueError, "Expected num_samples"),
        ({"num_samples": 10.0}, ValueError, "Expected num_samples"),
        ({"samples_per_pass": 0}, ValueError, "Expected samples_per_pass"),
        ({"samples_per_pass": 2.0}, ValueError, "Expected samples_per_pass"),
        ({"model_args": [torch.zeros(3)]}, TypeError, "Expected model_args to be a tensor or a tuple, got list"),
        ({"model_kwargs": [1]}, TypeError, "Expected model_kwargs to be a mapping from names, got list"),
        ({"dims": {"nu": ["a"]}}, ValueError, r"Expected dims for sites among .*got \['nu'\]"),
        ({"dims": {"x": ["a", "b"]}}, ValueError, "Expected dims of site 'x' .*got"),
        ({"dims": {"x": "a"}}, ValueError, "Expected dims of site 'x' .*got"),
        ({"dims": {"x": ["draw"]}}, ValueError, "Expected dims other than chain and draw"),
        ({"constant_data": {"x": [1.0]}}, ValueError, "Expected names in constant_data that no site of the model has"),
        ({"constant_data": {"w": [1.0]}, "dims": {"w": ["a", "b"]}}, ValueError, "Expected dims of constant 'w'.*got"),
        ({"constant_data": {"w": [1.0]}, "dims": {"w": "a"}}, ValueError, "Expected dims of constant 'w'.*got"),
        ({"num_samples": "a"}, ValueError, "Expected num_samples"),
        ({"num_importance_samples": 0}, ValueError, "Expected num_importance_samples"),
        ({"seed": "a"}, ValueError, "Expected seed"),
        ({"prior": 1}, TypeError, "Expected prior to be True or False"),
        ({"posterior_predictive": "no"}, TypeError, "Expected posterior_predictive to be True or False"),
        (
            {"log_likelihood": "marginal"},
            ValueError,
            "Expected log_likelihood to be one of 'integrated', 'conditional'",
        ),
        ({"log_likelihood": 1}, TypeError, "Expected log_likelihood to be True or False"),
        ({"plate": "dat"}, ValueError, r"Expected plate to be one of \['data'\], got 'dat'"),
        ({"plate": 1}, ValueError, r"Expected plate to be one of \['data'\], got 1"),
        ({"coords": {"dta": [1, 2, 3]}}, ValueError, "Expected coords for dimensions among .*got 'dta'"),
        ({"coords": {"data": [1, 2]}}, ValueError, r"Expected coords\['data'\] to be 3 values"),
        ({"coords": {"data": "abc"}}, ValueError, r"Expected coords\['data'\] to be 3 values"),
        ({"coords": {"data": 3}}, ValueError, r"Expected coords\['data'\] to be 3 values"),
        ({"coords": ["data"]}, TypeError, "Expected coords to be a mapping"),
        ({"dims": ["data"]}, TypeError, "Expected dims to be a mapping"),
        ({"dims": {"x": [1]}}, ValueError, "Expected dims of site 'x' to be a list of different names"),
        ({"dims": {"x": None}}, ValueError, "Expected dims of site 'x' to be a list of different names"),
        ({"constant_data": {"w": [1.0]}, "dims": {"w": ["data"]}}, ValueError, "Expected dims of one length .*'data'"),
        ({"constant_data": [1.0]}, TypeError, "Expected constant_data to be a mapping"),
        ({"constant_data": {1: [1.0]}}, TypeError, "Expected constant_data to be a mapping from names"),
        ({"constant_data": {"w": [[1.0], [1.0, 2.0]]}}, TypeError, r"Expected constant_data\['w'\] to be an array"),
        ({"constant_data": {"w": object()}}, TypeError, r"Expected constant_data\['w'\] to be an array"),
        ({"model_args": ()}, TypeError, "Expected model_args and model_kwargs that the model takes, .*'x'"),
        ({"model_kwargs": {"y": 1}}, TypeError, "Expected model_args and model_kwargs that the model takes"),
    ],
)
def test_arguments_are_checked(arguments, error, match):
    with pytest.raises(error, match=match):
        from_pyro_svi((conjugate_model, conjugate_guide), **{"model_args": (torch.zeros(3),), **arguments})


@pytest.mark.parametrize(
    "pair",
    [None, conjugate_model, (conjugate_model,), (conjugate_model, None), [conjugate_model] * 2, (Regression, "a"), SVI],
)
def test_model_and_guide_are_checked(pair):
    with pytest.raises(TypeError, match=r"Expected .*svi_or_pair"):
        from_pyro_svi(pair)
