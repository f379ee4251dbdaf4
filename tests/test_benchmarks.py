"""benchmarks.py: files, wording, joint tokenisation and scores, against hand-written cases and lm-evaluation-harness."""

import csv
import os
import shutil

import pytest
import torch

import benchmarks
import data
import model as llama
from conftest import write_checkpoint

QUESTIONS = [("What eats meat?", ("lion", "cow", " sheep", "tree"), 0), ("  Which\nriver is \"long\"? ", ("Nile", "none", "1", "2"), 0),
             ("Mji mkuu wa Ufaransa ni upi?", ("Roma", "Paris", "Kìnnìún", "x, y"), 1), ("2 + 2 = ", ("3", "5", "4", "22"), 2),
             ("Is {A} a brace?", ("yes", "no", "{B}", "maybe"), 3), ("Why?", ("a", "b", "c", "d"), 1),
             ("What eats grass? " * 9, ("cow", "lion", "wolf", "cat"), 0)]
ROTATIONS = [QUESTIONS[i:] + QUESTIONS[:i] for i in range(3)]


def write_csv(path, rows, header=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([*([header] if header else []), *rows])


def write_lines(path, records):
    data.write_jsonl(path, records)
    return str(path)


def write_mmlu(root):
    for subject, rows in zip(("anatomy", "world_religions"), ROTATIONS):
        for split, part in (("test", rows), ("dev", rows[2:6])):
            write_csv(root / split / f"{subject}_{split}.csv", [[q, *options, "ABCD"[gold]] for q, options, gold in part])
    return root


def write_cmmlu(root):
    for subject, rows in zip(("anatomy", "arts"), ROTATIONS):
        for split, part in (("test", rows), ("dev", rows[2:6])):
            write_csv(root / split / f"{subject}.csv", [[i, q, *options, "ABCD"[gold]] for i, (q, options, gold) in enumerate(part)],
                      ["", "Question", "A", "B", "C", "D", "Answer"])
    return root


def write_mmmlu(root):
    rows = [[i, q, *options, "ABCD"[gold], subject] for subject, part in
            zip(("anatomy", "world_religions_test.csv_sw-KE.csv"), ROTATIONS) for i, (q, options, gold) in enumerate(part)]
    write_csv(root / "test" / "mmlu_SW-KE.csv", rows, ["", "Question", "A", "B", "C", "D", "Answer", "Subject"])
    return root


def write_belebele(root):
    (root / "data").mkdir(parents=True)
    write_lines(root / "data" / "deu_Latn.jsonl", [
        {"link": "x", "question_number": i % 2 + 1, "flores_passage": f"Der Text {i // 2}. ", "question": q,
         **{f"mc_answer{k + 1}": option for k, option in enumerate(options)}, "correct_answer_num": str(gold + 1),
         "dialect": "deu_Latn", "ds": "2023"} for i, (q, options, gold) in enumerate(QUESTIONS)])
    return root


def write_afrimmlu(root):
    for split, rows in (("test", ROTATIONS[0]), ("val", ROTATIONS[1])):
        path = root / "data" / "swa" / f"{split}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([["subject", "question", "choices", "answer"]] + [
                ["anatomy" if i % 2 else "global_facts", q, str(list(options)), "ABCD"[gold]]
                for i, (q, options, gold) in enumerate(rows)])
    return root


WRITERS = {"mmlu": write_mmlu, "cmmlu": write_cmmlu, "mmmlu": write_mmmlu, "belebele": write_belebele, "afrimmlu": write_afrimmlu}
LANGUAGE = {"mmmlu": "sw", "belebele": "de", "afrimmlu": "sw"}


# ------------------------------------------------------------------------------------------ lm-evaluation-harness

def hub_row(name, document):
    """A document in the columns of the hub's data set."""
    letters = dict(zip("ABCD", document.options))
    if name == "mmlu":
        return {"question": document.question, "subject": document.subject, "choices": list(document.options),
                "answer": document.gold}
    if name == "afrimmlu":
        return {"subject": document.subject, "question": document.question, "choices": str(list(document.options)),
                "answer": "ABCD"[document.gold]}
    if name == "belebele":
        return {"flores_passage": document.passage, "question": document.question,
                **{f"mc_answer{i + 1}": option for i, option in enumerate(document.options)},
                "correct_answer_num": str(document.gold + 1)}
    return {"Question": document.question, **letters, "Answer": "ABCD"[document.gold], "Subject": document.subject}


YAML = {"mmlu": "mmlu/default/mmlu_{subject}.yaml", "cmmlu": "cmmlu/cmmlu_{subject}.yaml", "belebele": "belebele/belebele_deu_Latn.yaml",
        "mmmlu": "openai-mmmlu/default/mmmlu_sw_ke_{subject}.yaml", "afrimmlu": "afrimmlu/direct/prompt_1/afrimmlu_direct_swa.yaml"}
SPLITS = {"dev": "dev", "val": "validation", "": "test"}


def harness_scores(name, root, checkpoint, shots, limit, work):
    """[(context, [log-prob of each choice])] of lm-evaluation-harness's own task on the same rows, and its results."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml
    task, folder = benchmarks.TASKS[name], os.path.dirname(lm_eval.__file__) + "/tasks/"
    asked = benchmarks.by_subject(task, benchmarks.read_split(task, root, LANGUAGE.get(name, ""), "test"))
    shown = benchmarks.by_subject(task, benchmarks.read_split(task, root, LANGUAGE.get(name, ""), task.examples or "test"))
    tasks = []
    for subject, documents in asked.items():
        files = {"test": write_lines(work / f"{subject}-test.jsonl", [hub_row(name, document) for document in documents])}
        if task.examples:
            files[SPLITS[task.examples]] = write_lines(work / f"{subject}-shots.jsonl",
                                                       [hub_row(name, document) for document in shown[subject]])
        config = load_yaml(folder + YAML[name].format(subject=subject), resolve_func=True)
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files},
                   "task": f"{len(tasks):02d}_{subject}"}
        config = {key: value for key, value in config.items() if key not in ("tag", "task_alias", "metric_list")}
        tasks.append(ConfigurableTask(config=config))
    theirs = lm_eval.simple_evaluate(HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4), tasks=tasks,
                                     num_fewshot=shots, limit=limit, log_samples=True, bootstrap_iters=0)
    return [(sample["arguments"][0][0], [float(r[0][0]) for r in sample["resps"]])
            for key in sorted(theirs["samples"]) for sample in sorted(theirs["samples"][key], key=lambda s: s["doc_id"])], theirs


def check_against_harness(name, root, checkpoint, shots, limit, work):
    benchmark = benchmarks.read_benchmark(name, root, shots, LANGUAGE.get(name, ""), limit=limit)
    theirs, results = harness_scores(name, root, checkpoint, shots, limit, work)
    ours = benchmarks.multiple_choice(llama.load(checkpoint), data.load_tokenizer(checkpoint), benchmark.questions)
    assert len(ours) == len(theirs)
    for question, mine, (context, logps) in zip(benchmark.questions, ours, theirs):
        assert question.header + question.text == context
        assert mine["choice"] == max(range(len(logps)), key=lambda i: logps[i])
        torch.testing.assert_close(torch.tensor(mine["logp"]), torch.tensor(logps), rtol=0, atol=1e-3)
    return benchmark, ours, results


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("shots, family", [(3, {}), (0, {"model_type": "qwen2", "qkv_bias": True, "max_position_embeddings": 4096})])
def test_choices_and_log_probs_equal_the_harness(name, shots, family, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model", **family)          # the first reads 256 tokens: long prompts are cut
    check_against_harness(name, WRITERS[name](tmp_path / "files"), checkpoint, shots, None, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [{}, {"model_type": "qwen2", "qkv_bias": True}])
@pytest.mark.parametrize("name, files, shots", [("mmlu", "mmlu", 5), ("cmmlu", "cmmlu", 5), ("belebele", "belebele", 2)])
def test_real_questions_score_as_in_the_harness(name, files, shots, family, shared, tmp_path):
    tokenizer = shared / "tokenizers" / ("qwen2_5" if family else "llama2")
    checkpoint = write_checkpoint(tmp_path / "model", **family, vocab_size=151936 if family else 32000, max_position_embeddings=4096)
    for path in tokenizer.glob("tokenizer*.json"):
        shutil.copyfile(path, checkpoint / path.name)
    check_against_harness(name, shared / "benchmarks" / files, checkpoint, shots, 4, tmp_path)


# --------------------------------------------------------------------------------------- without the harness

def logps_one_by_one(model, tokenizer, question):
    """Each choice scored alone: the whole text, cut on the left, one forward pass."""
    whole, found = question.header + question.text, []
    prompt = tokenizer.full.encode(whole.rstrip()).ids
    for choice in question.choices:
        ids = prompt + tokenizer.full.encode(f"{whole} {choice}").ids[len(prompt):]
        n = len(ids) - len(prompt)
        ids = ids[-(model.config.max_position_embeddings + 1):]
        logits = model(torch.tensor([ids[:-1]]))[0] @ model.head.T
        logp = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        found.append(logp[-n:].sum())
    return torch.stack(found)


@pytest.mark.parametrize("batch_tokens", [40, 4096])
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("window", [None, 20])
def test_scores_equal_one_forward_pass_a_choice(name, window, batch_tokens, tmp_path):
    kind = {"model_type": "mistral", "sliding_window": window} if window else {}
    checkpoint = write_checkpoint(tmp_path / "model", max_position_embeddings=300, **kind)        # some prompts are longer
    model, tokenizer = llama.load(checkpoint, dtype=torch.float64), data.load_tokenizer(checkpoint)
    questions = benchmarks.read_benchmark(name, WRITERS[name](tmp_path / "files"), 2, LANGUAGE.get(name, "")).questions
    for question, found in zip(questions, benchmarks.multiple_choice(model, tokenizer, questions, batch_tokens)):
        torch.testing.assert_close(torch.tensor(found["logp"], dtype=torch.float64), logps_one_by_one(model, tokenizer, question),
                                   rtol=0, atol=1e-9)
        assert found["correct"] == (found["choice"] == question.gold)


def test_the_header_of_a_subject_is_computed_once(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "model", max_position_embeddings=4096)
    model, tokenizer = llama.load(checkpoint), data.load_tokenizer(checkpoint)
    questions = benchmarks.read_benchmark("mmlu", write_mmlu(tmp_path / "files"), 3).questions
    widths, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, tokens, *args, **kw: widths.append(tokens.numel()) or forward(self, tokens, *args, **kw))
    benchmarks.multiple_choice(model, tokenizer, questions)
    prompts = [prompt for prompt, _ in benchmarks.encode_questions(tokenizer, questions)]
    assert sum(widths) < sum(map(len, prompts)) / 2.5
    assert len(widths) == 4                                                    # header and questions of two subjects


def test_choices_cut_at_different_places_are_forks_of_their_own():
    parts = benchmarks.make_parts(7, "x:1", [1, 2, 3, 4], [[5], [6, 7], [8]], max_tokens=4)
    assert [(part.fork.prompt, part.fork.continuations, part.choices, part.cut) for part in parts] == [
        ([1, 2, 3, 4], [[5], [8]], [0, 2], False), ([2, 3, 4], [[6, 7]], [1], True)]
    with pytest.raises(data.DataError, match="x:1: a choice fills"):
        benchmarks.make_parts(7, "x:1", [1], [[5, 6, 7, 8, 9]], max_tokens=4)


@pytest.mark.parametrize("prompts, shared", [([[1, 2, 3], [1, 2, 4]], [1, 2]), ([[1, 2], [1, 2]], [1]), ([[1, 2], [1, 2, 3]], [1]),
                                             ([[5], [5, 6]], []), ([[1, 2], [3]], []), ([[4, 5, 6]], [4, 5])])
def test_a_common_prefix_leaves_every_prompt_a_token(prompts, shared):
    assert benchmarks.common_prefix(prompts) == shared


def test_header_and_question_are_worded_as_published(tmp_path):
    question = benchmarks.read_benchmark("mmlu", write_mmlu(tmp_path), 1, subjects=["world_religions"], limit=1).questions[0]
    assert question.header == ("The following are multiple choice questions (with answers) about world religions.\n\n"
                               "2 + 2 =\nA. 3\nB. 5\nC. 4\nD. 22\nAnswer: C\n\n")
    assert question.text == 'Which\nriver is "long"?\nA. Nile\nB. none\nC. 1\nD. 2\nAnswer:' and question.gold == 0
    assert question.where.endswith("test/world_religions_test.csv:1")


def test_lines_are_counted_through_quoted_newlines(tmp_path):
    benchmark = benchmarks.read_benchmark("mmlu", write_mmlu(tmp_path), subjects=["anatomy"])
    assert [question.where.rsplit(":")[-1] for question in benchmark.questions] == ["1", "2", "4", "5", "6", "7", "8"]


def test_maps_hold_every_subject_once():
    mmlu = [subject for part in benchmarks.MMLU_CATEGORIES.values() for subject in part.split()]
    cmmlu = [subject for part in benchmarks.CMMLU_SUBJECTS.values() for subject in part]
    assert len(mmlu) == len(set(mmlu)) == 57 and len(cmmlu) == len(set(cmmlu)) == 67
    assert len(benchmarks.CHINA_SPECIFIC) == 15 and benchmarks.CHINA_SPECIFIC <= set(cmmlu)


def test_settings_tell_template_shots_and_file_hashes(tmp_path):
    settings = benchmarks.read_benchmark("cmmlu", write_cmmlu(tmp_path), 2).settings
    assert settings["shots"] == 2 and settings["template"] == benchmarks.CMMLU_TEXT and settings["subjects"] == ["anatomy", "arts"]
    assert set(settings["files"]) == {f"{split}/{subject}.csv" for split in ("dev", "test") for subject in ("anatomy", "arts")}
    assert all(len(digest) == 16 for digest in settings["files"].values())


# ------------------------------------------------------------------------------------------------ summaries

def test_errors_are_those_of_the_harness():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    groups = [[True, False, True], [False, False, True, True, True], [True]]
    parts = [benchmarks.accuracy(group) for group in groups]
    for part, group in zip(parts[:2], groups):
        assert part["stderr"] / 100 == pytest.approx(metrics.mean_stderr([float(x) for x in group]))
    theirs = metrics.pooled_sample_stderr([part["stderr"] / 100 for part in parts[:2]], [3, 5])
    assert benchmarks.pooled(parts[:2])["stderr"] / 100 == pytest.approx(theirs)


def test_pooling_weights_by_questions_and_ignores_differences_between_subjects():
    whole = benchmarks.pooled([benchmarks.accuracy([True] * 4), benchmarks.accuracy([False] * 2), benchmarks.accuracy([True])])
    assert whole == {"accuracy": pytest.approx(500 / 7), "stderr": 0.0, "n": 7}
    assert benchmarks.accuracy([True])["stderr"] is None and benchmarks.pooled([benchmarks.accuracy([True])])["stderr"] is None


def test_weighted_f1_equals_scikit_learn():
    gold, choice = [0, 1, 2, 3, 0, 1, 1, 2], [0, 1, 1, 3, 2, 1, 0, 2]
    sklearn = pytest.importorskip("sklearn.metrics")
    assert benchmarks.weighted_f1(gold, choice) == pytest.approx(100 * sklearn.f1_score(gold, choice, average="weighted"))


# --------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("name, file, text, wanted", [
    ("mmlu", "test/anatomy_test.csv", "q,1,2,3,4,E\n", r"anatomy_test.csv:1: the answer is 'E'"),
    ("mmlu", "test/anatomy_test.csv", "q,1,2,3,4,A\nq,1,2,3,A\n", "anatomy_test.csv:2: 5 columns, 6 are wanted"),
    ("mmlu", "test/anatomy_test.csv", "q,1,2,3,4,A\n,1,2,3,4,A\n", "anatomy_test.csv:2: the question is empty"),
    ("mmlu", "test/anatomy_test.csv", "", "anatomy_test.csv: the file holds no question"),
    ("mmlu", "other/x.csv", "", r"found no \*_test.csv"),
    ("mmlu", "test.jsonl", '{"question": "q", "subject": "anatomy", "choices": ["a"], "answer": 1}', "test.jsonl:1: choices are no list of 4"),
    ("cmmlu", "test/anatomy.csv", ",Question,A,B,C,D,Answer\n0,q,1,2,3,4,A\n0,r,1,2,3,4,A\n", "anatomy.csv:3: the same identifier as in .*:2"),
    ("cmmlu", "test/anatomy.csv", ",Question,A,B,C,D\n0,q,1,2,3,4\n", 'anatomy.csv:2: "Answer" is missing'),
    ("cmmlu", "test/alchemy.csv", ",Question,A,B,C,D,Answer\n0,q,1,2,3,4,A\n", "no subject 'alchemy'"),
    ("belebele", "deu_Latn.jsonl", '{"flores_passage": "p", "question": "q", "question_number": 1, "mc_answer1": "a", "mc_answer2": "b", '
     '"mc_answer3": "c", "mc_answer4": "d", "correct_answer_num": "5"}', "deu_Latn.jsonl:1: correct_answer_num is '5'"),
    ("belebele", "test.parquet", "PAR1", "pandas.read_parquet"), ("mmmlu", "mmlu_DE-DE.csv", "", "found no mmlu_SW-KE"),
    ("afrimmlu", "swa/test.tsv", "subject\tquestion\tchoices\tanswer\nx\tq\t__import__('os')\tA\n", "test.tsv:2: choices are no list of 4")])
def test_a_bad_file_is_one_clear_line(name, file, text, wanted, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(data.DataError, match=wanted) as error:
        benchmarks.read_benchmark(name, tmp_path, language=LANGUAGE.get(name, ""))
    assert "\n" not in str(error.value)


def test_wrong_wishes_are_one_clear_line(tmp_path):
    root = write_mmlu(tmp_path)
    for wanted, arguments in (("has only 4 examples", {"shots": 5}), ("no subject alchemy", {"subjects": ["alchemy"]}),
                              ("found no \\*_val.csv", {"split": "val"})):
        with pytest.raises(data.DataError, match=wanted):
            benchmarks.read_benchmark("mmlu", root, **arguments)
    with pytest.raises(data.DataError, match="choose one with --lang"):
        benchmarks.read_benchmark("belebele", root)
    with pytest.raises(data.DataError, match="no such file"):
        benchmarks.read_benchmark("mmlu", tmp_path / "none")


def test_the_hub_is_asked_for_one_language_only(tmp_path, monkeypatch):
    asked = []
    root = write_belebele(tmp_path)
    monkeypatch.setattr(benchmarks.hub, "fetch", lambda *arguments, **kind: asked.append((arguments, kind)) or root)
    assert len(benchmarks.read_benchmark("belebele", "facebook/belebele", language="de").questions) == 7
    assert asked == [(("facebook/belebele", ("*deu_Latn.jsonl",)), {"kind": "dataset"})]
