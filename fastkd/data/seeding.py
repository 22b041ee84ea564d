"""Random numbers that depend on what they are for, not on what was drawn before."""

import numpy as np

SPLIT, SHUFFLE, AUGMENT, FAKE, WORKERS, NOISE = range(6)


def stream(seed: int, purpose: int, *key: int) -> np.random.Generator:
    """A generator of its own for each (seed, purpose, *key)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *key)))


def check_seed(operation: str, seed: int) -> None:
    """Raises ValueError where `seed` is not an integer of at least 0."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"{operation}: seed must be an integer of at least 0, got {seed!r}")


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A seeded permutation of range(len(labels)) each prefix of which holds every class in proportion.

    labels [N] -> int64 [N]. A class has within one image its share of each prefix, up to ties.
    """
    shuffled = stream(seed, SPLIT).permutation(len(labels))
    place = np.empty(len(labels))  # how far into its class an image comes, in (0, 1)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels[shuffled] == label)
        place[of_class] = (np.arange(len(of_class)) + 0.5) / len(of_class)
    return shuffled[np.argsort(place, kind="stable")]


def noisy_labels(labels: np.ndarray, share: float, classes: int, seed: int) -> np.ndarray:
    """Labels [N] of which each is, with probability `share`, one of the other classes, each as likely.

    An image's label depends on seed, share and its place alone. What is wrong at one share is wrong, and the same, at
    each larger one.
    """
    draws = stream(seed, NOISE).random((len(labels), 2))
    other = (labels + 1 + (draws[:, 1] * (classes - 1)).astype(labels.dtype)) % classes
    return np.where(draws[:, 0] < share, other, labels)
