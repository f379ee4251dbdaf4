"""Evaluation: exact answers, the language of replies, the report of a run, and a prompt to talk to a model.

    python eval.py ask --adapter runs/sw/clo/adapter "Mji mkuu wa Ufaransa ni upi?"
    python eval.py ask --adapter runs/sw/clo/adapter                # a small conversation, one question at a time

A reply is *correct* when, normalised (Unicode NFC, case, spaces, final punctuation), it equals the row's response in the
language of the question. Whether it is in the *right language* is judged by a naive Bayes classifier over character
n-grams, fitted on the run's own parallel rows: it knows no language by name, only the ones it was given. Rows whose
responses are the same in both languages say nothing about language; they are left out of that figure and counted.

References: naive Bayes over n-grams for language identification (Lui and Baldwin 2012, langid.py).
"""

import argparse
import math
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
import model as llama

LONGEST_NGRAM = 4
UNSEEN = 0.3                    # added to every n-gram's count
INDEPENDENCE = 0.3              # neighbouring n-grams overlap: their evidence counts for this part of itself
SURE = 0.8                      # below this posterior probability the classifier abstains
SCRIPTS = {"han": ((0x2E80, 0x2FDF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
           "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)), "kana": ((0x3040, 0x30FF),),
           "latin": ((0x0041, 0x024F), (0x1E00, 0x1EFF)), "cyrillic": ((0x0400, 0x052F),), "greek": ((0x0370, 0x03FF),),
           "arabic": ((0x0600, 0x06FF), (0x0750, 0x077F)), "hebrew": ((0x0590, 0x05FF),),
           "devanagari": ((0x0900, 0x097F),), "bengali": ((0x0980, 0x09FF),), "tamil": ((0x0B80, 0x0BFF),),
           "thai": ((0x0E00, 0x0E7F),), "ethiopic": ((0x1200, 0x137F),)}


# ----------------------------------------------------------------------------------------------------- reply language

@dataclass
class LanguageModel:
    """Per language, per n-gram length: how often each n-gram was seen, and all together."""
    counts: dict[str, list[Counter]]
    totals: dict[str, list[int]]
    vocabulary: list[int]                # distinct n-grams of each length over all languages


def script(char: str) -> str:
    code = ord(char)
    return next((name for name, ranges in SCRIPTS.items() if any(low <= code <= high for low, high in ranges)), "other")


def ngrams(text: str) -> list[list[str]]:
    """Character n-grams by length, inside words padded with spaces; [0] holds each letter's script instead."""
    text = unicodedata.normalize("NFC", text).lower()
    letters = "".join(c if unicodedata.category(c)[0] in "LM" else " " for c in text)
    words = [f" {word} " for word in letters.split()]
    grams = [[script(c) for c in letters if c != " "]]
    return grams + [[word[i:i + n] for word in words for i in range(len(word) - n + 1) if word[i:i + n] != " "]
                    for n in range(1, LONGEST_NGRAM + 1)]


def fit_languages(texts: dict[str, list[str]]) -> LanguageModel:
    """Fit the classifier on texts of each language (a few hundred lines are enough)."""
    counts = {}
    for language, lines in texts.items():
        counts[language] = [Counter() for _ in range(LONGEST_NGRAM + 1)]
        for line in lines:
            for counter, grams in zip(counts[language], ngrams(line)):
                counter.update(grams)
    totals = {language: [counter.total() for counter in counters] for language, counters in counts.items()}
    vocabulary = [len(set().union(*(counters[n] for counters in counts.values()))) for n in range(LONGEST_NGRAM + 1)]
    return LanguageModel(counts, totals, vocabulary)


def reply_language(text: str, languages: LanguageModel) -> tuple[str | None, float]:
    """(language, its posterior probability); None instead of a language when unsure or when there are no letters."""
    grams = ngrams(text)
    if not grams[0]:
        return None, 0.0
    scores = {}
    for language, counters in languages.counts.items():
        scores[language] = INDEPENDENCE * sum(
            math.log((counters[n][gram] + UNSEEN) / (languages.totals[language][n] + UNSEEN * (languages.vocabulary[n] + 1)))
            for n in range(LONGEST_NGRAM + 1) for gram in grams[n])
    best = max(scores, key=scores.get)
    confidence = 1 / sum(math.exp(score - scores[best]) for score in scores.values())
    return (best if confidence >= SURE else None), confidence


def texts_by_language(rows: list[dict], languages: tuple[str, ...]) -> dict[str, list[str]]:
    return {language: [row[language][part] for row in rows for part in ("prompt", "response")] for language in languages}


# ------------------------------------------------------------------------------------------------------------ answers

def normalise(text: str) -> str:
    """NFC, one space between words, no case, no final punctuation."""
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text.rstrip(".!?…。！？ ")


def answer(model, tokenizer, questions: list[str], max_tokens: int, system=None, label="answers") -> list[str]:
    """Greedy replies to questions, in their order."""
    prompts = [tokenizer.prompt_ids(question, system) for question in questions]
    with tqdm(total=len(prompts), desc=label, unit="reply") as bar:
        replies = llama.generate(model, prompts, max_tokens, tokenizer.stop_ids, progress=bar.update)
    return [tokenizer.decode(reply).strip() for reply in replies]


def answer_and_score(model, tokenizer, rows: list[dict], languages: tuple[str, str], classifier: LanguageModel,
                     max_tokens: int, system: str | None, path: Path) -> dict:
    """Answer the rows in both languages; {language: {"correct": %, "right_language": %, "n": int, ...}}. Every reply is
    written to `path`, one JSON line each."""
    source, target = languages
    scores, lines = {}, []
    for language in languages:
        replies = answer(model, tokenizer, [row[language]["prompt"] for row in rows], max_tokens, system, f"answer {language}")
        for row, reply in zip(rows, replies):
            expected = row[language]["response"]
            same = normalise(row[source]["response"]) == normalise(row[target]["response"])
            found, confidence = reply_language(reply, classifier)
            lines.append({"row_id": row["row_id"], "language": language, "prompt": row[language]["prompt"], "reply": reply,
                          "expected": expected, "correct": normalise(reply) == normalise(expected),
                          "reply_language": found, "confidence": round(confidence, 4), "judged": not same})
        scores[language] = score(line for line in lines if line["language"] == language)
    data.write_jsonl(path, lines)
    return scores


def score(lines) -> dict:
    """Percentages over replies of one language; right_language over those whose response differs between languages."""
    lines = list(lines)
    judged = [line for line in lines if line["judged"]]
    return {"correct": percent(sum(line["correct"] for line in lines), len(lines)),
            "right_language": percent(sum(line["reply_language"] == line["language"] for line in judged), len(judged)),
            "n": len(lines), "n_language": len(judged), "unsure": sum(line["reply_language"] is None for line in judged)}


def percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else 0.0


def binomial_error(value: float, n: int) -> float:
    """Standard error, in points, of a percentage over n independent trials; by Wilson's centre, so that it is not 0 at
    0 and 100 % (Wilson 1927)."""
    p = (value / 100 * n + 0.5) / (n + 1)
    return 100 * math.sqrt(p * (1 - p) / n) if n else 0.0


# ------------------------------------------------------------------------------------------------------------- report

def table(header: list[str], lines: list[list[str]]) -> str:
    """A table that reads well in a terminal and is Markdown; the first column is left-aligned."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    rows = [[cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
            for line in [header, rule, *lines]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def report_text(report: dict, answers: dict[str, list[dict]], source: str, examples: int = 2) -> str:
    """report.md: answers, held-out log-probs, and the first few answers of every method side by side."""
    lang, methods = report["lang"], report["methods"]
    lines, heldout = [], []
    for name, scores in methods.items():
        cells = [name]
        for language in (source, lang):
            result = scores[language]
            for key, n in (("correct", result["n"]), ("right_language", result["n_language"])):
                cells.append(f"{result[key]:.1f} ± {binomial_error(result[key], n):.1f}")
        lines.append(cells + [f"{scores['train_seconds']:.0f}"])
        held = scores["heldout"]
        heldout.append([name] + [f"{held[key]:.3f}" if key in held else "-" for key in
                                 ("nll_en", "nll_tgt", "rewards/accuracies_en", "rewards/accuracies_tgt",
                                  "rewards/margins_en", "rewards/margins_tgt")])
    n = next(iter(methods.values()))[lang]
    text = [f"# {lang}: {report['samples']} samples, seed {report['seed']}", "",
            f"Answers to {n['n']} questions in each language, in % ± standard error. Correct: equal to the expected answer; "
            f"in {lang}: written in that language.", "",
            table(["", f"{source} correct", f"in {source}", f"{lang} correct", f"in {lang}", "train s"], lines), ""]
    if n["n_language"] < n["n"]:
        text += [f"{n['n'] - n['n_language']} answers are the same in both languages and left out of the language columns.", ""]
    text += ["Held-out pairs: NLL per token of the right response (lower is better), and how often (accuracy) and by how much "
             "(margin) training moved the right response up against the wrong one.", "",
             table(["", f"nll {source}", f"nll {lang}", f"accuracy {source}", f"accuracy {lang}", f"margin {source}",
                    f"margin {lang}"], heldout), ""]
    for language in (source, lang):
        shown = [line["row_id"] for line in answers["base"] if line["language"] == language][:examples]
        for row_id in shown:
            replies = {name: line for name, lines in answers.items() for line in lines
                       if line["row_id"] == row_id and line["language"] == language}
            text += [f"{replies['base']['prompt']}"]
            text += [f"- {name}: {line['reply']}{'' if line['correct'] else '  (expected: ' + line['expected'] + ')'}"
                     for name, line in replies.items()] + [""]
    return "\n".join(text)


# ---------------------------------------------------------------------------------------------------------------- ask

def ask(args) -> None:
    """Answer one question, or questions typed one at a time until an empty line. Each stands alone."""
    base = args.model
    if base is None and args.adapter:
        base = llama.read_json(Path(args.adapter) / "adapter_config.json").get("base_model_name_or_path")
    base = base or "demo/llama"
    tokenizer = data.load_tokenizer(base)
    model = llama.load(base, args.device, torch.float32, args.adapter)

    def reply(question: str) -> str:
        ids = llama.generate(model, [tokenizer.prompt_ids(question, args.system_prompt)], args.max_tokens, tokenizer.stop_ids,
                             args.temperature, args.top_p, args.seed)[0]
        return tokenizer.decode(ids).strip()
    if args.question:
        print(reply(args.question))
        return
    print(f"{base}{' with ' + args.adapter if args.adapter else ''}. Ask; an empty line ends.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        print(reply(question))


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval.py", description="Look at what a model answers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = commands.add_parser("ask", help="one answer, or a small terminal conversation",
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sub.add_argument("question", nargs="?", help="without it, questions are read from the terminal")
    sub.add_argument("--model", default=None, help="model directory; default: the adapter's base, else demo/llama")
    sub.add_argument("--adapter", default=None, help="PEFT LoRA adapter directory, e.g. runs/sw/clo/adapter")
    sub.add_argument("--system-prompt", default=None, help="put before the question, in the checkpoint's chat template")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; higher is more varied")
    sub.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that hold this probability")
    sub.add_argument("--max-tokens", type=int, default=256, help="longest answer, in tokens")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    sub.set_defaults(run=ask)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    data.run(main)
