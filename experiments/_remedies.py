"""Remedies of collapse for models of images and of sequences: what each changes about a model and its training.

A remedy has a setting, a number, and everything else is as without it: the decoder is plain with a linear path and
starts from the data, as the projected decoder does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro.infer import ELBO, SVI, TraceMeanField_ELBO
from torch import nn

from pyro_ilvae import AnnealedELBO, InverseLipschitzController, PIController, measures, remedies, schedules
from pyro_ilvae.infer import Schedule

Nothing = Callable[..., None]


def nothing(*_: Any) -> None:
    """What most remedies do after a step."""


@dataclass
class Remedy:
    """How a remedy trains."""

    objective: ELBO
    model: Callable[..., Any] | None = None  # in place of the model's own
    wrap: Callable[[SVI], Any] = lambda svi: svi
    after_step: Nothing = nothing
    after_epochs: Nothing = nothing
    begins_to_wait: int = 0  # the epoch from which on a measurement may be the best, or end the training
    is_under_way: Callable[[], bool] = lambda: False  # as long as it is, no measurement ends the training
    controller: Any = None


@dataclass
class Budget:
    """What remedies with a beginning and an end need to know of the training."""

    warm_up_epochs: int  # until beta is 1
    control_epochs: int  # until a controller freezes
    steps_per_epoch: int
    information: Callable[[], float]  # of validation data, in nats


def elbo(beta: Any = 1.0) -> ELBO:
    return AnnealedELBO(TraceMeanField_ELBO(), beta=beta)


def with_schedule(beta: Schedule, budget: Budget) -> Remedy:
    return Remedy(elbo(beta), after_step=lambda *_: beta.step(), begins_to_wait=budget.warm_up_epochs)


def annealed(_: float, vae: Any, budget: Budget) -> Remedy:
    return with_schedule(schedules.linear(0.0, 1.0, num_steps=budget.warm_up_epochs * budget.steps_per_epoch), budget)


def cyclical(_: float, vae: Any, budget: Budget) -> Remedy:
    return with_schedule(schedules.cyclical(0.0, 1.0, num_steps=budget.warm_up_epochs * budget.steps_per_epoch), budget)


def free_bits(nats: float, vae: Any, budget: Budget) -> Remedy:
    return Remedy(remedies.FreeBitsELBO(TraceMeanField_ELBO(), nats))


def free_bits_of_all(nats: float, vae: Any, budget: Budget) -> Remedy:
    return Remedy(remedies.FreeBitsELBO(TraceMeanField_ELBO(), nats, groups="site"))


def latent_reconstruction(weight: float, vae: Any, budget: Budget) -> Remedy:
    return Remedy(elbo(), model=remedies.LatentReconstruction(vae.encoder, weight=weight)(vae.model))


def aggressive(max_inner: float, vae: Any, budget: Budget) -> Remedy:
    inference: list[remedies.AggressiveInference] = []

    def wrap(svi: SVI) -> Any:
        inference.append(remedies.AggressiveInference(svi, max_inner=int(max_inner)))
        return inference[0]

    counted = [0]

    def update() -> None:
        if inference[0].is_aggressive and inference[0].num_model_steps >= counted[0] + budget.steps_per_epoch:
            counted[0] = inference[0].num_model_steps
            inference[0].update(budget.information())

    def is_under_way() -> bool:
        return inference[0].is_aggressive

    return Remedy(elbo(), wrap=wrap, after_epochs=update, is_under_way=is_under_way)


def pi_control(target: float, vae: Any, budget: Budget) -> Remedy:
    beta = PIController(
        measures.total_kl(vae.model, vae.guide),
        target,
        integral=1e-3,
        bounds=(0.0, 10.0),
        num_steps=budget.control_epochs * budget.steps_per_epoch,
    )
    return Remedy(elbo(beta), after_step=beta.step, begins_to_wait=budget.control_epochs, controller=beta)


def controlled(target: float, vae: Any, budget: Budget) -> Remedy:
    controller = InverseLipschitzController(
        vae.decoder,
        measures.total_kl(vae.model, vae.guide),
        target,
        num_steps=budget.control_epochs * budget.steps_per_epoch,
        largest_beta=100.0,
    )
    return Remedy(
        elbo(controller.beta),
        after_step=controller.step,
        begins_to_wait=budget.control_epochs,
        controller=controller,
    )


TRAINED: dict[str, Callable[[float, Any, Budget], Remedy]] = {
    "beta": lambda beta, vae, budget: Remedy(elbo(beta)),
    "annealing": annealed,
    "cyclical annealing": cyclical,
    "free bits": free_bits,
    "free bits of all": free_bits_of_all,
    "aggressive inference": aggressive,
    "latent reconstruction": latent_reconstruction,
    "PI control": pi_control,
    "controlled": controlled,
}
WRAPPED: dict[str, Callable[[float, nn.Module], nn.Module]] = {
    "delta-VAE": lambda delta, encoder: remedies.MinimumKLEncoder(encoder, delta),
    "BN-VAE": lambda gamma, encoder: remedies.BatchNormEncoder(encoder, gamma),
}


def remedy(family: str, setting: float, vae: Any, budget: Budget) -> Remedy:
    """How a remedy trains; by the ELBO if it is a part of the model."""
    return TRAINED[family](setting, vae, budget) if family in TRAINED else Remedy(elbo())


def encoder_of(family: str, setting: float, encoder: nn.Module) -> nn.Module:
    """The encoder, in the wrapper that some remedies are."""
    return WRAPPED[family](setting, encoder) if family in WRAPPED else encoder
