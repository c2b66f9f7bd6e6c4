"""The first call of a module may be a call inside of a transform of torch.func."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from pyro_ilvae import (
    ICNN,
    BiLipschitzMap,
    BrenierMap,
    InverseLipschitzDecoder,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
)

# The first forward derivative loads a part of PyTorch that warns about another part.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")

SIZES = {"latent_dim": 3, "event_shape": 4}


def decoder_of_linear_layers():
    """With a backbone that is no PyroModule."""
    return ProjectedDecoder(nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 4)), **SIZES)


FUNCTIONS = {
    "map": lambda: (module := BrenierMap(3), module),
    "inverse": lambda: (module := BrenierMap(3), module.inverse),
    "jacobian": lambda: (module := BrenierMap(3), lambda z: module.jacobian(z).sum(-1)),
    "potential": lambda: (module := BrenierMap(3), lambda z: module.potential(z).unsqueeze(-1)),
    "bilipschitz map": lambda: (module := BiLipschitzMap(3), module),
    "bilipschitz inverse": lambda: (module := BiLipschitzMap(3), module.inverse),
    "bilipschitz jacobian": lambda: (module := BiLipschitzMap(3), lambda z: module.jacobian(z).sum(-1)),
    "gradient": lambda: (module := ICNN(3), module.gradient),
    "hessian": lambda: (module := ICNN(3), lambda z: module.hessian(z).sum(-1)),
    "composition": lambda: (module := InverseLipschitzDecoder(**SIZES), module),
    "projected": lambda: (module := decoder_of_linear_layers(), module),
    "perceptron": lambda: (module := MLPDecoder(**SIZES), module),
    "encoder": lambda: (module := MLPEncoder(event_shape=3, latent_dim=2), lambda x: module(x)[0]),
}
TRANSFORMS = {
    "vmap": lambda f, z: vmap(f)(z),
    "jacrev": lambda f, z: vmap(jacrev(f))(z),
    "jacfwd": lambda f, z: vmap(jacfwd(f))(z),
    "jvp": lambda f, z: jvp(f, (z,), (z,))[1],
    "grad": lambda f, z: grad(lambda z: f(z).sum())(z),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("local", [False, True])
def test_the_first_call_is_transformed(name, transform, local):
    z = torch.randn(5, 3)
    with pyro.settings.context(module_local_params=local):
        module, function = FUNCTIONS[name]()
        first = TRANSFORMS[transform](function, z)
        store = pyro.get_param_store()
        entered = set(store._params)
        function(z)
        assert set(store._params) == entered  # the names that Pyro gives
        assert local or {id(value) for value in store._params.values()} == {id(p) for p in module.parameters()}
        torch.testing.assert_close(TRANSFORMS[transform](function, z), first)


def test_a_module_that_was_transformed_first_is_trained():
    brenier, x = BrenierMap(3, hidden_features=(8,)), torch.randn(10, 3)
    vmap(jacrev(brenier.inverse))(x)
    before = [parameter.clone() for parameter in brenier.parameters()]

    def model():
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(brenier(x), 1.0).to_event(1), obs=-x)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, brenier.parameters(), strict=True))
