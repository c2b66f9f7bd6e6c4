"""Active units, by a guide and by draws, against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_within
from helpers.factor_models import LOADING, SCALE, N, global_guide, global_model, mean_field_guide, sum_model
from helpers.latent_structures import chain_guide, chain_model, reversed_chain_guide, scalar_guide, scalar_model
from torch.distributions import Normal

from pyro_ilvae.diagnostics import active_units, active_units_of_draws


@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_active_units(batch_size):
    x = torch.randn(N)
    units = active_units(sum_model, mean_field_guide, x, batch_size=batch_size)
    torch.testing.assert_close(units.variances, LOADING**2 * x.var())
    assert units.active.tolist() == [True, True, False]
    assert units.num_active == 2
    assert active_units(sum_model, mean_field_guide, x, threshold=1.0).active.tolist() == [True, False, False]


def test_active_units_by_draws_where_the_mean_has_no_formula():
    def flow_guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[:, None] * LOADING, SCALE).to_event(1)
            transform = dist.transforms.AffineTransform(0.0, 2.0, event_dim=1)
            pyro.sample("z", dist.TransformedDistribution(base, [transform]))

    x = torch.randn(N)
    units = active_units(sum_model, flow_guide, x, num_samples=2000)
    torch.testing.assert_close(units.variances, 4 * LOADING**2 * x.var(), rtol=0.03, atol=5e-3)


def test_active_units_of_draws():
    means = torch.randn(200, 3) * torch.tensor([1.0, 0.3, 0.0])
    draws = means + torch.randn(50, 200, 3)
    units = active_units_of_draws(draws)
    # Without the correction the sampling of the means alone, 1 / 50, would pass the threshold.
    assert draws.mean(0).var(0)[2] > 0.01
    assert ((units.variances - means.var(0)).abs() < 5 * (units.standard_errors + 0.002)).all()
    assert units.active.tolist() == [True, True, False]
    assert active_units_of_draws(torch.ones(1, 4, 2)).variances.tolist() == [0.0, 0.0]


def test_standard_errors_of_the_variances():
    x = torch.randn(400, 500)
    units = [active_units_of_draws(batch[None, :, None]) for batch in x]
    variances = torch.stack([unit.variances for unit in units])
    errors = torch.stack([unit.standard_errors for unit in units])
    assert float(errors.mean() / variances.std()) == pytest.approx(1.0, abs=0.2)


X = torch.linspace(-1.0, 1.0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: active_units(global_model, global_guide, X, site="a"), "site 'a' in a plate over the 5 data"),
        (lambda: active_units(sum_model, mean_field_guide, X[:1]), "at least two data"),
        (lambda: active_units(sum_model, mean_field_guide, X, threshold=-1.0), "threshold"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_two_data_say_nothing_about_the_error_of_their_variance():
    units = active_units(scalar_model, scalar_guide, torch.tensor([0.0, 1.0]))
    assert units.variances.item() == pytest.approx(0.08)
    assert units.standard_errors.isnan().all()


def test_active_units_are_of_the_data_set_and_not_of_its_batches():
    x = torch.arange(12.0)  # sorted, so that the means move between batches
    within = torch.stack([batch.var() for batch in x.split(4)]).mean() * 0.16
    units = active_units(scalar_model, scalar_guide, x, batch_size=4)
    torch.testing.assert_close(units.variances, 0.16 * x.var())
    assert units.variances > 5 * within


def test_units_of_draws_are_those_of_the_guide():
    x = torch.randn(40)
    draws = Normal(0.4 * x, 0.8).sample((3000,))
    of_draws, of_guide = active_units_of_draws(draws), active_units(scalar_model, scalar_guide, x)
    assert abs(of_draws.variances - of_guide.variances) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("guide", [chain_guide, reversed_chain_guide])
def test_standard_errors_of_active_units(guide):
    def call(seed):
        x = torch.randn(300, generator=torch.Generator(torch.get_default_device()).manual_seed(seed))
        units = active_units(chain_model, guide, x, site="z1", num_samples=10)
        return units.variances, units.standard_errors

    variances, errors = zip(*(call(seed) for seed in range(100)), strict=True)
    spread = torch.stack(variances).std()
    assert abs(float(torch.stack(errors).mean() / spread) - 1) < 0.3
    exact = (0.62 if guide is chain_guide else 0.5) ** 2
    assert_within(torch.stack(variances).mean(), torch.tensor(exact), spread / 10)
