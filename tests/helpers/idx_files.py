"""IDX files of random images and labels, as MNIST and its kind are published."""

import gzip

import numpy as np

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array, code=0x08):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write(folder, sizes=(5, 3), image=(4, 6), seed=0, compress=(True,) * 4):
    """Four files of random images and labels; returns what they hold, in the order of FILES."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for size in sizes:
        arrays += [generator.integers(0, 256, (size, *image)), generator.integers(0, 10, size)]
    for name, array, zipped in zip(FILES, arrays, compress, strict=True):
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return arrays
