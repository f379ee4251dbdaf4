"""What the exercises of lesson 6 have to fulfil."""

import itertools
import json

import pytest
from lesson_6 import banned, complete, put_back


def repeats(words, n):
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) < len(grams)


@pytest.mark.parametrize("n", [2, 3])
def test_1_banned(n):
    """Against all short texts without a repeat, each with every next word."""
    for length in range(7):
        for words in map(list, itertools.product("ab", repeat=length)):
            if not repeats(words, n):
                wanted = {word for word in "ab" if repeats(words + [word], n)}
                assert set(banned(words, n)) == wanted


@pytest.mark.parametrize("text, wanted", [
    ("Ona [1], tumia [0].", "Ona b[0], tumia `x`."),
    ("Ona [1].", None),
    ("Ona [1], [0], [0].", None),
    ("Ona [1], [0], [2].", None),
])
def test_2_put_back(text, wanted):
    assert put_back(text, ["`x`", "b[0]"]) == wanted


ROWS = ["one", "two", "three", "four"]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_3_complete_makes_no_row_twice_wherever_it_was_killed(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert complete(path, ROWS, str.upper) == ["ONE", "TWO", "THREE", "FOUR"]
    whole = path.read_bytes()
    for kept in range(len(whole) + 1):
        path.write_bytes(whole[:kept])
        made = []
        done = complete(path, ROWS, lambda row: made.append(row) or row.upper())
        assert done == ["ONE", "TWO", "THREE", "FOUR"]
        assert len(made) == len(ROWS) - whole[:kept].count(b"\n")
        assert {line["source"]: line["text"] for line in lines(path)} == dict(zip(ROWS, done))
        assert path.read_bytes().endswith(b"\n")


def test_3_complete_keeps_what_was_made_before_a_failure_and_rows_of_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    complete(path, ["zero"], str.upper)

    def fail_at_three(row):
        if row == "three":
            raise RuntimeError("power cut")
        return row.upper()

    with pytest.raises(RuntimeError):
        complete(path, ROWS, fail_at_three)
    assert [line["source"] for line in lines(path)] == ["zero", "one", "two"]
    assert complete(path, ROWS[::-1], str.upper) == ["FOUR", "THREE", "TWO", "ONE"]
    assert len(lines(path)) == 5
