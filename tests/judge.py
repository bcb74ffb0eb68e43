"""The outside judge of the built-in digits: knows scikit-learn's pictures and nothing of distill's networks.

    distill sample --model digits --num 2000 --format npz --out runs/judge && python -m tests.judge runs/judge/samples.npz

accuracy   of a support-vector classifier (gamma 0.001) trained on scikit-learn's 8x8 digits, applied to the maximum over
           the channels averaged down to 8x8, against the label that was asked for
frechet    distance on those 64 pixels scaled to [-1, 1], against all 1,797 real ones enlarged and averaged down likewise
nearest    median distance to the nearest real picture, over the same median between real pictures (under 0.9: memorised)
spread     mean standard deviation of a pixel inside a class, over that of the real pictures
hue        largest deviation of a twelfth of the colour circle from its share, in standard deviations
"""

from __future__ import annotations

import colorsys
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.svm import SVC


def features(grey: np.ndarray) -> np.ndarray:
    """(N, 16, 16) in [0, 1] -> (N, 64)."""
    return F.avg_pool2d(torch.as_tensor(grey, dtype=torch.float64)[:, None], 2).flatten(1).numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    one, other = np.cov(a.T), np.cov(b.T)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * sqrtm(one @ other).real))


def nearest(a: np.ndarray, b: np.ndarray, skip: int = 0) -> float:
    distances = torch.cdist(torch.from_numpy(a), torch.from_numpy(b))
    return distances.sort(1).values[:, skip].median().item()


def spread(x: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([x[labels == c].std(0).mean() for c in range(10)]))


def judge(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measure uint8 images (N, 16, 16, 3) that were asked to show `labels` (N,)."""
    pixels, classes = load_digits(return_X_y=True)
    small = torch.as_tensor(pixels / 16).view(-1, 1, 8, 8)
    real = features(F.interpolate(small, size=16, mode="bilinear", align_corners=False)[:, 0].numpy())
    fake = features(images.max(3) / 255)
    ink = images.reshape(len(images), -1, 3).sum(1, dtype=np.float64)
    hues = [colorsys.rgb_to_hsv(*(colour / max(1, colour.max())))[0] for colour in ink]
    counts = np.histogram(hues, 12, (0, 1))[0]
    share = len(hues) / 12
    return {
        "images": len(images),
        "accuracy": float((SVC(gamma=0.001).fit(pixels, classes).predict(fake * 16) == labels).mean()),
        "frechet": frechet(2 * fake - 1, 2 * real - 1),
        "nearest": nearest(fake, real) / nearest(real, real, skip=1),
        "spread": spread(fake, labels) / spread(real, classes),
        "hue": float(np.abs(counts - share).max() / (share * 11 / 12) ** 0.5),
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with np.load(name) as stored:
            print(json.dumps({"file": name, **{k: round(v, 4) for k, v in judge(stored["arr_0"], stored["arr_1"]).items()}}))
