"""Names in Pyro's param store: a module whose names belong to another module is told, and no other module."""

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyro_ilvae import (
    ICNN,
    BiLipschitzMap,
    BrenierMap,
    ConvEncoder,
    InverseLipschitzDecoder,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    RecurrentHistory,
    SequenceDecoder,
    SequenceEncoder,
    TransformerHistory,
    likelihoods,
    mlp,
    remedies,
)

K, D, V = 2, 8, 5
X = torch.randn(6, D, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[1, 2], [3, 4]])
SIZES = {"latent_dim": K, "event_shape": D}


def sequence_decoder():
    return SequenceDecoder("gru", MLPDecoder(latent_dim=K, event_shape=V, context_dim=4, hidden_features=(4,)))


# Each module with what it is called with.
MODULES = {
    "MLPDecoder": (lambda: MLPDecoder(**SIZES, hidden_features=(4,)), (torch.zeros(6, K),)),
    "InverseLipschitzDecoder": (
        lambda: InverseLipschitzDecoder(**SIZES, map_features=(4,)),
        (torch.zeros(6, K),),
    ),
    "ProjectedDecoder": (lambda: ProjectedDecoder(nn.Linear(K, D), **SIZES, map_features=(4,)), (torch.zeros(6, K),)),
    "BiLipschitzMap": (lambda: BiLipschitzMap(K), (torch.zeros(6, K),)),
    "BrenierMap": (lambda: BrenierMap(K), (torch.zeros(6, K),)),
    "mlp": (lambda: mlp(K, (4,), D), (torch.zeros(6, K),)),
    "MLPEncoder": (lambda: MLPEncoder(**SIZES, hidden_features=(4,)), (X,)),
    "BatchNormEncoder": (
        lambda: remedies.BatchNormEncoder(MLPEncoder(**SIZES, hidden_features=(4,)), 0.5),
        (X,),
    ),
    "LinearPath": (
        lambda: remedies.LinearPath(MLPDecoder(**SIZES, hidden_features=(4,))),
        (torch.zeros(6, K),),
    ),
    "ConvEncoder": (lambda: ConvEncoder(event_shape=(2, 4), latent_dim=K, channels=(2,)), (X.reshape(6, 2, 4),)),
    "SequenceEncoder": (lambda: SequenceEncoder(vocab_size=V, latent_dim=K, hidden_features=4), (TOKENS,)),
    "SequenceDecoder": (sequence_decoder, (torch.zeros(2, K), TOKENS)),
    "RecurrentHistory": (lambda: RecurrentHistory(V, hidden_features=4), (TOKENS,)),
    "TransformerHistory": (lambda: TransformerHistory(V, hidden_features=4), (TOKENS,)),
    "Normal": (lambda: likelihoods.Normal(1.0, "learned"), (X,)),
    "Normal of features": (lambda: likelihoods.Normal(torch.ones(X.shape[-1]), "learned"), (X,)),
    "NegativeBinomial": (lambda: likelihoods.NegativeBinomial(), (X,)),
    "ZeroInflatedPoisson": (lambda: likelihoods.ZeroInflatedPoisson(), (X,)),
    "ZeroInflatedNegativeBinomial": (lambda: likelihoods.ZeroInflatedNegativeBinomial(torch.ones(D)), (X,)),
}
EVERY_MODULE = pytest.mark.parametrize(("build", "arguments"), MODULES.values(), ids=MODULES.keys())


def total(output):
    """A number that depends on all of a module's parameters."""
    if isinstance(output, torch.distributions.Distribution):
        return output.log_prob(torch.ones(6, D)).sum()
    return sum(part.sum() for part in (output if isinstance(output, tuple) else (output,)))


def svi_of(modules, arguments, name=None):
    def model():
        for i, module in enumerate(modules):
            if name is not None:
                pyro.module(f"{name}{i}", module)
            pyro.factor(f"factor{i}", total(module(*arguments)))

    return SVI(model, lambda: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())


def left_where_they_were(svi, modules):
    before = [[value.clone() for value in module.parameters()] for module in modules]
    svi.step()
    return [all(map(torch.equal, values, module.parameters())) for values, module in zip(before, modules, strict=True)]


@EVERY_MODULE
def test_two_modules_of_one_function_share_names_and_are_told(build, arguments):
    modules = build(), build()
    svi = svi_of(modules, arguments)
    with pytest.warns(UserWarning, match=f"another module's '.*instead of this {type(modules[0]).__name__}'s"):
        left = left_where_they_were(svi, modules)
    assert left == [False, True]


@EVERY_MODULE
def test_a_second_fit_is_told_unless_the_store_was_cleared(build, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for clear in (False, True):
            if clear:
                pyro.clear_param_store()
            svi = svi_of([build()], arguments)
            svi.step()
            svi.step()
    with pytest.warns(UserWarning, match="another module's"):
        svi_of([build()], arguments).step()


@EVERY_MODULE
def test_modules_with_names_of_their_own_are_trained_and_not_told(build, arguments):
    named = build(), build()
    whole = PyroModule("whole")
    whole.first, whole.second = build(), build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert left_where_they_were(svi_of(named, arguments, name="part"), named) == [False, False]
        pyro.clear_param_store()

        def model():
            with whole._pyro_context:
                for i, module in enumerate((whole.first, whole.second)):
                    pyro.factor(f"factor{i}", total(module(*arguments)))

        svi = SVI(model, lambda: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
        assert left_where_they_were(svi, (whole.first, whole.second)) == [False, False]


def test_an_encoder_and_a_plain_decoder_of_one_model_are_told():
    encoder, decoder = MODULES["MLPEncoder"][0](), MODULES["MLPDecoder"][0]()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.warns(UserWarning, match=r"another module's 'network.0.weight': .* instead of this MLPDecoder's"):
        svi.step(X)


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (lambda: BiLipschitzMap(K), "inverse"),
        (lambda: BiLipschitzMap(K), "jacobian"),
        (lambda: BrenierMap(K, hidden_features=(4,)), "inverse"),
        (lambda: BrenierMap(K, hidden_features=(4,)), "potential"),
        (lambda: BrenierMap(K, hidden_features=(4,)), "jacobian"),
        (lambda: ICNN(K, (4,)), "gradient"),
        (lambda: ICNN(K, (4,)), "hessian"),
    ],
)
def test_methods_tell_as_calls_do(build, method):
    modules = build(), build()

    def model():
        for i, module in enumerate(modules):
            pyro.factor(f"factor{i}", getattr(module, method)(torch.ones(3, K)).sum())

    svi = SVI(model, lambda: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    with pytest.warns(UserWarning, match=f"another module's '.*instead of this {type(modules[0]).__name__}'s"):
        svi.step()


@EVERY_MODULE
def test_nobody_is_told_where_svi_does_not_train(build, arguments):
    first, second = build(), build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in (first, second):
            total(module(*arguments)).backward()
        svi_of([first, second], arguments).evaluate_loss()


@EVERY_MODULE
def test_copies_and_files_keep_the_module(build, arguments):
    module = build().eval()
    expected = total(module(*arguments))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert list(other.state_dict()) == list(module.state_dict())
        torch.testing.assert_close(total(other(*arguments)), expected)
