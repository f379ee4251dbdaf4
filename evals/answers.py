"""Replies to held-out questions: made greedily, compared with the expected answers, kept on disk.

A reply is *correct* when it equals the row's response in the language of the question but for case, spaces
and final punctuation (`normalise`). That is asked only where every expected answer is short; what open-ended
replies are worth is told by the other figures (figures.py).
"""

import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import data
import model as llama
from engine.files import InputError, need, read_records, write_jsonl
from engine.progress import progress
from evals.figures import ANSWER_KEYS, languages_told, measure
from evals.heldout import summed_logps
from evals.language import LanguageModel, reply_language

HASH_DIGITS = 16

# Unicode's punctuation that is part of an answer: "C#", "50%", "A*", "[0, 1)" are not "C", "50", "A", "[0, 1".
# Dashes (Pd, as in "A-"), connectors (Pc) and opening brackets (Ps) are kept by their category.
PART_OF_ANSWER = set("#%&*@/\\)]}†‡‰‱′″‴٪؉؊׳״")
FINAL_CATEGORIES = ("Po", "Pe", "Pi", "Pf")
# Spaces without width, soft hyphens, marks of direction and of an emoji's style. Joiners and flags are text.
INVISIBLE = "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufe0e\ufe0f\ufeff"
DOTTED = {"tr", "tur", "az", "aze", "azj"}      # languages whose small I is ı, and whose capital i is İ


# -------------------------------------------------------------------------------------------- correct replies

def normalise(text: str, language: str = "") -> str:
    """What of a text has to be equal: small letters, one space between words, no final punctuation; Unicode's
    composed form and one width, without invisible marks (zero-width spaces, soft hyphens, direction). Accents,
    other punctuation, superscripts and the script of digits are part of an answer."""
    text = re.sub(f"[{INVISIBLE}]", "", text)
    text = unicodedata.normalize("NFC", text)
    text = "".join(map(one_width, text))
    if re.split("[-_]", language)[0] in DOTTED:
        text = text.replace("I", "ı")
    text = text.replace("İ", "i").lower().replace("ς", "σ")
    text = unicodedata.normalize("NFC", text)
    text = " ".join(text.split())
    return without_final_punctuation(text) or text


def one_width(char: str) -> str:
    """The usual form of a full-width, half-width or small one."""
    kind = unicodedata.decomposition(char).split(" ", 1)[0]
    return unicodedata.normalize("NFKC", char) if kind in ("<wide>", "<narrow>", "<small>") else char


def without_final_punctuation(text: str) -> str:
    while text and is_final(text):
        text = text[:-1].rstrip()
    return text


def is_final(text: str) -> bool:
    """Whether the last character is punctuation that ends a sentence or a quotation."""
    last = text[-1]
    if last in "'\"" and text[-2:-1].isdigit():         # feet and inches, unless it was opened before
        return text.count(last) % 2 == 0
    return unicodedata.category(last) in FINAL_CATEGORIES and last not in PART_OF_ANSWER


def is_correct(reply: str, expected: str, language: str) -> bool:
    return normalise(reply, language) == normalise(expected, language)


# ---------------------------------------------------------------------------------------------------- replies

@dataclass(frozen=True)
class Decoding:
    """How replies are written."""
    system_prompt: str | None
    max_tokens: int
    temperature: float           # 0: greedy
    top_p: float
    seed: int

    def replies(self, model, tokenizer, questions: list[str], first: int = 0) -> list[tuple[str, int]]:
        """(text, number of tokens) for each question, one batch. first: its place, which the seed depends on;
        max_tokens of them are a reply that was cut."""
        prompts = [tokenizer.prompt_ids(question, self.system_prompt) for question in questions]
        long = sum(len(prompt) + self.max_tokens > model.config.max_position_embeddings for prompt in prompts)
        if long:
            tqdm.write(f"{long} prompts with --max-tokens {self.max_tokens} are longer than the "
                       f"{model.config.max_position_embeddings} tokens that the model was made for",
                       file=sys.stderr)
        replies = llama.generate(model, prompts, self.max_tokens, tokenizer.stop_ids, self.temperature,
                                 self.top_p, self.seed + first, len(prompts))
        return [(tokenizer.decode(reply).strip(), len(reply)) for reply in replies]


def answer(model, tokenizer, questions: list[str], max_tokens: int, system=None,
           label="answers") -> list[tuple[str, bool]]:
    """Greedy replies to questions, in their order; and whether each ended by itself, by a stop token
    within max_tokens."""
    prompts = [tokenizer.prompt_ids(question, system) for question in questions]
    with progress(total=len(prompts), desc=label, unit="reply") as bar:
        replies = llama.generate(model, prompts, max_tokens, tokenizer.stop_ids, progress=bar.update)
    texts = [tokenizer.decode(reply).strip() for reply in replies]
    ends = [len(reply) < max_tokens for reply in replies]
    return list(zip(texts, ends))


def answer_and_score(model, tokenizer, rows: list[dict], languages: tuple[str, ...],
                     classifier: LanguageModel, max_tokens: int, system: str | None, path: Path | None,
                     limit: int | None = None, reference_nll: dict[str, list[float]] | None = None) -> dict:
    """Answer the rows, or the first `limit` of them, in every language; {language: score(...), ...}.
    Every reply is written to `path`, one JSON line each.

    reference_nll: {language: nats of each answered row's response and its stop token}, for bits per byte.
    """
    asked, lines, scores = rows[:limit], [], {}
    for language in languages:
        questions = [row[language]["prompt"] for row in asked]
        replies = answer(model, tokenizer, questions, max_tokens, system, f"answer {language}")
        own = [answer_line(row, language, languages, reply, ends, classifier)
               for row, (reply, ends) in zip(asked, replies)]
        if reference_nll is not None:
            for line, nats in zip(own, reference_nll[language], strict=True):
                line["reference_nll"] = round(nats, 6)      # ranks add in other orders
        scores[language] = score(own)
        lines += own
    if path is not None:                     # of several processes the first writes
        write_jsonl(path, lines)
    decoding = {"temperature": 0, "max_tokens": max_tokens, "system_prompt": system,
                "template": tokenizer.fingerprint[:HASH_DIGITS]}
    return scores | {"questions": len(rows), "decoding": decoding}


def reference_nll(model, tokenizer, rows: list[dict], languages: tuple[str, ...], packing: data.Packing,
                  system: str | None) -> dict[str, list[float]]:
    """Nats of the expected answer, stop token included, to each question, by language."""
    nats = {}
    for language in languages:
        forks = [data.Fork(tokenizer.prompt_ids(row[language]["prompt"], system),
                           [tokenizer.response_ids(row[language]["response"])], language, row["row_id"])
                 for row in rows]
        longest = max(fork.length for fork in forks)
        if longest > model.config.max_position_embeddings:
            print(f"a question with its answer in {language} has {longest} tokens, the model was made for "
                  f"{model.config.max_position_embeddings}: its bits per byte say little")
        batches = data.micro_batches(forks, max(packing.row_tokens, longest), packing.micro_rows, packing.trim,
                                     ends=False)
        nats[language] = [0.0] * len(forks)
        for batch, sums in zip(batches, summed_logps(model, batches, f"expected answers {language}")):
            for i, logp in zip(batch.order, sums.tolist()):
                nats[language][i] = -logp
    return nats


def answer_line(row: dict, language: str, languages: tuple[str, ...], reply: str, ends: bool,
                classifier: LanguageModel) -> dict:
    """A line of answers.jsonl. A response that another language has, too, says nothing about the language of
    its reply: that is not judged."""
    expected = row[language]["response"]
    others = [row[other]["response"] for other in languages if other != language]
    found, confidence = reply_language(reply, classifier)
    return {
        "row_id": row["row_id"],
        "language": language,
        "prompt": row[language]["prompt"],
        "reply": reply,
        "ends": ends,
        "expected": expected,
        "correct": is_correct(reply, expected, language),
        "reply_language": found,
        "confidence": round(confidence, 4),
        "judged": not any(is_correct(other, expected, language) for other in others)}


def read_answers(path: Path, scores: dict) -> list[dict]:
    """The lines that answer_and_score wrote when it returned `scores`. InputError unless all are there."""
    lines = read_records(path) if path.is_file() else []
    for where, line in lines:
        for key in ANSWER_KEYS:
            need(line, key, where)
    parts = [part for part in scores.values() if isinstance(part, dict)]
    written = sum(part["n"] for part in parts if "n_language" in part)
    if len(lines) != written:
        raise InputError(f"{path} holds {len(lines)} answers, {written} were written: delete the "
                         f"result.json beside it, and the same command answers again")
    return [line for _, line in lines]


# ----------------------------------------------------------------------------------------------------- scores

def score(lines: list[dict]) -> dict:
    """Figures over replies in one language and their standard errors, and counts of `languages_told`.
    `correct` is always there, also where `answers_short` says that it means little."""
    samples = measure(lines)
    right = sum(line["correct"] for line in lines)
    figures = {"correct": percent(right, len(lines)), "right_language": 0.0}
    errors = {}
    for name, sample in samples.items():
        digits = sample.figure.digits + 1
        figures[name] = round(sample.value, digits)
        errors[name] = None if sample.error is None else round(sample.error, digits)
    return figures | {
        "stderr": errors,
        "answers_short": "correct" in samples,
        "n": len(lines),
        **languages_told(lines)}


def percent(part: int, total: int) -> float:
    return round(100 * part / total, 2) if total else 0.0
