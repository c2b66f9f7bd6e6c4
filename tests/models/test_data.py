"""What the models take as data: tensors, what converts to one without loss, and iterables of batches."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import EVENT, LATENT, perturb
from helpers.models import NUM_DATA, ONE_OF_EACH, TOKENS, X, mixture_with, vae_with
from pyro import poutine
from scipy import sparse
from torch.utils.data import DataLoader, TensorDataset

from pyro_ilvae import VAE, MixtureVAE, MLPDecoder, MLPEncoder, likelihoods, principal_frame
from pyro_ilvae.diagnostics import kl_divergence, linear_reference

EVERY_MODEL = pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=ONE_OF_EACH.keys())


def decoded(model):
    """The latent site that the decoder takes."""
    return getattr(model, "latent_sites", ("z",))[0]


METHODS = {
    "encode": lambda model, x: torch.stack(model.encode(x)),
    "reconstruct": lambda model, x: model.reconstruct(x),
    "predict_component": lambda model, x: model.predict_component(x, seed=0),
    "initialize_components": lambda model, x: model.initialize_components(x, seed=0),
    "log density": lambda model, x: (
        poutine.trace(poutine.condition(model.model, {decoded(model): torch.zeros(NUM_DATA, LATENT)}))
        .get_trace(x)
        .nodes["x"]["fn"]
        .log_prob(model._checked_data(x)[0])
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


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Poisson(),
        likelihoods.NegativeBinomial(),
        likelihoods.NegativeBinomial(torch.ones(8)),
        likelihoods.ZeroInflatedPoisson(),
        likelihoods.ZeroInflatedNegativeBinomial(torch.ones(8), torch.full((8,), 0.2)),
        likelihoods.Normal(),
    ],
)
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
        assert torch.equal(vae.reconstruct(x), vae.reconstruct(counts.float()))


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
        found = getattr(model, name)(loaders(case.x)[kind], batch_size=batch_size, **options)
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


def own_encoder(x):
    """An encoder and a likelihood of a user, which do not say what shape a datum has."""
    loc = x.reshape(-1, 15)[:, :2]
    return loc, torch.ones_like(loc)


def own_likelihood(eta, x=None):
    return dist.Normal(eta, 1.0)


IMAGES = torch.rand(7, 3, 5)
SINGLE = {
    "known": (MLPEncoder(event_shape=(3, 5), latent_dim=2, hidden_features=(4,)), likelihoods.Normal(0.5)),
    "likelihood": (own_encoder, likelihoods.Normal(0.5)),
    "encoder": (MLPEncoder(event_shape=(3, 5), latent_dim=2, hidden_features=(4,)), own_likelihood),
    "neither": (own_encoder, own_likelihood),
    "last dimensions": (lambda x: own_encoder(x) if x.dim() > 2 else tuple(v[0] for v in own_encoder(x)),
                        own_likelihood),
}  # fmt: skip


@pytest.mark.parametrize("parts", SINGLE.values(), ids=SINGLE.keys())
@pytest.mark.parametrize("kind", ["vae", "guide", "model"])
def test_a_datum_without_a_batch_dimension_is_refused(parts, kind):
    encoder, likelihood = parts
    decoder = MLPDecoder(latent_dim=2, event_shape=(3, 5), hidden_features=(4,))
    if kind == "vae":
        model = VAE(decoder, encoder, likelihood)
    else:
        model = MixtureVAE(decoder, encoder, likelihood, 2, enumerate_in=kind)
    assert model.encode(IMAGES[:1])[0].shape == (1, 2)
    one_by_one = DataLoader(IMAGES, batch_size=None)
    names = ("model", "guide", "encode", "reconstruct", "predict_component", "initialize_components")
    for name in names:
        if hasattr(model, name) and not (name == "model" and kind == "model"):
            with pytest.raises(ValueError, match=r"Expected data at site 'x' of shape \(N, 3, 5\), got \(3, 5\)"):
                getattr(model, name)(IMAGES[0])
        if hasattr(model, name) and name not in ("model", "guide"):
            with pytest.raises(ValueError, match=r"Expected data at site 'x' of shape \(N, 3, 5\), got \(3, 5\)"):
                getattr(model, name)(one_by_one)


def test_a_posterior_that_is_the_same_for_all_data():
    for loc in (torch.zeros(2), torch.zeros(1, 2)):
        vae = VAE(MLPDecoder(latent_dim=2, event_shape=3), lambda x, loc=loc: (loc, loc + 1), likelihoods.Normal())
        assert vae.encode(torch.rand(5, 3))[0].shape == (5, 2)


def test_lists_hold_batches_or_the_data_one_by_one():
    encoder, likelihood = SINGLE["known"]
    vae = VAE(MLPDecoder(latent_dim=2, event_shape=(3, 5), hidden_features=(4,)), encoder, likelihood)
    arrays = [batch.numpy() for batch in IMAGES.split(4)]
    for x in (
        list(IMAGES),
        list(IMAGES.numpy()),
        arrays,
        [batch.numpy() for batch in IMAGES[:6].split(3)] + [IMAGES[6:].numpy()],
        [(batch, 0) for batch in arrays],
        [[batch, torch.zeros(len(batch))] for batch in IMAGES.split(4)],
        memoryview(IMAGES.numpy()),
    ):
        torch.testing.assert_close(vae.encode(x)[0], vae.encode(IMAGES)[0])
    with pytest.raises(ValueError, match="float32 does not hold exactly"):
        vae.encode(memoryview(np.random.default_rng(0).random((7, 3, 5))))
    kl_divergence(vae.model, vae.guide, memoryview(IMAGES.numpy()), seed=0)


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
    "a batch by another name": iter([{"data": X}]),
    "object array": np.array([object()] * 3),
    "strings": pd.DataFrame({"a": ["x", "y"]}),
    "ragged": [[1.0, 2.0], [1.0]],
    "no data": [],
    "scalar": torch.tensor(1.0),
    "sparse": X.flatten(1).to_sparse(),
    "sparse array": sparse.csr_array(X.flatten(1).numpy(force=True)),
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


SPARSE = {
    "coordinates": (lambda x: x.to_sparse(), r"a dense tensor, got one of layout torch.sparse_coo; .*\.to_dense\(\)"),
    "rows": (lambda x: x.to_sparse_csr(), r"a dense tensor, got one of layout torch.sparse_csr; .*\.to_dense\(\)"),
    "matrix": (lambda x: sparse.csr_matrix(x.numpy(force=True)), r"got a csr_matrix; .*\.toarray\(\)"),
    "array": (lambda x: sparse.coo_array(x.numpy(force=True)), r"got a coo_array; .*\.toarray\(\)"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_data_are_refused_with_what_makes_them_dense(kind):
    make, message = SPARSE[kind]
    x = torch.randint(3, (20, 8)).float()
    encoder = MLPEncoder(event_shape=8, latent_dim=2, hidden_features=(8,))
    decoder = MLPDecoder(latent_dim=2, event_shape=8, hidden_features=(8,), linear_path=True)
    vae = VAE(decoder, encoder, likelihoods.NegativeBinomial(torch.ones(8)))
    for function in (
        vae.model,
        vae.guide,
        vae.encode,
        vae.reconstruct,
        vae.initialize,
        encoder,
        lambda x: decoder.initialize(x, vae.likelihood),
        lambda x: principal_frame(x, 2),
        lambda x: linear_reference(x, 0.5),
    ):
        function(x)
        with pytest.raises(TypeError, match=message):
            function(make(x))


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
