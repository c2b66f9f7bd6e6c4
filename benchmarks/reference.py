"""The public implementations' way to write the decoder, as the baseline: two differentiated potentials.

Nothing here is used by the package. The maps are gradients by ``autograd.grad(..., create_graph=True)``, the frame is
the dense matrix [I; 0], and the activations are the ones in the published LIDVAE code.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae import ICNN, InverseLipschitzDecoder

ACTIVATION = ("squared_leaky_relu", "leaky_relu")


class Potential(nn.Module):
    """An ICNN of two hidden layers with input skips, LeakyReLU(0.2), the first layer squared."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.second = nn.Linear(features, width)
        self.hidden = nn.Parameter(0.1 * torch.randn(width, width) - 5)
        self.output = nn.Parameter(torch.zeros(width) - 5)
        self.slope = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x), 0.2).square()
        h = F.leaky_relu(F.linear(h, F.softplus(self.hidden)) + self.second(x), 0.2)
        return h @ F.softplus(self.output) + x @ self.slope

    @torch.no_grad()
    def copy_(self, icnn: ICNN) -> None:
        """Take over the weights of an ICNN of the package."""
        width = len(self.output)
        for layer, rows in ((self.first, slice(None, width)), (self.second, slice(width, None))):
            layer.weight.copy_(icnn.input_weight[rows])
            layer.bias.copy_(icnn.bias[rows])
        self.hidden.copy_(icnn.hidden_weights[0].raw)
        self.output.copy_(icnn.output_weight_raw)
        self.slope.copy_(icnn.slope)


class ReferenceDecoder(nn.Module):
    """g2(B g1(z)) with g = grad psi + L z, differentiated and not written out."""

    def __init__(self, latent_dim: int, features: int, inverse_lipschitz: float = 1.0, width: int = 512) -> None:
        super().__init__()
        self.constant = inverse_lipschitz**0.5
        self.inner = Potential(latent_dim, width)
        self.outer = Potential(features, width)
        self.register_buffer("frame", torch.eye(features, latent_dim))

    def forward(self, z: Tensor) -> Tensor:
        # The derivative needs a graph, also where nobody asked for gradients.
        with torch.enable_grad():
            u = self._map(self.inner, z.detach().requires_grad_() if z.is_leaf else z)
            return self._map(self.outer, u @ self.frame.mT)

    def _map(self, potential: Potential, x: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(potential(x).sum(), x, create_graph=True)
        return gradient + self.constant * x

    def copy_(self, decoder: InverseLipschitzDecoder) -> None:
        """Take over the weights of the package's decoder, which makes the two the same function."""
        self.inner.copy_(decoder.inner.icnn)
        self.outer.copy_(decoder.outer.icnn)
