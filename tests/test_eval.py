"""eval.py: what counts as correct, the language of a reply, and the figures of the report."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import eval as evaluation
import report
from conftest import write_checkpoint

ROOT = Path(__file__).parents[1]
LANGUAGES = ("de", "en", "id", "ko", "sw", "yo", "zh")
TEXTS = {"en": ["The lion eats meat.", "What is the capital of France?", "The river is long."],
         "sw": ["Simba anakula nyama.", "Mji mkuu wa Ufaransa ni upi?", "Mto ni mrefu."],
         "ko": ["사자는 고기를 먹어요.", "프랑스의 수도는 어디예요?", "강은 길어요."]}


@pytest.mark.parametrize("reply, expected", [
    ("The lion eats meat", "The lion eats meat."), ("  the LION\n eats meat!", "The lion eats meat."),
    ("狮子吃肉", "狮子吃肉。"), ("Kìnnìún ń jẹ ẹran".replace("ì", "i\u0300"), "Kìnnìún ń jẹ ẹran.")])
def test_case_spaces_final_punctuation_and_unicode_form_do_not_count(reply, expected):
    assert evaluation.normalise(reply) == evaluation.normalise(expected)


@pytest.mark.parametrize("reply", ["The lion eats", "The lion, eats meat.", "Lion eats meat.", "Kìnnìún n jẹ ẹran"])
def test_anything_else_counts(reply):
    assert evaluation.normalise(reply) not in map(evaluation.normalise, ["The lion eats meat.", "Kìnnìún ń jẹ ẹran."])


def test_reply_language_knows_scripts_and_words_and_abstains_without_letters():
    languages = evaluation.fit_languages(TEXTS)
    assert evaluation.reply_language("The capital is Paris.", languages)[0] == "en"
    assert evaluation.reply_language("Mji mkuu ni Paris.", languages)[0] == "sw"
    assert evaluation.reply_language("개는 물을 마셔요.", languages)[0] == "ko"          # no syllable of it seen but by script
    for text in ("", "42", "?!", "\U0001f600 3.14"):
        assert evaluation.reply_language(text, languages) == (None, 0.0)


def test_reply_language_abstains_when_languages_fit_equally():
    languages = evaluation.fit_languages({"aa": ["mama papa"], "bb": ["mama papa"]})
    assert evaluation.reply_language("mama", languages) == (None, pytest.approx(0.5))


def test_posteriors_are_bayes_rule_over_the_n_grams():
    languages = evaluation.fit_languages({"aa": ["ab"], "bb": ["ac"]})
    # of "ab" the languages differ in " ab ", " ab", "ab ", "ab", "b " (and "b"), seen once in aa, never in bb
    counts = {language: [sum(c.values()) for c in counters] for language, counters in languages.counts.items()}
    assert counts == {"aa": [2, 2, 3, 2, 1], "bb": [2, 2, 3, 2, 1]}
    grams = {1: 1, 2: 2, 3: 2, 4: 1}                      # "b"; "ab" "b "; " ab" "ab "; " ab "
    ratio = sum(n * math.log((1 + evaluation.UNSEEN) / evaluation.UNSEEN) for n in grams.values())
    expected = 1 / (1 + math.exp(-evaluation.INDEPENDENCE * ratio))
    assert evaluation.reply_language("ab", languages)[1] == pytest.approx(expected)


@pytest.mark.slow
def test_reply_language_on_real_news(shared):
    lines = [json.loads(line) for line in (shared / "parallel" / "ntrex_1000.jsonl").read_text().splitlines()]
    languages = evaluation.fit_languages({code: [line[code] for line in lines[:500]] for code in LANGUAGES})
    found = [(code, evaluation.reply_language(line[code], languages)[0]) for line in lines[500:] for code in LANGUAGES]
    assert sum(code == guess for code, guess in found) / len(found) >= 0.97
    pairwise = [evaluation.fit_languages({c: [line[c] for line in lines[:500]] for c in ("en", code)}) for code in ("sw", "id")]
    for code, model in zip(("sw", "id"), pairwise):
        right = sum(evaluation.reply_language(line[c], model)[0] == c for line in lines[500:] for c in ("en", code))
        assert right / 1000 >= 0.995


def test_scores_leave_equal_responses_out_of_the_language_figure(checkpoint, tmp_path, monkeypatch):
    rows = [{"row_id": str(i), "en": {"prompt": p, "response": r}, "sw": {"prompt": q, "response": s}} for i, (p, r, q, s) in
            enumerate([("a", "The lion eats meat.", "b", "Simba anakula nyama."), ("c", "Paris", "d", "paris."),
                       ("e", "The river is long.", "f", "Mto ni mrefu.")])]
    replies = {"a": "The lion eats meat", "b": "The lion eats meat.", "c": "Paris", "d": "Paris", "e": "Mto", "f": "Mto ni mrefu"}
    monkeypatch.setattr(evaluation, "answer", lambda model, tokenizer, questions, *_: [replies[q] for q in questions])
    tokenizer = SimpleNamespace(fingerprint="0123456789abcdef0")
    scores = evaluation.answer_and_score(None, tokenizer, rows, ("en", "sw"), evaluation.fit_languages(TEXTS), 8, None,
                                         tmp_path / "answers.jsonl")
    assert (scores["en"]["correct"], scores["en"]["right_language"], scores["en"]["n_language"]) == (66.67, 50.0, 2)
    assert (scores["sw"]["correct"], scores["sw"]["right_language"], scores["sw"]["n"]) == (66.67, 50.0, 3)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6


def test_binomial_error_is_the_formula_and_never_0_at_the_ends():
    assert report.binomial_error(50, 100) == pytest.approx(5.0)
    assert 0 < report.binomial_error(100, 100) < 1 and 0 < report.binomial_error(0, 30) < 3


def test_answers_equal_generate_one_at_a_time(checkpoint):
    import model as llama
    model, tokenizer = llama.load(checkpoint), data.load_tokenizer(checkpoint)
    questions = ["What is it?", "Mji mkuu wa Ufaransa ni upi?", "x"]
    together = evaluation.answer(model, tokenizer, questions, 9)
    assert together == [evaluation.answer(model, tokenizer, [question], 9)[0] for question in questions]


def ask(*arguments, typed=""):
    return subprocess.run([sys.executable, "eval.py", "ask", *map(str, arguments)], cwd=ROOT, input=typed, text=True,
                          capture_output=True)


def test_ask_answers_a_question_and_holds_a_conversation(tmp_path):
    path = write_checkpoint(tmp_path)
    one = ask("--model", path, "--max-tokens", 5, "Where is the lion?")
    assert one.returncode == 0 and one.stderr == ""
    talk = ask("--model", path, "--max-tokens", 5, typed="Where is the lion?\n\nnever read\n")
    assert talk.returncode == 0 and talk.stdout.count("> ") == 2 and one.stdout.strip() in talk.stdout


def test_ask_refuses_what_is_not_there_in_one_line(tmp_path):
    for arguments in (["--model", tmp_path / "none"], ["--adapter", tmp_path / "none"]):
        result = ask(*arguments, "hello")
        assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
