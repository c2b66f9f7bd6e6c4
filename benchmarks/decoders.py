"""A training step of the decoder alone, and decoding without gradients."""

from collections.abc import Callable

import torch
from reference import ACTIVATION, ReferenceDecoder
from timing import Line, Step, at_most, compare, faster, peak_bytes
from torch import nn

from pyro_ilvae import BiLipschitzMap, BrenierMap, InverseLipschitzDecoder, MLPDecoder, ProjectedDecoder, mlp

BATCH = 128


def training_step(decoder: nn.Module, latent_dim: int, features: int, batch: int = BATCH) -> Step:
    """Forward, a Normal log likelihood to a fixed target, backward and Adam."""
    z, x = torch.randn(batch, latent_dim), torch.randn(batch, features)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss = 0.5 * (decoder(z).flatten(1) - x).square().sum() / batch
        loss.backward()
        optimizer.step()

    return step


def decoding(decoder: nn.Module, latent_dim: int) -> Step:
    z = torch.randn(BATCH, latent_dim)

    @torch.no_grad()
    def step() -> None:
        decoder(z)

    return step


def same_function(latent_dim: int, features: int) -> InverseLipschitzDecoder:
    """The reference's function: identity frame, input skips, its activations."""
    return InverseLipschitzDecoder(
        latent_dim=latent_dim,
        event_shape=features,
        inverse_lipschitz=1.0,
        map_features=(512, 512),
        frame="identity",
        activation=ACTIVATION,
    )


def light(latent_dim: int, features: int, width: int = 512) -> InverseLipschitzDecoder:
    """A composition made cheap: a small inner map, no input skips, a narrower second layer."""
    return InverseLipschitzDecoder(
        latent_dim=latent_dim,
        event_shape=features,
        inverse_lipschitz=1.0,
        map_features=(width, width // 2),
        inner_map_features=(64, 64),
        input_skips=False,
    )


def small_inner(latent_dim: int, features: int) -> InverseLipschitzDecoder:
    """The default composition with a small inner map."""
    return InverseLipschitzDecoder(
        latent_dim=latent_dim,
        event_shape=features,
        inverse_lipschitz=1.0,
        map_features=(512, 512),
        inner_map_features=(64, 64),
    )


def conv_backbone(latent_dim: int) -> nn.Module:
    """Transposed convolutions to images of 28 x 28."""
    return nn.Sequential(
        nn.Linear(latent_dim, 32 * 7 * 7),
        nn.Softplus(),
        nn.Unflatten(1, (32, 7, 7)),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
        nn.Softplus(),
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
        nn.Flatten(),
    )


def same(row: str, latent_dim: int, features: int, target: float) -> list[Line]:
    ours, reference = same_function(latent_dim, features), ReferenceDecoder(latent_dim, features)
    reference.copy_(ours)
    z = torch.randn(BATCH, latent_dim)
    # What is compared has to be the same function.
    torch.testing.assert_close(ours(z), reference(z), rtol=1e-3, atol=1e-3)
    steps = {
        "same function": training_step(ours, latent_dim, features),
        "reference": training_step(reference, latent_dim, features),
    }
    return [faster(row, "same function", "reference", compare(steps, "same function"), target)]


def default(latent_dim: int, features: int) -> InverseLipschitzDecoder:
    return InverseLipschitzDecoder(latent_dim=latent_dim, event_shape=features)


COMPOSITIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "composition": default,
    "composition, small inner map": small_inner,
    "light composition": light,
}


def composition(row: str, latent_dim: int, features: int, name: str) -> list[Line]:
    # A random frame costs what a principal one does.
    decoder = COMPOSITIONS[name](latent_dim, features)
    steps = {
        name: training_step(decoder, latent_dim, features),
        "plain": training_step(MLPDecoder(latent_dim=latent_dim, event_shape=features), latent_dim, features),
    }
    return [
        at_most(row, name, "plain", compare(steps, "plain"), 1.6),
        against_reference(row, name, decoder, latent_dim, features),
    ]


def against_reference(row: str, name: str, decoder: nn.Module, latent_dim: int, features: int) -> Line:
    steps = {
        name: training_step(decoder, latent_dim, features),
        "reference": training_step(ReferenceDecoder(latent_dim, features), latent_dim, features),
    }
    return faster(row, name, "reference", compare(steps, name), 3.0)


def projected(row: str, backbone: Callable[[], nn.Module], latent_dim: int, features: int) -> list[Line]:
    steps = {
        "projected": training_step(
            ProjectedDecoder(backbone(), latent_dim=latent_dim, event_shape=features), latent_dim, features
        ),
        "its backbone": training_step(backbone(), latent_dim, features),
    }
    return [at_most(row, "projected", "its backbone", compare(steps, "its backbone"), 1.15)]


def projected_mlp(row: str, latent_dim: int, features: int) -> list[Line]:
    def backbone() -> nn.Module:
        return mlp(latent_dim, (512, 512), features)

    decoder = ProjectedDecoder(backbone(), latent_dim=latent_dim, event_shape=features)
    return [
        *projected(row, backbone, latent_dim, features),
        against_reference(row, "projected", decoder, latent_dim, features),
    ]


def gradients(decoder: nn.Module, latent_dim: int) -> Step:
    """Forward, a Normal log likelihood and backward."""
    z, x = torch.randn(BATCH, latent_dim), torch.randn(BATCH, latent_dim)

    def step() -> None:
        decoder.zero_grad()
        (0.5 * (decoder(z) - x).square().sum() / BATCH).backward()

    return step


def bilipschitz(row: str, latent_dim: int) -> list[Line]:
    """Both maps with their defaults, whose layers are 64 wide."""
    steps = {
        "bi-Lipschitz map": gradients(BiLipschitzMap(latent_dim), latent_dim),
        "Brenier map": gradients(BrenierMap(latent_dim), latent_dim),
    }
    return [at_most(row, "bi-Lipschitz map", "Brenier map", compare(steps, "Brenier map"), 3.0)]


def decode(row: str, latent_dim: int, features: int) -> list[Line]:
    decoders = {
        "same function": same_function(latent_dim, features),
        "light composition": light(latent_dim, features),
        "reference": ReferenceDecoder(latent_dim, features),
    }
    steps = {name: decoding(decoder, latent_dim) for name, decoder in decoders.items()}
    memory = {name: peak_bytes(step) for name, step in steps.items()}
    lines = []
    for name in ("same function", "light composition"):
        timings = compare({name: steps[name], "reference": steps["reference"]}, name)
        lines.append(faster(row, name, "reference", timings, 2.0))
        lines.append(
            Line(
                row,
                f"{name} {memory[name] / 2**20:.1f} MiB",
                f"reference {memory['reference'] / 2**20:.1f} MiB",
                f"{memory['reference'] / memory[name]:.1f} less",
                ">= 3",
                memory["reference"] >= 3 * memory[name],
            )
        )
    return lines


ROWS: dict[str, Callable[[str], list[Line]]] = {
    "same-784": lambda row: same(row, 32, 784, 1.4),
    "same-3072": lambda row: same(row, 64, 3072, 2.0),
    "composition-784": lambda row: composition(row, 32, 784, "composition"),
    "composition-3072": lambda row: composition(row, 64, 3072, "composition"),
    "small-inner-784": lambda row: composition(row, 32, 784, "composition, small inner map"),
    "small-inner-3072": lambda row: composition(row, 64, 3072, "composition, small inner map"),
    "light-784": lambda row: composition(row, 32, 784, "light composition"),
    "light-3072": lambda row: composition(row, 64, 3072, "light composition"),
    "projected-784": lambda row: projected_mlp(row, 32, 784),
    "projected-3072": lambda row: projected_mlp(row, 64, 3072),
    "projected-conv": lambda row: projected(row, lambda: conv_backbone(32), 32, 784),
    "bilipschitz-2": lambda row: bilipschitz(row, 2),
    "bilipschitz-16": lambda row: bilipschitz(row, 16),
    "bilipschitz-64": lambda row: bilipschitz(row, 64),
    "decode-784": lambda row: decode(row, 32, 784),
    "decode-3072": lambda row: decode(row, 64, 3072),
}
