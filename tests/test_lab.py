"""lab/: plans and what is missing of them, figures of a run, intervals, the page drawn from the lines."""

import json
import math
import random
import re
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pytest
import torch

import data
import model as llama
from engine.files import HeldByAnother, InputError, locked, read_records, write_json
from evals.figures import chrf, chrf_counts
from formats.records import write_rows
from lab import data as lab_data
from lab import figures, measure, plan, plots, report, runner
from lab.__main__ import main

SETTINGS = {"model": "m", "data": "d", "eval-data": "e", "dtype": "fp32", "max-new-tokens": 8}
METHODS = {"sft": {"method": "sft"}, "clo": {"method": "clo", "beta": 0.5},
           "sft, clo's compute": {"method": "sft", "tokens-of": "clo", "passes-of": "sft"}}


def write_plan(path, methods=METHODS, **more):
    part = {"languages": ["sw"], "sizes": [20, 10], "seeds": [0, 1], "methods": list(methods)}
    write_json(path, {"settings": SETTINGS, "methods": methods, "runs": [part]} | more)
    return plan.read_plan(str(path))


def line_of(run, tokens=100, bits=8.0, **more):
    return {"run": run.name, "language": run.language, "method": run.method, "size": run.size,
            "seed": run.seed, "split": run.split, "epochs": run.flags.get("epochs", 2), "tokens": tokens,
            "questions": {"sw": {"bits": [bits], "bytes": [4]}}} | more


def finish_all(table):
    """Every run of a plan, in the order they would run in, each finished at once."""
    done = []
    while missing := plan.ready(table, [line_of(run) for run in done]):
        done.append(missing[0])
    return done


# ------------------------------------------------------------------------------------------------------ plans

def test_the_base_comes_first_then_the_cheapest_run_and_nothing_twice(tmp_path):
    done = finish_all(write_plan(tmp_path / "p.json"))
    assert [(run.method, run.size, run.seed) for run in done[:3]] == [
        ("base", None, 0), ("sft", 10, 0), ("clo", 10, 0)]
    assert [(run.size, run.seed) for run in done[1:]] == [(size, seed) for size in (10, 20) for seed in (0, 1)
                                                          for _ in METHODS]
    assert len({run.name for run in done}) == len(done) == 1 + 3 * 2 * 2


def test_equal_compute_waits_for_both_runs_and_takes_the_epochs_their_tokens_say(tmp_path):
    table = write_plan(tmp_path / "p.json")
    first = {run.method: run for run in plan.ready(table, []) if (run.size, run.seed) != (10, 1)}
    assert set(first) == {"base", "sft", "clo"}
    lines = [line_of(first["sft"], tokens=400), line_of(first["clo"], tokens=900)]
    run = next(run for run in plan.ready(table, lines) if run.method == "sft, clo's compute")
    assert run.flags["epochs"] == 4.5                                   # 2 * 900 / 400
    assert "tokens-of" not in run.flags and run.flags["method"] == "sft"


def test_a_grid_runs_on_validation_and_its_best_value_is_used_at_every_size(tmp_path):
    methods = {"sft": {"method": "sft", "lr": [1e-3, 3e-3]}}
    table = write_plan(tmp_path / "p.json", methods, grid={"size": 10, "seed": 0})
    points = [run for run in plan.ready(table, []) if run.method == "sft"]
    assert [(run.split, run.flags["eval-split"], run.size) for run in points] == [
        ("validation", "validation", 10)] * 2
    lines = [line_of(run, bits=bits) for run, bits in zip(points, (9.0, 7.0))]
    chosen = [run for run in plan.ready(table, lines) if run.method == "sft"]
    assert {(run.flags["lr"], run.split) for run in chosen} == {(3e-3, "test")} and len(chosen) == 4


def test_grids_come_before_the_runs_that_wait_for_them_and_those_that_do_not(tmp_path):
    methods = {"clo": {"method": "clo", "lr": [1e-3, 3e-3]}, "sft": {"method": "sft"}}
    done = finish_all(write_plan(tmp_path / "p.json", methods, grid={"size": 20, "seed": 0}))
    assert {(run.method, run.split) for run in done[:2]} == {("base", "test"), ("base", "validation")}
    assert [run.split for run in done[2:4]] == ["validation"] * 2
    assert {run.split for run in done[4:]} == {"test"}


def test_a_grid_is_decided_without_a_value_that_failed(tmp_path):
    methods = {"sft": {"method": "sft", "lr": [1e-3, 3e-3]}}
    table = write_plan(tmp_path / "p.json", methods, grid={"size": 10, "seed": 0})
    points = [run for run in plan.ready(table, []) if run.method == "sft"]
    left = plan.ready(table, [line_of(points[0])], {points[1].name})
    assert {run.flags["lr"] for run in left if run.method == "sft"} == {1e-3}


def test_other_settings_make_another_run(tmp_path):
    before = plan.ready(write_plan(tmp_path / "p.json"), [])
    lines = [line_of(run) for run in before]
    changed = METHODS | {"clo": {"method": "clo", "beta": 0.1}}
    after = plan.ready(write_plan(tmp_path / "p.json", changed), lines)
    assert {run.method for run in after} == {"clo", "sft, clo's compute"}


@pytest.mark.parametrize("change, told", [
    ({"settings": {"model": "m"}}, '"data" is missing'),
    ({"runs": [{"languages": ["sw"], "sizes": [1], "seeds": [0], "methods": ["slo"]}]}, '"slo" is missing'),
    ({"runs": [{"languages": ["sw"], "sizes": [1], "seeds": [0]}]}, '"methods" is missing'),
    ({"methods": {"sft": {"lr": 1}}}, '"method" is missing'),
    ({"methods": {"sft": {"method": "sft", "tokens-of": "clo"}}}, '"clo" is missing'),
    ({"methods": {"sft": {"method": "sft", "lr": [1, 2]}}}, '"grid" is missing')])
def test_a_plan_that_cannot_be_run_is_refused_in_one_line(tmp_path, change, told):
    with pytest.raises(InputError, match=told) as error:
        write_plan(tmp_path / "p.json", change.pop("methods", METHODS), **change)
    assert "\n" not in str(error.value)


def test_a_plan_whose_model_was_not_made_is_refused_before_any_run_fails(tmp_path):
    settings = SETTINGS | {"model": "runs/no-such-model", "data": str(tmp_path / "d.jsonl")}
    write_json(tmp_path / "p.json", {"settings": settings, "methods": METHODS, "runs": []})
    with pytest.raises(InputError, match="runs/no-such-model: not there yet; lab/README.md"):
        main([str(tmp_path / "p.json"), "--results", str(tmp_path)])


def test_a_grid_s_point_and_the_run_it_is_chosen_for_are_one_training(tmp_path):
    table = write_plan(tmp_path / "p.json")
    runs = [plan.make_runs(table, ("sw", 8, seed, "sft"), split, [{"lr": 1e-3}], [])[0]
            for seed, split in ((0, "validation"), (0, "test"), (1, "test"))]
    point, chosen, other = runs
    assert point.directory == chosen.directory != other.directory and len({run.name for run in runs}) == 3
    assert point.training == chosen.training and "eval-split" not in point.training


def test_the_plans_of_the_project_can_be_read_and_begun():
    names = [path.stem for path in plan.PLANS.glob("*.json")]
    assert {"demo", "portuguese", "chinese"} <= set(names)
    for name in names:
        assert plan.ready(plan.read_plan(name), [])[0].method == "base"


# ------------------------------------------------------------------------------------------------------ queue

def test_the_queue_goes_on_behind_its_lines_and_past_a_failure(tmp_path, monkeypatch):
    table, asked, broken = write_plan(tmp_path / "p.json"), [], True

    def perform(table, run, runs):
        asked.append(run.name)
        if run.method == "clo" and broken:
            raise runner.RunFailed("out of memory")
        return line_of(run)
    monkeypatch.setattr(runner, "perform", perform)
    results = tmp_path / "results" / "p.jsonl"
    failed = runner.work(table, tmp_path, results)
    assert len(failed) == 4 and set(failed.values()) == {"out of memory"}
    broken = False
    asked.clear()
    assert runner.work(table, tmp_path, results) == {}
    assert len(asked) == 4 + 4                                     # and those that waited for their tokens
    assert len(read_records(results)) == 1 + 3 * 4


def test_processes_at_one_plan_take_runs_that_no_other_holds_and_end_together(tmp_path, monkeypatch, capsys):
    table, results, done = write_plan(tmp_path / "p.json"), tmp_path / "p.jsonl", []
    theirs = plan.ready(table, [])[:2]
    with ExitStack() as other:
        for run in theirs:
            other.enter_context(locked(runner.turn_of(tmp_path, run)))

        def perform(table, run, runs):
            with pytest.raises(HeldByAnother), locked(runner.turn_of(runs, run)):
                pass
            done.append(run.name)
            return line_of(run)

        def wait(seconds):                              # meanwhile the other ends one of its runs, and dies
            lines = runner.read_results(results)
            runner.write_results(results, [*lines, line_of(theirs[0])])
            other.close()
        monkeypatch.setattr(runner, "perform", perform)
        monkeypatch.setattr(runner.time, "sleep", wait)
        assert runner.work(table, tmp_path, results) == {}
    assert "other processes hold all 2 that can begin" in capsys.readouterr().out
    assert theirs[0].name not in done and theirs[1].name in done
    names = [line["run"] for line in runner.read_results(results)]
    assert len(names) == len(set(names)) == 1 + 3 * 4


def test_a_run_that_another_process_ended_meanwhile_is_not_made_again(tmp_path, monkeypatch):
    table, results, done = write_plan(tmp_path / "p.json"), tmp_path / "p.jsonl", []
    take = runner.take_free

    def late(held, missing, runs):
        if not results.exists():
            runner.write_results(results, [line_of(missing[0])])
        return take(held, missing, runs)
    monkeypatch.setattr(runner, "take_free", late)
    monkeypatch.setattr(runner, "perform", lambda table, run, runs: done.append(run.name) or line_of(run))
    runner.work(table, tmp_path, results)
    assert len(done) == 3 * 4 and plan.base_run(table, "sw", "test").name not in done


def test_a_failed_command_says_which_it_was_and_where_its_log_is(tmp_path):
    with pytest.raises(runner.RunFailed, match="ended with code 2: .*--lang") as error:
        runner.call("clo.py", {"method": "sft"}, tmp_path / "run")
    assert str(tmp_path / "run.log") in str(error.value)


def test_tokens_count_the_reference_pass_once_and_only_where_one_was_made(tmp_path):
    write_json(tmp_path / "config.json", {"flags": {"epochs": 2.0}})
    write_json(tmp_path / "report.json", {"samples": 8})
    for place in ("clo", "sft", "sft+dpo/1-sft", "sft+dpo/2-dpo"):
        steps = [{"step": 0}, *({"step": step, "tokens": 100, "seconds": 0.5} for step in (1, 2))]
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    tokens = [runner.training_facts(tmp_path, method)["tokens"] for method in ("sft", "clo", "sft+dpo")]
    assert tokens == [200, 300, 500]
    assert runner.training_facts(tmp_path, "clo") == {"epochs": 2.0, "rows": 8, "seconds": 1.0, "tokens": 300}


# ---------------------------------------------------------------------------------------------------- figures

ROWS = [{"row_id": str(i),
         "en": {"prompt": f"What is {i}?", "response": "It is a number, and small."[:8 + i]},
         "sw": {"prompt": f"Nini {i}?", "response": "Ni namba ndogo sana."[:6 + 2 * i]}} for i in range(5)]


def test_confusion_and_bits_are_those_of_each_sequence_alone(checkpoint):
    tokenizer, model = data.load_tokenizer(checkpoint), llama.load(checkpoint, dtype=torch.float64)
    same = {"row_id": "x", "en": {"prompt": "1+1?", "response": "2"},
            "sw": {"prompt": "1+1 ni?", "response": "2"}}
    columns = measure.answer_columns(model, tokenizer, [*ROWS, same], ["en", "sw"])
    for own, other in (("en", "sw"), ("sw", "en")):
        for i, row in enumerate(ROWS):
            per_byte = []
            for language in (own, other):
                prompt = tokenizer.prompt_ids(row[own]["prompt"])
                ids = prompt + tokenizer.response_ids(row[language]["response"])
                logits = model(torch.tensor([ids])) @ model.head.T
                logps = logits.log_softmax(-1)[0, len(prompt) - 1:-1]
                total = logps.gather(1, torch.tensor(ids[len(prompt):])[:, None]).sum().item()
                per_byte.append(total / len(row[language]["response"].encode()))
            size = len(row[own]["response"].encode())
            assert columns[own]["bytes"][i] == size
            assert columns[own]["bits"][i] == pytest.approx(-per_byte[0] * size / math.log(2), abs=1e-3)
            assert columns[own]["confused"][i] == (per_byte[1] > per_byte[0])
        assert columns[own]["confused"][-1] is None


def test_a_response_with_the_ids_of_the_right_one_is_no_wrong_one(checkpoint, monkeypatch):
    """Its log-prob may be higher in the last bits, which depend on its place in a packed row."""
    row = {"row_id": "x"} | {language: {"prompt": "1+1?", "response": response}
                             for language, response in (("en", "2"), ("de", "2"), ("sw", "mbili"))}
    monkeypatch.setattr(measure, "log_probs", lambda _, forks: [[-5.0, -4.999, -90.0]] * len(forks))
    columns = measure.answer_columns(None, data.load_tokenizer(checkpoint), [row], ["en", "de", "sw"])
    assert [column["confused"] for column in columns.values()] == [[0], [0], [0]]


@pytest.mark.parametrize("reply, expected", [
    ("Paris", "Paris"), ("a b", "abc defg hijk"), ("", "abc"), ("abc", ""), ("abcdefgh", "ab"),
    ("新加坡", "新加坡共和国的首都")])
def test_the_short_form_of_ngram_counts_gives_the_same_figure(reply, expected):
    found, = measure.long_counts([measure.short_counts(reply, expected)])
    assert chrf(found) == chrf(np.array(chrf_counts(reply, expected), float))


# -------------------------------------------------------------------------------------------------- intervals

def share_figure():
    return next(figure for figure in figures.FIGURES if figure.name == "language")


@pytest.mark.parametrize("reply, question, echo", [
    ("Descreva  os efeitos\ndas alterações climáticas. Elas", "Descreva os efeitos das alterações climáticas.", True),
    ("Nomeie três animais: o cão", "Nomeie três animais", True),
    ("Os efeitos são", "Descreva os efeitos das alterações climáticas.", False),
    ("Descreva os efeitos", "Descreva os efeitos das alterações climáticas.", False),
    ("Sim. Mas", "Sim", False),
    ("", "", False)])
def test_an_echo_begins_with_the_question_and_a_short_word_is_none(reply, question, echo):
    assert measure.is_echo(reply, question) == echo


def test_an_interval_has_the_width_that_theory_gives_it():
    draw = np.random.default_rng(1)
    figure = next(figure for figure in figures.FIGURES if figure.name == "bits")
    one, other = draw.normal(5, 1, (1, 400)), draw.normal(4, 1, (1, 400))
    counts = np.stack([np.stack([x, np.ones_like(x)], -1) for x in (one, other)], 1)
    found = figures.difference(figure, counts)
    half = 1.96 * (one - other).std() / math.sqrt(400)
    assert found.value == pytest.approx((one - other).mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.verdict == "worse"                                    # more bits


def test_seeds_that_disagree_make_the_interval_wider():
    counts = np.ones((2, 2, 100, 2))
    counts[:, 1, :, 0] = 0.5
    alike = figures.difference(share_figure(), counts)
    counts[0, 1, :, 0], counts[1, 1, :, 0] = 1.0, 0.0
    apart = figures.difference(share_figure(), counts)
    assert alike.value == apart.value == 50
    assert (alike.verdict, apart.verdict) == ("better", "a tie") and apart.seeds == [0, 100]
    assert (apart.low, apart.high) == (-100, 100)       # two seeds tell nothing: as far as a percentage goes


def test_seeds_alone_make_an_interval_that_misses_one_truth_in_twenty():
    random, missed = np.random.default_rng(0), 0
    for _ in range(2000):
        middle, half = figures.seed_interval(random.normal(1, 2, 3).tolist())
        missed += not middle - half <= 1 <= middle + half
    assert missed / 2000 == pytest.approx(0.05, abs=0.015)
    assert figures.seed_interval([0.3]) == (0.3, 0.0)


def test_an_interval_covers_what_the_seeds_say_and_what_the_questions_say():
    bits = next(figure for figure in figures.FIGURES if figure.name == "bits")
    counts = np.ones((3, 2, 50, 2))
    counts[:, 0, :, 0] += np.array([0.1, 0.2, 0.3])[:, None]             # every question alike: seeds decide
    found = figures.difference(bits, counts)
    assert (found.low, found.high) == pytest.approx((0.2 - 4.303 * 0.1 / 3 ** 0.5, 0.2 + 4.303 * 0.1 / 3 ** 0.5))
    counts[:, 0, :, 0] = 1.2 + np.random.default_rng(0).normal(0, 1, 50)                # all seeds alike
    found = figures.difference(bits, counts)
    assert (found.low, found.high) == figures.bootstrap(bits, counts)


def test_a_usable_reply_is_in_the_language_ends_and_is_no_echo():
    columns = {"language": [1, 1, 1, 0, None], "ends": [1, 0, 1, 1, 1], "echo": [0, 0, 1, 0, 0]}
    assert figures.usable_share(columns, "usable") == [(1, True), (0, True), (0, True), (0, True), (0, False)]


def test_chrf_per_question_is_the_mean_of_each_ones_own():
    each = next(figure for figure in figures.FIGURES if figure.name == "chrf each")
    texts = [("aa bb", "aa bb cc"), ("xy" * 50, "zz")]
    columns = {"chrf": [measure.short_counts(*pair) for pair in texts]}
    line = {"questions": {"sw": columns}}
    wanted = [float(chrf(np.array(chrf_counts(*pair), float))) for pair in texts]
    assert float(each.of_sums(each.counts(line, "sw").sum(0))) == pytest.approx(sum(wanted) / 2)


def test_a_share_that_is_the_same_on_a_few_questions_is_not_certain():
    counts = np.ones((3, 2, 5, 2))
    found = figures.difference(share_figure(), counts)
    assert found.low < 0 < found.high and found.verdict == "a tie"


def test_a_difference_smaller_than_what_is_shown_is_a_tie():
    figure = next(figure for figure in figures.FIGURES if figure.name == "bits")
    assert figures.Difference(figure, 9, 2e-4, 1e-4, 3e-4, [2e-4]).verdict == "a tie"
    assert figures.Difference(figure, 9, 2e-2, 1e-2, 3e-2, [2e-2]).verdict == "worse"


def test_a_reply_unlike_the_base_s_is_a_change_and_no_harm():
    figure = next(figure for figure in figures.FIGURES if figure.name == "kept")
    found = figures.Difference(figure, 9, -20.0, -30.0, -10.0, [-20.0])
    assert found.verdict == "lower"
    assert report.verdicts({"kept": found}) == "(9 questions) **lower** in likeness to the base's replies"


# ------------------------------------------------------------------------------------------------------- page

def made_up(method, rows=100, seed=0, right=0.5, asked="x", n=40):
    chance = random.Random(f"{method}{rows}{seed}")
    columns = {"bits": [10 * (1 - right) + chance.random() for _ in range(n)], "bytes": [10] * n,
               "language": [int(chance.random() < right) for _ in range(n)],
               "confused": [0] * n, "ends": [1] * n, "chrf": [[20, 20, 10, 9, 8, 7, 6, 5]] * n}
    return {"run": f"{method}-{rows}-{seed}", "plan": "p", "language": "sw", "method": method, "size": rows,
            "seed": seed, "split": "test", "epochs": 2, "rows": rows, "seconds": 1.5, "tokens": 5,
            "flags": {"model": "m", "dtype": "fp32", "max-new-tokens": 9}, "commit": "abc", "cpu": "c",
            "gpu": None, "threads": 1, "torch": "t", "asked": asked,
            "questions": {"sw": columns, "en": columns}}


def page_of(lines):
    return report.pages(lines, report.compare_all(lines))[report.PAGE]


def section_of(text, number):
    return next(part for part in text.split("\n## ") if part.startswith(f"{number}."))


def test_a_sentence_says_no_more_than_its_interval_and_a_question_without_runs_is_not_run():
    lines = [made_up("base", rows=0, right=0.1), *(made_up("sft", seed=seed, right=0.2) for seed in (0, 1, 2)),
             *(made_up("clo", seed=seed, right=0.9) for seed in (0, 1, 2))]
    text = page_of(lines)
    answer = section_of(text, 1)
    assert ("clo against sft (3 seeds): in sw (40 questions) **better** in language of replies, bits per byte"
            in answer)
    assert "bits per byte; a tie in the other 4." in answer
    for number in (2, 3, 4, 5, 6):
        assert report.NOT_RUN in section_of(text, number)
    short = text.split("## In short")[1].split("\n## ")[0]
    assert "p, sw, 100 rows: clo against sft" in short and "sft against" not in short


def test_verdicts_are_counted_over_the_places_of_real_models_alone():
    lines = [made_up("base", rows=0, right=0.1)]
    for rows, right in ((50, 0.2), (100, 0.9)):
        lines += [made_up("sft", rows, seed, right=0.2) for seed in (0, 1, 2)]
        lines += [made_up("clo", rows, seed, right=right) for seed in (0, 1, 2)]
    lines += [line | {"plan": "demo-rate"} for line in lines]
    compared = report.compare("target", lines)
    assert len({one.plan for one in compared}) == 2
    header, _, row = report.verdict_table(compared).splitlines()
    cells = dict(zip(header.split("|"), row.split("|")))
    told = {title.strip(): cell.strip() for title, cell in cells.items()}
    assert told["target: in language"] == "1 / 0 / 1"


def test_twice_the_rows_are_compared_where_both_sizes_were_run():
    lines = [made_up("base", rows=0, right=0.1)]
    lines += [made_up(method, rows, right=rows / 100) for method in ("sft", "clo") for rows in (20, 40)]
    answer = section_of(page_of(lines), 2)
    assert "- sw, 20 rows: clo against sft with 40" in answer
    assert "- sw, 40 rows: sft against sft with 20" in answer


def test_an_adapter_of_two_languages_is_compared_with_each_ones_own_on_the_same_questions():
    two = made_up("clo") | {"language": "sw,de", "asked": "z"}
    two["questions"] = two["questions"] | {"de": made_up("clo", right=0.1)["questions"]["sw"]}
    alone = [made_up("clo") | {"language": language} for language in ("sw", "de")]
    alone[1]["questions"] = {"de": two["questions"]["de"], "en": two["questions"]["en"]}
    answer = section_of(page_of([two, *alone]), "6b")
    for language in ("sw", "de"):
        assert f"- sw,de, 100 rows: clo against clo for {language} alone (1 seed): in {language}" in answer
    alone[0]["questions"]["sw"] = alone[0]["questions"]["sw"] | {"bytes": [11] * 40}
    with pytest.raises(InputError, match="different questions"):
        page_of([two, *alone])


def test_content_is_compared_on_questions_that_both_reply_to_in_the_right_language():
    lines = [made_up("base", rows=0), made_up("sft"), made_up("clo")]
    sides = [line["questions"]["sw"]["language"] for line in lines[1:]]
    both = sum(map(min, *sides))
    assert f"in sw ({both} questions)" in section_of(page_of(lines), 7)


def test_points_of_a_grid_are_told_apart_by_the_flags_in_which_they_differ():
    points = [made_up("clo", right=right) | {"split": "validation", "run": str(rate)}
              for rate, right in ((0.001, 0.2), (0.002, 0.9))]
    for point, rate in zip(points, (0.001, 0.002)):
        point["flags"] = point["flags"] | {"lr": rate, "beta": 0.5}
    text = report.grid_section(points)
    assert "| lr 0.001 |" in text and "| lr 0.002 |" in text and "beta" not in text
    points[1]["flags"] |= {"nll": "en,tgt"}
    assert "| lr 0.002, nll en,tgt |" in report.grid_section(points)
    first, second = [line.split("|")[6].strip() for line in text.splitlines()[-2:]]
    assert float(first) > float(second) > 0


def test_answers_to_other_questions_are_not_compared():
    with pytest.raises(InputError, match="different questions"):
        page_of([made_up("base", rows=0), made_up("sft"), made_up("clo", asked="y")])


def test_of_two_lines_of_a_run_the_later_one_counts(tmp_path):
    lines = [made_up("base", rows=0), made_up("clo", right=0.1), made_up("clo", right=0.9)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.read_all(tmp_path)[1]["questions"] == lines[2]["questions"]


@pytest.mark.slow                       # the more is measured the longer it takes: 12 s
def test_the_committed_pages_are_what_the_committed_lines_say():
    lines = report.read_all(runner.RESULTS)
    drawn_again = report.pages(lines, report.compare_all(lines))
    for name, text in drawn_again.items():
        assert (report.DOCS / name).read_text(encoding="utf-8") == text
    text = drawn_again[report.PAGE]
    drawn = {path.name for path in report.DOCS.glob("replication-*.png")} - {report.SHOWN_PLOT}
    assert drawn == set(re.findall(r"\((replication-\S+\.png)\)", text)) > set()


def test_the_committed_readme_shows_what_the_committed_lines_say():
    text = report.README.read_text(encoding="utf-8")
    lines = report.read_all(runner.RESULTS)
    assert report.with_summary(text, report.summary(lines, report.shown_comparisons(lines))) == text
    assert f"docs/{report.SHOWN_PLOT}" in text and (report.DOCS / report.SHOWN_PLOT).is_file()


@pytest.mark.parametrize("text", ["", "".join(report.BETWEEN[:1]), report.BETWEEN[1] + report.BETWEEN[0],
                                  2 * "".join(report.BETWEEN)])
def test_a_readme_without_the_place_of_its_table_is_left_alone(text):
    with pytest.raises(InputError, match="expected once each"):
        report.with_summary(text, "| table |")


def test_plots_are_drawn_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "replication-nll-p.png").write_bytes(b"of lines that are gone")
    report.write([made_up("base", rows=0), made_up("sft"), made_up("clo")], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "replication-base-p.png", "replication-content-p.png", "replication-tables.md", "replication-target-p.png",
        report.PAGE]


def test_figures_are_drawn_by_rows_where_there_are_three_sizes(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [made_up("base", rows=0)]
    lines += [made_up(method, rows, seed) for method in ("sft", "clo") for rows in (10, 20, 40) for seed in (0, 1)]
    told = report.curves(lines)["p-sw"]
    assert {method: sorted(by_rows) for method, by_rows in told[0, "bits/byte"].items()} == {
        "base": [10, 20, 40], "sft": [10, 20, 40], "clo": [10, 20, 40]}
    assert len({value for values in told[0, "bits/byte"]["base"].values() for value in values}) == 1
    assert all(len(values) == 2 for values in told[0, "bits/byte"]["clo"].values())
    report.write(lines, tmp_path)
    assert (tmp_path / "replication-curves-p-sw.png").is_file()
    assert "(replication-curves-p-sw.png)" in (tmp_path / report.PAGE).read_text()
    assert report.curves(lines[:5]) == {}


def test_without_matplotlib_the_pages_come_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    report.write([made_up("base", rows=0), made_up("sft")], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {report.PAGE, report.TABLES}
    assert "matplotlib" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- data

def write_pairs(path, n=30, response="neno {}"):
    rows = [{"row_id": f"r{i}", "en": {"prompt": f"q {i}", "response": f"word {i}"},
             "sw": {"prompt": f"s {i}", "response": response.format(i)}} for i in range(n)]
    rows[3]["sw"]["response"] = rows[3]["en"]["response"]
    rows[5]["en"]["response"] = "long " * 121
    write_rows(path, rows)
    return path


@pytest.fixture
def split(tmp_path, monkeypatch):
    """Splits a file; what is on record then."""
    monkeypatch.setattr(lab_data, "SPLITS", tmp_path / "splits")

    def run(pairs, *more):
        lab_data.main([str(pairs), "--lang", "sw", "--name", "s", "--out", str(tmp_path / "data"),
                       "--validation", "4", "--test", "6", *more])
        return json.loads((tmp_path / "splits" / "s.json").read_text())
    return run


def test_a_split_leaves_out_equal_and_long_rows_and_counts_them(tmp_path, split):
    record = split(write_pairs(tmp_path / "pairs.jsonl"))
    parts = record["ids"]
    assert [len(parts[part]) for part in ("validation", "test", "train")] == [4, 6, 18]
    assert {"r3", "r5"}.isdisjoint(sum(parts.values(), []))
    assert record["counts"]["left out: equal responses"] == 1
    assert record["counts"]["left out: a response of more than 120 words"] == 1
    rows = data.read_rows(tmp_path / "data" / "s" / "eval.jsonl", targets=["sw"])
    assert [row["row_id"] for row in rows if row["split"] == "test"] == parts["test"]


def test_a_split_does_not_depend_on_the_order_of_rows_and_refuses_other_content(tmp_path, split):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    record = split(pairs)
    lines = pairs.read_text().splitlines()
    pairs.write_text("\n".join(reversed(lines)) + "\n")
    assert split(pairs) == record
    with pytest.raises(InputError, match="with other sha256"):
        split(write_pairs(pairs, response="neno lingine {}"))
    with pytest.raises(InputError, match="with other counts"):
        split(write_pairs(pairs, n=20))


def test_a_file_without_rows_to_train_on_is_refused(tmp_path, split):
    with pytest.raises(InputError, match="none is left to train on"):
        split(write_pairs(tmp_path / "pairs.jsonl", n=10))


# --------------------------------------------------------------------------------------------------- for real

@pytest.mark.slow
def test_a_plan_runs_end_to_end_and_again_does_nothing(tmp_path):
    settings = SETTINGS | {"model": "demo/llama", "translator": "demo/m2m100", "epochs": 1,
                           "data": str(tmp_path / "d.jsonl"), "eval-data": str(tmp_path / "e.jsonl")}
    with open("demo/eval.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    kept = [row for part in ("validation", "test") for row in rows if row["split"] == part][:3]
    write_rows(tmp_path / "e.jsonl", kept + [row for row in rows if row["split"] == "test"][:3])
    english = [{"row_id": str(i), "en": row["en"]} for i, row in enumerate(rows[20:40])]
    write_rows(tmp_path / "d.jsonl", english)
    write_json(tmp_path / "p.json", {"settings": settings, "methods": METHODS, "runs": [
        {"languages": ["sw"], "sizes": [8], "seeds": [0], "methods": list(METHODS)}]})
    command = [sys.executable, "-m", "lab", str(tmp_path / "p.json"), "--runs", str(tmp_path / "runs"),
               "--results", str(tmp_path / "results")]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    lines = [line for _, line in read_records(tmp_path / "results" / "p.jsonl")]
    assert [line["method"] for line in lines] == ["base", "sft", "clo", "sft, clo's compute"]
    tokens = {line["method"]: line["tokens"] for line in lines}
    assert tokens["sft, clo's compute"] == pytest.approx(tokens["clo"], rel=0.5)      # of one step in three
    assert {"commit", "cpu", "threads", "torch", "seconds"} <= lines[0].keys()
    assert all(len(column) == 3 for column in lines[1]["questions"]["sw"].values())
    assert str(tmp_path / "runs") not in json.dumps(lines)
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "")
    assert "1. Does CLO beat SFT" in page_of(lines)
