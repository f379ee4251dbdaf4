"""Multiple-choice benchmarks: their distributed files -> questions -> forks -> the log-prob of every choice.

    questions = read_benchmark("mmlu", "mmlu/data", shots=5).questions
    for i, line in score_questions(model, tokenizer, questions):
        ...                                       # the command line is python eval.py mc mmlu mmlu/data

MMLU, MMMLU, CMMLU and BELEBELE, worded, tokenised and averaged as lm-evaluation-harness does it, so
that numbers can be compared with published ones. A question is a *fork*: its text is the prompt, its choices
are the continuations. What all questions of a subject begin with (description, examples) is computed once, as
a prefix of keys and values.

Task wordings and sampling rules: lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836),
lm_eval/tasks.
"""

import math
import os
import re
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch

import data
import model as llama
from engine.files import InputError, as_kind, check_unicode, fingerprint, need, read_json, read_records
from formats import hub
from formats.languages import nllb_code, normal, suggestion
from formats.records import PARQUET, kind_of, read_table, refuse_duplicates, table_cells

LETTERS = ("A", "B", "C", "D")
MMLU_DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"
MMMLU_DESCRIPTION = ("The following are multiple choice questions (with answers) about {subject} "
                     "({language}).\n\n")
CMMLU_DESCRIPTION = "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n"
LETTERED = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"
CMMLU_TEXT = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n答案："
BELEBELE_TEXT = "P: {passage}\nQ: {question}\nA: {A}\nB: {B}\nC: {C}\nD: {D}\nAnswer:"
# Categories of subjects (CMMLU's are those of its src/categories.py; some subjects count in a fifth, too),
# the names of CMMLU's subjects in the harness, and the languages of MMMLU.
TABLES = read_json(Path(__file__).with_name("subjects.json"))
CMMLU_NAMES, MMMLU_LANGUAGES = TABLES["cmmlu names"], TABLES["mmmlu languages"]
FIELDS = ("question", *LETTERS, "answer")
CAPITALS = ("Question", *LETTERS, "Answer")
NUMBERS = ("", "Unnamed: 0", "question_number")      # pandas and the hub have a name for the unnamed column


@dataclass(frozen=True)
class Task:
    """How a benchmark is worded, and what its files call FIELDS and the four answers. Without a split of
    `examples` they come from the questions asked."""
    name: str
    description: str
    text: str
    keys: tuple[str, ...]
    categories: dict[str, list[str]]
    examples: str = ""
    answers: tuple = LETTERS


TASKS = {
    "mmlu": Task("mmlu", MMLU_DESCRIPTION, LETTERED, FIELDS, TABLES["mmlu"], "dev"),
    "mmmlu": Task("mmmlu", MMMLU_DESCRIPTION, LETTERED, CAPITALS, TABLES["mmlu"]),
    "cmmlu": Task("cmmlu", CMMLU_DESCRIPTION, CMMLU_TEXT, CAPITALS, TABLES["cmmlu"], "dev"),
    "belebele": Task(
        "belebele", "", BELEBELE_TEXT,
        ("question", "mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4", "correct_answer_num"),
        {}, answers=("1", "2", "3", "4"))}


@dataclass(frozen=True)
class Question:
    """One question: the log-prob of " " + letter after header + text is asked for each of LETTERS.
    A copy of it elsewhere is equal."""
    subject: str
    where: str = field(compare=False)  # file:line
    texts: dict[str, str]              # passage, question, A, B, C, D
    gold: int
    text: str                          # as it is asked
    name: str = ""                     # subject and number
    header: str = ""                   # description and worked examples


@dataclass(frozen=True)
class Benchmark:
    """Questions to ask, and what has to stand beside their score."""
    questions: list[Question]
    settings: dict
    categories: dict[str, list[str]]   # subjects of each; {} where a benchmark has none

    def absent(self) -> list[str]:
        """The benchmark's subjects that no question is of."""
        asked = {question.subject for question in self.questions}
        return sorted({*chain.from_iterable(self.categories.values())} - asked)

    def strange(self) -> list[str]:
        """The subjects asked that are none of the benchmark's: they count in no category."""
        asked = {question.subject for question in self.questions}
        return sorted(asked - {*chain.from_iterable(self.categories.values())}) if self.categories else []


# ---------------------------------------------------------------------------------------------- files -> rows

def rows_of(task: Task, path: Path) -> list[tuple[str, dict]]:
    """[("file:line", row)] of a csv as distributed, MMLU's without a header, or of a json or jsonl file."""
    kind = kind_of(path)
    if kind == ".parquet":
        raise InputError(f"{path} is one of the {PARQUET}")
    if kind in (".json", ".jsonl"):
        rows = read_records(path)
        return [(where, with_letters(row, where)) for where, row in rows] if task.name == "mmlu" else rows
    if task.name != "mmlu":
        return read_table(path)
    rows = []
    for where, cells in table_cells(path):
        if len(cells) != len(FIELDS):
            raise InputError(f"{where}: {len(cells)} columns, {len(FIELDS)} are wanted ({', '.join(FIELDS)})")
        if ",".join(cells).lower() != ",".join(FIELDS).lower():        # a header that is there all the same
            rows.append((where, dict(zip(FIELDS, cells))))
    return rows


def with_letters(row: dict, where: str) -> dict:
    """A row of the hub's MMLU, which lists choices and counts the answer from 0, with letters for both."""
    choices, answer = need(row, "choices", where), need(row, "answer", where)
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        raise InputError(f"{where}: choices is no list of {len(LETTERS)} texts")
    if answer in range(len(LETTERS)):
        answer = LETTERS[int(answer)]
    return row | dict(zip(LETTERS, choices)) | {"answer": answer, "Subject": need(row, "subject", where)}


def read_file(task: Task, path: Path, name: str) -> list[Question]:
    """The questions of a file, on the subject `name` where rows do not name their own. A number that rows
    carry tells copies of a row."""
    questions, numbered = [], []
    for where, row in rows_of(task, path):
        subject = name
        if task.name == "mmmlu" or "Subject" in row:        # it may carry the rest of a file's name
            subject = as_kind(need(row, "Subject", where), str, where)
            subject = re.split("_test[.-]", subject)[0]
        question = make_question(task, row, where, known_subject(task, subject))
        number = next((row[key] for key in NUMBERS if key in row), None)
        if number is not None:
            numbered.append((where, (subject, question.texts["passage"], str(number))))
        questions.append(question)
    refuse_duplicates(numbered)
    if not questions:
        raise InputError(f"{path}: the file holds no question")
    return questions


def known_subject(task: Task, subject: str) -> str:
    """The benchmark's own name of a subject, for "High School Biology", too; any other stays as it is."""
    folded = re.sub(r"[\s_-]+", "_", subject.strip().lower())
    return folded if folded in chain.from_iterable(task.categories.values()) else subject


def make_question(task: Task, row: dict, where: str, subject: str) -> Question:
    texts = {name: need(row, key, where) for name, key in zip(FIELDS, task.keys)}
    answer = str(texts.pop("answer")).strip()
    if answer not in task.answers:
        raise InputError(f"{where}: the answer is {answer!r:.80}, one of {', '.join(task.answers)} is wanted")
    texts["passage"] = need(row, "flores_passage", where) if task.name == "belebele" else ""
    dialect = str(row.get("dialect") or subject)
    if task.name == "belebele" and normal(dialect) != normal(subject):
        raise InputError(f"{where}: the row is in {dialect}, --lang asked for {subject}")
    for name, text in texts.items():
        check_unicode(as_kind(text, str, f"{where}: {name}"), where)
    texts["question"] = texts["question"].strip()
    if not texts["question"]:
        raise InputError(f"{where}: the question is empty")
    return Question(subject, where, texts, task.answers.index(answer), task.text.format_map(texts))


def mmmlu_code(language: str) -> str:
    """SW-KE for any spelling of Swahili."""
    for code in MMMLU_LANGUAGES:
        if normal(code) == normal(language):
            return code
    near = suggestion(language, map(normal, MMMLU_LANGUAGES))
    raise InputError(f"--lang {language}: MMMLU has {', '.join(MMMLU_LANGUAGES)}{near}")


def check_language(task: Task, path: Path, language: str) -> None:
    """InputError for a file whose name or directory says another language of MMMLU or BELEBELE, whose rows
    may say none."""
    names = "/".join(path.parts[-2:])
    if task.name == "belebele":
        wanted, codes = nllb_code(language), re.findall(r"\b[a-z]{3}_[A-Z][a-z]{3}(?![a-z])", names)
        named = {code for code in codes if normal(code) != code}
    else:
        wanted, names = mmmlu_code(language), names.replace("_", "-").upper()
        named = {code for code in MMMLU_LANGUAGES if code in names}
    if named and wanted not in named:
        raise InputError(f"{path} is in {', '.join(sorted(named))}, --lang asked for {wanted}")


def file_names(task: Task, language: str, split: str) -> list[str]:
    """Patterns of the files of a split, as distributed and as converted from the hub's parquet."""
    if task.name == "mmlu":
        return [f"*_{split}.csv", f"{split}.jsonl", f"{split}-*.jsonl"]
    if task.name == "cmmlu":
        return [f"{split}/*.csv", f"{split}/*.jsonl"]
    if task.name == "mmmlu":
        code = mmmlu_code(language)
        return [f"mmlu_{code}.*", f"*{code.replace('-', '_')}.*"]
    code = nllb_code(language)
    return [f"{code}.jsonl", f"{code}_*.jsonl"]


def find_files(root: Path, names: list[str]) -> list[Path]:
    """Files below a directory that match the first name pattern with any match; a file is itself. Not what a
    download or an archive leaves beside them, nor MMLU's questions from elsewhere."""
    if root.is_file():
        return [root]
    there = sorted(path for path in root.rglob("*") if path.is_file())
    there = [path for path in there if not is_aside(path.relative_to(root))]
    for name in names:
        found = [path for path in there if unpacked(path).match(name.lower())]
        if found:
            return found
    if any(root.rglob("*.parquet")):
        raise InputError(f"{root} holds {PARQUET}")
    raise InputError(f"{root}: found no {' or '.join(names)} there "
                     f"(of data sets on the hub some hold only {PARQUET})")


def unpacked(path: Path) -> Path:
    """The path in small letters and without .gz."""
    return Path(str(path).lower().removesuffix(".gz"))


def is_aside(path: Path) -> bool:
    return any(part.startswith(".") or part in ("__MACOSX", "auxiliary_train") for part in path.parts)


def read_questions(task: Task, root: Path, language: str, split: str) -> dict[Path, list[Question]]:
    """Questions of each file of a split."""
    questions = {}
    for path in find_files(root, file_names(task, language, split)):
        if language:
            check_language(task, path, language)
        stem = path.name[:len(unpacked(path).stem)]
        name = nllb_code(language) if task.name == "belebele" else stem.removesuffix(f"_{split}")
        questions[path] = read_file(task, path, name)
    return questions


# ---------------------------------------------------------------------------------------------- the benchmark

def description_of(task: Task, subject: str, language: str) -> str:
    """What stands before the examples, with the subject named in the benchmark's language."""
    spaced = subject.replace("_", " ")
    if task.name == "cmmlu":
        if subject not in CMMLU_NAMES:
            raise InputError(f"CMMLU has no subject {subject!r}: "
                             f"the file's name must be one of {', '.join(sorted(CMMLU_NAMES))}")
        spaced = CMMLU_NAMES[subject]
    if task.name == "mmmlu":
        language = MMMLU_LANGUAGES[mmmlu_code(language)]
    return task.description.format(subject=spaced, language=language)


def header_of(task: Task, question: Question, pool: list[Question], shots: int, language: str) -> str:
    """The description and the first examples of the pool; never the question itself, nor its copy."""
    header = description_of(task, question.subject, language)
    examples = [other for other in pool if other != question] if shots and not task.examples else pool
    if shots > len(examples):
        raise InputError(f"{question.where}: --shots {shots}, "
                         f"but {question.subject} has only {len(examples)} examples")
    for example in examples[:shots]:
        header += f"{example.text} {LETTERS[example.gold]}\n\n"
    return header


def by_subject(files: dict[Path, list[Question]]) -> dict[str, list[Question]]:
    """{subject: questions}, in the order of the files. InputError when two files hold a subject that are no
    parts of one, side by side and of one kind: its questions would be asked twice."""
    groups, found = {}, {}
    for path, questions in files.items():
        for subject in {question.subject: None for question in questions}:
            other = found.setdefault(subject, path)
            if (other.parent, other.suffix) != (path.parent, path.suffix):
                raise InputError(f"{subject} is in {other} and in {path}: name a directory with one of them")
        for question in questions:
            groups.setdefault(question.subject, []).append(question)
    return groups


def read_benchmark(name: str, path, shots: int = 0, language: str = "", subjects: list[str] | None = None,
                   split: str = "test", limit: int | None = None) -> Benchmark:
    """The questions of a benchmark, from the directory (or, with one file a language, the file)
    it is distributed as, or from the hub id of its data set.

    language: of MMMLU and BELEBELE. subjects: only these. limit: the first so many of every subject.
    Raises InputError with file and line.
    """
    if name in ("mmmlu", "belebele") and not language:
        raise InputError(f"{name} comes in many languages: choose one with --lang")
    if name in ("mmlu", "cmmlu") and language:
        raise InputError(f"{name} is in one language, {language!r} would choose nothing: leave --lang out")
    task, root = TASKS[name], Path(path)
    if not task.examples and split != "test":
        raise InputError(f"--split {split}: {name} has one split, test")
    if hub.is_id(path):
        names = file_names(task, language, split)
        if task.examples:
            names += file_names(task, language, task.examples)
        root = hub.fetch(str(path), tuple(f"*{pattern}" for pattern in names), kind="dataset")
    if not root.exists():
        raise InputError(f"{root}: no such file or directory")
    files = read_questions(task, root, language, split)
    groups = by_subject(files)
    unknown = set(subjects or ()) - set(groups)
    if unknown:
        raise InputError(f"{root} has no subject {', '.join(sorted(unknown))}; "
                         f"it has {', '.join(sorted(groups))}")
    examples = read_questions(task, root, language, task.examples) if shots and task.examples else files
    if task.examples and shots and files.keys() & examples.keys():
        raise InputError(f"{root}: --shots takes examples from the split {task.examples}, which here is what "
                         f"is asked, answers and all: name a directory with both, or leave out --shots")
    pools = by_subject(examples)
    asked = []
    for subject in subjects or groups:
        for number, question in enumerate(groups[subject][:limit], 1):
            header = header_of(task, question, pools.get(subject, []), shots, language)
            asked.append(replace(question, name=f"{subject} {number}", header=header))
    used = {str(file.relative_to(root) if root.is_dir() else file.name): fingerprint(file)
            for file in files | examples}
    settings = {
        "benchmark": name,
        "language": language,
        "split": split,
        "shots": shots,
        "examples from": task.examples or split,
        "description": task.description,
        "template": task.text,
        "scored": "log-prob of ' ' + letter, summed, not normalised; argmax, the first of equals",
        "subjects": sorted({question.subject for question in asked}),
        "limit": limit,
        "files": used}
    return Benchmark(asked, settings, task.categories)


# ----------------------------------------------------------------------------------------- questions -> forks

def full_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids with what the tokenizer itself adds: Llama's one BOS, nothing of Qwen."""
    return [encoding.ids for encoding in tokenizer.full.encode_batch(texts)]


def encode_questions(tokenizer, questions: list[Question]) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt ids, ids of each choice) of questions, prompt and choice tokenised jointly.

    What follows the prompt's own tokens in the joint text is the choice's;
    spaces at the prompt's end go over to it.
    """
    texts = [question.header + question.text for question in questions]
    prompts = full_ids(tokenizer, [text.rstrip() for text in texts])
    joint = []
    for letter in LETTERS:
        joint.append(full_ids(tokenizer, [f"{text} {letter}" for text in texts]))
    pairs = []
    for question, prompt, *texts in zip(questions, prompts, *joint):
        choices = [ids[len(prompt):] for ids in texts]
        if not all(choices):
            raise InputError(f"{question.where}: the tokenizer merges choice {LETTERS[choices.index([])]} "
                             f"with the prompt")
        pairs.append((prompt, choices))
    return pairs


def common_prefix(prompts: list[list[int]]) -> list[int]:
    """The tokens all prompts begin with, short of the last one of any."""
    return os.path.commonprefix(prompts)[:min(map(len, prompts)) - 1]


def fitting_forks(where: str, prompt: list[int], choices: list[list[int]],
                  max_tokens: int) -> list[data.Fork]:
    """One fork of all choices; of a question too long for the model, whose prompt loses its start, more of it
    before a longer choice, a fork for each choice."""
    longest = max(map(len, choices))
    if longest > max_tokens:
        raise InputError(f"{where}: {longest} tokens to be scored, the model reads {max_tokens}: "
                         f"leave it out")
    if len(prompt) + longest <= max_tokens + 1:
        return [data.Fork(prompt, choices, "", where)]
    return [data.Fork(prompt[-(max_tokens + 1 - len(choice)):], [choice], "", where) for choice in choices]


# ----------------------------------------------------------------------------------------------------- scores

@torch.no_grad()
def fork_logps(model, forks: list[data.Fork], batch_tokens: int, done=frozenset()):
    """Yields (index of a fork, log-probs of its continuations, summed over tokens) as they are done. What all
    prompts begin with is computed once. batch_tokens: of a forward pass, at most, but for longer forks.

    done: indices that are left out. The others keep the company they would have without, since the last bits
    of a log-prob depend on it: a resumed run equals an undisturbed one.
    """
    if done.issuperset(range(len(forks))):
        return
    shared = common_prefix([fork.prompt for fork in forks])
    prefix = llama.keys_and_values(model, shared)
    rest = [replace(fork, prompt=fork.prompt[len(shared):]) for fork in forks]
    longest = max(fork.length for fork in rest)
    for batch in data.micro_batches(rest, max(batch_tokens, longest), 1):
        if done.issuperset(batch.order):
            continue
        sums = llama.continuation_logps(model, batch.to(model.head.device), prefix).cpu()
        parts = sums.split([len(fork.continuations) for fork in batch.forks])
        for index, part in zip(batch.order, parts):
            if index not in done:
                yield index, part.tolist()


def score_questions(model, tokenizer, questions: list[Question], batch_tokens: int = 2048, done=frozenset()):
    """Yields (index of a question, its verdict) as they are done, not in order; see multiple_choice.
    What the questions with one header begin with is computed once. done: names of those left out."""
    headers = {}
    for index, question in enumerate(questions):
        headers.setdefault(question.header, []).append(index)
    for indices in headers.values():
        fitting = {}              # the others are cut, and a fork for each choice
        encoded = encode_questions(tokenizer, [questions[index] for index in indices])
        for index, (prompt, choices) in zip(indices, encoded):
            question = questions[index]
            forks = fitting_forks(question.where, prompt, choices, model.config.max_position_embeddings)
            if len(forks) == 1:
                fitting[index] = forks[0]
                continue
            if question.name in done:
                continue
            found = dict(fork_logps(model, forks, batch_tokens))
            logps = [found[i][0] for i in range(len(forks))]
            yield index, verdict(question, logps, cut=True)
        names = list(fitting)
        known = {i for i, index in enumerate(names) if questions[index].name in done}
        for i, logps in fork_logps(model, list(fitting.values()), batch_tokens, known):
            yield names[i], verdict(questions[names[i]], logps, cut=False)


def multiple_choice(model, tokenizer, questions: list[Question], batch_tokens: int = 2048) -> list[dict]:
    """For each question {"choice": int, "correct": bool, "logp": [log-prob of each choice], "cut": bool};
    cut: the prompt was longer than the model reads and lost its start."""
    scored = dict(score_questions(model, tokenizer, questions, batch_tokens))
    return [scored[i] for i in range(len(questions))]


def verdict(question: Question, logps: list[float], cut: bool) -> dict:
    choice = logps.index(max(logps))                          # the first of equals
    return {
        "question": question.name,
        "gold": question.gold,
        "choice": choice,
        "correct": choice == question.gold,
        "logp": logps,
        "cut": cut}


# -------------------------------------------------------------------------------------------------- summaries

def accuracy(*subjects: list[bool]) -> dict:
    """Accuracy in % over the questions of subjects, n, and the harness's pooled standard error: of the sample
    (n - 1; None for single questions), so that differences between subjects do not count."""
    n, right, spread = 0, 0, 0.0
    for correct in subjects:
        n += len(correct)
        right += sum(correct)
        spread += sum(correct) * (1 - sum(correct) / len(correct))
    free = n - len(subjects)
    error = 100 * math.sqrt(spread / free / n) if free else None
    return {"value": 100 * right / n, "stderr": error, "n": n}


def summarise(benchmark: Benchmark, verdicts: dict[str, dict]) -> dict:
    """{"all", "categories": {name}, "subjects": {name}} of verdicts by question: each value, stderr, n."""
    subjects, categories = {}, {}
    for question in benchmark.questions:
        subjects.setdefault(question.subject, []).append(verdicts[question.name]["correct"])
    for name, members in benchmark.categories.items():
        parts = [correct for subject, correct in subjects.items() if subject in members]
        if parts:
            categories[name] = accuracy(*parts)
    return {
        "all": accuracy(*subjects.values()),
        "subjects": {name: accuracy(correct) for name, correct in subjects.items()},
        "categories": categories}
