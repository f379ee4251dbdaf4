"""What the exercises of lesson 1 have to fulfil."""

import itertools
import random
from collections import Counter

import pytest
from lesson_1 import languages_of_words, probability, table

LANGUAGES = ("en", "sw", "ko")
COUNTS = {"": Counter("aaabbc"), "t": Counter("hhha"), "xt": Counter("h")}


def test_1_probability_by_hand():
    no_context = (3 + 3 * 0.01) / (6 + 3)                     # a: 3 of 6 letters, 3 kinds
    after_t = (1 + 2 * no_context) / (4 + 2)
    assert probability("a", [""], COUNTS, new=0.01) == pytest.approx(no_context)
    assert probability("a", ["", "t"], COUNTS, new=0.01) == pytest.approx(after_t)
    assert probability("a", ["", "t", "xt"], COUNTS, new=0.01) == pytest.approx(after_t / 2)
    assert probability("a", ["", "t", "qt"], COUNTS, new=0.01) == pytest.approx(after_t)


def test_1_probability_of_all_letters_is_one():
    letters = "abcdefgh"
    total = sum(probability(letter, ["", "t", "xt"], COUNTS, new=1 / len(letters)) for letter in letters)
    assert total == pytest.approx(1)


def path_score(path, evidence, change):
    changes = sum(a != b for a, b in zip(path, path[1:]))
    return sum(word[language] for word, language in zip(evidence, path)) - change * changes


@pytest.mark.parametrize("change", [0.0, 2.0, 50.0])
def test_2_languages_of_words(change):
    """Against all paths, tried one by one."""
    generator = random.Random(0)
    for words in (1, 2, 6):
        evidence = [{language: generator.gauss(0, 3) for language in LANGUAGES} for _ in range(words)]
        paths = itertools.product(LANGUAGES, repeat=words)
        most = max(path_score(path, evidence, change) for path in paths)
        found = languages_of_words(evidence, change)
        assert len(found) == words and path_score(found, evidence, change) == pytest.approx(most)


def test_3_table():
    lion = {"en": "The lion is a mammal.", "sw": "Simba ni mamalia."}
    replies = ["Simba  ni mamalia", "simba ni ndege.", "The lion is a MAMMAL.", "The lion is a bird.",
               "The lion is a mammal。"]
    asked = ["sw", "sw", "sw", "sw", "en"]
    found = table(replies, [lion] * 5, asked, lambda reply: "en" if "lion" in reply else "sw")
    assert Counter(found) == Counter({(True, True): 2, (True, False): 1, (False, True): 1, (False, False): 1})
