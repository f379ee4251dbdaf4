"""report.py: comparisons over runs against arithmetic by hand and simulation; plots that can be drawn."""

import json
import math
import random
import statistics

import numpy as np
import pytest

from engine.files import InputError, read_records, write_json, write_jsonl
from evals import report


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
    text = report.comparison(report.read_results(paths), "sft")
    line = next(line for line in text.splitlines() if "|    clo |" in line)
    assert (f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / math.sqrt(3):.2f}" in line
            and "|     3 |" in line)


def test_languages_and_sample_sizes_are_rows_of_their_own(tmp_path):
    paths = [write_run(tmp_path, f"{lang}{samples}", lang, samples)
             for lang in ("sw", "de") for samples in (1600, 400)]
    rows = list(report.by_row(report.read_results(paths)))
    assert [row[:2] for row in rows[::3]] == [("de", "400"), ("de", "1600"), ("sw", "400"), ("sw", "1600")]


def test_runs_that_differ_in_a_flag_are_told_apart_and_sft_does_not_read_beta(tmp_path):
    paths = [write_run(tmp_path, f"b{beta}", beta=beta, epochs=2) for beta in (0.1, 0.5)]
    assert [result.method for result in report.read_results(paths)] == [
        "base", "sft", "clo beta=0.1", "clo beta=0.5"]


def test_two_different_figures_of_one_model_are_refused(tmp_path):
    paths = [write_run(tmp_path, "a"), write_run(tmp_path, "b", right={"sft": 0.9})]
    with pytest.raises(InputError, match="a second, different .*sw 200 sft, seed 0"):
        report.read_results(paths)


def test_paired_bootstrap_finds_the_difference_and_covers_the_truth():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(20):
        one = [{str(i): 100.0 * (rng.random() < 0.6) for i in range(150)} for _ in range(2)]
        other = [{str(i): 100.0 * (rng.random() < 0.5) for i in range(150)}]
        found = report.paired_bootstrap(one, other)
        assert found["difference"] == pytest.approx(
            np.mean([list(s.values()) for s in one]) - np.mean(list(other[0].values())))
        covered += found["low"] <= 10 <= found["high"]
    assert covered >= 17


def test_paired_bootstrap_equals_the_normal_interval_of_the_paired_differences():
    rng = np.random.default_rng(2)
    one, other = ({str(i): float(x) for i, x in enumerate(rng.normal(m, 5, 400))} for m in (3, 2))
    gaps = [one[key] - other[key] for key in one]
    error = statistics.stdev(gaps) / 20
    found = report.paired_bootstrap([one], [other])
    assert found["low"] == pytest.approx(statistics.mean(gaps) - 1.96 * error, abs=0.1)
    assert found["high"] == pytest.approx(statistics.mean(gaps) + 1.96 * error, abs=0.1)
    assert report.paired_bootstrap([one], [one]) == {"difference": 0, "low": 0, "high": 0, "p": 1, "n": 400}
    assert report.paired_bootstrap([one], [{"x": 1.0}]) is None


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
    results = report.read_results([run, tmp_path / "mmlu-clo", tmp_path / "mmlu-sft"])
    assert {result.method: result.figures.get("mmlu 5-shot") for result in results} == {
        "base": None, "sft": 25.0, "clo": 50.0}
    text = report.comparison(results, "sft")
    assert "50.00 (± 7.00)" in text and any("mmlu 5-shot" in line and "+25.00" in line
                                            for line in text.splitlines())
    assert ('"shots": 5' in report.settings_text([tmp_path / "mmlu-clo"])
            and '"max_tokens": 64' in report.settings_text([run]))


def test_a_run_on_several_targets_has_columns_and_rows_for_each(tmp_path):
    run = write_run(tmp_path, "both", "sw,yo")
    written = json.loads((run / "report.json").read_text())
    answers = {name: [line for _, line in read_records(run / name / "answers.jsonl")]
               for name in written["methods"]}
    text = report.report_text(written, answers, "en", examples=1)
    header = next(line for line in text.splitlines() if "train s" in line)
    assert [cell.strip() for cell in header.split("|")[2:-2]] == [
        "en correct", "in en", "sw correct", "in sw", "yo correct", "in yo"]
    assert ("| nll en | nll sw | nll yo |" in text and "|  0.500 |  4.000 |  5.000 |" in text
            and "- clo: clo yo 0" in text and text.count("- base: ") == 3)
    assert "(neither counts as right): base en 1 and 2, base sw 1 and 2, base yo 1 and 2." in text
    results = report.read_results([run, write_run(tmp_path, "one", "sw")])
    assert [row[0] for row in report.by_row(results)] == ["sw"] * 3 + ["sw (sw,yo)"] * 3 + ["yo (sw,yo)"] * 3
    clo = {result.language: result for result in results if result.method == "clo"}
    assert (clo["yo (sw,yo)"].figures["nll target"] == 5.0
            and clo["yo (sw,yo)"].curves == {"source": {0: 0.5, 2: 0.6}, "target": {0: 5.0}})
    assert clo["yo (sw,yo)"].figures["target correct"] == written["methods"]["clo"]["yo"]["correct"]
    assert sum(clo["yo (sw,yo)"].scores["target correct"].values()) / 60 == pytest.approx(
        written["methods"]["clo"]["yo"]["correct"], abs=0.01)
    text = report.comparison(results, "sft")             # rows, and paired differences in two of four figures
    assert (text.count("yo (sw,yo)") == 3 + 2 * 2
            and "12 more figures equal those of sft on every question" in text)


@pytest.mark.parametrize("settings, rows", [
    ({"benchmark": "mmlu", "language": ""}, ["sw (sw,yo)", "yo (sw,yo)"]),
    ({"language": "yo"}, ["yo (sw,yo)"]),
    ({"benchmark": "mmmlu", "language": "de"}, ["sw (sw,yo)", "yo (sw,yo)"]),
    ({"language": "de"}, ["de (sw,yo)"])])
def test_an_evaluation_joins_the_rows_of_its_language_or_of_all(tmp_path, settings, rows):
    run, out = write_run(tmp_path, "both", "sw,yo"), tmp_path / "evaluation"
    write_jsonl(out / "answers.jsonl",
                     [{"settings": {}}, {"question": "1", "scores": {"figure": 100.0}}])
    write_json(out / "result.json", {
        "figures": {"figure": {"value": 100.0}},
        "settings": settings | {"adapter": str(run / "clo" / "adapter")}})
    found = report.read_results([run, out])
    assert [result.language for result in found if "figure" in result.figures] == rows
    assert all(result.method == "clo" for result in found if "figure" in result.figures)


def test_a_baseline_that_is_not_there_is_said(tmp_path):
    assert "No method here is called dpo" in report.comparison(
        report.read_results([write_run(tmp_path, "a")]), "dpo")


@pytest.mark.parametrize("spoil, wanted", [
    (lambda run: (run / "report.json").unlink(), "neither report.json"),
    (lambda run: (run / "report.json").write_text("{"), "report.json:1: not valid JSON"),
    (lambda run: (run / "clo" / "answers.jsonl").unlink(), "answers.jsonl: no such file")])
def test_a_broken_run_is_one_clear_line(tmp_path, spoil, wanted):
    run = write_run(tmp_path, "a")
    spoil(run)
    with pytest.raises(InputError, match=wanted):
        report.read_results([run])


def test_binomial_error_is_the_formula_and_never_0_at_the_ends():
    assert report.binomial_error(50, 100) == pytest.approx(5.0)
    assert 0 < report.binomial_error(100, 100) < 1 and 0 < report.binomial_error(0, 30) < 3


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    paths = [write_run(tmp_path, f"{lang}{samples}{seed}", lang, samples, seed)
             for lang in ("sw", "de") for samples in (400, 1600) for seed in range(2)]
    results = report.read_results(paths)
    drawn = report.plot(results, tmp_path / "plots")
    assert ([path.name for path in drawn] == ["learning.png", "tradeoff.png"]
            and all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn))
    group = next(group for row, group in report.by_row(results).items() if row == ("sw", "400", "clo"))
    assert report.mean_curve(group, "target") == ([0, 2], [3.0, 2.5])


def test_plotting_without_matplotlib_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match="--plot needs matplotlib: pip install matplotlib"):
        report.plot(report.read_results([write_run(tmp_path, "a")]), tmp_path / "plots")
