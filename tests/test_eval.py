"""eval.py: what counts as correct, the language of a reply, and its commands from end to end."""

import contextlib
import io
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import eval as evaluation
from conftest import with_lora, write_adapter, write_checkpoint
from engine import files
from engine.files import InputError, Journal, write_json, write_jsonl
from evals import instructions
from evals.instructions import read_instructions
from evals.perplexity import response_lines, scored_rows
from formats import records
from formats.chat import load_tokenizer
from formats.records import read_rows
from translate import Translation


@pytest.mark.parametrize("lines, told", [
    (["{}"], ':1: "settings" is missing'), (["[]"], ":1: damaged"), (['{"settings": 5}'], ":1: dict expected"),
    (['{"settings": {"a": 1}}', "{}"], ':2: "question" is missing'), (['{"settings": {"a": 1}}', "5"], ":2: damaged"),
    (['{"settings": {"a": 1}}', '{"question": "\udcff"}'], ":2: damaged"),
    (['{"settings": {"a": 1}}', "[" * 100_000], ":2: damaged")])
def test_a_damaged_journal_is_named_with_its_line(tmp_path, lines, told):
    path = tmp_path / "answers.jsonl"
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as error:
        Journal(path, {"a": 1}, ("question",))
    assert str(error.value).startswith(f"{path}{told}")
    path.write_bytes(b'{"settings": {"a": 1}}\n{"question": 1}\n{"question": "\xc3')     # killed in a letter
    with Journal(path, {"a": 1}, ("question",)) as journal:
        assert journal.done == [{"question": 1}]


def run(*arguments, typed=""):
    """A command of eval.py with `typed` on its standard input: its exit code and what it wrote."""
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err, \
            mock.patch("sys.stdin", io.StringIO(typed)):
        try:
            files.run(lambda: evaluation.main(list(map(str, arguments))))
        except SystemExit as ended:
            code = ended.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_ask_answers_a_question_and_holds_a_conversation(tmp_path):
    path = write_checkpoint(tmp_path)
    one = run("ask", "--model", path, "--max-tokens", 5, "Where is the lion?")
    assert one.returncode == 0 and one.stderr == f"loading {path}: fp32 on cpu\nanswering, at most 5 tokens\n"
    assert one.stdout.endswith("\n(cut at --max-tokens 5)\n")
    talk = run("ask", "--model", path, "--max-tokens", 5, typed="Where is the lion?\n\nnever read\n")
    assert talk.returncode == 0 and talk.stdout.count("> ") == 2 and one.stdout.strip() in talk.stdout


def test_ask_shows_the_base_and_adapters_side_by_side_each_as_it_answers_alone(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    adapters = [write_adapter(with_lora(base, alpha=alpha), base, tmp_path / f"adapter{alpha}")
                for alpha in (12, 500)]
    both = ["--adapter", adapters[0], "--adapter", adapters[1]]
    alone = [run("ask", *flags, "--max-tokens", 5, "Who?").stdout for flags in (
        ["--model", base], both[:2], both[2:])]
    names = [base, *adapters]
    asked = run("ask", *both, "--beside", "--max-tokens", 5, "Who?")
    assert asked.stdout == "".join(f"{name}:\n{text}" for name, text in zip(names, alone)), asked.stderr
    talk = run("ask", *both, "--beside", "--max-tokens", 5, typed="Who?\n\n")
    assert asked.stdout in talk.stdout and len(set(alone)) > 1
    assert run("ask", *both, "--max-tokens", 5, "Who?").stdout == asked.stdout[asked.stdout.index(
        f"{adapters[0]}:"):]


def test_an_adapter_on_another_base_than_its_own_is_told_and_two_names_of_one_base_are_one(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bases = [write_checkpoint(tmp_path / f"base{seed}", seed) for seed in range(2)]
    adapters = [write_adapter(with_lora(bases[0]), name, tmp_path / f"adapter{i}")
                for i, name in enumerate((bases[0], "base0", bases[1]))]
    one, same, other = (["--adapter", adapter] for adapter in adapters)
    asked = run("ask", *one, *same, "--max-tokens", 5, "Who?")
    assert asked.returncode == 0 and "trained on" not in asked.stderr
    refused = run("ask", *one, *other, "Who?")
    assert refused.returncode == 2 and f"{adapters[2]} belongs to {bases[1]}" in refused.stderr
    asked = run("ask", "--model", "base0", *one, *other, "--max-tokens", 5, "Who?")
    told, = [line for line in asked.stderr.splitlines() if "trained on" in line]
    assert told.startswith(f"{adapters[2]} was trained on {bases[1]}, --model base0 is taken")


@pytest.mark.parametrize("arguments", [
    ["ask", "--top-p", "0", "Who?"], ["ask", "--temperature", "-1", "Who?"],
    ["ask", "--max-tokens", "0", "Who?"], ["ask", "--seed", "-1", "Who?"],
    ["ask", "--temperature", "nan", "Who?"], ["mc", "mmlu", ".", "--limit", "-3"],
    ["mc", "mmlu", ".", "--shots", "-1"], ["mc", "mmlu", ".", "--batch-tokens", "0"],
    ["perplexity", "--lang", "sw", "--batch-tokens", "x"],
    ["alpaca", "--lang", "sw", "--instructions", "x", "--batch-size", "0"],
    ["alpaca", "--lang", "sw", "--instructions", "x", "--beams", "0"],
    ["alpaca", "--lang", "sw", "--instructions", "x", "--top-p", "1.5"],
    ["judge", "a", "b", "--timeout", "inf"], ["judge", "a", "b", "--parallel", "0"],
    ["judge", "a", "b", "--attempts", "0"], ["judge", "a", "b", "--judge-tokens", "0"],
    ["judge", "a", "b", "--price-in", "-1"], ["judge", "a", "b", "--seed", "nan"],
    ["judge", "a", "b", "--limit", "0"]])
def test_every_number_of_every_command_is_checked_in_one_line(arguments):
    result = run(*arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "was expected" in result.stderr


def test_a_notebook_finds_what_it_may_rely_on_in_eval():
    languages = evaluation.fit_languages({"en": ["where is the lion"] * 4, "sw": ["simba yuko wapi"] * 4})
    assert evaluation.reply_language("simba yuko wapi", languages)[0] == "sw"
    assert evaluation.multiple_choice is evaluation.choice.multiple_choice
    tokenizer = SimpleNamespace(fingerprint="")
    scores = evaluation.answer_and_score(None, tokenizer, [], (), languages, 8, None, None)
    assert scores["questions"] == 0 and scores["decoding"]["max_tokens"] == 8


@pytest.mark.parametrize("command", evaluation.COMMANDS)
def test_help_has_an_example_and_no_flag_without_words(command):
    told = run(command, "--help").stdout
    assert f"Example:\n  python eval.py {command} " in told and "None" not in told
    assert all(len(line) <= 150 for line in told.splitlines())


def test_alpaca_misses_the_model_before_it_translates(tmp_path, monkeypatch):
    (tmp_path / "i.json").write_text('[{"instruction": "a"}]')
    monkeypatch.setattr(evaluation.translate, "load", lambda *_: pytest.fail("hours of translation"))
    for flags in (["--adapter", tmp_path / "none", "--model", write_checkpoint(tmp_path / "base")],
                  ["--model", tmp_path / "none"]):
        result = run("alpaca", "--instructions", tmp_path / "i.json", "--lang", "sw",
                     "--translator", "t", *flags)
        assert result.returncode == 2 and str(tmp_path / "none") in result.stderr


def test_ask_refuses_what_is_not_there_in_one_line(tmp_path):
    for arguments in (["--model", tmp_path / "none"], ["--adapter", tmp_path / "none"]):
        result = run("ask", *arguments, "hello")
        assert (result.returncode == 2 and result.stderr.startswith("error: ")
                and result.stderr.count("\n") == 1)
    result = run("ask", "--model", write_checkpoint(tmp_path / "base"), "--beside", "hello")
    assert result.returncode == 2 and result.stderr.startswith("error: --beside shows what an adapter's base")


# --------------------------------------------------------------------------------------- commands, end to end

def write_rows(path, long=""):
    records.write_rows(path, [
        {"row_id": str(i), "split": "test",
         "en": {"prompt": f"What is {long if i == 3 else ''}{i}?", "response": f"It is {i}."},
         "sw": {"prompt": f"{i} ni nini?", "response": f"Ni kìnnìún {i}."}} for i in range(7)])
    return path


def test_multiple_choice_from_the_command_line_resumes_to_the_same_numbers(tmp_path):
    from test_choice import write_mmlu
    model, files = write_checkpoint(tmp_path / "model"), write_mmlu(tmp_path / "files")
    command = ["mc", "mmlu", files, "--shots", "2", "--model", model, "--out", tmp_path / "out"]
    whole = run(*command)
    assert whole.returncode == 0, whole.stderr
    first = json.loads((tmp_path / "out" / "result.json").read_text())
    assert first["figures"]["mmlu 2-shot"]["n"] == 14 and set(first["categories"]) == {"stem", "humanities"}
    for key in ("model hash", "tokenizer", "shots", "template", "description", "files",
                "dtype", "scored"):
        assert key in first["settings"]
    answers = tmp_path / "out" / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:6]) + lines[6][:20])                              # killed while writing
    again = run(*command)
    assert ("holds 5 answers: going on" in again.stdout
            and json.loads((tmp_path / "out" / "result.json").read_text()) == first)
    refused = run(*command, "--limit", "3")
    assert (refused.returncode == 2 and "limit = None, now it is 3" in refused.stderr
            and refused.stderr.count("\n") == 1)


def test_another_limit_split_subject_or_dtype_is_another_result_in_its_own_directory(tmp_path, monkeypatch):
    from test_choice import write_mmlu
    write_mmlu(tmp_path / "files"), write_checkpoint(tmp_path / "m"), monkeypatch.chdir(tmp_path)
    sequence = {"0-shot-first-3": ["--limit", "3"], "0-shot": [], "2-shot": ["--shots", "2"],
                "0-shot-dev": ["--split", "dev"], "0-shot-anatomy": ["--subjects", " anatomy"],
                "0-shot-anatomy,world_religions": ["--subjects", "world_religions, anatomy"]}
    for more in [*sequence.values(), *sequence.values(), ["--dtype", "bf16"]]:
        evaluation.main(["mc", "mmlu", "files", "--model", "m", "--device", "cpu", *more])
    names = {path.parent.name: json.loads(path.read_text()) for path in Path().glob("runs/eval/*/result.json")}
    assert set(names) == {*(f"mmlu-{name}-fp32-m" for name in sequence), "mmlu-0-shot-bf16-m"}
    assert [list(result["figures"]) for result in map(names.get, (
        "mmlu-0-shot-first-3-fp32-m", "mmlu-0-shot-fp32-m"))] == [["mmlu 0-shot first 3"], ["mmlu 0-shot"]]


def test_names_of_directories_stay_short_and_tell_long_ones_apart():
    model = "/".join(["directory"] * 40)
    subjects = [",".join(f"{name}{i}" for i in range(57)) for name in ("anatomy", "law")]
    settings = {"model": "base", "adapter": model}
    first, second = (evaluation.out_directory(settings, "mmlu", name) for name in subjects)
    assert first != second and max(len(first.name), len(second.name)) < 140 and " " not in first.name


def test_perplexity_per_byte_is_that_of_single_sequences_long_prompts_cut_and_said(tmp_path):
    import torch
    import model as llama
    path, rows = write_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", long="so " * 90)
    command = ["perplexity", "--model", path, "--data", rows, "--lang", "sw", "--out", tmp_path / "out"]
    first, again = run(*command), run(*command)
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert ("1 of 14 prompts were longer than the model reads" in first.stdout
            and "holds 14 answers" in again.stdout)
    assert first.stdout.splitlines()[2:5] == again.stdout.splitlines()[3:6]
    assert first.stdout.startswith(f"{rows}: 7 read, 7 kept\n")
    figures = json.loads((tmp_path / "out" / "result.json").read_text())["figures"]
    model, tokenizer = llama.load(path, dtype=torch.float64), load_tokenizer(path)
    for place, language in (("source", "en"), ("target", "sw")):
        nll = size = 0
        for row in read_rows(rows):
            prompt, reply = (tokenizer.prompt_ids(row[language]["prompt"]),
                             tokenizer.response_ids(row[language]["response"]))
            ids = (prompt + reply)[-257:]
            logp = (model(torch.tensor([ids[:-1]]))[0] @ model.head.T).log_softmax(-1)
            nll -= sum(logp[i - len(reply), token].item() for i, token in enumerate(reply))
            size += len(row[language]["response"].encode())
        nats, bits = figures[f"nll/byte {place}"], figures[f"bits/byte {place}"]
        assert nats["value"] == pytest.approx(nll / size, rel=1e-5)
        assert bits["value"] == pytest.approx(math.log2(math.e) * nll / size, rel=1e-5)
        assert bits["stderr"] / bits["value"] == pytest.approx(nats["stderr"] / nats["value"])
        assert figures[f"perplexity/byte {place}"]["value"] == pytest.approx(math.exp(nll / size), rel=1e-5)


@pytest.mark.parametrize("command", ["mc", "perplexity"])
def test_what_is_scored_behind_a_kill_has_the_bits_of_a_run_without_one(command, tmp_path):
    from test_choice import write_mmlu
    model, rows = write_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", long="so " * 20)
    what = {"mc": ["mmlu", write_mmlu(tmp_path / "files")], "perplexity": ["--data", rows, "--lang", "sw"]}
    flags = [command, *what[command], "--model", model, "--out", tmp_path / "out", "--batch-tokens", 150]
    assert run(*flags).returncode == 0
    answers, result = tmp_path / "out" / "answers.jsonl", tmp_path / "out" / "result.json"
    lines, figures = answers.read_text().splitlines(keepends=True), result.read_text()
    for kept in range(2, len(lines)):
        answers.write_text("".join(lines[:kept]))
        assert run(*flags).returncode == 0
        assert (answers.read_text(), result.read_text()) == ("".join(lines), figures), kept


def test_answers_for_alpaca_eval_have_its_format_and_resume(tmp_path):
    path = write_checkpoint(tmp_path / "model")
    asked = tmp_path / "instructions.json"
    asked.write_text(json.dumps(
        [{"instruction": f"Say {i}", "dataset": "d", "output": "x"} for i in range(5)]))
    command = ["alpaca", "--model", path, "--instructions", asked, "--lang", "en", "--max-tokens", "6",
               "--batch-size", "2", "--out", tmp_path / "out", "--name", "tiny", "--temperature", "0.7"]
    assert run(*command).returncode == 0
    outputs = json.loads((tmp_path / "out" / "model_outputs.json").read_text())
    assert [record["instruction"] for record in outputs] == [f"Say {i}" for i in range(5)]
    assert all(set(record) == {"dataset", "instruction", "output", "generator", "datasplit"}
               for record in outputs)
    answers = tmp_path / "out" / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:4]))            # 3 answers of 5
    assert run(*command).returncode == 0
    assert json.loads((tmp_path / "out" / "model_outputs.json").read_text()) == outputs
    settings = json.loads((tmp_path / "out" / "result.json").read_text())["settings"]
    assert (settings["temperature"], settings["max_tokens"], settings["seed"]) == (0.7, 6, 0)


def test_an_instruction_comes_with_its_input_and_an_empty_one_is_left_out_and_counted(tmp_path, capsys):
    write_json(tmp_path / "i.json", [
        {"instruction": "Summarise the text.", "input": "The tiger is a mammal."}, {"instruction": " "},
        {"instruction": "Summarise the text.", "input": "The lion is one."}, {"instruction": "Go.", "input": ""},
        {"instruction": "Say yes.", "input": "<noinput>"},
        {"instruction": "Say no.", "input": float("nan"), "dataset": float("nan")}])
    items = read_instructions(tmp_path / "i.json", "en")
    assert [item["instruction"] for item in items] == [
        "Summarise the text.\n\nThe tiger is a mammal.", "Summarise the text.\n\nThe lion is one.", "Go.", "Say yes.",
        "Say no."]
    assert items[-1]["dataset"] is None
    assert "1 empty instructions are left out" in capsys.readouterr().out


def test_rows_that_perplexity_does_not_score_are_counted(tmp_path, capsys):
    both = {language: {"prompt": f"{language}?", "response": "x"} for language in ("en", "sw")}
    rows = [both | {"id": "1", "split": None}, both | {"id": "2", "split": "train"}, both | {"id": "3"},
            {"id": "4", "en": both["en"]}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    kept = scored_rows(tmp_path / "rows.jsonl", "en", "sw", "test")
    assert [row["row_id"] for row in kept] == ["1", "3"]
    told = capsys.readouterr().out
    assert "1 rows without en or sw are left out" in told and "1 rows of other splits than test are left out" in told


def test_perplexity_refuses_a_response_that_is_too_long_before_it_scores_any():
    tokenizer = SimpleNamespace(prompt_ids=lambda text, _: [1], response_ids=lambda text: [2] * len(text))
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8))       # it scores nothing
    rows = [{"row_id": "7", "en": {"prompt": "a", "response": "short"}, "sw": {"prompt": "a", "response": 9 * "x"}}]
    places = {"source": "en", "target": "sw"}
    with pytest.raises(files.InputError, match="row 7 in sw: 9 tokens to be scored, the model reads 8"):
        next(response_lines(model, tokenizer, rows, places, set(), None, 1))


def test_translated_instructions_are_the_same_for_every_system_and_what_failed_a_check_is_left_out(
        tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.chdir(tmp_path)
    translator = SimpleNamespace(fingerprint="abc", check=lambda *_: None)

    def translate(texts, **_):
        calls.append(len(texts))
        odd = {"Say 3": " ", "Say 5": "Say 1 1"}
        faults = {"Say 7": Counter(length=2)}
        translations = [Translation(odd.get(text, f"{text} {len(calls)}")) for text in texts]
        for text, translation in zip(texts, translations):
            translation.faults = faults.get(text, Counter())
        return translations

    how = (translate, translator, "en", "sw", 2)
    items = [{"instruction": f"Say {i}", "dataset": None} for i in range(20)]
    first = instructions.translate_instructions(items, *how)
    assert instructions.translate_instructions(items, *how) == first and calls == [16, 4]
    assert [item["instruction"] for item in first] == [
        f"Say {i} {1 + i // 16}" for i in range(20) if i not in (3, 5, 7)]
    assert ("3 of 20 translated instructions are left out: 1 empty, 1 equal to an earlier one, 1 length"
            in capsys.readouterr().out)


@pytest.mark.parametrize("arguments, wanted", [
    (["perplexity", "--data", "rows.jsonl", "--lang", "fr"], "no row holds en and fr"),
    (["perplexity", "--data", "rows.jsonl", "--lang", "sw", "--split", "x"], "has no row of split 'x'"),
    (["perplexity", "--data", "twice.jsonl", "--lang", "sw"],
     "twice.jsonl:8: the same identifier as in twice.jsonl:1"),
    (["alpaca", "--instructions", "twice.json", "--lang", "en"],
     r"twice.json[1]: the same identifier as in twice.json[0]"),
    (["alpaca", "--instructions", "empty.json", "--lang", "en"], "holds no instruction"),
    (["alpaca", "--instructions", "half.json", "--lang", "en"], "half.json[0]: broken Unicode"),
    (["perplexity", "--lang", "swh", "--source", "sw"], "--source and --lang are both sw: give two languages"),
    (["winrate", "rows.jsonl"], 'rows.jsonl:1: "preference" is missing'),
    (["compare", "none"], "none: no such file or directory"),
    (["mc", "mmlu", "none"], "none: no such file or directory"),
    (["winrate", "odd.jsonl"], "odd.jsonl:1: the preference is 'M'"),
    (["ask", "--device", "quantum", "Who?"], "--device quantum cannot be used")])
def test_bad_input_is_one_clear_line(arguments, wanted, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "twice.jsonl").write_text((tmp_path / "rows.jsonl").read_text() * 2)
    (tmp_path / "twice.json").write_text('[{"instruction": "a"}, {"instruction": "a"}]')
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "half.json").write_text(json.dumps([{"instruction": "\ud800"}]))
    (tmp_path / "odd.jsonl").write_text('{"preference": "M", "output_1": "a", "output_2": "b"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        files.run(lambda: evaluation.main(arguments))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1 and wanted in told
