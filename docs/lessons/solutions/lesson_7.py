"""Lesson 7, solved."""

import math

import numpy as np


def draw(one, other, figure, draws):
    """Sums first, then the figure, then the mean over seeds. Were questions drawn anew for each seed, their
    luck would average out, as if there were three times as many."""
    random = np.random.default_rng(0)
    seeds, questions, _ = one.shape
    gaps = []
    for _ in range(draws):
        asked = random.integers(0, questions, questions)
        drawn = random.integers(0, seeds, seeds)
        per_seed = figure(one[:, asked].sum(1)) - figure(other[:, asked].sum(1))
        gaps.append(per_seed[drawn].mean())
    return np.array(gaps)


def needed(one, other, points):
    """1.96 * sqrt(variance / n) <= points / 100, solved for n. Only questions of which one model is right and
    the other is not add to the variance."""
    variance = np.var(np.subtract(one, other))
    return max(1, math.ceil(variance * (196 / points) ** 2))


def holm(p_values, chance=0.05):
    """chance / m for all would be enough (Bonferroni). But where the smallest is no accident, only m - 1 are
    left that could be one."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    remain = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > chance / (len(p_values) - rank):
            break
        remain[i] = True
    return remain
