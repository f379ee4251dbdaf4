"""evals/figures.py: chrF against sacrebleu, errors against the bootstrap and formulas, pairs by question."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest

from evals import figures
from evals.figures import (FIGURES, MEAN, SHARE, Sample, binomial_error, chrf, chrf_counts, is_loop,
                           is_short, languages_told, measure, paired_difference, question_keys)

ODD = ["", " ", "a", "  a b\tc\n", "猫", "狮子吃肉。", "Kìnnìún ń jẹ ẹran.", "n\u0303\u0301 e\u0301", "\u200b",
       "👩\u200d👩\u200d👧 ok", "The lion eats meat.", "the LION eats", "aaaaaaaaaa", "aaaa", "ไม่มีอะไร",
       "x" * 300, "नमस्ते दुनिया।"]


def answer_line(number=0, reply="r", expected="e", **more):
    return {"row_id": str(number), "language": "sw", "prompt": f"{number}?", "reply": reply,
            "expected": expected, "correct": reply == expected, "reply_language": "sw", "judged": True} | more


def shares(values, first=0):
    return Sample(SHARE, {(str(i),): (value, 1) for i, value in enumerate(values, first)})


def means(values):
    return Sample(MEAN, {(str(i),): (value, 1) for i, value in enumerate(values)})


# ------------------------------------------------------------------------------------------------------- chrF

def test_chrf_of_a_sentence_is_sacrebleus_for_odd_texts():
    metric = pytest.importorskip("sacrebleu.metrics").CHRF()
    for reply, expected in itertools.product(ODD, ODD):
        assert float(chrf(np.array(chrf_counts(reply, expected)))) == pytest.approx(
            metric.sentence_score(reply, [expected]).score, abs=1e-9), (reply, expected)


def test_chrf_of_a_corpus_is_sacrebleus_also_where_answers_are_empty():
    metric = pytest.importorskip("sacrebleu.metrics").CHRF()
    chance = random.Random(3)
    for size in (1, 2, 9):
        pairs = [(chance.choice(ODD), chance.choice(ODD)) for _ in range(size)]
        lines = [answer_line(i, *pair) for i, pair in enumerate(pairs)]
        replies, expected = map(list, zip(*pairs))
        assert measure(lines)["chrf"].value == pytest.approx(
            metric.corpus_score(replies, [expected]).score, abs=1e-9)


def test_chrf_by_hand():
    # "ab" against "abc": 1-grams 2 of 2 and of 3, 2-grams 1 of 1 and of 2; the reply has no 3-gram
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert float(chrf(np.array(chrf_counts("ab", "abc")))) == pytest.approx(
        100 * 5 * precision * recall / (4 * precision + recall))


# ---------------------------------------------------------------------------------------------------- figures

def test_binomial_error_is_the_formula_and_never_0_at_the_ends():
    assert binomial_error(50, 100) == pytest.approx(5.0)
    assert 0 < binomial_error(100, 100) < 1 and 0 < binomial_error(0, 30) < 3


def test_figures_of_answers_by_hand():
    lines = [answer_line(0, "abcd", "abcd", ends=True, reference_nll=8 * math.log(2)),
             answer_line(1, "abcdef", "猫", ends=False, reference_nll=6 * math.log(2), reply_language="en"),
             answer_line(2, "", "xy", ends=True, reference_nll=0.0, judged=False)]
    found = {name: sample.value for name, sample in measure(lines).items()}
    assert found["correct"] == pytest.approx(100 / 3) and found["right_language"] == 50
    assert found["bits_per_byte"] == pytest.approx((8 + 6) / (4 + 3 + 2))
    assert found["length"] == pytest.approx(100 * 10 / 7) and found["ends"] == pytest.approx(200 / 3)


def test_what_answers_do_not_tell_is_no_figure():
    assert set(measure([answer_line(judged=False)])) == {"correct", "chrf", "length"}    # of an older run
    assert set(measure([answer_line(expected="", reply="a")])) == {"correct", "right_language", "chrf"}
    assert measure([]) == {}


def test_exact_answers_are_asked_only_where_every_expected_answer_is_short():
    assert is_short("x" * 60) and not is_short("x" * 61) and is_short("猫" * 30) and not is_short("猫" * 31)
    lines = [answer_line(i, expected="Paris") for i in range(3)]
    assert "correct" in measure(lines)
    assert "correct" not in measure([*lines, answer_line(3, expected="a long answer " * 9)])


@pytest.mark.parametrize("name", ["chrf", "length", "bits_per_byte"])
def test_the_jackknife_error_agrees_with_the_bootstrap(name):
    chance = random.Random(5)
    words = "simba ni mnyama mkubwa na anakula nyama kila siku".split()
    lines = [answer_line(i, " ".join(chance.sample(words, chance.randint(1, 8))), " ".join(words[:5]),
                         reference_nll=chance.uniform(1, 30)) for i in range(150)]
    sample = measure(lines)[name]
    draws = figures.drawn_questions(len(lines)) @ sample.matrix
    assert sample.error == pytest.approx(float(sample.figure.of_sums(draws).std()), rel=0.1)


def test_the_error_of_a_mean_is_the_samples_and_of_one_question_unknown():
    values = [3.0, 4.0, 8.5, 1.0]
    assert means(values).error == pytest.approx(statistics.stdev(values) / 2)
    assert means([3.0]).error is None and measure([answer_line()])["chrf"].error is None


def test_replies_in_other_languages_and_short_ones_are_counted_apart():
    long = "simba ni mnyama mkubwa sana"
    found = [("sw", long), ("en", long), (None, "42"), ("mixed", long), ("other", long), ("sw", "ndiyo"),
             ("en", "x" * 19), ("sw", "x" * 20)]
    lines = [answer_line(i, reply, reply_language=language) for i, (language, reply) in enumerate(found)]
    lines += [answer_line(9, judged=False, reply_language="en")]
    assert languages_told(lines) == {"n_language": 8, "elsewhere": 2, "unsure": 1, "mixed": 1, "other": 1,
                                     "short": 3, "short_right": 1}


# ------------------------------------------------------------------------------------------------- difference

def test_questions_are_known_again_by_row_and_texts_and_twins_by_their_number():
    lines = [answer_line(0), answer_line(0), answer_line(0, expected="f"), answer_line(1)]
    keys = question_keys(lines)
    assert len(set(keys)) == 4 and question_keys(lines[1:]) == [keys[0], *keys[2:]]


def test_questions_with_one_row_id_are_paired_one_by_one():
    one = [answer_line(0, "a", "a", prompt="first?"), answer_line(0, "b", "a", prompt="second?")] * 5
    other = [answer_line(0, "b", "a", prompt="first?"), answer_line(0, "a", "a", prompt="second?")] * 5
    found = paired_difference([measure(one)["correct"]], [measure(other)["correct"]])
    assert found.questions == 10 and found.value == 0 and not found.nowhere and found.error > 10
    again = paired_difference([measure(one)["correct"]], [measure(one[::-1])["correct"]])
    assert again.nowhere                                      # another order of the same questions


def test_other_questions_under_the_same_row_ids_are_not_paired():
    other = [answer_line(i, prompt="another?") for i in range(9)]
    assert paired_difference([measure([answer_line(i) for i in range(9)])["chrf"]],
                             [measure(other)["chrf"]]) is None


def test_paired_bootstrap_finds_the_difference_and_covers_the_truth():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(20):
        one = [shares(rng.random(150) < 0.6) for _ in range(2)]
        other = [shares(rng.random(150) < 0.5)]
        found = paired_difference(one, other)
        assert found.value == pytest.approx(np.mean([sample.value for sample in one]) - other[0].value)
        covered += found.low <= 10 <= found.high
    assert covered >= 17


def test_paired_bootstrap_equals_the_normal_interval_of_the_paired_differences():
    rng = np.random.default_rng(2)
    one, other = (rng.normal(mean, 5, 400) for mean in (3, 2))
    error = statistics.stdev(one - other) / 20
    found = paired_difference([means(one)], [means(other)])
    assert found.error == pytest.approx(error, rel=0.05)
    assert found.low == pytest.approx((one - other).mean() - 1.96 * error, abs=0.1)
    assert found.high == pytest.approx((one - other).mean() + 1.96 * error, abs=0.1)


@pytest.mark.parametrize("better, worse, same", [(40, 10, 50), (0, 0, 30), (184, 0, 0), (3, 1, 0)])
def test_the_error_of_paired_shares_is_agresti_and_mins(better, worse, same):
    n = better + worse + same
    one, other = [1] * better + [0] * worse + [1] * same, [0] * better + [1] * worse + [1] * same
    wanted = math.sqrt(better + worse + 1 - (better - worse) ** 2 / (n + 2)) / (n + 2)
    found = paired_difference([shares(one)], [shares(other)])
    assert found.value == pytest.approx(100 * (better - worse) / n)
    assert found.error == pytest.approx(100 * wanted, rel=0.06)


@pytest.mark.parametrize("values, verdict", [
    ([1] * 9, "too few questions to tell"), ([1] * 10, ""), ([1] * 40, ""), ([1, 0] * 20, ""), ([1] + [0] * 39, "a tie"),
    ([0] * 40, "a tie")])
def test_a_difference_whose_interval_holds_0_is_a_tie(values, verdict):
    assert paired_difference([shares(values)], [shares([0] * len(values))]).verdict == verdict


def test_seeds_are_averaged_and_only_common_questions_count():
    one = [shares([1, 1, 0, 0], first=2), shares([0, 1, 0, 0], first=2)]
    found = paired_difference(one, [shares([0, 1, 1])])
    assert found.questions == 1 and found.value == pytest.approx(50 - 100)
    assert paired_difference([shares([1])], [shares([1], first=1)]) is None


def test_every_figure_of_a_line_has_a_name_of_its_own():
    assert len({figure.name for figure in FIGURES}) == len({figure.title for figure in FIGURES}) == 6


@pytest.mark.parametrize("text, loops", [
    ("one two " + "and on and on " * 9, True),
    ("The tide. " * 3, True),
    ("狮子吃肉。" * 5 + "狮\ufffd", True),
    ("Total: 1000000000", False),
    (" " * 30, False),
    ("Era uma vez. Era uma vez. Era outra vez", False),
    ("A reply of some length that is cut in the middle of a word ...", False),
    ("水は青い。" * 3, True),
    ("52. 53. 54. 55. 56. 57. 58. 59.", False),
    ("a" * 15, True),
    ("ab", False),
    ("", False)])
def test_a_loop_is_three_times_the_same_at_the_end_and_more_than_a_few_dots(text, loops):
    assert is_loop(text) == loops
