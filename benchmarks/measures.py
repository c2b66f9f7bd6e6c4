"""What each diagnostic takes in time and memory: 10,000 data, 100 draws, K = 32, an untrained VAE of D = 784."""

from collections.abc import Callable

import torch
from timing import Line, milliseconds_of, peak_bytes, seconds_of, settings
from training import build

from pyro_ilvae import diagnostics

NUM_DATA, NUM_SAMPLES, BATCH = 10_000, 100, 1000


def measures(row: str) -> list[Line]:
    vae = build(32, 784, "projected")
    num_data, num_samples = (200, 5) if settings["quick"] else (NUM_DATA, NUM_SAMPLES)
    x = torch.randn(num_data, 784)
    pair = (vae.model, vae.guide, x)
    options = {"num_samples": num_samples, "batch_size": BATCH}
    steps: dict[str, Callable[[], object]] = {
        "kl_per_dimension (analytic)": lambda: diagnostics.kl_per_dimension(*pair, **options),
        "active_units": lambda: diagnostics.active_units(*pair, **options),
        "evidence": lambda: diagnostics.evidence(*pair, **options),
        "mutual_information, 1 draw a datum": lambda: diagnostics.mutual_information(
            *pair, num_samples=1, batch_size=BATCH
        ),
        "guide_fisher_divergence": lambda: diagnostics.guide_fisher_divergence(*pair, **options),
        "posterior_fisher_divergence": lambda: diagnostics.posterior_fisher_divergence(*pair, **options),
        "mean_fisher_divergence, 1,000 draws of z": lambda: diagnostics.mean_fisher_divergence(
            vae.decoder, vae.likelihood, num_samples=10 * num_samples, samples_per_pass=100
        ),
        "lipschitz_audit, 1,000 draws of z": lambda: diagnostics.lipschitz_audit(
            vae.decoder, num_samples=10 * num_samples, samples_per_pass=100
        ),
    }
    lines = []
    for name, step in steps.items():
        seconds = seconds_of(step, 1)
        lines.append(Line(row, name, "", f"{milliseconds_of(seconds)}, {peak_bytes(step) / 2**20:.0f} MiB"))
    return lines


ROWS: dict[str, Callable[[str], list[Line]]] = {"measures": measures}
