"""evals/report.py: the report of one run, and what changed in it in a sentence."""

import re

import pytest

from evals.report import closing_lines, heldout_section, report_text, side, table

LONG = "simba ni mnyama mkubwa sana"


def lines_of(method, languages=("en", "sw"), n=20, expected="Paris", **more):
    return [{"row_id": str(i), "language": language, "prompt": f"{language} {i}?", "reply": f"{LONG} {i}",
             "expected": expected, "correct": method == "clo", "judged": i > 0,
             "reply_language": "en" if method == "base" else language} | more
            for language in languages for i in range(n)]


def report_of(answers, languages=("en", "sw"), **more):
    scores = {"heldout": {"nll_en": 0.5, "nll_tgt": 2.0}, "train_seconds": 3.2,
              "decoding": {"temperature": 0}} | more
    report = {"lang": ",".join(languages[1:]), "samples": 9, "seed": 0,
              "methods": {name: scores for name in answers}}
    return report_text(report, answers, languages[0])


def cells(text, *start):
    """The cells of the table row that begins with these."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    return next(row[len(start):] for row in rows if tuple(row[:len(start)]) == start)


def test_a_report_has_a_row_for_each_language_and_method():
    answers = {name: lines_of(name, ends=True, reference_nll=5.0) for name in ("base", "sft", "clo")}
    text = report_of(answers)
    assert cells(text, "language") == [
        "method", "correct", "in language", "chrF", "bits/byte", "length", "ends"]
    assert cells(text, "sw", "clo")[:2] == ["100.0 ± 3.4", "100.0 ± 3.6"]
    assert cells(text, "sw", "base")[:2] == ["0.0 ± 3.4", "0.0 ± 3.6"]
    assert "Answers to 20 questions in each language" in text
    assert "left out of the language figures: 1 of en, 1 of sw" in text
    assert "Training took sft 3 s, clo 3 s, reference passes and validations included (not those of a" in text


def test_open_ended_answers_have_no_exact_figure_and_older_runs_what_they_hold():
    text = report_of({name: lines_of(name, expected="a long answer " * 9) for name in ("base", "clo")})
    assert cells(text, "language") == ["method", "in language", "chrF", "length"]
    assert "- correct:" not in text


def test_a_language_with_long_answers_has_a_line_where_others_have_exact_answers():
    answers = {"base": lines_of("base", ("en",)) + lines_of("base", ("sw",), expected="neno " * 30)}
    assert cells(report_of(answers), "sw", "base")[0] == "-"


def test_some_of_the_questions_are_said_to_be_some():
    answers = {name: lines_of(name) for name in ("base", "clo")}
    assert "Answers to the first 20 of 400 questions" in report_of(answers, questions=400)


def test_replies_in_another_language_and_short_ones_are_apart():
    lines = lines_of("clo", n=5)
    lines[1]["reply_language"], lines[2]["reply_language"], lines[3]["reply"] = "other", None, "ndiyo"
    text = report_of({"base": lines})
    assert cells(text, "en", "base", "4") == ["0", "1", "0", "1", "1", "1"]
    assert cells(text, "language", "method", "replies")[-2:] == ["under 20 letters", "of them right"]


def test_replies_that_were_cut_are_counted_and_those_in_a_loop_apart():
    lines = lines_of("clo", n=5, ends=True)
    assert "Replies cut" not in report_of({"base": lines})
    for line, reply in zip(lines[:3], ("Ni nini? " * 40, LONG, "na " * 70)):
        line |= {"ends": False, "reply": reply}
    assert "a larger limit would hardly end: en base 3 (2)." in report_of({"base": lines})


def test_several_targets_have_held_out_figures_of_their_own():
    methods = {"clo": {"heldout": {"nll_en": 0.5, "nll_tgt": 2.0, "nll_tgt_sw": 3.0, "nll_tgt_yo": 4.0}}}
    text = heldout_section(methods, ["en", "sw", "yo"], "sw,yo")[1]
    assert [cells(text, language, "clo")[0] for language in ("en", "sw", "yo")] == ["0.500", "3.000", "4.000"]
    assert [side(language, "en", "sw") for language in ("en", "sw")] == ["en", "tgt"]


def test_examples_stand_side_by_side_on_lines_of_their_own():
    answers = {name: lines_of(name, n=3, reply="one\n\n- two " + "x" * 400) for name in ("base", "clo")}
    text = report_of(answers)
    assert text.count("\n- base: one - two xxx") == 4 and text.count("- expected: Paris") == 4
    assert max(len(line) for line in text.splitlines() if line.startswith("- base")) < 320


# ------------------------------------------------------------------------------------------- what has changed

def test_the_closing_sentence_says_what_changed_with_its_error_and_what_is_a_tie():
    answers = {name: lines_of(name) for name in ("base", "sft", "clo")}
    english, swahili, note = closing_lines(answers)
    assert english.startswith("en: clo against base: replies in en +0.0 ± ") and "standard error" in note
    base, sft = swahili.split("; against sft: ")
    error = r"(\d\.\d) points"
    found = re.match(rf"sw: clo against base: replies in sw \+100\.0 ± {error}, correct \+100\.0 ± {error}", base)
    # Agresti and Min: of 19 and of 20 questions all changed
    assert list(map(float, found.groups())) == pytest.approx([8.0, 7.6], rel=0.07)
    assert base.endswith("chrF +0.0 ± 0.0 (a tie)")
    assert re.match(rf"replies in sw \+0\.0 ± {error} \(a tie\), correct \+100\.0 ± {error}, chrF", sft)


def test_the_closing_sentence_leaves_out_what_the_answers_do_not_tell():
    open_ended = {name: lines_of(name, expected="a long answer " * 9) for name in ("base", "clo")}
    english, swahili, _ = closing_lines(open_ended)
    assert "correct" not in swahili and "bits" not in swahili and "against sft" not in swahili
    assert "bits per byte +0.000 ± 0.000 (a tie)" in closing_lines(
        {name: lines_of(name, reference_nll=2.0) for name in ("base", "clo")})[0]


def test_a_handful_of_questions_decides_nothing_and_one_method_changes_nothing():
    answers = {name: lines_of(name, n=3) for name in ("base", "clo")}
    assert all("correct +100.0" not in part or "too few questions to tell" in part
               for part in closing_lines(answers)[1].split(", "))
    assert closing_lines({"base": lines_of("base")}) == []


def test_closing_lines_are_part_of_the_report():
    answers = {name: lines_of(name) for name in ("base", "clo")}
    assert all(line in report_of(answers) for line in closing_lines(answers))


@pytest.mark.parametrize("header, lines", [
    (["a", "b"], []), (["", "long header"], [["row", "1"], ["x", "22"]])])
def test_tables_are_markdown_with_columns_of_one_width(header, lines):
    text = table(header, lines).splitlines()
    assert len({len(line) for line in text}) == 1 and len(text) == 2 + len(lines)
    assert text[1].endswith(": |")
