"""What the exercises of lesson 7 have to fulfil."""

import itertools
import math

import numpy as np
import pytest
from lesson_7 import draw, holm, needed

from evals.figures import ratio
from lab.figures import FIGURES, bootstrap


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def bits(gaps):
    """Counts (seeds, questions, 2) of bits and bytes, of texts of different lengths."""
    size = np.random.default_rng(5).integers(5, 30, gaps.shape[1])
    sizes = np.broadcast_to(size, gaps.shape)
    return np.stack(((1 + gaps) * sizes, sizes), -1)


def test_1_draw_pairs_the_questions():
    """Where one costs half a bit a byte more on every question, it does so in every draw."""
    one = noise(3, 40)
    gaps = draw(bits(one + 0.5), bits(one), ratio, draws=50)
    assert gaps.shape == (50,)
    np.testing.assert_allclose(gaps, 0.5)


def test_1_draw_takes_the_same_questions_for_every_seed():
    """Three times the same runs know no more than one of them."""
    one, other = noise(1, 60), noise(1, 60, seed=1)
    single = draw(bits(one), bits(other), ratio, draws=3000).std()
    triple = draw(bits(one.repeat(3, 0)), bits(other.repeat(3, 0)), ratio, draws=3000).std()
    assert triple == pytest.approx(single, rel=0.1)


def test_1_draw_takes_seeds_with_replacement():
    """Every question alike, and figures of the seeds that differ by 0, 0 and 15: a draw's mean says how often
    it has the third. The mean is one of figures: that of the sums of all seeds would be another."""
    gaps = np.array([0.0, 0.0, 3.0])[:, None].repeat(20, 1)
    found = draw(bits(gaps), bits(0 * gaps), lambda sums: ratio(sums) ** 2, draws=3000)
    for times, share in enumerate((8 / 27, 12 / 27, 6 / 27, 1 / 27)):
        assert np.isclose(found, 5 * times).mean() == pytest.approx(share, abs=0.03)


def test_1_draw_gives_the_interval_of_the_lab():
    one, other = bits(noise(3, 100)), bits(noise(3, 100, seed=1) + 0.2)
    figure = next(figure for figure in FIGURES if figure.name == "bits")
    their_low, their_high = bootstrap(figure, np.stack((one, other), 1))
    low, high = np.quantile(draw(one, other, ratio, draws=4000), (0.025, 0.975))
    width = their_high - their_low
    assert low == pytest.approx(their_low, abs=0.08 * width)
    assert high == pytest.approx(their_high, abs=0.08 * width)


@pytest.mark.parametrize("wins, losses, same", [(9, 7, 168), (30, 1, 10), (5, 0, 5), (0, 0, 12)])
def test_2_needed(wins, losses, same):
    """Against a walk through all numbers of questions."""
    one = np.array([1] * wins + [0] * losses + [0, 1] * (same // 2))
    other = np.array([0] * wins + [1] * losses + [0, 1] * (same // 2))
    total = len(one)
    mean = (wins - losses) / total
    square = (wins + losses) / total
    for points in (4, 10):
        questions = 1
        while 196 * math.sqrt((square - mean ** 2) / questions) > points:
            questions += 1
        assert needed(one, other, points) == questions


def remains(i, p_values, chance):
    """By the definition that Holm's way is a short cut of: in every group that it belongs to, the smallest p
    is small enough for a group of that size."""
    others = [p for k, p in enumerate(p_values) if k != i]
    groups = [(p_values[i], *some) for size in range(len(p_values))
              for some in itertools.combinations(others, size)]
    return all(min(group) <= chance / len(group) for group in groups)


def test_3_holm():
    random = np.random.default_rng(0)
    for count in range(1, 7):
        for _ in range(40):
            p_values = (random.random(count) ** 4).tolist()
            assert list(holm(p_values, 0.1)) == [remains(i, p_values, 0.1) for i in range(count)]
    assert list(holm([0.5, 0.001, 0.02, 0.02])) == [False, True, False, False]
