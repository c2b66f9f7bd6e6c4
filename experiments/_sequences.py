"""What the experiments with sequences share: decoders, training, measures and the columns of their tables."""

from collections.abc import Iterator

import numpy as np
import torch
from _remedies import Remedy
from _sweep import Column, Run, chosen, median_and_range
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor

from pyro_ilvae import (
    AnnealedELBO,
    InverseLipschitzScheduler,
    JointOptim,
    MLPDecoder,
    ProjectedDecoder,
    SequenceDecoder,
    SequentialVAE,
    diagnostics,
    principal_token_frame,
    remedies,
    schedules,
)
from pyro_ilvae.distributions import TokenSequence

SEEDS = chosen(smoke=[0], short=[0], full=[0, 1, 2])
NUM_SAMPLES = chosen(smoke=3, short=50, full=50)
LEARNING_RATE = 5e-3
COLUMNS: dict[str, Column] = {
    "perplexity": median_and_range("perplexity", 3),
    "IW log lik. (nats)": median_and_range("log_likelihood", 2),
    "KL": median_and_range("kl", 2),
    "smallest KL": median_and_range("smallest_kl", 3),
    "active": median_and_range("active", 0),
    "information (nats)": median_and_range("information", 2),
    "reconstructed": median_and_range("reconstructed", 3),
    "seconds": median_and_range("seconds", 0),
}


# The decoders. The frame of the projected decoder holds the leading principal directions of token counts: a step of z
# then moves the logits of tokens that occur together. The linear path of a plain decoder starts at the same directions.
# No decoder starts at the tokens' frequencies: with 5,000 words the language model then learns more slowly. After one
# epoch of Shakespeare its perplexity is 155 with that start and 121 without.
def plain(vocab_size: int, latent_dim: int, width: int, linear_path: Tensor | None = None) -> MLPDecoder:
    decoder = MLPDecoder(
        latent_dim=latent_dim,
        event_shape=vocab_size,
        context_dim=width,
        hidden_features=(width,),
        linear_path=linear_path is not None,
    )
    if linear_path is not None:
        with torch.no_grad():
            decoder.linear_path.weight.copy_(linear_path)
    return decoder


def projected(x: Tensor, vocab_size: int, latent_dim: int, width: int, constant: float) -> ProjectedDecoder:
    return ProjectedDecoder(
        plain(vocab_size, latent_dim, width),
        latent_dim=latent_dim,
        event_shape=vocab_size,
        context_dim=width,
        inverse_lipschitz=constant,
        frame=principal_token_frame(x, vocab_size=vocab_size, latent_dim=latent_dim),
    )


# Batches of sequences of equal length hold less padding, but the language model then needs far more epochs: after four,
# its perplexity on names is 7.70 where random batches have 7.39 (a GRU of 128).
def batches(x: Tensor, batch_size: int) -> Iterator[Tensor]:
    """All sequences in random order, a batch at a time, without columns that hold only padding."""
    for batch in x[torch.randperm(len(x))].split(batch_size):
        yield batch[:, (batch >= 0).any(0)]


def cosine(step: int, num_steps: int) -> float:
    """The learning rate, which falls to 0 along half a cosine."""
    return float(LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * step / num_steps)))


def train(
    vae: SequentialVAE,
    x: Tensor,
    epochs: int,
    batch_size: int,
    beta: tuple[float, float] = (1.0, 1.0),
    constant: tuple[float, float] | None = None,
    free_nats: float = 0.0,
    remedy: Remedy | None = None,
) -> None:
    """Fit by SVI, with free nats of each dimension (Kingma et al. 2016) or another remedy.

    The weight of the KL and the constant L follow schedules over the first half of the steps, and the learning rate a
    cosine over all of them.
    """
    num_steps = epochs * -(-len(x) // batch_size)
    weight = schedules.linear(*beta, num_steps=num_steps // 2)
    scheduler = None
    if constant is not None:
        scheduler = InverseLipschitzScheduler(vae.decoder, schedules.linear(*constant, num_steps=num_steps // 2))
    optimizer = JointOptim(torch.optim.Adam, {"lr": LEARNING_RATE, "fused": True}, {"clip_norm": 5 * len(x)})
    objective = remedies.FreeBitsELBO(TraceMeanField_ELBO(), free_nats)
    remedy = remedy or Remedy(AnnealedELBO(objective, beta=weight))
    svi = remedy.wrap(SVI(remedy.model or vae.model, vae.guide, optimizer, remedy.objective))
    step = 0
    for _ in range(epochs):
        for batch in batches(x, batch_size):
            svi.step(batch)
            remedy.after_step(batch)
            weight.step()
            if scheduler is not None:
                scheduler.step()
            step += 1
            for group in optimizer.optimizer.param_groups:
                group["lr"] = cosine(step, num_steps)
        remedy.after_epochs()


def measure(vae: SequentialVAE, test: Tensor) -> Run:
    """Measures of held-out sequences.

    The importance-weighted log likelihood in nats per sequence and the perplexity per token from it, the KL and its
    smallest dimension, active units, the mutual information of x and z, and the fraction of the tokens that a greedy
    search from the posterior mean gets back, each in its place.
    """
    test = test[(test >= 0).sum(1).argsort(stable=True)]  # little of a batch is then padding
    pair = (vae.model, vae.guide)
    evidence = diagnostics.evidence(*pair, test, num_samples=NUM_SAMPLES, batch_size=50, seed=0)
    kl = diagnostics.kl_per_dimension(*pair, test, batch_size=200).values.mean(0)
    information = diagnostics.mutual_information(*pair, test, num_samples=4, batch_size=200, seed=0)
    found = vae.reconstruct(test, batch_size=200)[:, : test.shape[1]]
    return {
        "log_likelihood": float(evidence.log_likelihood.mean()),
        "perplexity": float(diagnostics.perplexity(evidence.log_likelihood, (test >= 0).sum(1))),
        "kl": float(kl.sum()),
        "smallest_kl": float(kl.min()),
        "active": diagnostics.active_units(*pair, test, batch_size=200, seed=0).num_active,
        "information": information.mutual_information,
        "reconstructed": float(((found == test) & (test >= 0)).sum() / (test >= 0).sum()),
    }


def log_probability(decoder: SequenceDecoder, z: Tensor, x: Tensor) -> Tensor:
    """log p(x | z) in nats, for each sequence."""
    value: Tensor = TokenSequence(decoder(z, x), x).log_prob(x)
    return value
