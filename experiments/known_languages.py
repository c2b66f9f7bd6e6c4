"""Languages whose latent variable is known: what fitted models say about z, next to the truth.

Sequences are drawn from an LSTM with random weights and a 2-D z, a setting of He et al. 2019. How much they say about
z, and how probable they are, can be computed by integrating over z on a grid. Models are then fitted to the sequences
alone. ``information`` is what the fitted guide's z says about held-out sequences. ``z explained`` is the part of the
true z's variance that is linear in the posterior means.

``PYRO_ILVAE_FULL=1 python experiments/known_languages.py`` fits three languages, without the variable one language, and
``PYRO_ILVAE_SMOKE=1`` takes seconds, for tests. Results are kept in experiments/output/known_languages, and none is
made twice.
"""

from typing import Any

import pyro
import torch
from _sequences import COLUMNS, SEEDS, log_probability, measure, plain, projected, train
from _sweep import SMOKE, Run, Sweep, chosen, median_and_range, print_table
from sklearn.linear_model import LinearRegression
from torch import Tensor

from pyro_ilvae import SequenceDecoder, SequenceEncoder, SequentialVAE

SWEEP = Sweep("known_languages", "epochs20")
VOCAB, LENGTH = 20, 10
NUM_SEQUENCES = chosen(smoke=300, short=10_000, full=10_000)
SYNTHETIC: dict[str, tuple[float | None, dict[str, Any]]] = {
    "SVAE": (None, {}),
    "SVAE, KL annealed": (None, {"beta": (0.0, 1.0)}),
    "projected, L = 0.5": (0.5, {}),
    "projected, L = 1": (1.0, {}),
    "projected, L = 2": (2.0, {}),
    "projected, L = 4": (4.0, {}),
}


def sequential_vae(decoder: SequenceDecoder, hidden_features: int, data_size: int | None = None) -> SequentialVAE:
    pyro.clear_param_store()
    encoder = SequenceEncoder(vocab_size=VOCAB, latent_dim=2, hidden_features=hidden_features)
    return SequentialVAE(decoder, encoder, data_size=data_size, max_length=LENGTH)


def random_language(seed: int) -> tuple[Tensor, Tensor, SequentialVAE]:
    """Sequences, the z of each, and the model they are from."""
    pyro.set_rng_seed(seed)
    readout = plain(VOCAB, 2, 32)
    vae = sequential_vae(SequenceDecoder("lstm", readout), 8)
    first, _, output = readout.network
    # The order of the draws is part of the recipe: another order gives other languages.
    parameters = [*vae.decoder.history.parameters(), readout.from_context.weight, first.bias, first.weight]
    with torch.no_grad():
        for parameter in [*parameters, *output.parameters()]:
            parameter.normal_()
        output.weight.mul_(0.3)
    z = torch.randn(NUM_SEQUENCES, 2)
    return vae.sample(z), z, vae


@torch.no_grad()
def truth(vae: SequentialVAE, x: Tensor, z: Tensor) -> tuple[float, float, Tensor]:
    """The mutual information of x and z, the mean of log p(x), and E[z | x], by the trapezoidal rule on a grid."""
    line = torch.linspace(-4.5, 4.5, 61)
    grid = torch.cartesian_prod(line, line)
    log_weights = torch.log_softmax(-0.5 * grid.square().sum(-1), 0)
    given_z, evidence, means = [], [], []
    for batch, own in zip(x.split(20), z.split(20), strict=True):
        given_z.append(log_probability(vae.decoder, own, batch))
        joint = log_probability(vae.decoder, grid.unsqueeze(1), batch) + log_weights.unsqueeze(1)
        evidence.append(joint.logsumexp(0))
        means.append(joint.softmax(0).T @ grid)
    log_likelihood = torch.cat(evidence)
    information = torch.cat(given_z) - log_likelihood
    return float(information.mean()), float(log_likelihood.mean()), torch.cat(means)


def explained(z: Tensor, codes: Tensor) -> float:
    return float(
        LinearRegression()
        .fit(codes.numpy(force=True), z.numpy(force=True))
        .score(codes.numpy(force=True), z.numpy(force=True))
    )


def fit_synthetic(seed: int) -> Run:
    """Measures by recipe, and the true values."""
    x, z, language = random_language(seed)
    test, test_z = x[-len(x) // 10 :], z[-len(x) // 10 :]
    x = x[: -len(x) // 10]
    information, log_likelihood, means = truth(language, test, test_z)
    results = {
        "truth": {"information": information, "log_likelihood": log_likelihood, "explained": explained(test_z, means)}
    }
    for recipe, (constant, options) in SYNTHETIC.items():
        pyro.set_rng_seed(seed)
        decoder = plain(VOCAB, 2, 64) if constant is None else projected(x, VOCAB, 2, 64, constant)
        vae = sequential_vae(SequenceDecoder("lstm", decoder), 64, data_size=len(x))
        train(vae, x, epochs=1 if SMOKE else 20, batch_size=128, **options)
        results[recipe] = {**measure(vae, test), "explained": explained(test_z, vae.encode(test)[0])}
    return results


LANGUAGES = SWEEP.run(fit_synthetic, [(seed,) for seed in SEEDS])
columns = {name: COLUMNS[name] for name in ("information (nats)", "IW log lik. (nats)", "KL")}
columns |= {"z explained": median_and_range("explained", 2)}
recipes = ["truth", *SYNTHETIC]
print_table("synthetic", {recipe: [LANGUAGES[seed,][recipe] for seed in SEEDS] for recipe in recipes}, columns)
