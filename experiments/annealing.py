"""Does it help to anneal L? Kinoshita et al. (2023) do, to ease the choice of L.

A large L at the start forces information into the latent variable; L = 0 at the start gives the decoder its flexibility
first. Both ways end at L = 0.5 after half of the training, and stand beside the constant that is fixed, for the data,
the composition and the budget of ``tutorials/quickstart.py``.

Three seeds, 80 epochs, about two minutes on two cores, with or without ``PYRO_ILVAE_FULL=1``;
``PYRO_ILVAE_SMOKE=1`` takes seconds, for tests. Results are kept in experiments/output/annealing.

In each of the three seeds L from 0 fits a little better than the fixed constant and L from 2 a little worse, and the
smallest KL comes out about the same: annealing from 0 helps a little, and is not necessary.
"""

import time

import pyro
import torch
from _sweep import Run, Sweep, chosen, median_and_range, print_table
from pyro.infer import SVI, TraceMeanField_ELBO

from pyro_ilvae import (
    VAE,
    AnnealedELBO,
    InverseLipschitzDecoder,
    InverseLipschitzScheduler,
    MLPEncoder,
    datasets,
    diagnostics,
    likelihoods,
    principal_frame,
    schedules,
)

SEEDS = chosen(smoke=[0], short=[0, 1, 2], full=[0, 1, 2])
EPOCHS = chosen(smoke=2, short=80, full=80)
NUM_SAMPLES = chosen(smoke=5, short=200, full=200)
LATENT_DIM, IMAGE, HIDDEN, BATCH_SIZE = 16, (8, 8), (128, 128), 128
DATA = datasets.digits()
FRAME = principal_frame(DATA.train, LATENT_DIM)
PATHS = {"L = 0.5": None, "L from 2 to 0.5": (2.0, 0.5), "L from 0 to 0.5": (0.0, 0.5)}
SWEEP = Sweep("annealing", f"epochs{EPOCHS}")


def fit(name: str, seed: int) -> Run:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = VAE(
        InverseLipschitzDecoder(
            latent_dim=LATENT_DIM, event_shape=IMAGE, inverse_lipschitz=0.5, map_features=HIDDEN, frame=FRAME
        ),
        MLPEncoder(event_shape=IMAGE, latent_dim=LATENT_DIM, hidden_features=HIDDEN),
        likelihoods.Normal(0.3, estimate="learned"),
        data_size=len(DATA.train),
    )
    num_steps = EPOCHS * -(-len(DATA.train) // BATCH_SIZE)
    beta = schedules.linear(0.0, 1.0, num_steps=num_steps // 4, planned_steps=num_steps)
    path, scheduler = PATHS[name], None
    if path is not None:
        schedule = schedules.linear(*path, num_steps=num_steps // 2, planned_steps=num_steps)
        scheduler = InverseLipschitzScheduler(vae.decoder, schedule)
    optimizer = pyro.optim.ClippedAdam({"lr": 2e-3, "lrd": 0.1 ** (1 / num_steps)})
    svi = SVI(vae.model, vae.guide, optimizer, AnnealedELBO(TraceMeanField_ELBO(), beta=beta))
    began = time.perf_counter()
    for _ in range(EPOCHS):
        for batch in DATA.train[torch.randperm(len(DATA.train))].split(BATCH_SIZE):
            svi.step(batch)
            beta.step()
            if scheduler is not None:
                scheduler.step()
    seconds = time.perf_counter() - began
    summary = diagnostics.collapse_summary(
        vae.model,
        vae.guide,
        DATA.test,
        measures=("kl", "active_units", "evidence"),
        num_samples=NUM_SAMPLES,
        batch_size=100,
    )
    return {
        "elbo": summary.elbo.item(),
        "log_likelihood": summary.log_likelihood.item(),
        "smallest_kl": summary.kl.min().item(),
        "mean_kl": summary.kl.mean().item(),
        "active": summary.active_units.item(),
        "seconds": seconds,
    }


RESULTS = SWEEP.run(fit, [(name, seed) for name in PATHS for seed in SEEDS])
COLUMNS = {
    "ELBO (nats per image)": median_and_range("elbo", 1),
    "IW log lik.": median_and_range("log_likelihood", 1),
    "smallest KL": median_and_range("smallest_kl", 3),
    "mean KL": median_and_range("mean_kl", 2),
    "active": median_and_range("active", 0),
    "seconds": median_and_range("seconds", 0),
}
for seed in SEEDS:
    print_table(f"seed {seed}", {name: [RESULTS[name, seed]] for name in PATHS}, COLUMNS)
print_table("all seeds", {name: [RESULTS[name, seed] for seed in SEEDS] for name in PATHS}, COLUMNS)
