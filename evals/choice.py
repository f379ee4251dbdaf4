"""Multiple-choice benchmarks: their distributed files -> questions -> forks -> the log-prob of every choice.

    for i, logps in score(model, tokenizer, read_benchmark("mmlu", "mmlu/data", shots=5).questions):
        ...                                       # the command line is python eval.py mc mmlu mmlu/data

MMLU, MMMLU, CMMLU and BELEBELE, worded, tokenised and averaged as lm-evaluation-harness does it, so
that numbers can be compared with published ones. A question is a *fork*: its text is the prompt, its choices
are the continuations. What all questions of a subject begin with (description, examples) is computed once, as
a prefix of keys and values.

Why a file of its own: the wording of four benchmarks and the oddities of their files have nothing to do with
the rest of eval.py, and would hide it.

Task wordings and sampling rules: lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836),
lm_eval/tasks.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import data
import model as llama
from engine.files import InputError, as_kind, fingerprint, need, read_records
from formats import hub
from formats.languages import nllb_code, normal, suggestion
from formats.records import PARQUET, refuse_duplicates, table_cells

LETTERS = ("A", "B", "C", "D")
MMLU_DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"
MMMLU_DESCRIPTION = ("The following are multiple choice questions (with answers) about {subject} "
                     "({language}).\n\n")
CMMLU_DESCRIPTION = "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n"
LETTERED = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"
CMMLU_TEXT = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n答案："
BELEBELE_TEXT = "P: {passage}\nQ: {question}\nA: {A}\nB: {B}\nC: {C}\nD: {D}\nAnswer:"
MMLU_CATEGORIES = {
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
            "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
            "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
            "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging management "
             "marketing medical_genetics miscellaneous nutrition professional_accounting "
             "professional_medicine virology",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
                       "high_school_macroeconomics high_school_microeconomics high_school_psychology "
                       "human_sexuality professional_psychology public_relations security_studies "
                       "sociology us_foreign_policy",
    "humanities": "formal_logic high_school_european_history high_school_us_history "
                  "high_school_world_history international_law jurisprudence logical_fallacies "
                  "moral_disputes moral_scenarios philosophy prehistory professional_law world_religions"}
# the names the harness uses, in the categories of CMMLU's src/categories.py;
# CHINA_SPECIFIC ones count in a fifth one too
CMMLU_SUBJECTS = {part: dict(pair.split(":") for pair in text.split()) for part, text in {
    "stem":
        "anatomy:解剖学 astronomy:天文学 college_actuarial_science:大学精算学 "
        "college_engineering_hydrology:大学工程水文学 college_mathematics:大学数学 "
        "college_medical_statistics:大学医学统计 computer_science:计算机科学 "
        "conceptual_physics:概念物理学 electrical_engineering:电气工程 elementary_mathematics:初等数学 "
        "genetics:遗传学 high_school_biology:高中生物 high_school_chemistry:高中化学 "
        "high_school_mathematics:高中数学 high_school_physics:高中物理学 machine_learning:机器学习 "
        "virology:病毒学",
    "humanities":
        "arts:艺术学 chinese_history:中国历史 chinese_literature:中国文学 college_law:大学法律 "
        "global_facts:全球事实 international_law:国际法学 jurisprudence:法理学 logical:逻辑学 "
        "marxist_theory:马克思主义理论 philosophy:哲学 professional_law:专业法学 world_history:世界历史 "
        "world_religions:世界宗教",
    "social_sciences":
        "ancient_chinese:古汉语 business_ethics:商业伦理 chinese_civil_service_exam:中国公务员考试 "
        "chinese_food_culture:中国饮食文化 chinese_foreign_policy:中国外交政策 "
        "chinese_teacher_qualification:中国教师资格 college_education:大学教育学 economics:经济学 "
        "education:教育学 elementary_chinese:小学语文 ethnology:民族学 high_school_geography:高中地理 "
        "high_school_politics:高中政治 journalism:新闻学 management:管理学 marketing:市场营销 "
        "modern_chinese:现代汉语 professional_accounting:专业会计 professional_psychology:专业心理学 "
        "public_relations:公共关系 security_study:安全研究 sociology:社会学",
    "other":
        "agronomy:农学 chinese_driving_rule:中国驾驶规则 clinical_knowledge:临床知识 "
        "college_medicine:大学医学 computer_security:计算机安全 "
        "construction_project_management:建设工程管理 elementary_commonsense:小学常识 "
        "elementary_information_and_technology:小学信息技术 food_science:食品科学 "
        "human_sexuality:人类性行为 legal_and_moral_basis:法律与道德基础 nutrition:营养学 "
        "professional_medicine:专业医学 sports_science:体育学 traditional_chinese_medicine:中医中药",
}.items()}
CHINA_SPECIFIC = set(
    "ancient_chinese construction_project_management elementary_chinese elementary_commonsense ethnology "
    "high_school_politics modern_chinese traditional_chinese_medicine chinese_civil_service_exam "
    "chinese_driving_rule chinese_food_culture chinese_foreign_policy chinese_history chinese_literature "
    "chinese_teacher_qualification".split())
MMMLU_LANGUAGES = dict(pair.split(":") for pair in (
    "AR-XY:Arabic,BN-BD:Bengali,DE-DE:German,ES-LA:Spanish,FR-FR:French,HI-IN:Hindi,ID-ID:Indonesian,"
    "IT-IT:Italian,JA-JP:Japanese,KO-KR:Korean,PT-BR:Brazilian Portuguese,SW-KE:Swahili,YO-NG:Yoruba,"
    "ZH-CN:Simplified Chinese").split(","))


@dataclass(frozen=True)
class Question:
    """One question, ready to be scored: log-prob of " " + choice after header + text, for each choice."""
    subject: str
    where: str                         # file:line
    header: str                        # description and worked examples
    text: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Document:
    """One question as a file has it; a copy of it elsewhere is equal."""
    subject: str
    where: str = field(compare=False)
    passage: str
    question: str
    options: tuple[str, str, str, str]
    gold: int


@dataclass(frozen=True)
class Task:
    """How a benchmark is worded. An empty `examples` split: the examples come from the questions asked."""
    name: str
    description: str
    text: str
    examples: str = ""


TASKS = {"mmlu": Task("mmlu", MMLU_DESCRIPTION, LETTERED, "dev"),
         "mmmlu": Task("mmmlu", MMMLU_DESCRIPTION, LETTERED),
         "cmmlu": Task("cmmlu", CMMLU_DESCRIPTION, CMMLU_TEXT, "dev"),
         "belebele": Task("belebele", "", BELEBELE_TEXT)}


@dataclass(frozen=True)
class Benchmark:
    """Questions to ask, and what has to stand beside their score."""
    task: Task
    questions: list[Question]
    settings: dict
    categories: dict[str, set[str]]    # subjects of each; {} where a benchmark has none


# ---------------------------------------------------------------------------------------------- files -> rows

def table_rows(path: Path, wanted: tuple[str, ...], header: bool = True) -> list[tuple[str, dict]]:
    """[("file:line", {column: text})] of a csv or jsonl file. A table's header has to hold the columns
    `wanted`; without a header they are its columns, in this order."""
    if path.suffix == ".jsonl":
        return read_records(path)
    rows, columns = [], None if header else list(wanted)
    for where, cells in table_cells(path):
        if columns is None:
            columns = cells
            for name in wanted:
                need(dict.fromkeys(columns), name, where)
        elif len(cells) != len(columns):
            raise InputError(f"{where}: {len(cells)} columns, {len(columns)} are wanted "
                             f"({', '.join(columns)})")
        elif header or [cell.strip().lower() for cell in cells] != [name.lower() for name in wanted]:
            rows.append((where, dict(zip(columns, cells))))
    return rows


def make_document(row: dict, where: str, subject: str, keys: tuple[str, ...]) -> Document:
    """keys: those of the passage ("" without), the question, four options (or one list of them),
    and the answer."""
    passage, question, *options, answer = keys
    found = [need(row, key, where) for key in options]
    if len(found) == 1:
        found = found[0]
    if not isinstance(found, list) or len(found) != len(LETTERS):
        raise InputError(f"{where}: {options[0]} is no list of {len(LETTERS)} texts")
    gold = gold_index(need(row, answer, where), where)
    texts = [need(row, question, where), *found, row[passage] if passage else ""]
    question, *found, passage = [as_kind(text, str, where) for text in texts]
    if not question.strip():
        raise InputError(f"{where}: the question is empty")
    return Document(subject, where, passage, question.strip(), tuple(found), gold)


def gold_index(answer, where: str) -> int:
    """0 to 3 from a letter A-D or, as the hub's MMLU has it, from a number 0-3
    (no text: "1" may be counted from 1)."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(LETTERS):
        return answer
    letter = answer.strip() if isinstance(answer, str) else answer
    if letter not in LETTERS:
        raise InputError(f"{where}: the answer is {answer!r:.80}, one of {', '.join(LETTERS)} is wanted")
    return LETTERS.index(letter)


def local_files(name: str, path, language: str) -> Path:
    """The benchmark's directory; of a data set on the hub, its csv and jsonl files (of one language),
    downloaded."""
    if not hub.is_id(path):
        return Path(path)
    patterns = ["*.csv", "*.jsonl"]
    if name == "mmmlu":
        code = mmmlu_code(language)
        patterns = [f"*{code}.csv", f"*{code.replace('-', '_')}.csv"]
    elif name == "belebele":
        patterns = [f"*{nllb_code(language)}.jsonl"]
    return hub.fetch(str(path), tuple(patterns), kind="dataset")


def listed(root: Path, folders: list[str], names: list[str]) -> list[Path]:
    """Files that match the first name pattern with any match, in one of the folders of `root`."""
    for name in names:
        for folder in folders:
            found = sorted((root / folder).glob(name))
            if found:
                return found
    if any(root.rglob("*.parquet")):
        raise InputError(f"{root} holds {PARQUET}")
    places = ", ".join(sorted({str(root / folder) for folder in folders}))
    raise InputError(f"{root}: found no {' or '.join(names)} in {places} "
                    f"(of data sets on the hub some hold only {PARQUET})")


def read_subjects(task: Task, root: Path, split: str) -> dict[Path, list[Document]]:
    """MMLU or CMMLU: one csv a subject in a folder of the split, MMLU's without a header;
    or files converted to jsonl from the hub's parquet, MMLU's with all subjects in one."""
    mmlu = task.name == "mmlu"
    columns = ("question", *LETTERS, "answer") if mmlu else ("Question", *LETTERS, "Answer")
    names = [f"*_{split}.csv", f"{split}.jsonl", f"{split}-*.jsonl"] if mmlu else ["*.csv", "*.jsonl"]
    documents = {}
    for path in listed(root, [split, f"data/{split}", "", "data"], names):
        rows, name = table_rows(path, columns, header=not mmlu), path.stem.removesuffix(f"_{split}")
        if rows and "" in rows[0][1]:                                           # CMMLU numbers its rows
            refuse_duplicates([(where, row[""]) for where, row in rows])
        joined = mmlu and path.suffix == ".jsonl"
        keys = ("", "question", "choices", "answer") if joined else ("", *columns)
        documents[path] = [
            make_document(row, where, need(row, "subject", where) if joined else name, keys)
            for where, row in rows]
    return documents


def mmmlu_code(language: str) -> str:
    """SW-KE for any spelling of Swahili."""
    for code in MMMLU_LANGUAGES:
        if normal(code) == normal(language):
            return code
    near = suggestion(language, map(normal, MMMLU_LANGUAGES))
    raise InputError(f"--lang {language}: MMMLU has {', '.join(MMMLU_LANGUAGES)}{near}")


def read_mmmlu(root: Path, language: str) -> dict[Path, list[Document]]:
    """MMMLU: one csv a language with all subjects, whose Subject cells may carry a file name's rest."""
    code = mmmlu_code(language)
    path = root if root.is_file() else \
        listed(root, ["", "test"], [f"mmlu_{code}.*", f"*{code.replace('-', '_')}.*"])[0]
    columns, documents, seen = ("Question", *LETTERS, "Answer"), [], []
    for where, row in table_rows(path, (*columns, "Subject")):
        subject = (as_kind(need(row, "Subject", where), str, where)
                   .split("_test.csv")[0].split("_test-")[0])
        documents.append(make_document(row, where, subject, ("", *columns)))
        seen += [(where, (subject, row[""]))] if "" in row else []              # the index column
    refuse_duplicates(seen)
    return {path: documents}


def read_belebele(root: Path, language: str) -> dict[Path, list[Document]]:
    """BELEBELE: one jsonl a language, named by its FLORES code, which is NLLB's."""
    code = nllb_code(language)
    path = root if root.is_file() else listed(root, ["", "data"], [f"{code}.jsonl", f"{code}_*.jsonl"])[0]
    rows = table_rows(path, ())
    refuse_duplicates([(where, (row.get("question_number"), need(row, "question", where),
                                need(row, "flores_passage", where))) for where, row in rows])
    keys = ("flores_passage", "question", *(f"mc_answer{i}" for i in (1, 2, 3, 4)), "answer")
    documents = []
    for where, row in rows:
        number = str(need(row, "correct_answer_num", where))
        if number not in ("1", "2", "3", "4"):
            raise InputError(f"{where}: correct_answer_num is {number!r}, one of 1, 2, 3, 4 is wanted")
        documents.append(make_document(row | {"answer": int(number) - 1}, where, code, keys))
    return {path: documents}


def read_split(task: Task, root: Path, language: str, split: str) -> dict[Path, list[Document]]:
    """Documents of each file of a split; InputError when there is none."""
    if task.name in ("mmlu", "cmmlu"):
        documents = read_subjects(task, root, split)
    elif task.name == "mmmlu":
        documents = read_mmmlu(root, language)
    else:
        documents = read_belebele(root, language)
    for path, found in documents.items():
        if not found:
            raise InputError(f"{path}: the file holds no question")
    return documents


# ------------------------------------------------------------------------------------------ rows -> questions

def text_of(task: Task, document: Document) -> str:
    """The question as it is asked, without its answer."""
    return task.text.format(subject=document.subject, passage=document.passage, question=document.question,
                            **dict(zip(LETTERS, document.options)))


def description_of(task: Task, subject: str, language: str) -> str:
    """What stands before the examples, with the subject named in the benchmark's language."""
    spaced = subject.replace("_", " ")
    if task.name == "cmmlu":
        names = dict(pair for part in CMMLU_SUBJECTS.values() for pair in part.items())
        if subject not in names:
            raise InputError(f"CMMLU has no subject {subject!r}: "
                            f"the file's name must be one of {', '.join(sorted(names))}")
        spaced = names[subject]
    if task.name == "mmmlu":
        language = MMMLU_LANGUAGES[mmmlu_code(language)]
    return task.description.format(subject=spaced, language=language)


def examples_for(task: Task, document: Document, pool: list[Document], shots: int) -> list[Document]:
    """The worked examples of a question, the first of the pool: never the question itself, nor its copy."""
    if shots and not task.examples:
        pool = [other for other in pool if other != document]
    if shots > len(pool):
        raise InputError(f"{document.where}: --shots {shots}, "
                         f"but {document.subject} has only {len(pool)} examples")
    return pool[:shots]


def make_question(task: Task, document: Document, pool: list[Document], shots: int, language: str) -> Question:
    """A question with its description and examples before it."""
    header = description_of(task, document.subject, language)
    for example in examples_for(task, document, pool, shots):
        header += f"{text_of(task, example)} {LETTERS[example.gold]}\n\n"
    return Question(document.subject, document.where, header, text_of(task, document), LETTERS, document.gold)


def by_subject(files: dict[Path, list[Document]]) -> dict[str, list[Document]]:
    """{subject: documents}, in the order of the files."""
    groups = {}
    for documents in files.values():
        for document in documents:
            groups.setdefault(document.subject, []).append(document)
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
    task, root = TASKS[name], local_files(name, path, language)
    if not root.exists():
        raise InputError(f"{root}: no such file or directory")
    files = read_split(task, root, language, split)
    groups = by_subject(files)
    unknown = set(subjects or ()) - set(groups)
    if unknown:
        raise InputError(f"{root} has no subject {', '.join(sorted(unknown))}; "
                         f"it has {', '.join(sorted(groups))}")
    examples = read_split(task, root, language, task.examples) if shots and task.examples else files
    pools = by_subject(examples)
    asked = [document for subject, documents in groups.items() if not subjects or subject in subjects
             for document in documents[:limit]]
    questions = [make_question(task, document, pools.get(document.subject, []), shots, language)
                 for document in asked]
    used = {str(path.relative_to(root) if root.is_dir() else path.name): fingerprint(path)
            for path in {**files, **examples}}
    settings = {"benchmark": name, "language": language, "split": split, "shots": shots,
                "examples from": task.examples or split, "description": task.description,
                "template": task.text,
                "scored": "log-prob of ' ' + letter, summed, not normalised; argmax, the first of equals",
                "subjects": sorted({question.subject for question in questions}),
                "limit": limit, "files": used}
    return Benchmark(task, questions, settings, categories_of(task))


def categories_of(task: Task) -> dict[str, set[str]]:
    """{category: its subjects}."""
    if task.name == "cmmlu":
        categories = {name: set(part) for name, part in CMMLU_SUBJECTS.items()}
        return categories | {"china_specific": CHINA_SPECIFIC}
    if task.name == "belebele":
        return {}
    return {name: set(part.split()) for name, part in MMLU_CATEGORIES.items()}


# ----------------------------------------------------------------------------------------- questions -> forks

def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids as the tokenizer itself adds special tokens: Llama's one BOS, none of Qwen;
    none where the text brings it."""
    bos = tokenizer.names.get("bos_token")
    if not bos or not any(text.startswith(bos) for text in texts):
        return [encoding.ids for encoding in tokenizer.full.encode_batch(texts)]
    return [tokenizer.full.encode(text, add_special_tokens=not text.startswith(bos)).ids for text in texts]


def encode_questions(tokenizer, questions: list[Question]) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt ids, ids of each choice) of questions, prompt and choice tokenised jointly.

    What follows the prompt's own tokens in the joint text is the choice's;
    spaces at the prompt's end go over to it.
    """
    texts = [question.header + question.text for question in questions]
    prompts = encode(tokenizer, [text.rstrip() for text in texts])
    joint = iter(encode(tokenizer, [f"{text} {choice}" for text, question in zip(texts, questions)
                                    for choice in question.choices]))
    pairs = []
    for question, prompt in zip(questions, prompts):
        choices = [next(joint)[len(prompt):] for _ in question.choices]
        if not all(choices):
            merged = question.choices[choices.index([])]
            raise InputError(f"{question.where}: the tokenizer merges choice {merged!r} with the prompt")
        pairs.append((prompt, choices))
    return pairs


@dataclass
class Part:
    """A fork and what it scores: choices[j] is the question's choice that its continuation j spells."""
    fork: data.Fork
    question: int
    choices: list[int]
    cut: bool                          # the prompt lost its start to the model's longest input


def make_parts(index: int, where: str, prompt: list[int], choices: list[list[int]],
               max_tokens: int) -> list[Part]:
    """Forks of one question. Too long for the model, the prompt loses its start, more of it before a longer
    choice: where prompts then differ, the choices are forks of their own."""
    parts = {}
    for number, choice in enumerate(choices):
        kept = tuple((prompt + choice)[-(max_tokens + 1):][:-len(choice)])
        if not kept:
            raise InputError(f"{where}: {len(choice)} tokens to be scored, the model reads {max_tokens}: "
                            f"leave it out")
        if kept not in parts:
            fork = data.Fork(list(kept), [], "", where)
            parts[kept] = Part(fork, index, [], cut=len(kept) < len(prompt))
        parts[kept].fork.continuations.append(choice)
        parts[kept].choices.append(number)
    return list(parts.values())


def common_prefix(prompts: list[list[int]]) -> list[int]:
    """The tokens all prompts begin with, short of the last one of any."""
    first, last = min(prompts), max(prompts)          # in lexical order, all others lie between these two
    size = min(map(len, prompts)) - 1
    while first[:size] != last[:size]:
        size -= 1
    return first[:size]


def buckets(tokenizer, questions: list[Question], max_tokens: int):
    """Lists of Parts that share their header: those of each header that several questions have,
    then all others."""
    headers, others = {}, []
    for index, question in enumerate(questions):
        headers.setdefault(question.header, []).append(index)
    for indices in headers.values():
        parts, pairs = [], encode_questions(tokenizer, [questions[i] for i in indices])
        for index, (prompt, choices) in zip(indices, pairs):
            parts += make_parts(index, questions[index].where, prompt, choices, max_tokens)
        shared = [part for part in parts if not part.cut and len(indices) > 1]
        others += [part for part in parts if part.cut or len(indices) == 1]
        if shared:
            yield shared
    if others:
        yield others


# ----------------------------------------------------------------------------------------------------- scores

@torch.no_grad()
def sequence_logps(model, forks: list[data.Fork], batch_tokens: int, shared: list[int] | None = None):
    """Yields ([index of a fork], [log-probs of each one's continuations, summed over tokens])
    a batch of packed forks.

    shared: tokens all prompts begin with; they are computed once.
    batch_tokens: of a forward pass, at most, but for longer forks.
    """
    shared = shared or []
    prefix = llama.keys_and_values(model, shared)
    rest = [replace(fork, prompt=fork.prompt[len(shared):]) for fork in forks]
    longest = max(fork.length for fork in rest)
    for batch in data.micro_batches(rest, max(batch_tokens, longest), 1):
        sums = llama.continuation_logps(model, batch.to(model.head.device), prefix).cpu()
        sizes = [len(fork.continuations) for fork in batch.forks]
        yield batch.order, [part.tolist() for part in sums.split(sizes)]


def score(model, tokenizer, questions: list[Question], batch_tokens: int = 2048):
    """Yields (index of a question, its verdict) as they are done, not in order; see multiple_choice."""
    found, cut = [[None] * len(question.choices) for question in questions], set()
    for parts in buckets(tokenizer, questions, model.config.max_position_embeddings):
        shared = common_prefix([part.fork.prompt for part in parts])
        for order, logps in sequence_logps(model, [part.fork for part in parts], batch_tokens, shared):
            for part, values in zip([parts[i] for i in order], logps):
                for choice, value in zip(part.choices, values):
                    found[part.question][choice] = value
                cut |= {part.question} if part.cut else set()
                if None not in found[part.question]:
                    yield part.question, verdict(questions[part.question], found[part.question],
                                                 part.question in cut)


def multiple_choice(model, tokenizer, questions: list[Question], batch_tokens: int = 2048) -> list[dict]:
    """For each question {"choice": int, "correct": bool, "logp": [log-prob of each choice], "cut": bool};
    cut: the prompt was longer than the model reads and lost its start."""
    scored = dict(score(model, tokenizer, questions, batch_tokens))
    return [scored[i] for i in range(len(questions))]


def verdict(question: Question, logps: list[float], cut: bool) -> dict:
    choice = logps.index(max(logps))                          # the first of equals
    return {"choice": choice, "correct": choice == question.gold, "logp": logps, "cut": cut}


# -------------------------------------------------------------------------------------------------- summaries

def accuracy(correct: list[bool]) -> dict:
    """Accuracy in %, its standard error (of the sample, n - 1; None for a single question) and n."""
    n, mean = len(correct), sum(correct) / len(correct)
    error = 100 * math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None
    return {"accuracy": 100 * mean, "stderr": error, "n": n}


def pooled(parts: list[dict]) -> dict:
    """The accuracy over all questions of several subjects, with the pooled standard error of the harness:
    the questions' variance within subjects, so that differences between subjects do not count."""
    n = sum(part["n"] for part in parts)
    mean = sum(part["n"] * part["accuracy"] for part in parts) / n
    if n == len(parts):
        return {"accuracy": mean, "stderr": None, "n": n}
    squares = sum(part["n"] * (part["n"] - 1) * part["stderr"] ** 2 for part in parts if part["n"] > 1)
    return {"accuracy": mean, "stderr": math.sqrt(squares / (n - len(parts)) / n), "n": n}


def summarise(benchmark: Benchmark, verdicts: list[dict]) -> dict:
    """{"all", "categories": {name}, "subjects": {name}}, each with accuracy, stderr and n."""
    subjects = {}
    for question, result in zip(benchmark.questions, verdicts):
        subjects.setdefault(question.subject, []).append(result["correct"])
    subjects = {name: accuracy(correct) for name, correct in subjects.items()}
    categories = {name: [part for subject, part in subjects.items() if subject in members]
                  for name, members in benchmark.categories.items()}
    return {"all": pooled(list(subjects.values())), "subjects": subjects,
            "categories": {name: pooled(parts) for name, parts in categories.items() if parts}}
