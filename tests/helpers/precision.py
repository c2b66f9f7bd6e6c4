"""Ways of computing with fewer digits, under which what certifies has to stay right."""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.mv}


class RoundedProducts(TorchDispatchMode):
    """Products in single precision with factors of 10 bits, as TF32 computes them on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            args = [self._rounded(arg) for arg in args]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _rounded(arg):
        if not isinstance(arg, torch.Tensor) or arg.dtype != torch.float32:
            return arg
        mantissa, exponent = torch.frexp(arg)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@contextmanager
def tf32():
    """TF32 on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


PRECISIONS = {
    "full": nullcontext,
    "rounded-products": RoundedProducts,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
