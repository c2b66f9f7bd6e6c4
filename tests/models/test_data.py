"""What the models take as data: tensors, what converts to one without loss, and iterables of batches."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from helpers.decoders import EVENT, LATENT, perturb
from helpers.models import NUM_DATA, ONE_OF_EACH, TOKENS, X, mixture_with, vae_with
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, likelihoods

EVERY_MODEL = pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=ONE_OF_EACH.keys())
METHODS = {
    "encode": lambda model, x: torch.stack(model.encode(x)),
    "reconstruct": lambda model, x: model.reconstruct(x),
    "predict_component": lambda model, x: model.predict_component(x, seed=0),
    "initialize_components": lambda model, x: model.initialize_components(x, seed=0),
    "log density": lambda model, x: (
        poutine.trace(poutine.condition(model.model, {"z": torch.zeros(NUM_DATA, LATENT)}))
        .get_trace(x)
        .nodes["x"]["fn"]
        .log_prob(model._checked(x))
    ),
}


def of_methods(case, *, without=()):
    """A model, and those of the methods that it has."""
    model = perturb(case.build())
    if case is ONE_OF_EACH["mixture-components"]:
        without = (*without, "initialize_components")
    return model, [name for name in METHODS if name not in without and (hasattr(model, name) or name == "log density")]


CONVERTED = {
    "array": lambda x: x.numpy(),
    "lists": lambda x: x.tolist(),
    "other byte order": lambda x: x.numpy().astype(x.numpy().dtype.newbyteorder()),
    "backwards": lambda x: np.ascontiguousarray(x.numpy()[::-1])[::-1],
    "read-only": lambda x: np.broadcast_to(x.numpy(), x.shape),
    "int32 or float64": lambda x: x.int() if x.dtype == torch.long else x.double(),
}


@EVERY_MODEL
@pytest.mark.parametrize("convert", CONVERTED.values(), ids=CONVERTED.keys())
def test_what_converts_without_loss_is_taken_as_the_tensor(case, convert):
    model, names = of_methods(case)
    for name in names:
        pyro.set_rng_seed(0)
        expected = METHODS[name](model, case.x)
        pyro.set_rng_seed(0)
        assert torch.equal(METHODS[name](model, convert(case.x)), expected), name


@pytest.mark.parametrize("likelihood", [likelihoods.Poisson(), likelihoods.NegativeBinomial(), likelihoods.Normal()])
def test_counts_of_any_dtype_are_the_same_data(likelihood):
    counts = torch.randint(1000, (20, 8))
    encoder = MLPEncoder(event_shape=8, latent_dim=2, hidden_features=(8,), input_transform=torch.log1p)
    vae = VAE(MLPDecoder(latent_dim=2, event_shape=8), encoder, likelihood)
    expected = vae.encode(counts.float())[0]
    frame = pd.DataFrame(counts.double().numpy(), columns=list("abcdefgh"))
    for x in (counts, counts.double(), counts.short(), counts.double().numpy(), frame, frame.astype("uint16")):
        assert torch.equal(vae.encode(x)[0], expected)
        assert vae.guide(x).shape == (20, 2)
        assert torch.equal(vae.model(x), counts.float())


def loaders(x):
    labels = torch.arange(len(x))
    return {
        "loader": DataLoader(TensorDataset(x), batch_size=5),
        "labels": DataLoader(TensorDataset(x, labels), batch_size=5),
        "tensors": DataLoader(x, batch_size=5),
        "list": list(x.split(5)),
        "tuple": x.split(4),
        "generator": (batch for batch in x.split(5)),
        "arrays": (batch.numpy() for batch in x.split(5)),
        "one": [x],
    }


@EVERY_MODEL
@pytest.mark.parametrize("kind", loaders(X).keys())
@pytest.mark.parametrize("batch_size", [None, 3])
def test_batches_give_what_all_data_give(case, kind, batch_size):
    model, names = of_methods(case, without=("log density", "predict_component"))
    for name in names:
        expected = getattr(model, name)(case.x, **({"seed": 0} if name == "initialize_components" else {}))
        options = {"seed": 0} if name == "initialize_components" else {}
        found = getattr(model, name)(loaders(case.x)[kind], batch_size, **options)
        for some, other in zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, expected)), strict=True):
            torch.testing.assert_close(some, other, rtol=1e-4, atol=1e-5)


def test_component_probabilities_of_batches():
    mixture = perturb(mixture_with("factor"))
    torch.testing.assert_close(mixture.predict_component(DataLoader(X, 5)), mixture.predict_component(X))


@pytest.mark.parametrize("method", ["encode", "reconstruct"])
def test_batches_are_treated_one_after_the_other(method):
    """No more than one batch is held: the next one is asked for when the last one has been treated."""
    vae, sizes, asked = vae_with(), [], []
    vae.encoder.register_forward_hook(lambda module, arguments, output: sizes.append(len(arguments[0])))
    vae.decoder.register_forward_hook(lambda module, arguments, output: sizes.append(len(arguments[0])))

    def batches():
        for batch in X.split(5):
            asked.append(len(sizes))
            yield batch

    getattr(vae, method)(batches())
    calls = 1 if method == "encode" else 2
    assert asked == [0, calls, 2 * calls]
    assert max(sizes) == 5


def test_labels_of_categories_may_be_floats_that_are_whole():
    vae = VAE(MLPDecoder(latent_dim=2, event_shape=(4, 3)), MLPEncoder(event_shape=4, latent_dim=2),
              likelihoods.Categorical(3))  # fmt: skip
    labels = torch.randint(3, (6, 4))
    assert torch.equal(vae.encode(labels.double())[0], vae.encode(labels)[0])
    assert vae.model(labels.double()).dtype == torch.long
    for wrong in (3.0, -1.0, 0.5, float("nan")):
        with pytest.raises(ValueError, match="data at site 'x'"):
            vae.model(torch.full((6, 4), wrong))


def test_data_come_to_the_device_and_dtype_of_the_model():
    vae = vae_with().double()
    assert vae.encode(X)[0].dtype == torch.float64
    assert vae.encode(X.numpy())[0].dtype == torch.float64


class _NoBatches:
    def __iter__(self):
        return iter(())


NOT_DATA = {
    "string": "abc",
    "number": 3.0,
    "class": torch.Tensor,
    "function": len,
    "dict": {"x": X},
    "set": {1.0},
    "data set": TensorDataset(X),
    "no batch": _NoBatches(),
    "a batch that is none": iter(["ab"]),
    "a batch by name": iter([{"x": X}]),
    "object array": np.array([object()] * 3),
    "strings": pd.DataFrame({"a": ["x", "y"]}),
    "ragged": [[1.0, 2.0], [1.0]],
    "no data": [],
    "scalar": torch.tensor(1.0),
    "sparse": X.flatten(1).to_sparse(),
    "complex": X + 0j,
    "data and labels": (X, torch.arange(NUM_DATA)),
}


@EVERY_MODEL
@pytest.mark.parametrize("x", NOT_DATA.values(), ids=NOT_DATA.keys())
def test_what_is_no_data_is_refused(case, x):
    model, names = of_methods(case)
    if isinstance(x, tuple) and x[0].is_floating_point() and case.x is TOKENS:
        pytest.skip("floats are refused before labels are seen")
    for name in names:
        with pytest.raises((ValueError, TypeError), match=r"Expected .*\bx\b|site 'x'"):
            METHODS[name](model, x)
    for function in (model.encode, model.reconstruct):
        with pytest.raises((ValueError, TypeError), match="Expected data at site 'x'"):
            function(None)


def test_lossy_conversions_are_refused():
    vae = vae_with()
    for x in (
        torch.rand(12, *EVENT, dtype=torch.float64),
        np.full((12, *EVENT), 2**24 + 1),
        np.full((12, *EVENT), 0.1),
    ):
        for function in (vae.model, vae.guide, vae.encode, vae.reconstruct):
            with pytest.raises(ValueError, match=r"Expected data at site 'x' of dtype torch.float32, got .*convert"):
                function(x)
