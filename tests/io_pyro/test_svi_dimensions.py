"""The dimensions and coordinates that the conversion of a variational fit names."""

import numpy as np
import pyro
import pytest
import torch
from helpers.arviz_groups import SAMPLED, values
from helpers.plain_pyro_models import (
    HIERARCHICAL_DIMS,
    hierarchical_model,
)
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import (
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.infer.reparam import LocScaleReparam

from pyro_ilvae.io_pyro import from_pyro_svi


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 3), (3, 3), (2, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("samples_per_pass", [1, 4])
@pytest.mark.parametrize("make_guide", [AutoNormal, AutoMultivariateNormal, AutoNormalMessenger])
def test_dims_are_those_of_the_plates_and_the_event(sizes, samples_per_pass, make_guide):
    x = torch.randn(*sizes, 2)
    guide = make_guide(hierarchical_model)
    arguments = {"num_samples": 6, "samples_per_pass": samples_per_pass, "num_importance_samples": 2}
    if make_guide is AutoMultivariateNormal:  # which draws all sites together
        arguments["log_likelihood"] = "conditional"
    fit = from_pyro_svi((hierarchical_model, guide), model_args=(x,), **arguments)
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
    np.testing.assert_array_equal(values(fit, "observed_data")["x"], x.numpy(force=True))


@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_reparametrized_sites_are_variables_rather_than_data(samples_per_pass):
    def centered(x):
        with pyro.plate("group", len(x)):
            loc = pyro.sample("loc", dist.Normal(1.0, 2.0))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    model = poutine.reparam(centered, {"loc": LocScaleReparam(0.0)})
    fit = from_pyro_svi(
        (model, AutoNormal(model)), model_args=(torch.randn(3),), num_samples=6, samples_per_pass=samples_per_pass
    )
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

    arguments = {"num_samples": 6, "samples_per_pass": samples_per_pass, "log_likelihood": "conditional"}
    fit = from_pyro_svi((model, AutoNormal(model)), model_args=(torch.randn(3, 3),), **arguments)
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


@pytest.mark.parametrize("samples_per_pass", [1, 2, 3, None])
def test_batch_dimensions_outside_plates_are_named(samples_per_pass):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0))
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(1), 1.0))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    x = torch.randn(4, 3)
    fit = from_pyro_svi((model, AutoNormal(model)), x, num_samples=6, samples_per_pass=samples_per_pass)
    assert fit["posterior"]["loc"].dims == ("chain", "draw", "loc_dim_0")
    assert fit["posterior"]["scale"].dims == ("chain", "draw")
    assert fit["log_likelihood"]["x"].dims == ("chain", "draw", "data", "x_dim_0")
    loc, scale = (torch.tensor(values(fit, "posterior")[name]) for name in ["loc", "scale"])
    expected = dist.Normal(loc[:, :, None], scale[..., None, None]).log_prob(x).numpy(force=True)
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-4)


@pytest.mark.parametrize("samples_per_pass", [1, 2, 3, None])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_model_without_plates_keeps_its_batch_dimension(length, samples_per_pass):
    def model():
        loc = pyro.sample("loc", dist.Normal(torch.arange(float(length)), 1e-3))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(length))

    def guide():
        pyro.sample("loc", dist.Normal(torch.arange(float(length)), 1e-3))

    fit = from_pyro_svi((model, guide), num_samples=6, samples_per_pass=samples_per_pass)
    loc = values(fit, "posterior")["loc"].reshape(1, 6, length)
    np.testing.assert_allclose(loc, np.broadcast_to(np.arange(length), (1, 6, length)), atol=0.01)
    expected = dist.Normal(torch.tensor(loc), 1.0).log_prob(torch.zeros(length)).numpy(force=True)
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"].reshape(1, 6, length), expected, rtol=1e-4)


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
    np.testing.assert_array_equal(constants["covariate"], covariate.numpy(force=True))
    assert constants["city"].values.tolist() == ["Ghent", "Lund"]
    assert constants.coords["group"].values.tolist() == ["a", "b"]


@pytest.mark.parametrize("event", [(), (2,)])
def test_a_subsample_that_is_the_data_gives_no_coordinate(event):
    def model(batch):
        with pyro.plate("data", 60, subsample=batch) as x:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(event).to_event(len(event)))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(len(event)), obs=x)

    def guide(batch):
        with pyro.plate("data", 60, subsample=batch) as x:
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(len(event)))

    x = torch.randn(7, *event)
    fit = from_pyro_svi((model, guide), x, num_samples=4, prior=False, seed=0)
    assert fit["posterior"]["z"].dims[2] == "data"
    assert fit["posterior"].sizes["data"] == 7
    if "data" in fit["posterior"].coords:
        assert fit["posterior"].coords["data"].values.tolist() == list(range(7))
