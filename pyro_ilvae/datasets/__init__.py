"""Data for tutorials and tests: a Gaussian mixture, images of clothes and digits, and text."""

from pyro_ilvae.datasets import text
from pyro_ilvae.datasets.images import ImageData, binarize, digits, fashion_mnist, read_idx
from pyro_ilvae.datasets.toy import LabeledData, gaussian_mixture, gaussian_mixture_accuracy

__all__ = [
    "ImageData",
    "LabeledData",
    "binarize",
    "digits",
    "fashion_mnist",
    "gaussian_mixture",
    "gaussian_mixture_accuracy",
    "read_idx",
    "text",
]
