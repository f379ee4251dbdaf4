"""In which language is a reply, if in any of ours? A letter model of each, fitted on the run's own rows.

    languages = fit_languages({"en": ["The lion eats meat.", ...], "sw": ["Simba anakula nyama.", ...]})
    reply_language("Simba anakula nyama.", languages)                       # ("sw", 0.999)

A word's *gain* under a language is how much better the language explains it than its script does, in nats:

    gain = sum of log P(script) + log((1 - BLEND) P(letter | letters before) / Q(letter | script) + BLEND) # 1

over its letters and its end. Q, the background, is how often a letter stands in any text: what a text in any
language of that script may look like. A text is in the language of the largest gain if

    gain >= floor * letters - TOLERANCE                                                                    # 2

and else in none of them: OTHER. Words are weighted by the root of how often they are said, since one word
over and over tells little. Names (words with a capital) do not count.

It knows the run's languages and no other: a text in a close relative of one (Spanish where Portuguese is
learned, Malay for Indonesian, traditional characters for simplified ones) is mostly taken for that one.

P and Q are smoothed as by Witten and Bell (1991); the path behind MIXED is Viterbi's (1967).
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache

from formats.languages import letter_script
from formats.markup import prose

# A run of ASCII characters that holds one of these is no word: a path, an assignment, a call, a hashtag.
ASCII = re.compile("[!-~]+")
CODE = re.compile(r"[/\\={}@#]|[A-Za-z\d](?:[_.][A-Za-z]|\()")

OTHER = "other"             # what a reply in none of the languages is called
MIXED = "mixed"             # what a reply in two languages is called
MIXED_SHARE = 0.2           # least part of its letters that is in another language than the rest
SWITCH = 12.0               # nats that a change of language costs: a loan word does not make one
CONTEXT = 4                 # letters that the next one is predicted from
NEW = 1e-3                  # P of a letter that was never seen; Q of one: 1 / (letters seen of its script)
BLEND = 0.02                # bounds what one letter can say against a language
# The floor of eq. 2 is FLOOR. A language whose own lines, held out, gain less has a lower one: MARGIN below
# all of them but the worst, a share of REFUSED, which are mostly code, lists and names.
FLOOR = 0.43                # nats a letter
MARGIN = 0.2                # nats a letter
REFUSED = 0.015
TOLERANCE = 5.0             # nats: few letters say little
ENOUGH = 200_000            # characters of a language that are read; more make it slower, hardly better
FOLDS = 4                   # parts of the texts that are held out in turn
SURE = 0.8                  # below this posterior probability the classifier abstains


Gains = dict[str, float]                        # of a text under each language, in nats
Letters = dict[str, tuple[Counter, float]]      # {context: (how often each letter was seen after it, any)}


@dataclass(eq=False)
class LanguageModel:
    """letters: of each language, after the letters before; " " ends a word. background: of all texts, after
    their script."""
    letters: dict[str, Letters]
    background: Letters
    floors: dict[str, float]


# ---- text -> words ----

def split_words(text: str) -> list[str]:
    """Runs of letters of one script, of what is prose in the text. Marks and modifiers have no script."""
    text = prose(text)
    text = ASCII.sub(lambda run: " " if CODE.search(run[0]) else run[0], text)
    pieces, before = [""], None
    for char in unicodedata.normalize("NFC", text):
        kind = unicodedata.category(char)
        if kind[0] not in "LM":
            pieces.append("")
            before = None
            continue
        script = letter_script(char) if kind[0] == "L" and kind != "Lm" else before
        if before and script != before:
            pieces.append("")
        pieces[-1] += char
        before = script
    return [piece for piece in pieces if piece]


def letters(text: str) -> int:
    """How many letters of a text the classifier reads."""
    read = "".join(split_words(text))
    return sum(unicodedata.category(char)[0] == "L" for char in read)


def without_names(words: list[str]) -> list[str]:
    """Words without a capital, unless there is nothing else."""
    return [word for word in words if not word[0].isupper()] or words


# ---- words -> models ----

def steps(word: str):
    """(letter, its contexts, the shortest first) of a word and its end."""
    padded = f" {word} "
    for i in range(1, len(padded)):
        longest = min(CONTEXT, i)
        yield padded[i], [padded[i - size:i] for size in range(longest + 1)]


def steps_and_scripts(word: str):
    """Each letter's script too, as if it were a letter."""
    yield from steps(word)
    yield from [(letter_script(word[0]), ["script"])] * len(word)


def steps_in_script(word: str):
    for letter in word + " ":
        yield letter, [letter_script(word[0])]


def count_letters(words: Counter, walk) -> Letters:
    """words: {word: how often it is said}."""
    counts = defaultdict(Counter)
    for word, often in words.items():
        for letter, contexts in walk(word):
            for context in contexts:
                counts[context][letter] += math.sqrt(often)
    return {context: (seen, seen.total()) for context, seen in counts.items()}


def fit_words(lines: dict[str, list[list[str]]]) -> LanguageModel:
    """lines: the words of each line of each language."""
    words = {}
    for language, part in lines.items():
        words[language] = Counter(word.lower() for line in part for word in line)
    models = {language: count_letters(part, steps_and_scripts) for language, part in words.items()}
    everything = sum(words.values(), Counter())
    background = count_letters(everything, steps_in_script)
    return LanguageModel(models, background, dict.fromkeys(words, FLOOR))


def fit_languages(texts: dict[str, list[str]]) -> LanguageModel:
    """Fit the classifier on texts of each language (a few hundred lines are enough)."""
    lines, folds = {}, {}
    for language, part in texts.items():
        own = [words for words in map(split_words, enough(part)) if words]
        lines[language] = own
        # neighbours stay together: a prompt and its response are much alike
        cuts = [fold * len(own) // FOLDS for fold in range(FOLDS + 1)]
        folds[language] = [own[start:end] for start, end in zip(cuts, cuts[1:])]
    languages, brought = fit_words(lines), defaultdict(list)
    for fold in range(FOLDS):
        rest = {}
        for language, parts in folds.items():
            rest[language] = sum(parts[:fold] + parts[fold + 1:], [])
        others = fit_words(rest)
        for language, parts in folds.items():
            for line in parts[fold]:
                found, size = total_gains(without_names(line), others)
                brought[language].append((found[language] + TOLERANCE) / size)
    for language, own in brought.items():
        own = sorted(own)[int(REFUSED * len(own)) + 1:]        # one line at least may be in any language
        if own:
            languages.floors[language] = min(FLOOR, own[0] - MARGIN)
    return languages


def enough(texts: list[str]) -> list[str]:
    """Every text, or every third, fifth, ...: both of prompts and of responses, which take turns."""
    size = sum(map(len, texts))
    return texts[::2 * (size // (2 * ENOUGH)) + 1]


# ---- evidence ----

def probability(model: Letters, letter: str, contexts: list[str], new: float) -> float:
    """Each context corrects what the shorter one says, the more the oftener it was seen."""
    found = new
    for context in contexts:
        if context in model:
            seen, total = model[context]
            kinds = len(seen)
            found = (seen.get(letter, 0) + kinds * found) / (total + kinds)
    return found


@lru_cache(maxsize=1 << 16)
def gains(word: str, languages: LanguageModel) -> Gains:
    """Eq. 1 under each language."""
    script, path = letter_script(word[0]), list(steps(word))
    background = languages.background
    new = 1 / len(background[script][0]) if script in background else 1
    usual = [probability(background, letter, [script], new) for letter, _ in path]
    found = {}
    for language, model in languages.letters.items():
        of_script = probability(model, script, ["script"], NEW)
        gain = len(word) * math.log(of_script)
        for (letter, contexts), q in zip(path, usual):
            p = probability(model, letter, contexts, NEW)
            gain += math.log((1 - BLEND) * (p / q) + BLEND)
        found[language] = gain
    return found


def total_gains(words: list[str], languages: LanguageModel) -> tuple[Gains, float]:
    """(gain of a text under each language, its letters and word ends)."""
    found, size = dict.fromkeys(languages.letters, 0.0), 0.0
    for word, often in Counter(map(str.lower, words)).items():
        weight = math.sqrt(often)
        size += weight * (len(word) + 1)
        for language, gain in gains(word, languages).items():
            found[language] += weight * gain
    return found, size


# ---- verdict ----

def lacking(words: list[str], language: str, languages: LanguageModel) -> float:
    """Nats that words lack for being in the language (eq. 2); negative if they are."""
    found, size = total_gains(words, languages)
    return languages.floors[language] * size - TOLERANCE - found[language]


def reply_language(text: str, languages: LanguageModel) -> tuple[str | None, float]:
    """(language, its posterior probability); OTHER for a text in none of the languages; MIXED for one in two,
    with the share of its letters that are not of the first; None when unsure or without letters."""
    words = without_names(split_words(text))
    if not words:
        return None, 0.0
    path = likeliest_path([gains(word.lower(), languages) for word in words])
    share, most = foreign_share(words, path)
    if share >= MIXED_SHARE:
        part = [word for word, language in zip(words, path) if language == most]
        if lacking(part, most, languages) <= 0:
            return MIXED, share
    found, _ = total_gains(words, languages)
    best = max(found, key=found.get)
    missing = lacking(words, best, languages)
    if missing > 0:
        return OTHER, 1 / (1 + math.exp(-missing))
    odds = [math.exp(gain - found[best]) for gain in found.values()]
    confidence = 1 / sum(odds)
    return (best if confidence >= SURE else None), confidence


def likeliest_path(evidence: list[Gains]) -> list[str]:
    """The language of each word: a change costs SWITCH nats. evidence: gain of each word by language."""
    best, origins = dict(evidence[0]), []
    for row in evidence[1:]:
        top = max(best, key=best.get)
        entry = best[top] - SWITCH                      # worth of coming from the best other language
        origins.append({
            language: language if best[language] >= entry else top
            for language in row})
        for language, gain in row.items():
            best[language] = max(best[language], entry) + gain
    path = [max(best, key=best.get)]
    for origin in reversed(origins):
        path.append(origin[path[-1]])
    return path[::-1]


def foreign_share(words: list[str], path: list[str]) -> tuple[float, str]:
    """(share of the text that is not in its main language, that language), in bytes of letters: a Chinese
    character says as much as three letters."""
    sizes = Counter()
    for word, language in zip(words, path):
        sizes[language] += len(word.encode())
    (most, size), = sizes.most_common(1)
    return 1 - size / sizes.total(), most


def texts_by_language(rows: list[dict], languages: tuple[str, ...]) -> dict[str, list[str]]:
    texts = {language: [] for language in languages}
    for row in rows:
        for language in languages:
            texts[language] += [row[language]["prompt"], row[language]["response"]]
    return texts
