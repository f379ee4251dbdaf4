"""Replies to held-out questions: made greedily, compared with the expected answers, kept on disk."""

import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import model as llama
from engine.files import InputError, need, read_records, write_jsonl
from evals.language import LanguageModel, MIXED, reply_language

HASH_DIGITS = 16
ANSWER_KEYS = ("row_id", "language", "prompt", "reply", "expected", "correct", "reply_language", "judged")


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


def normalise(text: str) -> str:
    """NFC, one space between words, no case, no final punctuation."""
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text.rstrip(".!?…。！？ ")


def answer(model, tokenizer, questions: list[str], max_tokens: int, system=None,
           label="answers") -> list[str]:
    """Greedy replies to questions, in their order."""
    prompts = [tokenizer.prompt_ids(question, system) for question in questions]
    with tqdm(total=len(prompts), desc=label, unit="reply") as bar:
        replies = llama.generate(model, prompts, max_tokens, tokenizer.stop_ids, progress=bar.update)
    return [tokenizer.decode(reply).strip() for reply in replies]


def answer_and_score(model, tokenizer, rows: list[dict], languages: tuple[str, ...],
                     classifier: LanguageModel, max_tokens: int, system: str | None, path: Path | None) -> dict:
    """Answer the rows in every language; {language: {"correct": %, "right_language": %, "n": int, ...}}.
    Every reply is written to `path`, one JSON line each."""
    scores, lines = {}, []
    for language in languages:
        replies = answer(model, tokenizer, [row[language]["prompt"] for row in rows], max_tokens, system,
                         f"answer {language}")
        for row, reply in zip(rows, replies):
            expected = row[language]["response"]
            same = sum(normalise(row[other]["response"]) == normalise(expected) for other in languages) > 1
            found, confidence = reply_language(reply, classifier)
            lines.append({
                "row_id": row["row_id"], "language": language, "prompt": row[language]["prompt"],
                "reply": reply, "expected": expected, "correct": normalise(reply) == normalise(expected),
                "reply_language": found, "confidence": round(confidence, 4), "judged": not same})
        scores[language] = score(line for line in lines if line["language"] == language)
    if path is not None:                     # of several processes the first writes
        write_jsonl(path, lines)
    return scores | {"decoding": {"temperature": 0, "max_tokens": max_tokens, "system_prompt": system,
                                  "template": tokenizer.fingerprint[:HASH_DIGITS]}}


def read_answers(path: Path, scores: dict) -> list[dict]:
    """The lines that answer_and_score wrote when it returned `scores`. InputError unless all are there."""
    lines = read_records(path) if path.is_file() else []
    for where, line in lines:
        for key in ANSWER_KEYS:
            need(line, key, where)
    written = sum(part["n"] for part in scores.values() if isinstance(part, dict) and "n_language" in part)
    if len(lines) != written:
        raise InputError(f"{path} holds {len(lines)} answers, {written} were written: delete the "
                             f"result.json beside it, and the same command answers again")
    return [line for _, line in lines]


def score(lines) -> dict:
    """Percentages over replies of one language;
    right_language over those whose response differs between languages."""
    lines = list(lines)
    judged = [line for line in lines if line["judged"]]
    return {"correct": percent(sum(line["correct"] for line in lines), len(lines)),
            "right_language": percent(sum(line["reply_language"] == line["language"] for line in judged),
                                      len(judged)),
            "n": len(lines), "n_language": len(judged),
            "unsure": sum(line["reply_language"] is None for line in judged),
            "mixed": sum(line["reply_language"] == MIXED for line in judged)}


def percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else 0.0
