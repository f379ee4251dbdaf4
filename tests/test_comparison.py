"""evals/comparison.py, evals/plots.py: figures of many runs in one table; plots that can be drawn."""

import itertools
import json
import math
import random
import re
import statistics
import sys

import pytest

import eval as evaluation
from engine.files import InputError, read_records, write_json, write_jsonl
from evals import comparison, plots, report


def write_run(root, name, lang="sw", samples=200, seed=0, right={"base": 0.0, "sft": 0.3, "clo": 0.6}, n=60,
              **flags):
    """A run directory as clo.py leaves it, with made-up answers: a share `right[method]` of target answers
    is correct. lang may name several targets."""
    run, chance, methods, languages = (root / name, random.Random(f"{lang}{samples}{seed}"), {},
                                       ["en", *lang.split(",")])
    apart = ({f"nll_tgt_{language}": 4.0 + i for i, language in enumerate(languages[1:])}
             if "," in lang else {})
    for method, share in right.items():
        lines = [{"row_id": str(i), "language": language,
                  "correct": chance.random() < (0.9 if language == "en" else share),
                  "prompt": f"{language} {i}?", "reply": f"{method} {language} {i}", "expected": "x",
                  "reply_language": language if i % 5 else None, "judged": i % 3 > 0}
                 for language in languages for i in range(n)]
        methods[method] = {language: {
            "correct": percent([line["correct"] for line in lines if line["language"] == language]),
            "right_language": 80.0, "n": n, "n_language": n, "unsure": len(method) - 3,
            "mixed": 2 * (method == "base")} for language in languages}
        methods[method] |= {"heldout": {"nll_en": 0.5, "nll_tgt": 2 - share, **apart}, "train_seconds": 1.0,
                            "decoding": {"temperature": 0, "max_tokens": 64, "template": "abc"}}
        write_jsonl(run / method / "answers.jsonl", lines)
        if method != "base":
            write_jsonl(run / method / "metrics.jsonl", [
                {"step": 0, "nll_en": 0.5, "nll_tgt": 3.0, **apart}, {"step": 1, "loss": 1.0},
                {"step": 2, "nll_en": 0.6, "nll_tgt": 2.0 + seed}])
    write_json(run / "report.json", {"lang": lang, "samples": samples, "seed": seed, "methods": methods})
    write_json(run / "config.json", {
        "flags": {"lang": lang, "source": "en", "seed": seed, "samples": samples, **flags},
        "inputs": {"data": "0123"}})
    return run


def percent(values):
    return round(100 * sum(values) / len(values), 2)


def test_seeds_are_averaged_with_their_standard_error(tmp_path):
    paths = [write_run(tmp_path, f"r{seed}", seed=seed) for seed in range(3)]
    values = [json.loads((path / "report.json").read_text())["methods"]["clo"]["sw"]["correct"]
              for path in paths]
    text = comparison.comparison_text(comparison.read_results(paths), "sft")
    line = [line for line in text.splitlines() if "|    clo |" in line][1]      # source, then target
    wanted = f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / math.sqrt(3):.1f}"
    assert [cell.strip() for cell in line.split("|")[4:6]] == ["3", wanted]


def test_no_chance_is_told_of_a_difference_on_a_few_questions(tmp_path):
    for n, told in ((6, {"-"}), (60, {"<0.0010"})):
        run = write_run(tmp_path, f"r{n}", n=n, right={"sft": 0.0, "clo": 1.0})
        lines, _ = comparison.differences(comparison.by_row(comparison.read_results([run])), "sft")
        exact = [line for line in lines if line[3] == "target correct"]
        assert {line[6] for line in exact} == told and exact[0][7] == str(n)


def test_one_seed_has_the_figures_and_errors_of_its_report(tmp_path):
    run = write_run(tmp_path, "a")
    answers = {name: [line for _, line in read_records(run / name / "answers.jsonl")]
               for name in ("base", "sft", "clo")}
    told = report.report_text(json.loads((run / "report.json").read_text()), answers, "en")
    compared = comparison.comparison_text(comparison.read_results([run]), "sft")
    figures = re.findall(r"\d+\.\d+ ± \d+\.\d+", told[told.index("Answers to"):])
    assert len(figures) == 2 * 3 * 4 and not [figure for figure in figures if figure not in compared]
    swahili = report.closing_lines(answers)[1]
    for change in re.findall(r"[+-]\d+\.\d+ ± \d+\.\d+", swahili.split("against sft")[1]):
        assert change in compared or change.startswith("+0.0")       # equal on every question: no line there


def test_an_older_runs_missing_figures_are_shown_as_a_line(tmp_path):
    old, new = write_run(tmp_path, "old", seed=0), write_run(tmp_path, "new", seed=0, samples=400)
    for method in ("base", "sft", "clo"):
        path = new / method / "answers.jsonl"
        write_jsonl(path, [line | {"ends": True, "reference_nll": 2.0} for _, line in read_records(path)])
    text = comparison.comparison_text(comparison.read_results([old, new]), "sft")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if "|    clo |" in line]
    header = next(line for line in text.splitlines() if "target bits/byte" in line).split("|")[1:-1]
    header = [cell.strip() for cell in header]
    cells = [dict(zip(header, map(str.strip, row))) for row in rows if len(row) == len(header)]
    assert [cell["target ends"] for cell in cells][-2:] == ["-", "100.0 ± 1.2"]
    assert [cell["target bits/byte"] for cell in cells][-2:] == ["-", f"{2 / math.log(2):.3f} ± 0.000"]


def test_languages_and_sample_sizes_are_rows_of_their_own(tmp_path):
    paths = [write_run(tmp_path, f"{lang}{samples}", lang, samples)
             for lang in ("sw", "de") for samples in (1600, 400)]
    rows = list(comparison.by_row(comparison.read_results(paths)))
    assert [row[:2] for row in rows[::3]] == [("de", "400"), ("de", "1600"), ("sw", "400"), ("sw", "1600")]


def test_runs_that_differ_in_a_flag_are_told_apart_and_sft_does_not_read_beta(tmp_path):
    paths = [write_run(tmp_path, f"b{beta}", beta=beta, epochs=2) for beta in (0.1, 0.5)]
    assert [result.method for result in comparison.read_results(paths)] == [
        "base", "sft", "clo beta=0.1", "clo beta=0.5"]


@pytest.mark.parametrize("value, shown", [
    (None, "default"), (0.0, "0"), (1.0, "1"), (0.00071, "0.00071"), (4, "4"), ("en,tgt", "en,tgt"), (True, "True")])
def test_a_flag_is_shown_as_it_is_typed(value, shown):
    assert comparison.shown_flag(value) == shown


@pytest.mark.parametrize("flag, values, split", [
    ("nll", ("tgt", "en,tgt"), {"clo"}), ("lam", (0.2, 0.5), {"clo"}),
    ("beta", (0.1, 0.5), {"clo", "dpo", "sft+dpo"}), ("anchor", (0.5, None), {"clo", "dpo", "sft+dpo"}),
    ("baseline_epochs", (1, 2), {"sft", "sft+dpo"}), ("lr", (1e-4, 2e-4), {"sft", "clo", "dpo", "sft+dpo"})])
def test_a_flag_splits_the_methods_that_read_it_and_no_other(tmp_path, flag, values, split):
    methods = dict.fromkeys(("base", "sft", "clo", "dpo", "sft+dpo"), 0.5)
    paths = [write_run(tmp_path, str(i), right=methods, **{flag: value}) for i, value in enumerate(values)]
    found = [result.method for result in comparison.read_results(paths)]
    assert {method for method in methods if method not in found} == split


def test_the_curve_of_a_method_with_two_stages_goes_on_where_the_first_ends(tmp_path):
    run = write_run(tmp_path, "a", right={"sft+dpo": 0.5})
    (run / "sft+dpo" / "metrics.jsonl").unlink()
    for stage, start in (("1-sft", 3.0), ("2-dpo", 2.0)):              # as clo.run_method lays them out
        write_jsonl(run / "sft+dpo" / stage / "metrics.jsonl", [
            {"step": 0, "nll_en": 0.5, "nll_tgt": start}, {"step": 1, "loss": 1.0},
            {"step": 4, "nll_en": 0.6, "nll_tgt": start - 1}])
    result, = comparison.read_results([run])
    assert result.curves == {"source": {0: 0.5, 4: 0.5, 8: 0.6}, "target": {0: 3.0, 4: 2.0, 8: 1.0}}


def test_two_different_figures_of_one_model_are_refused(tmp_path):
    paths = [write_run(tmp_path, "a"), write_run(tmp_path, "b", right={"sft": 0.9})]
    with pytest.raises(InputError, match="a second, different .*sw 200 sft, seed 0"):
        comparison.read_results(paths)


def test_evaluations_of_an_adapter_join_the_row_of_its_run(tmp_path):
    run = write_run(tmp_path, "r0")
    for method in ("clo", "sft"):
        out = tmp_path / f"mmlu-{method}"
        write_jsonl(out / "answers.jsonl", [{"settings": {}}, *(
            {"question": f"anatomy {i}",
             "scores": {"mmlu 5-shot": 100.0 * (i % (2 if method == "clo" else 4) == 0)}}
            for i in range(40))])
        write_json(out / "result.json", {
            "figures": {"mmlu 5-shot": {"value": 50.0 if method == "clo" else 25.0, "stderr": 7.0}},
            "settings": {"adapter": str(run / method / "adapter"), "shots": 5}})
    results = comparison.read_results([run, tmp_path / "mmlu-clo", tmp_path / "mmlu-sft"])
    assert {result.method: result.figures["mmlu 5-shot"]["value"] for result in results
            if result.method != "base"} == {"sft": 25.0, "clo": 50.0}
    text = comparison.comparison_text(results, "sft")
    assert "50.00 ± 7.00" in text and any("mmlu 5-shot" in line and "+25.00" in line
                                            for line in text.splitlines())
    assert ('"shots": 5' in comparison.settings_text([tmp_path / "mmlu-clo"])
            and '"max_tokens": 64' in comparison.settings_text([run]))


def test_scores_that_are_all_0_or_100_are_compared_with_scores_that_are_not(tmp_path):
    run = write_run(tmp_path, "r0")
    given = {"clo": [100.0, 0.0, 100.0, 100.0, 0.0] * 4, "sft": [0.0, 50.0, 100.0, 0.0, 50.0] * 4}
    for method, scores in given.items():
        out = tmp_path / f"judge-{method}"
        lines = [{"question": str(i), "scores": {"win rate": score}} for i, score in enumerate(scores)]
        write_jsonl(out / "answers.jsonl", [{"settings": {}}, *lines])
        write_json(out / "result.json", {"figures": {"win rate": {"value": sum(scores) / 20}},
                                         "settings": {"adapter": str(run / method / "adapter")}})
    results = comparison.read_results([run, *tmp_path.glob("judge-*")])
    for baseline, expected in (("sft", "+20.00"), ("clo", "-20.00")):
        text = comparison.comparison_text(results, baseline)
        assert any("win rate" in line and expected in line for line in text.splitlines())


def test_a_run_on_several_targets_has_rows_for_each(tmp_path):
    run = write_run(tmp_path, "both", "sw,yo")
    written = json.loads((run / "report.json").read_text())
    results = comparison.read_results([run, write_run(tmp_path, "one", "sw")])
    assert [row[0] for row in comparison.by_row(results)][::3] == ["sw", "sw (sw,yo)", "yo (sw,yo)"]
    clo = {result.language: result for result in results if result.method == "clo"}
    assert clo["yo (sw,yo)"].figures["target nll"]["value"] == 5.0
    assert clo["yo (sw,yo)"].curves == {"source": {0: 0.5, 2: 0.6}, "target": {0: 5.0}}
    assert clo["yo (sw,yo)"].figures["target correct"]["value"] == pytest.approx(
        written["methods"]["clo"]["yo"]["correct"], abs=0.01)
    text = comparison.comparison_text(results, "sft")
    assert sum(line.startswith("| yo (sw,yo) ") for line in text.splitlines()) == 2 * 3 + 8
    assert "24 more figures equal those of sft on every question" in text


def test_answers_that_cannot_be_equal_have_no_exact_figure(tmp_path):
    run = write_run(tmp_path, "open")
    for method in ("base", "sft", "clo"):
        path = run / method / "answers.jsonl"
        write_jsonl(path, [line | {"expected": "word " * 40} for _, line in read_records(path)])
    text = comparison.comparison_text(comparison.read_results([run]), "sft")
    assert "correct" not in text and "target chrF" in text


# --------------------------------------------------------------------------------------- what paths stand for

def write_evaluation(out, **settings):
    write_jsonl(out / "answers.jsonl", [{"settings": {}}, {"question": "1", "scores": {"figure": 100.0}}])
    write_json(out / "result.json", {"figures": {"figure": {"value": 100.0}}, "settings": settings})
    return out


@pytest.mark.parametrize("result, score, wanted", [
    ({"figures": ["a.png"], "settings": {}}, 1, "result.json: figures: dict expected, found list"),
    ({"figures": {"f": 3}, "settings": {}}, 1, "result.json: f: dict expected, found int"),
    ({"figures": {"f": {"value": None}}, "settings": {}}, 1, "f: value: a number expected, found None"),
    ({"figures": {}, "settings": 3}, 1, "result.json: settings: dict expected, found int"),
    ({"figures": {}, "settings": {"adapter": 5}}, 1, "result.json: adapter: str expected, found int"),
    ({"figures": {}, "settings": {}}, "x", "answers.jsonl: 1: figure: a number expected, found 'x'")])
def test_a_result_of_another_program_is_one_clear_line(tmp_path, result, score, wanted):
    write_jsonl(tmp_path / "answers.jsonl", [{"question": "1", "scores": {"figure": score}}])
    write_json(tmp_path / "result.json", result)
    with pytest.raises(InputError, match=wanted):
        comparison.read_results([tmp_path])


def names(paths):
    return [path.name for path in paths]


def test_a_file_or_a_methods_directory_stands_for_its_run_and_a_directory_for_all_below(tmp_path):
    runs = tmp_path / "runs"
    run = write_run(runs, "sw")
    write_json(run / "clo" / "result.json", {"en": {}})                  # a method's, as clo.py writes it
    write_json(run / "clo" / "model" / "config.json", {"model_type": "llama"})
    mmlu = write_evaluation(runs / "eval" / "mmlu")
    win_rate = write_evaluation(runs / "eval" / "alpaca" / "against-x")
    instructions = runs / "eval" / "instructions-sw-0123.jsonl"
    instructions.write_text("{}")
    for path in (run, run / "report.json", run / "config.json", run / "clo", run / "clo" / "result.json"):
        assert comparison.find_results([path]) == ([run], []), path
    assert comparison.find_results([mmlu / "result.json", mmlu]) == ([mmlu], [])
    assert comparison.find_results(sorted(run.iterdir())) == ([run], [])                     # runs/sw/*
    assert comparison.find_results(sorted((runs / "eval").iterdir())) == ([win_rate, mmlu], [instructions])
    assert comparison.find_results([runs]) == ([win_rate, mmlu, run], [])
    assert len(comparison.read_results(comparison.find_results([runs])[0])) == 2 + 3


def test_what_is_unfinished_is_named_and_what_is_missing_refused(tmp_path):
    run, begun = write_run(tmp_path, "a"), write_run(tmp_path, "b")
    (begun / "report.json").unlink()
    write_jsonl(tmp_path / "mmlu" / "answers.jsonl", [{"settings": {}}])
    assert comparison.find_results([run, begun, tmp_path / "mmlu"]) == ([run], [begun, tmp_path / "mmlu"])
    found, left_out = comparison.find_results([tmp_path])
    assert found == [run] and {begun, tmp_path / "mmlu"} <= set(left_out)
    with pytest.raises(InputError, match="b: neither report.json .a finished run. nor result.json"):
        comparison.find_results([begun])
    with pytest.raises(InputError, match="x, .*y: no such file or directory"):
        comparison.find_results([run, tmp_path / "x", tmp_path / "y"])


@pytest.mark.parametrize("settings, rows", [
    ({"benchmark": "mmlu", "language": ""}, ["sw (sw,yo)", "yo (sw,yo)"]),
    ({"language": "yo"}, ["yo (sw,yo)"]),
    ({"benchmark": "mmmlu", "language": "de"}, ["sw (sw,yo)", "yo (sw,yo)"]),
    ({"language": "de"}, ["de (sw,yo)"])])
def test_an_evaluation_joins_the_rows_of_its_language_or_of_all(tmp_path, settings, rows):
    run = write_run(tmp_path, "both", "sw,yo")
    out = write_evaluation(tmp_path / "evaluation", adapter=str(run / "clo" / "adapter"), **settings)
    found = comparison.read_results([run, out])
    assert [result.language for result in found if "figure" in result.figures] == rows
    assert all(result.method == "clo" for result in found if "figure" in result.figures)


def test_a_baseline_that_is_not_there_is_said(tmp_path):
    assert "No method here is called dpo" in comparison.comparison_text(
        comparison.read_results([write_run(tmp_path, "a")]), "dpo")


@pytest.mark.parametrize("spoil, wanted", [
    (lambda run: (run / "report.json").unlink(), "neither report.json"),
    (lambda run: (run / "report.json").write_text("{"), "report.json:1: not valid JSON"),
    (lambda run: (run / "clo" / "answers.jsonl").unlink(), "answers.jsonl: no such file")])
def test_a_broken_run_is_one_clear_line(tmp_path, spoil, wanted):
    run = write_run(tmp_path, "a")
    spoil(run)
    with pytest.raises(InputError, match=wanted):
        comparison.read_results(comparison.find_results([run])[0])


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    paths = [write_run(tmp_path, f"{lang}{samples}{seed}", lang, samples, seed)
             for lang in ("sw", "de") for samples in (400, 1600) for seed in range(2)]
    results = comparison.read_results(paths)
    drawn = plots.plot(results, tmp_path / "plots")
    assert ([path.name for path in drawn] == ["learning.png", "tradeoff.png"]
            and all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn))
    group = next(group for row, group in comparison.by_row(results).items() if row == ("sw", "400", "clo"))
    assert plots.mean_curve(group, "target") == ([0, 2], [3.0, 2.5])


def test_compare_prints_tables_settings_and_the_plots_it_drew(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [str(write_run(tmp_path, f"r{seed}", seed=seed, right={"base": 0.0, "sft": 0.3, "clo": 0.7}))
            for seed in range(2)]
    evaluation.main(["compare", *runs, "--baseline", "base", "--plot", str(tmp_path / "plots")])
    printed = capsys.readouterr().out
    assert "Difference from base ± standard error" in printed and printed.count("| target correct |") == 2 + 1
    assert f"- {runs[0]}, {runs[1]}: " in printed and '"max_tokens": 64' in printed
    assert [path.name for path in sorted((tmp_path / "plots").iterdir())] == ["learning.png", "tradeoff.png"]


def test_plotting_without_matplotlib_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="--plot needs matplotlib: pip install matplotlib"):
        evaluation.main(["compare", str(tmp_path / "never read"), "--plot", str(tmp_path / "plots")])


def test_a_file_in_the_place_of_the_plots_is_refused_before_anything_is_read(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "plots").write_text("")
    with pytest.raises(InputError, match="plots: a file, a directory is wanted"):
        evaluation.main(["compare", str(tmp_path / "never read"), "--plot", str(tmp_path / "plots")])


@pytest.mark.slow
def test_legends_and_titles_stay_inside_the_picture(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    languages = ",".join(f"language{i}" for i in range(5))
    runs = [write_run(tmp_path, beta, languages, beta=beta, data="d" * 90 + beta,
                      right={"base": 0.0, f"clo-{beta}": 0.5}) for beta in "ab"]
    results, seen = comparison.read_results(runs), []
    closed = pyplot.close
    pyplot.close = seen.append
    try:
        plots.plot(results, tmp_path / "plots")
    finally:
        pyplot.close = closed
    for figure in seen:
        figure.canvas.draw()
        titles = [axis.title for axis in figure.axes if axis.get_visible()]
        boxes = [text.get_window_extent() for text in (*figure.legends, *titles)]
        assert len(titles) in (5, 10)
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        pyplot.close(figure)


def test_methods_differ_in_marker_filling_or_grey():
    styles = {tuple(plots.style(i)[key] for key in ("marker", "color", "markerfacecolor")) for i in range(16)}
    assert len(styles) == 16
