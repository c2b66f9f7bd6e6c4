"""What ``print`` and ``dir`` show: what a thing is, in one line, and the names that a user needs."""

import pickle

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_ilvae import (
    VAE,
    AnnealedELBO,
    BrenierMap,
    ConvEncoder,
    InverseLipschitzScheduler,
    JointOptim,
    MixtureVAE,
    MLPDecoder,
    MLPEncoder,
    SequenceDecoder,
    SequenceEncoder,
    SequentialVAE,
    anneal,
    datasets,
    likelihoods,
    protocols,
    schedules,
)
from pyro_ilvae.datasets import text


def square(step):
    return float(step**2)


def moved(schedule, steps):
    for _ in range(steps):
        schedule.step()
    return schedule


@pytest.mark.parametrize(
    ("schedule", "shown"),
    [
        (schedules.constant(0.5), "constant(0.5) at step 0: 0.5"),
        (moved(schedules.linear(0, 1, num_steps=100), 5), "linear(0.0, 1.0, num_steps=100) at step 5: 0.05"),
        (moved(schedules.cosine(0.0, 2.0, 4), 2), "cosine(0.0, 2.0, num_steps=4) at step 2: 1"),
        (moved(schedules.exponential(1e-4, 1.0, 4), 1), "exponential(0.0001, 1.0, num_steps=4) at step 1: 0.001"),
        (
            moved(schedules.cyclical(0.0, 1.0, 8, num_cycles=2, ramp=0.25), 9),
            "cyclical(0.0, 1.0, num_steps=8, num_cycles=2, ramp=0.25) at step 9: 1",
        ),
        (moved(schedules.Schedule(square), 3), "Schedule(square) at step 3: 9"),
        (schedules.Schedule(square, name="parabola"), "parabola at step 0: 0"),
    ],
)
def test_schedules_show_shape_position_and_value(schedule, shown):
    assert repr(schedule) == shown
    assert repr(pickle.loads(pickle.dumps(schedule))) == shown


def test_inference_shows_what_is_weighted_and_moved():
    beta = moved(schedules.linear(0.0, 1.0, 4), 1)
    at = "linear(0.0, 1.0, num_steps=4) at step 1: 0.25"
    assert repr(AnnealedELBO(TraceMeanField_ELBO(), beta)) == f"AnnealedELBO(TraceMeanField_ELBO, beta={at})"
    weights = {"y": 2.0, "z": beta}
    assert repr(AnnealedELBO(Trace_ELBO(), weights)) == f"AnnealedELBO(Trace_ELBO, beta={{'y': 2.0, 'z': {at}}})"
    assert repr(anneal(beta=0.5)) == "AnnealMessenger(beta=0.5)"
    assert repr(anneal(beta=weights)) == f"AnnealMessenger(beta={{'y': 2.0, 'z': {at}}})"
    scheduler = InverseLipschitzScheduler(BrenierMap(2), beta)
    assert repr(scheduler) == f"InverseLipschitzScheduler(BrenierMap, {at})"
    scheduler.step()
    assert repr(scheduler).endswith("at step 2: 0.5)")
    assert repr(JointOptim(torch.optim.Adam, {"lr": 0.1})) == "JointOptim(Adam, {'lr': 0.1})"
    clipped = JointOptim(torch.optim.SGD, {"lr": 0.1}, {"clip_norm": 1.0})
    assert repr(clipped) == "JointOptim(SGD, {'lr': 0.1}, {'clip_norm': 1.0})"


def test_data_show_names_and_shapes():
    pytest.importorskip("sklearn")
    assert repr(text.Vocabulary.of(["a b", "b c"], level="words")) == "Vocabulary(5 words)"
    assert repr(text.words()) == (
        "TextData(name='words', train=int64 (3503, 22), test=int64 (389, 17), vocabulary=Vocabulary(28 characters), "
        "num_left_out=0)"
    )
    assert repr(datasets.digits()) == (
        "ImageData(name='digits', train=float32 (1500, 8, 8), train_labels=int64 (1500,), test=float32 (297, 8, 8), "
        "test_labels=int64 (297,))"
    )
    assert repr(datasets.gaussian_mixture(7, 1.0)) == "LabeledData(x=float32 (7, 2), labels=int64 (7,))"


SIZES = {"latent_dim": 2, "event_shape": (3, 4)}


def decoder():
    return MLPDecoder(**SIZES, hidden_features=(5,))


def sequential():
    sizes = {"latent_dim": 2, "hidden_features": (5,)}
    return SequentialVAE(
        SequenceDecoder("gru", MLPDecoder(event_shape=9, context_dim=4, **sizes)),
        SequenceEncoder(vocab_size=9, latent_dim=2, embedding_features=4, hidden_features=5),
        end_token=0,
        max_length=7,
    )


@pytest.mark.parametrize(
    ("build", "shown"),
    [
        (lambda: MLPEncoder(**SIZES), "event_shape=(3, 4), latent_dim=2"),
        (
            lambda: ConvEncoder(**SIZES, channels=(2,), hidden_features=(3,), num_components=5),
            "event_shape=(3, 4), latent_dim=2, num_components=5",
        ),
        (
            lambda: VAE(decoder(), MLPEncoder(**SIZES), likelihoods.Bernoulli(), data_size=100),
            "latent_dim=2, event_shape=(3, 4), data_size=100",
        ),
        (
            lambda: MixtureVAE(decoder(), MLPEncoder(**SIZES), likelihoods.Bernoulli(), 5, enumerate_in="model"),
            "latent_dim=2, event_shape=(3, 4), data_size=None, num_components=5, weights='fixed', scales='learned', "
            "enumerate_in='model'",
        ),
        (sequential, "latent_dim=2, vocab_size=9, data_size=None, end_token=0, max_length=7"),
        (likelihoods.Normal, "scale=1, estimate='fixed'"),
        (lambda: likelihoods.Normal([0.5, 2.0], "learned"), "scale=0.5 to 2 of shape (2,), estimate='learned'"),
        (lambda: likelihoods.NegativeBinomial(2.0), "total_count=2, estimate='learned'"),
        (lambda: likelihoods.NegativeBinomial([0.5, 2.0]), "total_count=0.5 to 2 of shape (2,), estimate='learned'"),
        (lambda: likelihoods.ZeroInflatedPoisson(0.25, "fixed"), "gate=0.25, estimate='fixed'"),
        (
            lambda: likelihoods.ZeroInflatedNegativeBinomial(2.0, [0.25, 0.5]),
            "total_count=2, gate=0.25 to 0.5 of shape (2,), estimate='learned'",
        ),
        (lambda: likelihoods.Categorical(4), "num_categories=4"),
    ],
)
def test_modules_show_their_sizes(build, shown):
    module = build()
    assert module.extra_repr() == shown
    assert shown in repr(module)


@pytest.mark.parametrize("module", [likelihoods, protocols, schedules, text], ids=lambda module: module.__name__)
def test_dir_shows_what_a_module_exports(module):
    assert dir(module) == sorted(module.__all__)
    assert not {"Any", "math", "torch"} & set(dir(module))
