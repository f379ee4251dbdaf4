"""One table of languages: how each is spelt in codes and in English, and the script it is written in.

    normal("zh-CN") == normal("zho_Hans") == normal("cmn") == normal("Chinese") == "zh"
    normal("zh-TW") == "zh_Hant";  normal("sr-Latn") == "sr_Latn";  normal("pt-BR") == "pt"
    script_of("te") == "TELUGU";  script_of("zho_Hant") == "CJK";  script_of("xx") is None

A *normal code* is ISO 639-1's or, where that has none, ISO 639-3's; a script that is not the language's
usual one follows: a text in traditional characters is no answer to a simplified question. Regions are dropped
(pt-BR and pt-PT are one language here), but for those that mean a script: zh-TW, zh-HK and zh-MO. What the
table lacks stays as it is: data may hold any key, and the script of an unknown language is unknown.

Sources: FLORES-200 and NLLB (Costa-jussa et al. 2022), ISO 639, IETF BCP 47, M2M100 (Fan et al. 2021).
"""

import difflib
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from engine.files import InputError

# A line for each language and script: normal code, NLLB's and FLORES's code, other codes, names with a
# capital. NLLB lacks br and fy, whose second codes are made like its own, and calls Santali in Ol Chiki
# sat_Beng.
TABLE = Path(__file__).with_name("languages.txt")

# M2M100's languages in the order of their ids, which start where vocab.json ends. Its ns is ISO's nso.
M2M100_LANGUAGES = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi "
    "hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc "
    "or pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
).split()

# ISO 15924's script tag -> first word of the Unicode names of its letters.
SCRIPTS = dict(pair.split(":") for pair in (
    "Arab:ARABIC Armn:ARMENIAN Beng:BENGALI Cyrl:CYRILLIC Deva:DEVANAGARI Ethi:ETHIOPIC Geor:GEORGIAN "
    "Grek:GREEK Gujr:GUJARATI Guru:GURMUKHI Hang:HANGUL Hans:CJK Hant:CJK Hebr:HEBREW Jpan:KANA Khmr:KHMER "
    "Knda:KANNADA Laoo:LAO Latn:LATIN Mlym:MALAYALAM Mymr:MYANMAR Olck:OL Orya:ORIYA Sinh:SINHALA "
    "Taml:TAMIL Telu:TELUGU Tfng:TIFINAGH Thai:THAI Tibt:TIBETAN").split())
# First words that mean another one's script; Japanese is written in KANA and CJK.
SAME_SCRIPT = {"HIRAGANA": "KANA", "KATAKANA": "KANA", "KATAKANA-HIRAGANA": "KANA", "IDEOGRAPHIC": "CJK",
               "KANGXI": "CJK"}
UNSPACED = ("CJK", "KANA", "THAI", "LAO", "KHMER", "MYANMAR")  # scripts without spaces between words
DENSE = ("CJK", "KANA")                                        # and without any between sentences
TRADITIONAL = ("TW", "HK", "MO")                               # regions whose Chinese is zh_Hant


def fold(spelling: str) -> str:
    """Small letters without accents, one "_" for everything between them: "Chinese (Simplified)" ->
    "chinese_simplified", "Bokmål" -> "bokmal"."""
    bare = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", spelling.casefold()))
    return "_".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFC", bare)))


@lru_cache(maxsize=1)
def spellings() -> tuple[dict[str, str], dict[str, str]]:
    """({folded spelling: normal code}, {normal code: NLLB's code})."""
    known, nllb = {}, {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        code, flores, *others = line.split()
        nllb[code] = flores
        for spelling in (code, flores, *others):
            assert known.setdefault(fold(spelling), code) == code, f"{spelling} has two languages"
    return known, nllb


@lru_cache(maxsize=1 << 12)
def normal(code: str) -> str:
    """The normal code of a language's code or English name, in any case, with "-" or "_", with or without
    script and region. What is no known language stays as it is."""
    known, nllb = spellings()
    folded = fold(code)
    if folded in known:
        return known[folded]
    language, *rest = folded.split("_")
    script = rest.pop(0).title() if rest and rest[0].title() in SCRIPTS else ""
    region = rest.pop(0).upper() if rest and re.fullmatch(r"[a-z]{2}|\d{3}", rest[0]) else ""
    if rest or language not in known or "," in code:
        return code
    own = known[language]
    if own == "zh" and not script and region in TRADITIONAL:
        script = "Hant"
    usual = nllb[own].endswith(script)
    return own if usual else known.get(fold(f"{own}_{script}"), f"{own}_{script}")


def nllb_code(code: str) -> str:
    """NLLB's and FLORES's code of a language; an unknown one stays as it is."""
    return spellings()[1].get(normal(code), code)


def suggestion(code: str, there) -> str:
    """Of the languages `there`, the one that `code` may have meant: " (did you mean sw?)", or nothing."""
    names = {fold(name): name for name in there}
    names |= {spelling: names[own] for spelling, own in spellings()[0].items() if own in names}
    near = difflib.get_close_matches(fold(normal(code)), names, 1)
    return f" (did you mean {names[near[0]]}?)" if near else ""


def split_commas(text: str) -> list[str]:
    """The parts of "sw, yo," without the spaces around them and without empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


def language_list(text: str) -> list[str]:
    """The normal codes that a flag names, joined by commas. InputError where there is none."""
    codes = [normal(code) for code in split_commas(text)]
    if not codes:
        raise InputError(f"--lang {text!r}: a language was expected, or several joined by commas: sw,yo")
    return codes


def script_of(language: str) -> str | None:
    """The script of a language, named as `letter_script` does; None where it is not known."""
    return SCRIPTS.get(nllb_code(language)[-4:])


@lru_cache(maxsize=1 << 16)
def letter_script(char: str) -> str:
    """The first word of a letter's Unicode name, full and half width alike: LATIN, CJK, KANA, ..."""
    word = unicodedata.name(unicodedata.normalize("NFKC", char)[0], "?").split()[0]
    return SAME_SCRIPT.get(word, word)
