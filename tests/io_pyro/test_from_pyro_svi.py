"""Laws of the ArviZ conversion, on models in plain Pyro."""

import warnings

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from torch import nn

from pyro_ilvae.io_pyro import from_pyro_svi

matplotlib.use("Agg")
with warnings.catch_warnings():
    # Once a day ArviZ 0.x announces ArviZ 1 when it is imported.
    warnings.filterwarnings("ignore", "\nArviZ is undergoing a major refactor", FutureWarning)
    import arviz as az

PASSES = [1, 4, 10, 25]  # of 10 draws: one by one, with a remainder, all at once, more than there are
SAMPLED = ["posterior", "posterior_predictive", "log_likelihood", "prior", "prior_predictive"]


def conjugate_model(x):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def conjugate_guide(x):
    """The exact posterior of ``conjugate_model``."""
    precision = 1.0 + len(x)
    pyro.sample("mu", dist.Normal(x.sum() / precision, precision**-0.5))


def hierarchical_model(x):
    """x of shape (groups, data, 2): a global scale, a vector for each group, and a scalar for each datum."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    pyro.deterministic("norm", weight.square().sum((-2, -1)).sqrt())
    pyro.factor("penalty", -weight.square().sum((-2, -1)))
    with pyro.plate("group", x.shape[0], dim=-2):
        loc = pyro.sample("loc", dist.Normal(weight.mean(-2), scale[..., None]).to_event(1))
        pyro.deterministic("length", loc.square().sum(-1))
        with pyro.plate("datum", x.shape[1], dim=-1):
            local = pyro.sample("local", dist.Normal(0.0, scale))
            pyro.deterministic("shifted", loc + local[..., None], event_dim=1)
            pyro.factor("local_penalty", -local.square())
            pyro.sample("x", dist.Normal(loc + local[..., None], 1.0).to_event(1), obs=x)


HIERARCHICAL_DIMS = {
    "scale": (),
    "weight": ("weight_dim_0", "weight_dim_1"),
    "norm": (),
    "loc": ("group", "loc_dim_0"),
    "length": ("group",),
    "local": ("group", "datum"),
    "shifted": ("group", "datum", "shifted_dim_0"),
    "x": ("group", "datum", "x_dim_0"),
}


class Regression(PyroModule):
    """A Bayesian linear map, and two layers that behave differently in training mode."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(0.5)
        self.norm.eval()

    def model(self, x, y):
        mean = self.linear(self.dropout(self.norm(x))).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def forward(self, x, y):
        return self.model(x, y)


def values(fit, group):
    return {name: np.asarray(array) for name, array in fit[group].data_vars.items()}


def assert_same(one, other):
    for group in [*SAMPLED, "observed_data"]:
        first, second = values(one, group), values(other, group)
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


# Values


@pytest.mark.parametrize("samples_per_pass", [1, 300])
def test_draws_have_the_law_of_the_guide_and_of_the_model(samples_per_pass):
    x = torch.tensor([1.0, 2.0, 4.0])
    n = 3000 if samples_per_pass > 1 else 600
    fit = from_pyro_svi(
        (conjugate_model, conjugate_guide), model_args=(x,), num_samples=n, samples_per_pass=samples_per_pass, seed=1
    )
    prior, posterior = (0.0, 1.0), (7 / 4, 1 / 4)
    for group, (mean, variance) in {
        "posterior": posterior,
        "prior": prior,
        "posterior_predictive": (posterior[0], posterior[1] + 1.0),
        "prior_predictive": (prior[0], prior[1] + 1.0),
    }.items():
        for draws in np.moveaxis(np.atleast_3d(next(iter(values(fit, group).values()))), -1, 0):
            assert abs(draws.mean() - mean) < 5 * (variance / n) ** 0.5
            assert abs(draws.var() - variance) < 5 * variance * (2 / n) ** 0.5


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_log_likelihood_is_that_of_each_draw_and_datum(samples_per_pass):
    x = torch.randn(5)
    fit = from_pyro_svi((conjugate_model, conjugate_guide), model_args=(x,), num_samples=10, samples_per_pass=samples_per_pass)
    mu = torch.tensor(values(fit, "posterior")["mu"])
    expected = dist.Normal(mu[..., None], 1.0).log_prob(x)
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-5)


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_predictive_draws_follow_their_own_latent_draw(samples_per_pass):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1e-6), obs=x)

    x = torch.zeros(3)
    fit = from_pyro_svi((model, conjugate_guide), model_args=(x,), num_samples=10, samples_per_pass=samples_per_pass)
    for latent, predictive in [("posterior", "posterior_predictive"), ("prior", "prior_predictive")]:
        mu = values(fit, latent)["mu"]
        assert len(np.unique(mu)) == 10
        np.testing.assert_allclose(values(fit, predictive)["x"], np.broadcast_to(mu[..., None], (1, 10, 3)), atol=1e-4)


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_deterministic_sites_are_those_of_their_draw(samples_per_pass):
    x = torch.randn(2, 3, 2)
    guide = AutoNormal(hierarchical_model)
    fit = from_pyro_svi((hierarchical_model, guide), model_args=(x,), num_samples=10, samples_per_pass=samples_per_pass)
    for group in ["posterior", "prior"]:
        draws = values(fit, group)
        np.testing.assert_allclose(draws["norm"], np.sqrt(np.square(draws["weight"]).sum((-2, -1))), rtol=1e-5)
        shifted = draws["loc"][:, :, :, None] + draws["local"][..., None]
        np.testing.assert_allclose(draws["shifted"], shifted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_vector_events_are_summed_out_of_the_log_likelihood(samples_per_pass):
    x = torch.randn(2, 3, 2)
    guide = AutoNormal(hierarchical_model)
    fit = from_pyro_svi((hierarchical_model, guide), model_args=(x,), num_samples=10, samples_per_pass=samples_per_pass)
    shifted = torch.tensor(values(fit, "posterior")["shifted"])
    expected = dist.Normal(shifted, 1.0).log_prob(x).sum(-1)
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-4)


@pytest.mark.parametrize("samples_per_pass", PASSES)
@pytest.mark.parametrize("scaled", [poutine.scale(scale=0.1), poutine.scale(scale=torch.tensor(7.0))])
def test_log_likelihood_ignores_scales(samples_per_pass, scaled):
    x = torch.randn(5)
    arguments = {"model_args": (x,), "num_samples": 10, "samples_per_pass": samples_per_pass, "seed": 3}
    plain = from_pyro_svi((conjugate_model, conjugate_guide), **arguments)
    annealed = from_pyro_svi((scaled(conjugate_model), scaled(conjugate_guide)), **arguments)
    assert_same(plain, annealed)


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_masked_elements_have_no_log_likelihood(samples_per_pass):
    mask = torch.tensor([True, False, True])

    def model(x):
        with poutine.mask(mask=mask):
            conjugate_model(x)

    arguments = {"model_args": (torch.randn(3),), "num_samples": 10, "samples_per_pass": samples_per_pass, "seed": 0}
    plain = values(from_pyro_svi((conjugate_model, conjugate_guide), **arguments), "log_likelihood")["x"]
    masked = values(from_pyro_svi((model, conjugate_guide), **arguments), "log_likelihood")["x"]
    np.testing.assert_array_equal(masked, np.where(mask, plain, 0.0))


def test_observed_data_is_a_copy_of_the_data():
    x = torch.randn(5)
    fit = from_pyro_svi((conjugate_model, conjugate_guide), model_args=(x,), num_samples=2)
    expected = x.numpy().copy()
    x.zero_()
    np.testing.assert_array_equal(values(fit, "observed_data")["x"], expected)


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_draws_of_a_point_estimate_are_copies_of_it(samples_per_pass):
    guide = AutoDelta(conjugate_model)
    fit = from_pyro_svi((conjugate_model, guide), model_args=(torch.ones(3),), num_samples=10, samples_per_pass=samples_per_pass)
    expected = guide.median()["mu"].item()
    with torch.no_grad():
        guide.mu.add_(1.0)
    assert np.unique(values(fit, "posterior")["mu"]).tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_discrete_observations(samples_per_pass):
    def model(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(x)):
            pyro.sample("count", dist.Poisson(rate), obs=x)
            pyro.sample("kind", dist.Categorical(probs), obs=x.long() % 3)

    x = torch.tensor([0.0, 1.0, 2.0, 7.0])
    guide = AutoMultivariateNormal(model)
    fit = from_pyro_svi((model, guide), model_args=(x,), num_samples=10, samples_per_pass=samples_per_pass)
    draws = values(fit, "posterior")
    counts, kinds = values(fit, "posterior_predictive")["count"], values(fit, "posterior_predictive")["kind"]
    assert kinds.dtype == np.int64
    assert set(np.unique(kinds)) <= {0, 1, 2}
    np.testing.assert_array_equal(counts, counts.round())
    expected = np.log(draws["probs"])[..., x.long() % 3]
    np.testing.assert_allclose(values(fit, "log_likelihood")["kind"], expected, rtol=1e-4)


# Dimensions


@pytest.mark.parametrize("sizes", [(2, 3), (3, 3), (2, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("samples_per_pass", [1, 4])
@pytest.mark.parametrize("make_guide", [AutoNormal, AutoMultivariateNormal, AutoNormalMessenger])
def test_dims_are_those_of_the_plates_and_the_event(sizes, samples_per_pass, make_guide):
    x = torch.randn(*sizes, 2)
    guide = make_guide(hierarchical_model)
    fit = from_pyro_svi((hierarchical_model, guide), model_args=(x,), num_samples=6, samples_per_pass=samples_per_pass)
    lengths = {"group": sizes[0], "datum": sizes[1], "weight_dim_0": 3}
    for group in SAMPLED:
        for name, array in fit[group].data_vars.items():
            dims = ("group", "datum") if group == "log_likelihood" else HIERARCHICAL_DIMS[name]
            assert array.dims == ("chain", "draw", *dims)
            assert array.shape == (1, 6, *(lengths.get(dim, 2) for dim in dims))
    assert set(fit["posterior"].data_vars) == set(fit["prior"].data_vars) == set(HIERARCHICAL_DIMS) - {"x"}
    for group in ["posterior_predictive", "prior_predictive", "log_likelihood", "observed_data"]:
        assert list(fit[group].data_vars) == ["x"]
    assert fit["observed_data"]["x"].dims == HIERARCHICAL_DIMS["x"]
    np.testing.assert_array_equal(values(fit, "observed_data")["x"], x)


@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_reparametrized_sites_are_variables_rather_than_data(samples_per_pass):
    def centered(x):
        with pyro.plate("group", len(x)):
            loc = pyro.sample("loc", dist.Normal(1.0, 2.0))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    model = poutine.reparam(centered, {"loc": LocScaleReparam(0.0)})
    fit = from_pyro_svi((model, AutoNormal(model)), model_args=(torch.randn(3),), num_samples=6, samples_per_pass=samples_per_pass)
    assert set(fit["posterior"].data_vars) == set(fit["prior"].data_vars) == {"loc", "loc_decentered"}
    assert list(fit["observed_data"].data_vars) == list(fit["prior_predictive"].data_vars) == ["x"]
    for group in ["posterior", "prior"]:
        draws = values(fit, group)
        np.testing.assert_allclose(draws["loc"], 1 + 2 * draws["loc_decentered"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_plates_side_by_side_keep_their_names(samples_per_pass):
    def model(x):
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            row = pyro.sample("row", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * row)
        with columns:
            column = pyro.sample("column", dist.Normal(0.0, 1.0))
        with rows, columns:
            pyro.deterministic("total", row + column)
            pyro.deterministic("of_columns", 3 * column)
            pyro.sample("x", dist.Normal(row - column, 1.0), obs=x)

    fit = from_pyro_svi(
        (model, AutoNormal(model)), model_args=(torch.randn(3, 3),), num_samples=6, samples_per_pass=samples_per_pass
    )
    draws = fit["posterior"]
    assert draws["row"].dims == draws["twice"].dims == ("chain", "draw", "rows")
    assert draws["column"].dims == ("chain", "draw", "columns")
    assert draws["total"].dims == draws["of_columns"].dims == ("chain", "draw", "rows", "columns")
    # The sums are by name, so that rows and columns of one size cannot be taken for each other.
    np.testing.assert_allclose(draws["total"], draws["row"] + draws["column"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(draws["of_columns"].isel(rows=1), 3 * draws["column"], rtol=1e-5)
    np.testing.assert_allclose(draws["twice"], 2 * draws["row"], rtol=1e-5)


@pytest.mark.parametrize("samples_per_pass", [1, 4])
@pytest.mark.parametrize("plate_size", [2, 3])
def test_deterministic_vectors_in_a_plate(plate_size, samples_per_pass):
    def model(x):
        with pyro.plate("data", plate_size):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.deterministic("default", z + 1)
            pyro.deterministic("declared", z + 1, event_dim=1)
            pyro.deterministic("constant", torch.arange(3.0), event_dim=1)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        pyro.deterministic("table", torch.eye(4))

    fit = from_pyro_svi(
        (model, AutoNormal(model)),
        model_args=(torch.zeros(plate_size, 3),),
        num_samples=6,
        samples_per_pass=samples_per_pass,
    )
    for name in ["default", "declared"]:
        assert fit["posterior"][name].dims == ("chain", "draw", "data", f"{name}_dim_0")
        np.testing.assert_array_equal(values(fit, "posterior")[name], values(fit, "posterior")["z"] + 1)
    assert fit["posterior"]["table"].dims == ("chain", "draw", "table_dim_0", "table_dim_1")
    if plate_size != 3:  # where a constant vector could also be a number for each element of the plate
        assert fit["posterior"]["constant"].dims == ("chain", "draw", "data", "constant_dim_0")


def test_batch_dimensions_outside_plates_are_named_or_refused():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    arguments = {"model_args": (torch.zeros(4, 3),), "num_samples": 6}
    fit = from_pyro_svi((model, AutoNormal(model)), **arguments)
    assert fit["posterior"]["loc"].dims == ("chain", "draw", "loc_dim_0")
    assert fit["log_likelihood"]["x"].dims == ("chain", "draw", "data", "x_dim_0")
    with pytest.raises(ValueError, match=r"Expected every batch dimension of site 'loc' .* got batch shape"):
        from_pyro_svi((model, AutoNormal(model)), samples_per_pass=2, **arguments)


def test_sequential_plates_leave_no_dimension():
    def model(x):
        for n in pyro.plate("step", len(x)):
            z = pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{n}", dist.Normal(z, 1.0), obs=x[n])

    def guide(x):
        for n in pyro.plate("step", len(x)):
            pyro.sample(f"z_{n}", dist.Normal(x[n] / 2, 0.7))

    fit = from_pyro_svi((model, guide), model_args=(torch.zeros(2),), num_samples=6, samples_per_pass=4)
    assert fit["posterior"]["z_1"].dims == fit["log_likelihood"]["x_1"].dims == ("chain", "draw")
    assert "step" not in fit["posterior"].coords


def test_dims_and_coords_override():
    x = torch.randn(2, 3, 2)
    arguments = {"model_args": (x,), "num_samples": 6, "samples_per_pass": 6}
    fit = from_pyro_svi(
        (hierarchical_model, AutoNormal(hierarchical_model)),
        dims={"loc": ["axis"], "x": ["clinic", "patient", "axis"]},
        coords={"axis": ["east", "north"], "group": [7, 9]},
        **arguments,
    )
    assert fit["posterior"]["loc"].dims == ("chain", "draw", "group", "axis")
    assert fit["posterior"].coords["axis"].values.tolist() == ["east", "north"]
    assert fit["posterior"].coords["group"].values.tolist() == [7, 9]
    assert fit["log_likelihood"]["x"].dims == ("chain", "draw", "clinic", "patient")
    assert fit["observed_data"]["x"].dims == ("clinic", "patient", "axis")


def test_constant_data_and_its_dimensions():
    x = torch.randn(2, 3, 2)
    covariate = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    fit = from_pyro_svi(
        (hierarchical_model, AutoNormal(hierarchical_model)),
        model_args=(x,),
        num_samples=4,
        constant_data={"covariate": covariate, "city": ["Ghent", "Lund"]},
        dims={"covariate": ["group", "axis"]},
        coords={"group": ["a", "b"]},
    )
    constants = fit["constant_data"]
    assert {name: constants[name].dims for name in constants.data_vars} == {
        "covariate": ("group", "axis"),
        "city": ("city_dim_0",),
    }
    assert constants["covariate"].dtype == np.float64
    np.testing.assert_array_equal(constants["covariate"], covariate.detach())
    assert constants["city"].values.tolist() == ["Ghent", "Lund"]
    assert constants.coords["group"].values.tolist() == ["a", "b"]


# Subsampling


def subsampled(**plate):
    data = torch.linspace(-1.0, 1.0, 100)

    def model(x=data):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, **plate) as index:
            local = pyro.sample("local", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(local, 1.0), obs=x[index])

    return model, data


@pytest.mark.parametrize("samples_per_pass", [1, 4])
@pytest.mark.parametrize("plate", [{"subsample_size": 5}, {"subsample": torch.tensor([40, 7, 99])}, {}])
@pytest.mark.parametrize("make_guide", [AutoNormal, AutoDelta])
def test_subsampled_plates_are_held_at_the_indices_of_their_coordinate(plate, make_guide, samples_per_pass):
    model, data = subsampled(**plate)
    guide = make_guide(model)
    guide()
    locs = torch.randn(100)  # the guide has a parameter for each of the 100 data
    with torch.no_grad():
        next(value for name, value in guide.named_parameters() if "local" in name).copy_(locs)
    fit = from_pyro_svi((model, guide), num_samples=6, samples_per_pass=samples_per_pass)
    index = torch.tensor(fit["posterior"].coords["data"].values)
    if "subsample" in plate:
        np.testing.assert_array_equal(index, plate["subsample"])
    else:
        np.testing.assert_array_equal(index, np.arange(plate.get("subsample_size", 100)))
    np.testing.assert_array_equal(values(fit, "observed_data")["x"], data[index])
    local = torch.tensor(values(fit, "posterior")["local"])
    np.testing.assert_allclose(
        values(fit, "log_likelihood")["x"], dist.Normal(local, 1.0).log_prob(data[index]), rtol=1e-5
    )
    np.testing.assert_allclose(local[0].mean(0), locs[index], atol=1e-6 if make_guide is AutoDelta else 0.25)


def test_a_minibatch_in_a_plate_of_the_size_of_the_data():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.randn(4)
    fit = from_pyro_svi((model, AutoNormal(model)), model_args=(x,), num_samples=6, samples_per_pass=4)
    loc = torch.tensor(values(fit, "posterior")["loc"])[..., None]
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], dist.Normal(loc, 1.0).log_prob(x), rtol=1e-5)
    np.testing.assert_array_equal(values(fit, "observed_data")["x"], x)


# Sites that inference enumerates


def z_scores(difference, variance):
    """The mean over draws (axes 0 and 1) of what has mean 0 and a known variance for each draw, in standard errors."""
    return difference.sum((0, 1)) / np.sqrt(variance.sum((0, 1)))


@config_enumerate
def mixture_model(x):
    """A shifted mixture of N(shift, 1) and N(shift + 2, 1), whose indicator is enumerated, and a coin without data."""
    shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("coin", dist.Bernoulli(0.4))
        loc = pyro.deterministic("loc", shift + 2.0 * kind)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def mixture_guide(x):
    pyro.sample("shift", dist.Normal(0.5, 1.5))


@pytest.mark.parametrize("samples_per_pass", [1, 60, 1500])
def test_enumerated_sites_are_drawn_given_the_draw_of_the_guide_and_the_data(samples_per_pass):
    x = torch.tensor([0.0, 1.0, 4.0])
    n = 1500 if samples_per_pass > 1 else 50
    fit = from_pyro_svi((mixture_model, mixture_guide), model_args=(x,), num_samples=n, samples_per_pass=samples_per_pass)
    draws = values(fit, "posterior")
    shift = torch.tensor(draws["shift"])[..., None]
    weights = torch.stack(
        [0.3 * dist.Normal(shift, 1.0).log_prob(x).exp(), 0.7 * dist.Normal(shift + 2, 1.0).log_prob(x).exp()]
    )
    probs = (weights[1] / weights.sum(0)).numpy()
    variance = probs * (1 - probs)
    assert (abs(z_scores(draws["kind"] - probs, variance)) < 5).all()
    # The indicators follow the shift of their own draw.
    assert (abs(z_scores((draws["kind"] - probs) * shift.numpy(), variance * shift.numpy() ** 2)) < 5).all()
    # What has no data under it keeps its prior, on its own for each datum and draw.
    coins = draws["coin"]
    assert (abs(z_scores(coins - 0.4, np.full_like(coins, 0.24))) < 5).all()
    products = (coins[..., [0, 1, 2]] - 0.4) * (coins[..., [1, 2, 0]] - 0.4)
    assert (abs(z_scores(products, np.full_like(products, 0.24**2))) < 5).all()


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_log_likelihood_and_predictions_are_given_the_enumerated_sites(samples_per_pass):
    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.ones(4)))
            loc = pyro.deterministic("loc", 10.0 * kind)
            pyro.sample("x", dist.Normal(loc, 0.1 + kind), obs=x)

    x = torch.tensor([0.0, 9.0, 31.0])
    arguments = {"model_args": (x,), "num_samples": 10, "samples_per_pass": samples_per_pass, "seed": 1}
    fit = from_pyro_svi((model, lambda x: None), **arguments)
    for group, predictive in [("posterior", "posterior_predictive"), ("prior", "prior_predictive")]:
        kind = fit[group]["kind"]
        assert kind.dims == ("chain", "draw", "data")
        assert kind.dtype == np.int64
        np.testing.assert_array_equal(fit[group]["loc"], 10.0 * kind)
        assert (abs(fit[predictive]["x"] - 10.0 * kind) < 6 * (0.1 + kind)).all()
    kind = torch.tensor(values(fit, "posterior")["kind"])
    expected = dist.Normal(10.0 * kind, 0.1 + kind).log_prob(x)
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-4)
    assert len(np.unique(values(fit, "prior")["kind"])) > 2
    assert_same(fit, from_pyro_svi((model, lambda x: None), **arguments))


@pytest.mark.parametrize("samples_per_pass", [1, 500])
def test_paths_of_a_hidden_markov_model_have_their_posterior(samples_per_pass):
    step = torch.tensor([[0.8, 0.2], [0.3, 0.7]])

    def model(x):
        state = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            state = pyro.sample(f"state_{t}", dist.Categorical(step[state]), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Normal(2.0 * state, 1.0), obs=x[t])

    x = torch.tensor([0.5, 2.0, 1.0])
    n = 1500 if samples_per_pass > 1 else 50
    fit = from_pyro_svi((model, lambda x: None), model_args=(x,), num_samples=n, samples_per_pass=samples_per_pass, prior=False)
    paths = torch.cartesian_prod(*[torch.arange(2)] * 3)
    joint = step[0, paths[:, 0]] * step[paths[:, 0], paths[:, 1]] * step[paths[:, 1], paths[:, 2]]
    joint = joint * dist.Normal(2.0 * paths, 1.0).log_prob(x).sum(-1).exp()
    expected = (joint / joint.sum()).numpy()
    draws = values(fit, "posterior")
    drawn = np.stack([draws[f"state_{t}"] for t in range(3)], -1)[..., None, :] == paths.numpy()
    assert (abs(z_scores(drawn.all(-1) - expected, np.broadcast_to(expected * (1 - expected), (1, n, 8)))) < 5).all()


@pytest.mark.parametrize("samples_per_pass", [1, 1500])
def test_global_and_local_enumerated_sites_and_what_the_guide_draws_below_them(samples_per_pass):
    """regime -> kind[n] -> z[n] -> x[n], of which the guide draws z."""
    z = torch.tensor([0.2, 1.5])

    @config_enumerate
    def model(x):
        regime = pyro.sample("regime", dist.Bernoulli(0.4))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.2 + 0.6 * regime))
            local = pyro.sample("z", dist.Normal(2.0 * kind, 1.0))
            pyro.sample("x", dist.Normal(local, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z))

    n = 1500 if samples_per_pass > 1 else 50
    fit = from_pyro_svi((model, guide), model_args=(torch.zeros(2),), num_samples=n, samples_per_pass=samples_per_pass)
    states = torch.cartesian_prod(*[torch.arange(2.0)] * 3)
    joint = dist.Bernoulli(0.4).log_prob(states[:, 0]) + dist.Bernoulli(0.2 + 0.6 * states[:, :1]).log_prob(
        states[:, 1:]
    ).sum(-1)
    joint = (joint + dist.Normal(2.0 * states[:, 1:], 1.0).log_prob(z).sum(-1)).exp()
    expected = (joint / joint.sum()).numpy()
    draws = values(fit, "posterior")
    drawn = np.concatenate([draws["regime"][..., None], draws["kind"]], -1)[..., None, :] == states.numpy()
    assert fit["posterior"]["regime"].dims == ("chain", "draw")
    assert (abs(z_scores(drawn.all(-1) - expected, np.broadcast_to(expected * (1 - expected), (1, n, 8)))) < 5).all()


@pytest.mark.parametrize("samples_per_pass", [1, 500])
def test_sites_enumerated_in_the_guide_are_drawn_from_it(samples_per_pass):
    @config_enumerate
    def guide(x):
        pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Categorical(torch.tensor([0.9, 0.1])))
            pyro.sample("coin", dist.Bernoulli(0.5))

    n = 500 if samples_per_pass > 1 else 50
    x = torch.tensor([2.0, 6.0])  # whose posterior would be another
    fit = from_pyro_svi((mixture_model, guide), model_args=(x,), num_samples=n, samples_per_pass=samples_per_pass)
    kind = values(fit, "posterior")["kind"]
    assert (abs(z_scores(kind - 0.1, np.full(kind.shape, 0.09))) < 5).all()


@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_enumerated_mixture_fitted_with_automatic_guides(samples_per_pass):
    @config_enumerate
    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("component", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(Vindex(loc.unsqueeze(-2))[..., kind], 1.0), obs=x)

    x = torch.tensor([-3.0, 3.0, 2.5, -2.0])
    continuous = AutoNormal(poutine.block(model, hide=["kind"]))
    both = AutoGuideList(model)
    both.append(AutoNormal(poutine.block(model, hide=["kind"])))
    both.append(AutoDiscreteParallel(poutine.block(model, expose=["kind"])))
    for guide in [continuous, both]:
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1))
        svi.step(x)
        fit = from_pyro_svi(svi, model_args=(x,), num_samples=4, samples_per_pass=samples_per_pass)
        assert fit["posterior"]["loc"].dims == ("chain", "draw", "component")
        assert fit["posterior"]["kind"].dims == ("chain", "draw", "data")
        draws = {name: torch.tensor(value) for name, value in values(fit, "posterior").items()}
        expected = dist.Normal(draws["loc"].gather(-1, draws["kind"]), 1.0).log_prob(x)
        np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-4)


@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_enumerated_sites_of_a_minibatch(samples_per_pass):
    data = torch.linspace(-20.0, 20.0, 100)

    @config_enumerate
    def model():
        with pyro.plate("data", 100, subsample_size=5) as index:
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(40.0 * kind - 20.0, 0.1), obs=data[index])

    fit = from_pyro_svi((model, lambda: None), num_samples=8, samples_per_pass=samples_per_pass)
    assert fit["posterior"].coords["data"].values.tolist() == [0, 1, 2, 3, 4]
    assert (values(fit, "posterior")["kind"] == 0).all()


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
    arguments = {"model_args": (x,), "num_samples": 6, "samples_per_pass": samples_per_pass}
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


def test_a_model_that_mixes_its_batch_dimensions_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.deterministic("all", z.reshape(-1))

    arguments = {"model_args": (torch.zeros(3),), "num_samples": 4}
    assert from_pyro_svi((model, AutoNormal(model)), **arguments)["posterior"]["all"].shape == (1, 4, 3)
    with pytest.raises(ValueError, match=r"Expected values of shape .* of site 'all'.*samples_per_pass=1"):
        from_pyro_svi((model, AutoNormal(model)), samples_per_pass=2, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_samples": 0}, ValueError, "Expected num_samples"),
        ({"num_samples": True}, ValueError, "Expected num_samples"),
        ({"num_samples": 10.0}, ValueError, "Expected num_samples"),
        ({"samples_per_pass": 0}, ValueError, "Expected samples_per_pass"),
        ({"samples_per_pass": None}, ValueError, "Expected samples_per_pass"),
        ({"model_args": torch.zeros(3)}, TypeError, "Expected model_args to be a tuple, got Tensor"),
        ({"dims": {"nu": ["a"]}}, ValueError, r"Expected dims for sites among .*got \['nu'\]"),
        ({"dims": {"x": ["a", "b"]}}, ValueError, "Expected dims of site 'x' .*got"),
        ({"dims": {"x": "a"}}, ValueError, "Expected dims of site 'x' .*got"),
        ({"dims": {"x": ["draw"]}}, ValueError, "Expected dims other than chain and draw"),
        ({"constant_data": {"x": [1.0]}}, ValueError, "Expected names in constant_data that no site of the model has"),
        ({"constant_data": {"w": [1.0]}, "dims": {"w": ["a", "b"]}}, ValueError, "Expected dims of constant 'w'.*got"),
        ({"constant_data": {"w": [1.0]}, "dims": {"w": "a"}}, ValueError, "Expected dims of constant 'w'.*got"),
    ],
)
def test_arguments_are_checked(arguments, error, match):
    with pytest.raises(error, match=match):
        from_pyro_svi((conjugate_model, conjugate_guide), **{"model_args": (torch.zeros(3),), **arguments})


@pytest.mark.parametrize("pair", [None, conjugate_model, (conjugate_model,), (conjugate_model, None)])
def test_model_and_guide_are_checked(pair):
    with pytest.raises(TypeError, match="Expected an SVI object or a"):
        from_pyro_svi(pair)
