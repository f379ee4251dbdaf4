"""In which language is a reply? Naive Bayes over character n-grams, fitted on the run's own rows."""

import math
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

MIXED = "mixed"             # what a reply in two languages is called:
MIXED_SHARE = 0.2           # one with this part of its letters in another language than the rest
SWITCH = 12.0               # nats that a change of language costs: a name or a loan word does not make one
LONGEST_NGRAM = 4
UNSEEN = 0.3                # added to every n-gram's count
INDEPENDENCE = 0.3          # neighbouring n-grams overlap: their evidence counts for this part of itself
SURE = 0.8                  # below this posterior probability the classifier abstains
SCRIPTS = {
    "han": ((0x2E80, 0x2FDF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)), "kana": ((0x3040, 0x30FF),),
    "latin": ((0x0041, 0x024F), (0x1E00, 0x1EFF)), "cyrillic": ((0x0400, 0x052F),),
    "greek": ((0x0370, 0x03FF),), "arabic": ((0x0600, 0x06FF), (0x0750, 0x077F)),
    "hebrew": ((0x0590, 0x05FF),), "devanagari": ((0x0900, 0x097F),), "bengali": ((0x0980, 0x09FF),),
    "tamil": ((0x0B80, 0x0BFF),), "thai": ((0x0E00, 0x0E7F),), "ethiopic": ((0x1200, 0x137F),)}


@dataclass
class LanguageModel:
    """Per language, per n-gram length: how often each n-gram was seen, and the log-probs that follow."""
    counts: dict[str, list[Counter]]
    logp: dict[str, list[dict[str, float]]]
    unseen_logp: dict[str, list[float]]  # of any n-gram the language has not shown


@lru_cache(maxsize=1 << 16)
def script(char: str) -> str:
    code = ord(char)
    return next((name for name, ranges in SCRIPTS.items()
                 if any(low <= code <= high for low, high in ranges)), "other")


def split_words(text: str) -> list[str]:
    """Runs of letters of one script."""
    text = unicodedata.normalize("NFC", text)
    letters = "".join(c if unicodedata.category(c)[0] in "LM" else " " for c in text)
    return [piece for word in letters.split() for piece in pieces_by_script(word)]


def pieces_by_script(word: str) -> list[str]:
    """Cut where the script changes;
    marks and letters of no listed script stay with what stands before them."""
    pieces, before = [""], "other"
    for char in word:
        own = script(char)
        if own != before and own != "other":
            pieces += [""] if before != "other" else []
            before = own
        pieces[-1] += char
    return pieces


def ngrams(word: str) -> list[list[str]]:
    """Character n-grams of a word by length, in lower case, padded with spaces;
    [0] holds each letter's script instead."""
    padded = f" {word.lower()} "
    return [[script(c) for c in word]] + [
        [gram for i in range(len(padded) - n + 1) if (gram := padded[i:i + n]) != " "]
        for n in range(1, LONGEST_NGRAM + 1)]


def fit_languages(texts: dict[str, list[str]]) -> LanguageModel:
    """Fit the classifier on texts of each language (a few hundred lines are enough)."""
    counts = {language: [Counter() for _ in range(LONGEST_NGRAM + 1)] for language in texts}
    for language, lines in texts.items():
        for line in lines:
            for word in split_words(line):
                for counter, grams in zip(counts[language], ngrams(word)):
                    counter.update(grams)
    logp, unseen = {}, {}
    vocabulary = [len(set().union(*(counters[n] for counters in counts.values())))
                  for n in range(LONGEST_NGRAM + 1)]
    for language, counters in counts.items():
        totals = [counter.total() + UNSEEN * (size + 1) for counter, size in zip(counters, vocabulary)]
        logp[language] = [{gram: math.log((count + UNSEEN) / total) for gram, count in counter.items()}
                          for counter, total in zip(counters, totals)]
        unseen[language] = [math.log(UNSEEN / total) for total in totals]
    return LanguageModel(counts, logp, unseen)


def word_evidence(word: str, languages: LanguageModel) -> list[float]:
    """Log-likelihood of a word under each language, in nats, overlap discounted."""
    grams = ngrams(word)
    return [INDEPENDENCE * sum(known.get(gram, unseen) for known, unseen, part in
                               zip(languages.logp[language], languages.unseen_logp[language], grams)
                               for gram in part) for language in languages.logp]


def reply_language(text: str, languages: LanguageModel) -> tuple[str | None, float]:
    """(language, its posterior probability); "mixed" for a reply in two languages, with the share of its
    letters that are not of the first; None when unsure or without letters."""
    words = split_words(text)
    if not words:
        return None, 0.0
    evidence, names = [word_evidence(word, languages) for word in words], list(languages.logp)
    share = foreign_share(words, evidence)
    if share >= MIXED_SHARE:
        return MIXED, share
    scores = [sum(column) for column in zip(*evidence)]
    best = max(range(len(names)), key=scores.__getitem__)
    confidence = 1 / sum(math.exp(score - scores[best]) for score in scores)
    return (names[best] if confidence >= SURE else None), confidence


def foreign_share(words: list[str], evidence: list[list[float]]) -> float:
    """Share of the text (in bytes of letters) outside its main language, along the likeliest path of
    languages over the words; a change of language costs SWITCH nats (Viterbi 1967). Words with a capital,
    names most of them, belong to no language."""
    kept = [i for i, word in enumerate(words) if not word[0].isupper()]
    if not kept:
        return 0.0
    words, evidence = [words[i] for i in kept], [evidence[i] for i in kept]
    best, steps = evidence[0], []
    for row in evidence[1:]:
        top = max(range(len(best)), key=best.__getitem__)
        steps.append([state if best[state] >= best[top] - SWITCH else top for state in range(len(row))])
        best = [max(stay, best[top] - SWITCH) + own for stay, own in zip(best, row)]
    state, letters = max(range(len(best)), key=best.__getitem__), Counter()
    for word, step in zip(reversed(words), [*reversed(steps), None]):
        letters[state] += len(word.encode())      # bytes: a Chinese character says as much as three letters
        state = step[state] if step else state
    return 1 - max(letters.values()) / letters.total()


def texts_by_language(rows: list[dict], languages: tuple[str, ...]) -> dict[str, list[str]]:
    return {language: [row[language][part] for row in rows for part in ("prompt", "response")]
            for language in languages}
