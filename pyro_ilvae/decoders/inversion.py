"""The inverse of a Brenier map: Newton's method, and derivatives by the implicit function theorem."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_ilvae.decoders.arguments import without_autocast

__all__ = ["default_tolerance", "invert", "weights_are_drawn"]


def default_tolerance(dtype: torch.dtype) -> float:
    """How large a residual may be, relative to 1 + |y|: with room for the rounding of z, which the map may stretch."""
    tolerances = {torch.float64: 1e-9, torch.float32: 1e-5}
    return tolerances.get(dtype) or 8 * torch.finfo(dtype).eps


def invert(brenier: Any, y: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """The point z with g(z) = y, of shape (..., D); see ``BrenierMap.inverse``.

    What certifies the point is computed in double precision, in which no setting of PyTorch for faster products (TF32,
    bfloat16, autocast) has a say.
    """
    method = _Method(brenier)
    weights = _double_weights(brenier)
    drawn = not weights
    # Weights drawn from priors may have batch dimensions of their own, as vectorized particles do.
    right = y.expand(_shape_of_image(brenier, y)) if drawn else y.double()

    def solve(right: Tensor, *values: Tensor) -> Tensor:
        arguments = ("solve", right, tolerance, max_iterations, y.dtype, drawn)
        return functional_call(method, dict(zip(weights, values, strict=True)), arguments)  # type: ignore[no-any-return]

    with without_autocast(y.device.type):
        z = _Root.apply(solve, right.detach(), *(weight.detach() for weight in weights.values()))
        if not _differentiates():
            return z.to(y.dtype)
        # Steps for g(z) = y + offset, which z solves exactly, with a constant Jacobian: they leave the value of z, and
        # each has one more derivative of the inverse function right. By the inverse matrix, because PyTorch's forward
        # derivatives of solve are wrong under vmap.
        value, jacobian = functional_call(method, weights, ("value_and_jacobian", z.detach()))
        wide = _wide(jacobian.dtype)
        inverse, offset = torch.linalg.inv(jacobian.detach().to(wide)).to(z.dtype), (value - right).detach()
        for _ in range(2):
            residual = functional_call(method, weights, ("value", z)) - right - offset
            z = z - (inverse @ residual.unsqueeze(-1)).squeeze(-1)
    return z.to(y.dtype)


@torch.no_grad()
def _shape_of_image(brenier: Any, y: Tensor) -> torch.Size:
    try:
        return brenier(y).shape  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise ValueError(
            f"Expected y whose batch dimensions broadcast with those of the weights that are drawn from priors, got "
            f"{tuple(y.shape)}: {error}"
        ) from error


def _differentiates() -> bool:
    """Whether derivatives may be asked for: tangents pass through without gradients too."""
    # The level is private; without it the answer is yes, which only takes longer.
    return torch.is_grad_enabled() or getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


def weights_are_drawn(module: nn.Module) -> bool:
    """Whether Pyro draws weights of a module from priors, or constrains them."""
    tables = ("_pyro_samples", "_pyro_params")
    return any(getattr(part, table, None) for part in module.modules() for table in tables)


def constant_is_drawn(brenier: nn.Module) -> bool:
    """Whether a map has another constant L for each draw of a noise scale."""
    nats: Any = getattr(brenier, "_nats", None)
    return nats is not None and nats.is_drawn


def _double_weights(brenier: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, in double precision; none if Pyro draws or constrains some of them."""
    if weights_are_drawn(brenier) or constant_is_drawn(brenier):
        return {}
    parts = brenier.named_modules(prefix="map")
    # Read as attributes, by which Pyro learns of them.
    return {f"{prefix}.{name}": getattr(part, name).double() for prefix, part in parts for name in part._parameters}


class _Method(nn.Module):
    """Functions of a map as forward passes of a module, for ``functional_call``."""

    def __init__(self, brenier: nn.Module) -> None:
        super().__init__()
        self.map = brenier

    def forward(self, name: str, *arguments: Any) -> Any:
        """The function with that name."""
        functions: Mapping[str, Callable[..., Any]] = {
            "solve": _solve,
            "value": lambda brenier, z: brenier(z),
            "value_and_jacobian": lambda brenier, z: (brenier(z), brenier.jacobian(z)),
        }
        return functions[name](self.map, *arguments)


class _Root(torch.autograd.Function):
    """A point found by iteration: constant in all derivatives, and under vmap found for the whole batch."""

    @staticmethod
    def forward(solve: Callable[..., Tensor], y: Tensor, *weights: Tensor) -> Tensor:  # type: ignore[override]
        return solve(y, *weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.num_inputs = len(inputs)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None,) * ctx.num_inputs

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        return torch.zeros_like(ctx.saved_tensors[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], solve: Any, *tensors: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        y_dim, *weight_dims = in_dims[1:]
        if y_dim is not None and all(dim is None for dim in weight_dims):
            return _Root.apply(solve, tensors[0].movedim(y_dim, 0), *tensors[1:]), 0
        pairs = list(zip(tensors, in_dims[1:], strict=True))
        batch = [[t if dim is None else t.select(dim, i) for t, dim in pairs] for i in range(info.batch_size)]
        return torch.stack([_Root.apply(solve, *one) for one in batch]), 0


@torch.no_grad()
def _solve(
    brenier: Any, y: Tensor, tolerance: float, max_iterations: int, dtype: torch.dtype, drawn: bool = False
) -> Tensor:
    """The points for ``y`` of shape (..., D), whose residuals are below the tolerance when rounded to ``dtype``.

    Where weights are drawn, each point may have its own, and the dimensions of ``y`` are left as they are.
    """
    if not y.isfinite().all():
        raise ValueError("Expected y to be finite, got NaN or infinity")
    flat = y if drawn else y.reshape(-1, brenier.features)
    limit = tolerance * (1 + flat.norm(dim=-1))
    # Where the points are rounded afterwards, the limit is left to rounding.
    z = _iterate(brenier, flat, limit if dtype == y.dtype else limit / 100, max_iterations, drawn).to(dtype).to(y.dtype)
    residual = (brenier(z) - flat).norm(dim=-1)
    failed = ~(residual <= limit)  # NaN fails too
    hint = " With inverse_lipschitz = 0 the map need not reach every point." if not brenier.inverse_lipschitz else ""
    if failed.any():
        raise RuntimeError(
            f"Expected a residual |g(z) - y| <= {tolerance:g} (1 + |y|) within {max_iterations} Newton steps, got "
            f"{float(residual[failed].max()):.3g} as the largest over {int(failed.sum())} of {failed.numel()} "
            f"points.{hint}"
        )
    if not brenier.inverse_lipschitz:
        # A bi-Lipschitz map has a Jacobian that is not symmetric.
        values = torch.linalg.svdvals(brenier.jacobian(z).to(_wide(z.dtype)))
        if (values[..., -1] <= brenier.features * torch.finfo(y.dtype).eps * values[..., 0]).any():
            raise RuntimeError(
                "Expected a Jacobian that is not singular, got one that is: other points have the same image. With "
                "inverse_lipschitz = 0 the map need not be one to one."
            )
    return z.reshape(y.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for linear algebra, which PyTorch does not have in half precision."""
    return torch.promote_types(dtype, torch.float32)


def _iterate(brenier: Any, y: Tensor, limit: Tensor, max_iterations: int, drawn: bool) -> Tensor:
    z = y / (1 + brenier.inverse_lipschitz)
    residual = brenier(z) - y
    for _ in range(max_iterations):
        active = ~(residual.norm(dim=-1) <= limit)
        if not active.any():
            break
        if drawn:
            moved, z, residual = _newton_step(brenier, z, residual, y, active)
        else:  # all points have the same weights, so the others can be left out
            rows = active.nonzero().squeeze(-1)
            moved, z[rows], residual[rows] = _newton_step(brenier, z[rows], residual[rows], y[rows], active[rows])
        if not moved:
            break
    return z


def _newton_step(brenier: Any, z: Tensor, residual: Tensor, y: Tensor, active: Tensor) -> tuple[bool, Tensor, Tensor]:
    """Whether some residual became smaller, and the points and residuals after a step of the active points."""
    jacobian = brenier.jacobian(z)
    norm, wide = residual.norm(dim=-1), _wide(z.dtype)
    # Where L = 0 the Jacobian may be singular; a ridge as large as the residual keeps the step finite and fast.
    ridge = 0.0 if brenier.inverse_lipschitz > 0 else 1e-3 * norm.clamp(max=1.0)[..., None, None]
    eye = torch.eye(brenier.features, dtype=z.dtype, device=z.device)
    matrix, right = (jacobian + ridge * eye).to(wide), residual.unsqueeze(-1).to(wide)
    direction = torch.linalg.solve_ex(matrix, right).result.squeeze(-1).to(z.dtype)
    length = torch.ones_like(norm)
    best, best_residual = z, residual
    pending = active
    for _ in range(40):
        candidate = z - length.unsqueeze(-1) * direction
        candidate_residual = brenier(candidate) - y
        accepted = pending & (candidate_residual.norm(dim=-1) <= (1 - 1e-4 * length) * norm)
        best = torch.where(accepted.unsqueeze(-1), candidate, best)
        best_residual = torch.where(accepted.unsqueeze(-1), candidate_residual, best_residual)
        pending = pending & ~accepted
        if not pending.any():
            break
        length = torch.where(pending, length / 2, length)
    return not torch.equal(pending, active), best, best_residual
