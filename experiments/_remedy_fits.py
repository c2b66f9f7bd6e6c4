"""Fits under the remedies of collapse: to images, to names, towards targets, and with too much noise."""

import time
import warnings
from functools import cache, partial
from typing import Any

import pyro
import torch
from _images import BATCH_SIZE, LATENT_DIM, Images, build, images_of, kl_of_dimensions, measure, train
from _remedies import Budget, encoder_of, remedy
from _sequences import measure as measure_sequences
from _sequences import plain, projected
from _sequences import train as train_sequences
from _sweep import SMOKE, Run

from pyro_ilvae import (
    VAE,
    GraphSVI,
    JointOptim,
    SequenceDecoder,
    SequenceEncoder,
    SequentialVAE,
    diagnostics,
    likelihoods,
    principal_token_frame,
)
from pyro_ilvae.datasets import text

LEARNING_RATE = 3e-3
BASE = "plain, linear path"
ENDS = {"digits": (600, 600, 600), "Fashion-MNIST": (80, 105, 120)}
WARM_UP, CONTROL = {"digits": 50, "Fashion-MNIST": 15}, {"digits": 400, "Fashion-MNIST": 60}
HIDDEN = {"digits": (32, 32) if SMOKE else (128, 128), "Fashion-MNIST": (256, 256)}
if SMOKE:
    ENDS, WARM_UP, CONTROL = {"digits": (2, 3)}, {"digits": 1}, {"digits": 2}
LANDING_EPOCHS = {"digits": 10 if SMOKE else 500, "Fashion-MNIST": 70}
# Of names: a GRU over the letters before, as in text.py.
NAMES_EPOCHS, NAMES_HIDDEN, NAMES_LATENT = 4, 256, 8
TOO_LARGE = 1.0  # a noise scale where about 0.2 is best


def information(vae: VAE, x: torch.Tensor) -> float:
    found = diagnostics.mutual_information(vae.model, vae.guide, x[:500], num_samples=4, batch_size=200, seed=0)
    return found.mutual_information


def decoder_of(family: str, setting: float) -> str:
    """The decoder that goes with a remedy, by its name among the decoders of images."""
    own = {"plain": "plain", "projected": f"projected, kappa = {setting:g}", "controlled": "projected, kappa = 0"}
    return own.get(family, BASE)


def images_model(
    data: str, likelihood: str, family: str, setting: float, seed: int, noise: torch.nn.Module | None = None
) -> tuple[VAE, Images]:
    pyro.enable_validation(False)
    pyro.set_rng_seed(seed)
    part = images_of(data, likelihood)
    decoder = decoder_of(family, setting)
    wrap = partial(encoder_of, family, setting)
    vae = build(decoder, noise or likelihood, part.shape, HIDDEN[data], len(part.train), wrap)
    if family == "controlled":
        vae.decoder.inverse_lipschitz = 0.0  # a number, which the controller sets
    vae.initialize(part.train, seed=seed)
    return vae, part


def rate(vae: Any, x: torch.Tensor) -> Run:
    r"""The mean KL of held-out data, and the most information between data and z that goes with it, in nats.

    .. math:: I_q(x; z) = \overline{\mathrm{KL}} - \mathrm{KL}(q(z) \,\|\, p(z))
        \le \overline{\mathrm{KL}} - \mathrm{KL}(N(m, S) \,\|\, p(z)),

    with mean m and covariance S of the aggregate posterior q(z): of all distributions with these moments the Normal is
    closest to the prior. Estimates of the information itself by N data end at log N, which is 5.7 nats for digits.
    """
    loc, scale = (value.double() for value in vae.encode(x, batch_size=500))
    kl = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1).mean()
    mean, covariance = loc.mean(0), loc.T.cov(correction=0) + scale.square().mean(0).diag()
    moments = 0.5 * (mean @ mean + covariance.trace() - len(mean) - covariance.logdet())
    return {"rate": float(kl), "information_at_most": float(kl - moments)}


def fit(data: str, likelihood: str, family: str, setting: float, seed: int) -> Run:
    """Measures of held-out data under a remedy."""
    if data == "names":
        return fit_names(family, setting, seed)
    vae, part = images_model(data, likelihood, family, setting, seed)
    return fitted(vae, part, data, family, setting) | measured(vae, part)


def measured(vae: VAE, part: Images) -> Run:
    return {**measure(vae, part), **kl_of_dimensions(vae, part), **rate(vae, part.test)}


def fitted(vae: VAE, part: Images, data: str, family: str, setting: float) -> Run:
    steps = -(-len(part.train) // BATCH_SIZE)
    budget = Budget(WARM_UP[data], CONTROL[data], steps, lambda: information(vae, part.validation))
    how = remedy(family, setting, vae, budget)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*froze off target")  # the table says how far off
        run = train(vae, part, ENDS[data], LEARNING_RATE, remedy=how)
    return run | state_of(how.controller, vae)


def state_of(controller: Any, vae: Any) -> Run:
    """What a controller arrived at."""
    if controller is None:
        return {}
    beta = getattr(controller, "beta", controller).value
    constant = getattr(vae.decoder, "inverse_lipschitz", None)
    return {"constant": constant, "beta": beta, "estimate": controller.estimate, "on_target": controller.on_target}


@cache
def names() -> text.TextData:
    data = text.names()
    return data._replace(test=data.test[:2000])


def fit_names(family: str, setting: float, seed: int) -> Run:
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    data = names()
    size = len(data.vocabulary)
    frame = principal_token_frame(data.train, vocab_size=size, latent_dim=NAMES_LATENT)
    decoder: Any = plain(size, NAMES_LATENT, NAMES_HIDDEN, None if family == "plain" else frame)
    if family in ("projected", "controlled"):
        constant = setting if family == "projected" else 0.0
        decoder = projected(data.train, size, NAMES_LATENT, NAMES_HIDDEN, constant)
    encoder = SequenceEncoder(vocab_size=size, latent_dim=NAMES_LATENT, hidden_features=NAMES_HIDDEN // 2)
    vae = SequentialVAE(
        SequenceDecoder("gru", decoder),
        encoder_of(family, setting, encoder),
        data_size=len(data.train),
        end_token=data.vocabulary.end,
        max_length=data.train.shape[1],
    )
    steps = -(-len(data.train) // BATCH_SIZE)
    how = remedy(family, setting, vae, Budget(2, 3, steps, lambda: information(vae, data.validation)))
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*froze off target")
        train_sequences(vae, data.train, NAMES_EPOCHS, BATCH_SIZE, remedy=how)
    seconds = time.perf_counter() - began
    own = rate(vae, data.test)
    return {"seconds": seconds, **own, **state_of(how.controller, vae), **measure_sequences(vae, data.test)}


def fit_to_target(data: str, likelihood: str, target: float, start: float, seed: int) -> Run:
    """Where a controller of L, and of beta where L = 0 leaves too much, arrives from another L.

    The training has a fixed length, and a learning rate that falls to 0.3 and 0.09 of itself. The controller freezes
    after nine tenths of it.
    """
    vae, part = images_model(data, likelihood, "controlled", target, seed)
    vae.decoder.inverse_lipschitz = start
    epochs, steps = LANDING_EPOCHS[data], -(-len(part.train) // BATCH_SIZE)
    how = remedy("controlled", LATENT_DIM * target, vae, Budget(0, 9 * epochs // 10, steps, float))
    optimizer = JointOptim(torch.optim.Adam, {"lr": LEARNING_RATE, "fused": True})
    svi = GraphSVI(vae.model, vae.guide, optimizer, how.objective, compile=not SMOKE)
    path = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*froze off target")
        for epoch in range(epochs):
            for batch in part.train[torch.randperm(len(part.train))].split(BATCH_SIZE):
                svi.step(batch)
                how.after_step(batch)
            path.append(how.controller.estimate)
            if epoch + 1 in (6 * epochs // 10, 8 * epochs // 10):
                for group in optimizer.optimizer.param_groups:
                    group["lr"] *= 0.3
    kl = {
        f"{name}_kl": float(diagnostics.kl_divergence(vae.model, vae.guide, x, batch_size=500).values.mean())
        for name, x in (("train", part.train), ("test", part.test))
    }
    goal = LATENT_DIM * target
    swing = max(abs(value / goal - 1) for value in path[7 * epochs // 10 : 9 * epochs // 10])
    return {**state_of(how.controller, vae), **kl, "off": kl["train_kl"] / goal - 1, "swing": swing}


def fit_with_noise(family: str, setting: float, seed: int) -> Run:
    """Measures of held-out digits with the noise scale fixed far too large."""
    vae, part = images_model("digits", "Normal", family, setting, seed, likelihoods.Normal(TOO_LARGE))
    return fitted(vae, part, "digits", family, setting) | measured(vae, part)
