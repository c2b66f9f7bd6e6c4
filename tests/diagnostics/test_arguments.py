"""What the diagnostics are called with: the arguments of model and guide, and the names of sites."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.factor_models import N, mean_field_guide, sum_model

from pyro_ilvae.diagnostics import collapse_summary, kl_per_dimension


def test_scalar_sites_and_several_arguments():
    def scalar_model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x + z, 1.0), obs=y)

    def scalar_guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((y - x) / 2, 0.5**0.5))

    x, y = torch.randn(2, N)
    summary = collapse_summary(scalar_model, scalar_guide, (x, y), batch_size=10)
    assert summary.unit.values.tolist() == ["z"]
    expected = dist.Normal(x, 2**0.5).log_prob(y).mean()
    assert float(summary.log_likelihood) == pytest.approx(float(expected), abs=1e-5)


X = torch.linspace(-1.0, 1.0, 5)


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ([1.0], "model_args to be a tensor or a tuple, got list"),
        ((X, [1.0] * 5), r"model_args\[1\] to be a tensor over the 5 data or something that all data share, got list"),
    ],
)
def test_refuses_arguments_of_another_kind(model_args, message):
    with pytest.raises(TypeError, match=message):
        kl_per_dimension(sum_model, mean_field_guide, model_args)
