"""What shows that a translation cannot be trusted, to one who does not know the language: it `loops`, is in
the `wrong_script`, is `copied`, has an `odd_length`.
"""

import re

from formats.languages import letter_script, normal, script_of
from formats.markup import prose

# Characters that a text has in a script or a language, for each one that it has in English.
LENGTH_RATIO = {"CJK": 0.35, "KANA": 0.45, "HANGUL": 0.55, "yo": 1.5, "en": 1.0}
OTHER_RATIO = 1.15                                      # in any other
LETTER_WEIGHT = {"CJK": 3, "KANA": 2, "HANGUL": 2}      # Latin letters that say as much as one of these
LONGEST_ACRONYM = 5
LONGEST_KANJI = 20                                      # letters of Japanese without kana: a name
WORDS = re.compile(r"[^\W\d_]+")
LONG_WORDS = re.compile(r"[^\W\d_]{3,}")
LENGTH_BOUNDS = 0.4, 2.5  # of a translation over what is expected; people's go from 0.55 to 2.05 (NTREX)
LENGTH_SLACK = 15         # characters added to both, so that short segments are not judged by their length


def loops(ids: list[int]) -> bool:
    """Whether a stretch repeats itself: tokens equal to those n before, 2n of them in a row, at least 8."""
    for n in range(1, len(ids) // 3 + 1):
        run = 0
        for a, b in zip(ids, ids[n:]):
            run = run + 1 if a == b else 0
            if run >= max(8, 2 * n):
                return True
    return False


def is_name(word: str) -> bool:
    """Whether a word may be a name or an acronym: it has a capital, and is not shouted."""
    return word[0].isupper() and (len(word) <= LONGEST_ACRONYM or not word.isupper())


def wrong_script(text: str, language: str) -> bool:
    """Whether less than three tenths of the text are in the language's script; False where that is not known.
    Code does not count, nor do names in another script."""
    script = script_of(language)
    if script is None:
        return False
    words = WORDS.findall(prose(text))
    if script == "KANA" and without_kana("".join(words)):
        return True
    own = ("KANA", "CJK") if script == "KANA" else (script,)
    right = wrong = 0
    for word in words:
        inside = sum(letter_script(char) in own for char in word)
        right += LETTER_WEIGHT.get(script, 1) * inside
        wrong += 0 if is_name(word) else len(word) - inside
    letters = sum(map(len, words))
    enough = wrong > 8 or wrong > 3 and not right and letters > 8
    return enough and right < 0.3 * (right + wrong)


def without_kana(letters: str) -> bool:
    """Whether a text is too long for Japanese without any kana: it is Chinese."""
    return len(letters) > LONGEST_KANJI and all(letter_script(char) == "CJK" for char in letters)


def copied(source: str, text: str, language: str) -> bool:
    """Whether four in five of the source's words, names left out, came back as they were, or all of a text
    without names. Of a source in another script than Latin, Latin words are quotations."""
    same = source.strip() == text.strip()
    long_words = LONG_WORDS.findall(source)
    latin = script_of(language) in ("LATIN", None)
    words = [word for word in long_words if word.islower() and (latin or letter_script(word[0]) != "LATIN")]
    back = set(LONG_WORDS.findall(text))
    again = [word for word in words if word in back]
    shouted = source.isupper() and len(long_words) > 3
    caseless = source.upper() == source.lower() and len("".join(WORDS.findall(source))) > 3
    return len(words) > 3 and len(again) >= 0.8 * len(words) or same and (shouted or caseless)


def expansion(language: str) -> float | None:
    """The length of a text in a language over its length in English; None if the script is unknown."""
    script = script_of(language)
    usual = LENGTH_RATIO.get(script, OTHER_RATIO)
    return None if script is None else LENGTH_RATIO.get(normal(language), usual)


def odd_length(source: str, text: str, languages: tuple[str, str]) -> bool:
    """Whether a translation is far shorter or longer than its language would have it; False for a
    language of unknown script."""
    own, other = map(expansion, languages)
    if own is None or other is None:
        return False
    expected = len(source) * other / own
    ratio = (len(text) + LENGTH_SLACK) / (expected + LENGTH_SLACK)
    return not LENGTH_BOUNDS[0] <= ratio <= LENGTH_BOUNDS[1]
