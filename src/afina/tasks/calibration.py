"""Temperature scaling: one number that makes probabilities mean what they say, and changes no answer.

A model that is right in 80 % of the rows it is 95 % sure of is overconfident. Dividing its scores by one temperature, chosen
on the validation rows by their likelihood, mends most of that (Guo et al. 2017, https://arxiv.org/abs/1706.04599). The
likelihood is concave in 1 / temperature, so its best point is found by halving. Scores are known up to a constant
from probabilities, so all of it works on probabilities. A yes or no is a choice of two classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["as_two_classes", "calibration_error", "compared", "fit_temperature", "tempered"]

LOWEST, HIGHEST = 0.1, 10.0  # temperatures that are looked at
BINS = 15
_TINY = 1e-300


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities `[..., classes]` of scores divided by `temperature`; by its inverse, what they were before."""
    scores = np.log(np.clip(probabilities, _TINY, 1.0)) / temperature
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def as_two_classes(probabilities: np.ndarray) -> np.ndarray:
    """`[..., 2]`, no and yes, from probabilities of yes `[...]`."""
    return np.stack([1.0 - probabilities, probabilities], axis=-1)


def fit_temperature(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """The temperature under which `targets [rows]` are likeliest, from `probabilities [rows, classes]`.

    1.0 where no answer is wrong, since then the rows say nothing of how often the model errs.
    """
    targets = np.asarray(targets)
    if not len(targets) or bool((probabilities.argmax(axis=1) == targets).all()):
        return 1.0
    scores = np.log(np.clip(probabilities, _TINY, 1.0))
    chosen = scores[np.arange(len(targets)), targets]
    low, high = np.log(1 / HIGHEST), np.log(1 / LOWEST)  # of the inverse temperature; the slope of the loss rises in it
    for _ in range(60):
        middle = (low + high) / 2
        mean = (tempered(probabilities, float(np.exp(-middle))) * scores).sum(axis=1)
        low, high = (low, middle) if float((mean - chosen).sum()) > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: how far confidence and share of right answers are apart, on average over the rows.

    Rows are put into `bins` of equal width by the probability of their answer.
    """
    answers = probabilities.argmax(axis=1)
    confidence, right = probabilities[np.arange(len(answers)), answers], answers == np.asarray(targets)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    apart = np.bincount(place, confidence, bins) - np.bincount(place, right.astype(float), bins)
    return float(np.abs(apart).sum() / len(answers))


def compared(probabilities: np.ndarray, targets: np.ndarray, temperature: float) -> dict[str, Any]:
    """Loss and calibration error of `probabilities [rows, classes]`, and of what they were before the temperature."""

    def figures(p: np.ndarray) -> dict[str, float]:
        chosen = np.clip(p[np.arange(len(targets)), targets], 1e-12, 1.0)
        return {"loss": float(-np.log(chosen).mean()), "calibration_error": calibration_error(p, targets)}

    before = tempered(probabilities, 1 / temperature)
    return {"temperature": temperature, "before": figures(before), "after": figures(probabilities)}
