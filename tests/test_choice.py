"""choice.py: files, wording, joint tokenisation and scores, against hand-written cases and
lm-evaluation-harness."""

import csv
import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model as llama
from conftest import write_checkpoint
from engine.files import InputError, write_jsonl
from evals import choice
from formats.chat import load_tokenizer

QUESTIONS = [("What eats meat?", ("lion", "cow", " sheep", "tree"), 0),
             ("  Which\nriver is \"long\"? ", ("Nile", "none", "1", "2"), 0),
             ("Mji mkuu wa Ufaransa ni upi?", ("Roma", "Paris", "Kìnnìún", "x, y"), 1),
             ("2 + 2 = ", ("3", "5", "4", "22"), 2), ("Is {A} a brace?", ("yes", "no", "{B}", "maybe"), 3),
             ("Why?", ("a", "b", "c", "d"), 1), ("What eats grass? " * 9, ("cow", "lion", "wolf", "cat"), 0)]
ROTATIONS = [QUESTIONS[i:] + QUESTIONS[:i] for i in range(3)]


def write_csv(path, rows, header=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([*([header] if header else []), *rows])


def write_lines(path, records):
    write_jsonl(path, records)
    return str(path)


def write_mmlu(root):
    for subject, rows in zip(("anatomy", "world_religions"), ROTATIONS):
        for split, part in (("test", rows), ("dev", rows[2:6])):
            write_csv(root / split / f"{subject}_{split}.csv",
                      [[q, *options, "ABCD"[gold]] for q, options, gold in part])
    return root


def write_cmmlu(root):
    for subject, rows in zip(("anatomy", "arts"), ROTATIONS):
        for split, part in (("test", rows), ("dev", rows[2:6])):
            write_csv(root / split / f"{subject}.csv",
                      [[i, q, *options, "ABCD"[gold]] for i, (q, options, gold) in enumerate(part)],
                      ["", "Question", "A", "B", "C", "D", "Answer"])
    return root


def write_mmmlu(root):
    rows = [[i, q, *options, "ABCD"[gold], subject]
            for subject, part in zip(("anatomy", "world_religions_test.csv_sw-KE.csv"), ROTATIONS)
            for i, (q, options, gold) in enumerate(part)]
    write_csv(root / "test" / "mmlu_SW-KE.csv", rows,
              ["", "Question", "A", "B", "C", "D", "Answer", "Subject"])
    return root


def write_belebele(root):
    (root / "data").mkdir(parents=True)
    write_lines(root / "data" / "deu_Latn.jsonl", [
        {"link": "x", "question_number": i % 2 + 1, "flores_passage": f"Der Text {i // 2}. ", "question": q,
         **{f"mc_answer{k + 1}": option for k, option in enumerate(options)},
         "correct_answer_num": str(gold + 1), "dialect": "deu_Latn", "ds": "2023"}
        for i, (q, options, gold) in enumerate(QUESTIONS)])
    return root


WRITERS = {"mmlu": write_mmlu, "cmmlu": write_cmmlu, "mmmlu": write_mmmlu, "belebele": write_belebele}
LANGUAGE = {"mmmlu": "sw", "belebele": "de"}


# -------------------------------------------------------------------------------------- lm-evaluation-harness

def hub_row(name, document):
    """A document in the columns of the hub's data set."""
    texts = document.texts
    letters = {letter: texts[letter] for letter in "ABCD"}
    if name == "mmlu":
        return {"question": texts["question"], "subject": document.subject, "choices": list(letters.values()),
                "answer": document.gold}
    if name == "belebele":
        return {"flores_passage": texts["passage"], "question": texts["question"],
                **{f"mc_answer{i + 1}": option for i, option in enumerate(letters.values())},
                "correct_answer_num": str(document.gold + 1)}
    return {"Question": texts["question"], **letters, "Answer": "ABCD"[document.gold],
            "Subject": document.subject}


YAML = {"mmlu": "mmlu/default/mmlu_{}.yaml", "cmmlu": "cmmlu/cmmlu_{}.yaml",
        "belebele": "belebele/belebele_deu_Latn.yaml", "mmmlu": "openai-mmmlu/default/mmmlu_sw_ke_{}.yaml"}
SPLITS = {"test": "test", "dev": "dev", "val": "validation"}                      # their names on the hub


def harness_tasks(name, root, shots, work):
    """lm-evaluation-harness's own tasks, a subject each, in its wording but on the rows that `root` holds."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager
    task, folder = choice.TASKS[name], Path(lm_eval.__file__).parent / "tasks"
    splits = {SPLITS[split]:
              choice.by_subject(choice.read_questions(task, root, LANGUAGE.get(name, ""), split))
              for split in filter(None, ("test", task.examples))}
    for number, subject in enumerate(splits["test"]):
        files = {split: write_lines(work / f"{number}-{split}.jsonl",
                                    [hub_row(name, document) for document in part[subject]])
                 for split, part in splits.items()}
        config = {"include": str(folder / YAML[name].format(subject)), "task": f"{number:02d}", "tag": None,
                  "task_alias": None, "dataset_path": "json", "dataset_name": None,
                  "metric_list": [{"metric": "acc"}], "num_fewshot": shots,
                  "dataset_kwargs": {"data_files": files, "cache_dir": str(work / "cache")}}
        (work / f"{number:02d}.yaml").write_text(json.dumps(config))                     # JSON is YAML
    found = TaskManager(include_path=str(work), include_defaults=False).load(
        [f"{n:02d}" for n in range(len(splits["test"]))])
    return [task for _, task in sorted(found["tasks"].items())]


def harness_scores(tasks, judge, limit):
    """[(prompt, [log-prob of each choice])] of the tasks' questions, by the harness's Hugging Face
    back end."""
    questions = []
    for task in tasks:
        task.build_all_requests(limit=limit)
        found = {}
        for request, (logp, _) in zip(task.instances, judge.loglikelihood(task.instances, disable_tqdm=True)):
            found.setdefault(request.doc_id, (request.args[0], []))[1].append(logp)
        questions += found.values()
    return questions


def open_both(checkpoint):
    """The same checkpoint in the harness and in ours, fp32."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    judge = huggingface.HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4)
    return judge, llama.load(checkpoint), load_tokenizer(checkpoint)


def check_against_harness(both, name, root, shots, limit, work):
    judge, model, tokenizer = both
    questions = choice.read_benchmark(name, root, shots, LANGUAGE.get(name, ""), limit=limit).questions
    theirs = harness_scores(harness_tasks(name, root, shots, work), judge, limit)
    ours = choice.multiple_choice(model, tokenizer, questions)
    assert len(ours) == len(theirs) > 0
    for question, mine, (prompt, logps) in zip(questions, ours, theirs):
        assert question.header + question.text == prompt
        assert mine["choice"] == logps.index(max(logps))
        assert mine["logp"] == pytest.approx(logps, rel=0, abs=1e-3)


# the first model reads 256 tokens: long prompts are cut;
# the third's tokenizer joins the prompt's last ":" with a space
SHAPES = {"llama": {}, "qwen2": {"model_type": "qwen2", "qkv_bias": True, "max_position_embeddings": 4096},
          "merging": {"model_type": "qwen3", "qk_norm": True, "max_position_embeddings": 4096}}


@pytest.fixture(scope="module", params=SHAPES)
def both(request, tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp(request.param), **SHAPES[request.param])
    if request.param == "merging":
        join_colon_and_space(checkpoint / "tokenizer.json")
    return request.param, open_both(checkpoint)


def join_colon_and_space(path):
    """Make the byte-level tokenizer one of single bytes and ": ", across words."""
    raw = json.loads(path.read_text())
    vocab = {piece: i for piece, i in raw["model"]["vocab"].items() if len(piece) == 1 or i < 2}
    raw["model"] |= {"vocab": vocab | {":\u0120": 319}, "merges": [[":", "\u0120"]]}
    raw["pre_tokenizer"]["use_regex"] = False
    path.write_text(json.dumps(raw))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_choices_and_log_probs_equal_the_harness(name, both, tmp_path):
    kind, both = both
    if kind == "merging":
        ids, joint = (both[2].full.encode(text, add_special_tokens=False).ids
                      for text in ("Answer:", "Answer: A"))
        assert joint[:len(ids)] != ids                            # the choice changes the prompt's own tokens
    check_against_harness(both, name, WRITERS[name](tmp_path / "files"), 3 if kind == "llama" else 0, None,
                          tmp_path)


@pytest.fixture(scope="module", params=["llama2", "qwen2_5"])
def real_tokenizer(request, shared, tmp_path_factory):
    shape = ({"vocab_size": 32000} if request.param == "llama2" else
             {"model_type": "qwen2", "qkv_bias": True, "vocab_size": 151936})
    checkpoint = write_checkpoint(tmp_path_factory.mktemp(request.param), **shape,
                                  max_position_embeddings=4096)
    for path in (shared / "tokenizers" / request.param).glob("tokenizer*.json"):
        shutil.copyfile(path, checkpoint / path.name)
    return open_both(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("name, shots", [("mmlu", 5), ("cmmlu", 5), ("belebele", 2)])
def test_real_questions_score_as_in_the_harness(name, shots, real_tokenizer, shared, tmp_path):
    check_against_harness(real_tokenizer, name, shared / "benchmarks" / name, shots, 2, tmp_path)


# --------------------------------------------------------------------------------------- without the harness

def logps_one_by_one(model, tokenizer, question):
    """Each choice scored alone: the whole text, cut on the left, one forward pass."""
    whole, found = question.header + question.text, []
    prompt = tokenizer.full.encode(whole.rstrip()).ids
    for letter in choice.LETTERS:
        ids = prompt + tokenizer.full.encode(f"{whole} {letter}").ids[len(prompt):]
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
    # some prompts are longer
    checkpoint = write_checkpoint(tmp_path / "model", max_position_embeddings=300, **kind)
    model, tokenizer = llama.load(checkpoint, dtype=torch.float64), load_tokenizer(checkpoint)
    questions = choice.read_benchmark(name, WRITERS[name](tmp_path / "files"), 2,
                                          LANGUAGE.get(name, "")).questions
    for question, found in zip(questions,
                               choice.multiple_choice(model, tokenizer, questions, batch_tokens)):
        torch.testing.assert_close(torch.tensor(found["logp"], dtype=torch.float64),
                                   logps_one_by_one(model, tokenizer, question), rtol=0, atol=1e-9)
        assert found["correct"] == (found["choice"] == question.gold)
        assert found["cut"] == any(
            len(prompt) + len(ids) > 301
            for prompt, choices in choice.encode_questions(tokenizer, [question]) for ids in choices)


def test_a_tokenizer_is_asked_for_its_encoder_alone_and_for_no_chat_template(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model", max_position_embeddings=4096)
    model, tokenizer = llama.load(checkpoint), load_tokenizer(checkpoint)
    bare = SimpleNamespace(full=tokenizer.full, names=tokenizer.names)
    questions = choice.read_benchmark("mmlu", write_mmlu(tmp_path / "files"), 1).questions
    assert (choice.multiple_choice(model, bare, questions)
            == choice.multiple_choice(model, tokenizer, questions))


def test_the_header_of_a_subject_is_computed_once(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "model", max_position_embeddings=4096)
    model, tokenizer = llama.load(checkpoint), load_tokenizer(checkpoint)
    questions = choice.read_benchmark("mmlu", write_mmlu(tmp_path / "files"), 3).questions
    widths, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, tokens, *args, **kw: (
        widths.append(tokens.numel()) or forward(self, tokens, *args, **kw)))
    choice.multiple_choice(model, tokenizer, questions)
    prompts = [prompt for prompt, _ in choice.encode_questions(tokenizer, questions)]
    assert sum(widths) < sum(map(len, prompts)) / 2.5
    assert len(widths) == 4                                             # header and questions of two subjects


def test_choices_cut_at_different_places_are_forks_of_their_own():
    def forks(max_tokens):
        return [(fork.prompt, fork.continuations) for fork in
                choice.fitting_forks("x:1", [1, 2, 3, 4], [[5], [6, 7], [8]], max_tokens)]
    assert forks(5) == [([1, 2, 3, 4], [[5], [6, 7], [8]])]
    assert forks(4) == [([1, 2, 3, 4], [[5]]), ([2, 3, 4], [[6, 7]]), ([1, 2, 3, 4], [[8]])]
    with pytest.raises(InputError, match="x:1: 5 tokens to be scored, the model reads 4"):
        choice.fitting_forks("x:1", [1], [[5, 6, 7, 8, 9]], max_tokens=4)


@pytest.mark.parametrize("prompts, shared", [
    ([[1, 2, 3], [1, 2, 4]], [1, 2]), ([[1, 2], [1, 2]], [1]), ([[1, 2], [1, 2, 3]], [1]),
    ([[5], [5, 6]], []), ([[1, 2], [3]], []), ([[4, 5, 6]], [4, 5])])
def test_a_common_prefix_leaves_every_prompt_a_token(prompts, shared):
    assert choice.common_prefix(prompts) == shared


def test_header_and_question_are_worded_as_published(tmp_path):
    question = choice.read_benchmark("mmlu", write_mmlu(tmp_path), 1, subjects=["world_religions"],
                                         limit=1).questions[0]
    assert question.header == (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "2 + 2 =\nA. 3\nB. 5\nC. 4\nD. 22\nAnswer: C\n\n")
    assert (question.text == 'Which\nriver is "long"?\nA. Nile\nB. none\nC. 1\nD. 2\nAnswer:'
            and question.gold == 0)
    assert question.where.endswith("test/world_religions_test.csv:1")


def test_lines_are_counted_through_quoted_newlines(tmp_path):
    benchmark = choice.read_benchmark("mmlu", write_mmlu(tmp_path), subjects=["anatomy"])
    assert [question.where.rsplit(":")[-1] for question in benchmark.questions] == [
        "1", "2", "4", "5", "6", "7", "8"]


@pytest.mark.parametrize("name, part, split", [("mmlu", "", "dev"), ("cmmlu", "", "dev"),
                                               ("cmmlu", "test/arts.csv", "test")])
def test_no_question_is_an_example_of_itself_and_what_would_make_it_one_is_refused(tmp_path, name, part, split):
    root = WRITERS[name](tmp_path) / part
    with pytest.raises(InputError, match="--shots takes examples from the split dev, which here is what is asked"):
        choice.read_benchmark(name, root, shots=2, split=split)
    assert choice.read_benchmark(name, root, split=split).questions


def test_a_file_of_one_language_is_not_asked_as_another(tmp_path):
    german = write_belebele(tmp_path) / "data" / "deu_Latn.jsonl"
    assert choice.read_benchmark("belebele", german, language="de").questions
    other = german.rename(german.with_name("test.jsonl"))
    with pytest.raises(InputError, match="test.jsonl:1: the row is in deu_Latn, --lang asked for por_Latn"):
        choice.read_benchmark("belebele", other, language="pt")
    german.write_text((BELEBELE_ROW % 1) + "\n")                    # rows that do not say their language
    assert choice.read_benchmark("belebele", german, language="de").questions
    with pytest.raises(InputError, match="deu_Latn.jsonl is in deu_Latn, --lang asked for por_Latn"):
        choice.read_benchmark("belebele", german, language="pt")
    swahili = write_mmmlu(tmp_path) / "test" / "mmlu_SW-KE.csv"
    assert choice.read_benchmark("mmmlu", swahili, language="sw").questions
    with pytest.raises(InputError, match="mmlu_SW-KE.csv is in SW-KE, --lang asked for PT-BR"):
        choice.read_benchmark("mmmlu", swahili, language="pt")
    folder = tmp_path / "SW_KE" / "test-00000-of-00001.csv"
    folder.parent.mkdir()
    swahili.rename(folder)
    assert choice.read_benchmark("mmmlu", folder, language="sw").questions
    with pytest.raises(InputError, match="is in SW-KE, --lang asked for PT-BR"):
        choice.read_benchmark("mmmlu", folder, language="pt")


def test_a_subject_that_two_files_hold_is_refused_unless_they_are_parts_of_one(tmp_path):
    lines = [{"question": question, "subject": "anatomy", "choices": list(options), "answer": gold}
             for question, options, gold in QUESTIONS]
    for part, own in enumerate((lines[:2], lines[2:])):
        (tmp_path / "all").mkdir(exist_ok=True)
        write_lines(tmp_path / "all" / f"test-0000{part}-of-00002.jsonl", own)
    assert len(choice.read_benchmark("mmlu", tmp_path).questions) == len(lines)
    for aside in (".cache", "__MACOSX", "auxiliary_train"):
        (tmp_path / aside).mkdir()
        write_lines(tmp_path / aside / "test-00000-of-00001.jsonl", lines)
    assert len(choice.read_benchmark("mmlu", tmp_path).questions) == len(lines)
    (tmp_path / "anatomy").mkdir()
    write_lines(tmp_path / "anatomy" / "test-00000-of-00001.jsonl", lines)
    with pytest.raises(InputError, match="anatomy is in .*all.* and in .*anatomy.*: name a directory"):
        choice.read_benchmark("mmlu", tmp_path)


def test_subjects_that_were_not_asked_are_known(tmp_path):
    mmlu = choice.read_benchmark("mmlu", write_mmlu(tmp_path / "mmlu"))
    assert len(mmlu.absent()) == 55 and not {"anatomy", "world_religions"} & {*mmlu.absent()}
    assert choice.read_benchmark("belebele", write_belebele(tmp_path / "b"), language="de").absent() == []


def test_a_subject_counts_in_its_category_however_it_is_spelt_and_others_are_known(tmp_path):
    row = ["q", *"1234", "A"]
    for subject in ("High School Biology", "anatomy", "anatomy (1)"):
        write_csv(tmp_path / f"{subject}_test.csv", [row])
    found = choice.read_benchmark("mmlu", tmp_path)
    assert {question.subject for question in found.questions} == {
        "high_school_biology", "anatomy", "anatomy (1)"}
    assert found.strange() == ["anatomy (1)"] and "anatomy (1)" not in found.absent()
    verdicts = {question.name: {"correct": True} for question in found.questions}
    assert choice.summarise(found, verdicts)["categories"]["stem"]["n"] == 2
    write_csv(tmp_path / "c" / "test" / "college mathematics.csv", [row], ["Question", *"ABCD", "Answer"])
    assert choice.read_benchmark("cmmlu", tmp_path / "c").strange() == []
    assert choice.read_benchmark("belebele", write_belebele(tmp_path / "b"), language="de").strange() == []


@pytest.mark.parametrize("name, language", [("mmmlu", "sw"), ("belebele", "de")])
def test_a_split_that_a_benchmark_lacks_is_no_label(tmp_path, name, language):
    with pytest.raises(InputError, match=f"--split train: {name} has one split, test"):
        choice.read_benchmark(name, WRITERS[name](tmp_path), language=language, split="train")


def test_maps_hold_every_subject_once():
    mmlu = [subject for part in choice.TABLES["mmlu"].values() for subject in part]
    *parts, china = choice.TABLES["cmmlu"].values()
    cmmlu = [subject for part in parts for subject in part]
    assert len(mmlu) == len(set(mmlu)) == 57 and len(cmmlu) == len(set(cmmlu)) == 67
    assert len(china) == 15 and set(china) <= set(cmmlu) == set(choice.CMMLU_NAMES)


def test_settings_tell_template_shots_and_file_hashes(tmp_path):
    settings = choice.read_benchmark("cmmlu", write_cmmlu(tmp_path), 2).settings
    assert (settings["shots"] == 2 and settings["template"] == choice.CMMLU_TEXT
            and settings["subjects"] == ["anatomy", "arts"])
    assert set(settings["files"]) == {f"{split}/{subject}.csv" for split in ("dev", "test")
                                      for subject in ("anatomy", "arts")}
    assert all(len(digest) == 16 for digest in settings["files"].values())


# ------------------------------------------------------------------------------------------------ summaries

def test_errors_are_those_of_the_harness():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    groups = [[True, False, True], [False, False, True, True, True], [True]]
    parts = [choice.accuracy(group) for group in groups]
    for part, group in zip(parts[:2], groups):
        assert part["stderr"] / 100 == pytest.approx(metrics.mean_stderr([float(x) for x in group]))
    theirs = metrics.pooled_sample_stderr([part["stderr"] / 100 for part in parts[:2]], [3, 5])
    assert choice.accuracy(*groups[:2])["stderr"] / 100 == pytest.approx(theirs)


def test_pooling_weights_by_questions_and_ignores_differences_between_subjects():
    whole = choice.accuracy([True] * 4, [False] * 2, [True])
    assert whole == {"value": pytest.approx(500 / 7), "stderr": 0.0, "n": 7}
    assert choice.accuracy([True])["stderr"] is None and choice.accuracy([True], [False])["stderr"] is None


# -------------------------------------------------------------------------------------------------- odd files

@pytest.mark.parametrize("text", [
    "\ufeffq,1,2,3,4,A\r\n\r\n r ,1,2,3,4,B \r\n",
    "question,A,B,C,D,answer\nq,1,2,3,4,A\n  \nr,1,2,3,4, B", '"q",1,"2",3,4,A\n"\nr",1,2,3,4,B\n\n'])
def test_marks_line_ends_blank_lines_and_a_header_do_not_change_what_is_read(text, tmp_path):
    (tmp_path / "anatomy_test.csv").write_bytes(text.encode())
    questions = choice.read_benchmark("mmlu", tmp_path).questions
    assert [(question.text[0], question.gold) for question in questions] == [("q", 0), ("r", 1)]


def test_what_parquet_files_are_converted_to_is_read_and_a_question_asked_twice_is_asked_twice(tmp_path):
    row = {"question": "q", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2}
    write_lines(tmp_path / "mmlu" / "test-00000-of-00001.jsonl", [row, row])
    assert [question.gold
            for question in choice.read_benchmark("mmlu", tmp_path / "mmlu").questions] == [2, 2]
    write_lines(tmp_path / "cmmlu" / "test" / "arts.jsonl",
                [{"Question": "q", **dict(zip("ABCD", "1234")), "Answer": "C"}])
    assert choice.read_benchmark("cmmlu", tmp_path / "cmmlu").questions[0].gold == 2


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_packed_or_named_in_capitals_is_the_same_file(name, tmp_path):
    root, language = WRITERS[name](tmp_path), LANGUAGE.get(name, "")
    plain = choice.read_benchmark(name, root, 2, language).questions
    for path in list(filter(Path.is_file, root.rglob("*"))):
        path.with_suffix(path.suffix.upper() + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert choice.read_benchmark(name, root, 2, language).questions == plain


def test_a_list_in_a_json_file_is_read(tmp_path):
    row = {"Question": "q", **dict(zip("ABCD", "1234")), "Answer": "C", "Subject": "anatomy"}
    (tmp_path / "mmlu_SW-KE.json").write_text(json.dumps([row, row | {"Question": "r"}], indent=1))
    assert len(choice.read_benchmark("mmmlu", tmp_path, language="sw").questions) == 2


# --------------------------------------------------------------------------------------------------- refusals

BELEBELE_ROW = ('{"flores_passage": "p", "question": "q", "question_number": 1, "mc_answer1": "a", '
                '"mc_answer2": "b", "mc_answer3": "c", "mc_answer4": "d", "correct_answer_num": "%d"}')


@pytest.mark.parametrize("name, file, text, wanted", [
    ("mmlu", "test/anatomy_test.csv", "q,1,2,3,4,E\n", r"anatomy_test.csv:1: the answer is 'E'"),
    ("mmlu", "test/anatomy_test.csv", "q,1,2,3,4,A\nq,1,2,3,A\n",
     "anatomy_test.csv:2: 5 columns, 6 are wanted"),
    ("mmlu", "test/anatomy_test.csv", "q,1,2,3,4,A\n,1,2,3,4,A\n",
     "anatomy_test.csv:2: the question is empty"),
    ("mmlu", "test/anatomy_test.csv", "", "anatomy_test.csv: the file holds no question"),
    ("mmlu", "test/anatomy_test.csv", "q,1,2,3,4,a\n", r"anatomy_test.csv:1: the answer is 'a'"),
    ("mmlu", "test/anatomy_test.csv", "q,1,2,3,4,1\n", r"anatomy_test.csv:1: the answer is '1'"),
    ("mmlu", "test/anatomy_test.csv", '"q,1,2,3,4,A\nr,1,2,3,4,B\n',
     "anatomy_test.csv:1: not a table"),
    ("mmlu", "test/anatomy_test.csv", 'q,1,2,3,4,A\n"r' + "x" * 200_000,
     "anatomy_test.csv:2: not a table .*: is a quotation mark left open"),
    ("mmlu", "other/x.csv", "", r"found no \*_test.csv"),
    ("mmlu", "test.jsonl", '{"question": "q", "subject": "x", "choices": ["a", "b", "c", "d"], "answer": 4}',
     "test.jsonl:1: the answer is '4'"),
    ("mmlu", "test.jsonl", '{"question": "q", "subject": "x", "choices": ["a", 2, "c", "d"], "answer": 3}',
     "test.jsonl:1: B: str expected, found int"),
    ("mmlu", "test.jsonl", r'{"question": "\ud800", "subject": "x", "choices": ["a", "", "c", "d"], "answer": 3}',
     "test.jsonl:1: broken Unicode"),
    ("mmlu", "test.jsonl", '{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 3}',
     'test.jsonl:1: "subject" is missing'),
    ("mmlu", "test.jsonl", '{"question": "q", "subject": "anatomy", "choices": ["a"], "answer": 1}',
     "test.jsonl:1: choices is no list of 4"),
    ("cmmlu", "test/anatomy.csv", ",Question,A,B,C,D,Answer\n0,q,1,2,3,4,A\n0,r,1,2,3,4,A\n",
     "anatomy.csv:3: the same identifier as in .*:2"),
    ("cmmlu", "test/anatomy.csv", ",Question,A,B,C,D\n0,q,1,2,3,4\n", 'anatomy.csv:2: "Answer" is missing'),
    ("cmmlu", "test/anatomy.csv", "0,q,1,2,3,4,A\n1,r,1,2,3,4,A\n",
     'anatomy.csv:2: "Question" is missing'),
    ("cmmlu", "test/anatomy.csv", ",Question,A,B,C,D,Answer\n", "anatomy.csv: the file holds no question"),
    ("mmmlu", "mmlu_SW-KE.csv", ",Question,A,B,C,D,Answer,Subject\n0,q,1,2,3,4,A,x\n0,r,1,2,3,4,A,x\n",
     "SW-KE.csv:3: the same identifier"),
    ("mmmlu", "mmlu_SW-KE.csv",
     "Unnamed: 0,Question,A,B,C,D,Answer,Subject\n0,q,1,2,3,4,A,x\n0,r,1,2,3,4,A,x\n",
     "SW-KE.csv:3: the same identifier"),
    ("mmmlu", "mmlu_SW-KE.csv", "Question,A,B,C,D,Answer\nq,1,2,3,4,A\n",
     'SW-KE.csv:2: "Subject" is missing'),
    ("belebele", "deu_Latn.jsonl", BELEBELE_ROW % 1 + "\n\n" + BELEBELE_ROW % 1,
     "deu_Latn.jsonl:3: the same identifier as in .*:1"),
    ("belebele", "deu_Latn.jsonl", (BELEBELE_ROW % 1 + "\n").replace(": 1", ": [1]") * 2,
     "deu_Latn.jsonl:2: the same identifier as in .*:1"),
    ("belebele", "deu_Latn.jsonl", BELEBELE_ROW % 1 + "\n{", "deu_Latn.jsonl:2: not valid JSON"),
    ("belebele", "deva.jsonl", BELEBELE_ROW % 1, "found no deu_Latn.jsonl or deu_Latn_"),
    ("cmmlu", "test/alchemy.csv", ",Question,A,B,C,D,Answer\n0,q,1,2,3,4,A\n", "no subject 'alchemy'"),
    ("belebele", "deu_Latn.jsonl", BELEBELE_ROW % 5, "deu_Latn.jsonl:1: the answer is '5', one of 1, 2, 3"),
    ("belebele", "test.parquet", "PAR1", "pandas.read_parquet"),
    ("mmmlu", "mmlu_SW-KE.parquet", "PAR1", "mmlu_SW-KE.parquet is one of the parquet files"),
    ("mmmlu", "mmlu_DE-DE.csv", "", "found no mmlu_SW-KE")])
def test_a_bad_file_is_one_clear_line(name, file, text, wanted, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=wanted) as error:
        choice.read_benchmark(name, tmp_path, language=LANGUAGE.get(name, ""))
    assert "\n" not in str(error.value)


def test_wrong_wishes_are_one_clear_line(tmp_path):
    root = write_mmlu(tmp_path)
    for wanted, arguments in (("has only 4 examples", {"shots": 5}),
                              ("no subject alchemy", {"subjects": ["alchemy"]}),
                              ("found no \\*_val.csv", {"split": "val"})):
        with pytest.raises(InputError, match=wanted):
            choice.read_benchmark("mmlu", root, **arguments)
    with pytest.raises(InputError, match="choose one with --lang"):
        choice.read_benchmark("belebele", root)
    with pytest.raises(InputError, match="no such file"):
        choice.read_benchmark("mmlu", tmp_path / "none")


def test_the_hub_is_asked_for_one_language_only(tmp_path, monkeypatch):
    asked = []
    root = write_belebele(tmp_path)
    monkeypatch.setattr(choice.hub, "fetch",
                        lambda *arguments, **kind: asked.append((arguments, kind)) or root)
    assert len(choice.read_benchmark("belebele", "facebook/belebele", language="de").questions) == 7
    assert asked == [(("facebook/belebele", ("*deu_Latn.jsonl", "*deu_Latn_*.jsonl")), {"kind": "dataset"})]
