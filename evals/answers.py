"""Replies to held-out questions: made greedily, compared with the expected answers, kept on disk.

A reply is *correct* when it equals the row's response in the language of the question but for case, spaces
and final punctuation (`normalise`). That is asked only where every expected answer is short; what open-ended
replies are worth is told by the other figures (figures.py).
"""

import re
import sys
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

import data
import model as llama
from engine import ranks
from engine.files import InputError, need, read_records, write_jsonl
from engine.progress import progress
from evals.figures import ANSWER_KEYS, languages_told, measure
from evals.heldout import summed_logps
from evals.language import LanguageModel, reply_language
from formats.languages import normal

# Unicode's punctuation that is part of an answer: "C#", "50%", "A*", "[0, 1)" are not "C", "50", "A", "[0, 1"
# Dashes (Pd, as in "A-"), connectors (Pc) and opening brackets (Ps) are kept by their category.
PART_OF_ANSWER = set("#%&*@/\\)]}†‡‰‱′″‴٪؉؊׳״")
FINAL_CATEGORIES = ("Po", "Pe", "Pi", "Pf")
# Spaces without width, soft hyphens, marks of direction and of an emoji's style. Joiners and flags are text.
INVISIBLE = "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufe0e\ufe0f\ufeff"
DOTTED = {"tr", "az"}       # languages whose small I is ı, and whose capital i is İ


# -------------------------------------------------------------------------------------------- correct replies

def normalise(text: str, language: str = "") -> str:
    """What of a text has to be equal: small letters, one space between words, no final punctuation; Unicode's
    composed form and one width, without invisible marks (spaces without width, soft hyphens). Accents, other
    punctuation, superscripts and the script of digits are part of an answer."""
    text = re.sub(f"[{INVISIBLE}]", "", text)
    text = unicodedata.normalize("NFC", text)
    text = "".join(map(one_width, text))
    if normal(language) in DOTTED:
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
    temperature: float = 0.0     # greedy
    top_p: float = 1.0
    seed: int = 0

    def replies(self, model, tokenizer, questions: list[str], first: int = 0, batch_size: int = 64,
                on_replies=None) -> list[tuple[str, int]]:
        """(text, number of tokens) for each question; max_tokens of them are a reply that was cut.
        first: place of the first question, which the seed depends on. on_replies(n): n more are done."""
        prompts = [tokenizer.prompt_ids(question, self.system_prompt) for question in questions]
        room = model.config.max_position_embeddings - self.max_tokens
        long = sum(len(prompt) > room for prompt in prompts)
        if long:
            tqdm.write(f"{long} prompts with {self.max_tokens} tokens of reply are longer than the "
                       f"{model.config.max_position_embeddings} tokens that the model was made for",
                       file=sys.stderr)
        replies = llama.generate(model, prompts, self.max_tokens, tokenizer.stop_ids, self.temperature,
                                 self.top_p, self.seed + first, batch_size, on_replies)
        return [(tokenizer.decode(reply).strip(), len(reply)) for reply in replies]


def answer_and_score(model, tokenizer, rows: list[dict], languages: tuple[str, ...],
                     classifier: LanguageModel, max_tokens: int, system: str | None, path: Path | None,
                     limit: int | None = None, nats: dict[str, list[float]] | None = None) -> dict:
    """Answer the rows, or the first `limit` of them, greedily in every language; {language: score(...), ...}.
    Every reply is written to `path`, one JSON line each.

    nats: {language: of each answered row's response and its stop token}, for bits per byte.
    """
    how, asked = Decoding(system, max_tokens), rows[:limit]
    lines, scores = [], {}
    for language in languages:
        questions = [row[language]["prompt"] for row in asked]
        with progress(total=len(asked), desc=f"answer {language}", unit="reply") as bar:
            replies = how.replies(model, tokenizer, questions, on_replies=bar.update)
        own = [answer_line(row, language, languages, text, tokens < max_tokens, classifier)
               for row, (text, tokens) in zip(asked, replies)]
        for line, cost in zip(own, nats[language] if nats else []):
            line["reference_nll"] = round(cost, 6)      # ranks add in other orders
        scores[language] = score(own)
        lines += own
    if path is not None:
        ranks.on_first(lambda: write_jsonl(path, lines))
    decoding = {
        "temperature": 0,
        "max_tokens": max_tokens,
        "system_prompt": system,
        "template": tokenizer.fingerprint}
    return scores | {"questions": len(rows), "decoding": decoding}


def expected_nll(model, tokenizer, rows: list[dict], languages: tuple[str, ...], packing: data.Packing,
                 system: str | None) -> dict[str, list[float]]:
    """Nats of the expected answer, stop token included, to each question, by language."""
    nats = {}
    for language in languages:
        forks = [data.row_forks(row, tokenizer, (language,), system)[0] for row in rows]
        longest = max(fork.length for fork in forks)
        if longest > model.config.max_position_embeddings:
            print(f"a question with its answer in {language} has {longest} tokens, the model was made for "
                  f"{model.config.max_position_embeddings}: its bits per byte say little")
        batches, = data.cut_steps([forks], replace(packing, row_tokens=max(packing.row_tokens, longest)))
        found = {}
        for batch, sums in zip(batches, summed_logps(model, batches, f"expected answers {language}")):
            found |= zip(batch.order, sums.tolist())
        nats[language] = [-found[i] for i in range(len(forks))]
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
    lines = read_lines(path, ANSWER_KEYS) if path.is_file() else []
    written = sum(part["n"] for part in scores.values() if isinstance(part, dict) and "n_language" in part)
    if len(lines) != written:
        raise InputError(f"{path} holds {len(lines)} answers, {written} were written: delete the "
                         f"result.json beside it, and the same command answers again")
    return lines


def read_lines(path: Path, keys: tuple[str, ...] = ()) -> list[dict]:
    """The objects of a JSONL file, or an InputError that names the line without one of the keys."""
    lines = []
    for where, line in read_records(path):
        for key in keys:
            need(line, key, where)
        lines.append(line)
    return lines


# ----------------------------------------------------------------------------------------------------- scores

def score(lines: list[dict]) -> dict:
    """Figures over replies in one language and their standard errors, and counts of `languages_told`.
    `correct` is always there, also where `answers_short` says that it means little."""
    samples = measure(lines)
    right = sum(line["correct"] for line in lines)
    figures = {"correct": round(100 * right / len(lines), 2) if lines else 0.0, "right_language": 0.0}
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
