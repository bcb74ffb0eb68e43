"""Files of statistics: mean and covariance of a network's features of real pictures, as others publish them and as we write them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from distill_cli.data.npz import arrays, opened
from distill_cli.errors import DistillError, UsageError, printable
from distill_cli.evaluate.distances import Statistics
from distill_cli.evaluate.networks import Network
from distill_cli.files import write_atomic

ASYMMETRY = 1e-5
"""Most by which a covariance may differ from its transpose, as a share of its largest value."""
ANEW = "distill evaluate --data FOLDER --save-statistics FILE writes one"
LAYOUT = ("mu", "sigma", "network", "protocol", "images")
"""Arrays of a file. EDM's and pytorch-fid's files have the first two; guided-diffusion's have others beside them, and arr_0, pictures."""


def holds(path: Path) -> tuple[bool, bool]:
    """Whether an npz file has statistics, and whether it has pictures."""
    with opened(path, ANEW) as stored:
        return {"mu", "sigma"} <= set(stored.files), "arr_0" in stored.files


def width(path: Path) -> int:
    """The number of features whose mean is in a file."""
    with opened(path, ANEW) as stored:
        return int(arrays(path, stored, ("mu",))["mu"].size)


def read(path: Path, network: Network) -> tuple[Statistics, str]:
    """The statistics in a file, for one network, and what is known of them, in words. Raises DistillError for those of another network."""
    with opened(path, ANEW) as stored:
        there = arrays(path, stored, LAYOUT)
    mean, covariance = there["mu"], there["sigma"]
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f" or mean.ndim != 1 or covariance.shape != (*mean.shape, *mean.shape):
        raise DistillError(
            f"{path}: mu is {mean.dtype} {mean.shape}, sigma {covariance.dtype} {covariance.shape}", "(D,) and (D, D) are expected"
        )
    of = printable(there["protocol"]) if "protocol" in there else ""
    if len(mean) != network.width or ("network" in there and str(there["network"]) != network.digest):
        theirs = of or f"{len(mean)} features"
        raise DistillError(
            f"{path}: statistics of another feature network: {theirs}, not {network.about}", "features=NAME chooses the network"
        )
    off = np.abs(covariance - covariance.T).max()
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DistillError(f"{path}: mu or sigma holds what is no number", "is the file sound?")
    if off > ASYMMETRY * np.abs(covariance).max() or covariance.diagonal().min() < 0:
        raise DistillError(f"{path}: sigma is no covariance", "is the file sound?")
    found = Statistics(torch.from_numpy(mean).double(), torch.from_numpy((covariance + covariance.T) / 2).double())
    count = f" of {int(there['images'])} images" if "images" in there else ""
    return found, f"mean and covariance{count} in {path}" + ("" if of else f", taken to be of {network.name}: the file does not say")


def write(path: Path, statistics: Statistics, network: Network, images: int) -> None:
    """Write a file of statistics that other programs read too: mu and sigma; beside them the network and its protocol."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=statistics.mean.numpy(),
        sigma=statistics.covariance.numpy(),
        network=np.array(network.digest),
        protocol=np.array(network.about),
        images=np.array(images),
    )
    write_atomic(path, buffer.getvalue())


def refuse_pickle(name: str) -> None:
    """Raise UsageError for a file that would have to be unpickled."""
    if not name.lower().endswith(".npz"):
        raise UsageError(
            f"--data {name}: a pickle, which may run code, is not read", "np.savez(FILE, mu=..., sigma=...) where you trust it"
        )
