"""Models and guides in plain Pyro, with plates side by side and inside each other, and with modules."""

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule, PyroSample
from torch import nn


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
