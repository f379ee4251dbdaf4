"""formats/languages.py: spellings that meet, scripts, comma lists, and what reads them."""

import json
import unicodedata

import pytest

import translate
from engine.files import InputError
from evals.choice import mmmlu_code
from formats.languages import (M2M100_LANGUAGES, SCRIPTS, language_list, letter_script, nllb_code, normal,
                               script_of, spellings, split_commas, suggestion)
from formats.markup import prose
from formats.records import languages_of, read_rows, require_languages
from m2m100.tokenizer import load_tokenizer
from translate import odd_length, wrong_script

SIDE = {"prompt": "q", "response": "r"}


@pytest.mark.parametrize("code, texts", [
    ("zh", "zh ZH zh-CN zh_CN zho zho_Hans zh-Hans zh-Hans-CN cmn chi chinese zho-CN"),
    ("zh_Hant", "zh_Hant zh-TW zh_HK zho_Hant zh-Hant-HK zho-TW traditional_chinese"),
    ("sw", "sw SW swa swh swh_Latn sw-KE sw_KE Swahili swahili kiswahili"), ("pt", "pt pt-BR pt-PT por_Latn PT_br"),
    ("id", "id in ind ind_Latn in-ID Indonesian"), ("he", "he iw heb_Hebr"), ("yi", "yi ji ydd_Hebr"),
    ("no", "no nb nob_Latn nb-NO"), ("nn", "nn nno_Latn"), ("sr", "sr srp_Cyrl sr-Cyrl sr-Cyrl-RS srp"),
    ("sr_Latn", "sr_Latn sr-Latn srp-Latn sr-Latn-RS"), ("en", "en en-US en_XX eng English en_GB"),
    ("es", "es es-419 es_XX spa-Latn"), ("nso", "ns nso nso_Latn"), ("uz_Cyrl", "uz_Cyrl uz-Cyrl"),
    ("sat", "sat sat_Olck sat_Beng"), ("yue", "yue yue_Hant yue-HK cantonese")])
def test_the_spellings_of_a_language_meet(code, texts):
    assert {text: normal(text) for text in texts.split()} == dict.fromkeys(texts.split(), code)
    assert normal("Chinese (Simplified)") == "zh"


@pytest.mark.parametrize("code", ["xx", "xx-Foo", "en_gpt4", "base", "Python", "my model", "", "-", "tlh", "sw,yo"])
def test_what_is_no_known_language_stays_as_it_is_and_has_no_script(code):
    assert normal(code) == code and script_of(code) is None
    assert not wrong_script("какой-то длинный текст без единой латинской буквы", code)
    assert not odd_length("a text of some length, long enough to be judged", "x", ("en", code))


def test_no_spelling_has_two_languages_and_normal_codes_are_their_own():
    known, nllb = spellings()
    assert len(set(nllb.values())) == len(nllb) and {normal(code) for code in nllb} == {*nllb}
    assert all(normal(spelling) == code for spelling, code in known.items())


def test_every_code_of_nllb_is_known_with_the_script_of_its_tag():
    theirs = pytest.importorskip("transformers.models.nllb.tokenization_nllb").FAIRSEQ_LANGUAGE_CODES
    assert len({normal(code) for code in theirs}) == len(theirs)
    for code in theirs:
        tag = "Olck" if code == "sat_Beng" else code[-4:]           # what NLLB calls Bengali is Ol Chiki
        assert script_of(code) == script_of(normal(code)) == SCRIPTS[tag]
        assert nllb_code(code) == nllb_code(normal(code))


def test_every_code_of_m2m100_is_known_and_they_differ():
    assert len({normal(code) for code in M2M100_LANGUAGES}) == len(M2M100_LANGUAGES) == 100
    assert all(script_of(code) in SCRIPTS.values() for code in M2M100_LANGUAGES)


@pytest.mark.parametrize("code, text", [
    ("te", "నది పొడవుగా ఉంది"), ("tel_Telu", "నది పొడవుగా ఉంది"), ("bo", "གཙང་པོ་རིང་པོ་ཡིན།"), ("ka", "მდინარე გრძელია"),
    ("hy", "գետը երկար է"), ("am", "ወንዙ ረጅም ነው"), ("ja", "川は長いです、とても"), ("zh-TW", "這條河很長很長很長"), ("sr", "река је дуга"),
    ("sr_Latn", "reka je duga i široka"), ("ug", "دەريا ئۇزۇن"), ("km", "ទន្លេវែងណាស់"), ("shn", "ၼမ်ႉယၢဝ်းၼႃႇ"),
    ("sat_Beng", "ᱜᱟᱰᱟ ᱫᱚ ᱡᱤᱞᱤᱧ ᱜᱮᱭᱟ"), ("tzm", "ⴰⵙⵉⴼ ⵉⵖⵣⵣⵉⴼ ⴰⵟⵟⴰⵙ"), ("mai", "नदी नमहर अछि"), ("yi", "דער טײַך איז לאַנג")])
def test_a_text_in_its_languages_script_is_right_and_english_is_wrong(code, text):
    assert not wrong_script(text, code)
    assert wrong_script("the river is long and wide", code) == (script_of(code) != "LATIN")


@pytest.mark.parametrize("text, wrong", [
    ("海狸的学名是 Castor canadensis。", False), ("用 `print(\"hello world, this is code\")` 输出。", False),
    ("参见 https://www.example.org/a/very/long/address/of/a/page", False), ("公式为 $\\frac{alpha}{beta}$。", False),
    ("他用 Microsoft Windows 和 NASA 的软件。", False), ("```python\nimport this\nprint(this.everything)\n```\n输出", False),
    ("The river is long and wide.", True), ("a 河 is a long body of running water", True),
    ("Река длинная и широкая.", True), ("THE CAPITAL OF FRANCE REMAINS UNKNOWN", True)])
def test_code_links_formulas_and_names_are_not_the_wrong_script(text, wrong):
    assert wrong_script(text, "zh") == wrong


def test_a_letters_script_is_that_of_its_unicode_name_in_any_width():
    assert [letter_script(char) for char in "aＡжあアｱー漢々한አ"] == [
        "LATIN", "LATIN", "CYRILLIC", *["KANA"] * 4, "CJK", "CJK", "HANGUL", "ETHIOPIC"]
    assert unicodedata.name("ᱜ").split()[0] == letter_script("ᱜ") == "OL"


@pytest.mark.parametrize("code, there, said", [
    ("swahilli", ["en", "sw"], " (did you mean sw?)"), ("norvegian", ["no", "de"], " (did you mean no?)"),
    ("xx-foo", ["xx-Foo"], " (did you mean xx-Foo?)"), ("zh_Hant", ["en", "zh"], " (did you mean zh?)"),
    ("qqq", ["en", "sw"], "")])
def test_the_nearest_known_code_is_suggested(code, there, said):
    assert suggestion(code, there) == said


def test_comma_lists_take_spaces_and_a_comma_at_the_end():
    assert split_commas(" a b, c ,,d, ") == ["a b", "c", "d"] and split_commas("") == []
    assert language_list("sw, yor_Latn,") == ["sw", "yo"]
    for text in ("", " , "):
        with pytest.raises(InputError, match="a language was expected"):
            language_list(text)


# ---- what reads codes ----

def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("key, asked", [("zh-CN", "zh"), ("zho_Hans", "zh"), ("zh", "zh_CN"), ("swh_Latn", "sw"),
                                        ("SW", "Swahili"), ("xx-Foo", "xx-Foo"), ("in", "id"), ("ind", "id")])
def test_the_human_side_of_a_row_is_found_under_any_spelling(tmp_path, key, asked):
    path = write(tmp_path / "f", {"id": "a", "en": SIDE, key: SIDE}, {"id": "b", "en-US": SIDE, key: None})
    rows = read_rows(path, targets=[asked])
    assert [row["row_id"] for row in rows] == ["a", "b"]
    assert languages_of(rows[0]) == ["en", asked] and languages_of(rows[1]) == ["en"]


def test_traditional_is_not_simplified(tmp_path):
    row, = read_rows(write(tmp_path / "f", {"zh-TW": SIDE, "zh-CN": SIDE}), targets=["zh"])
    assert languages_of(row) == ["zh-TW", "zh"]


def test_two_keys_that_are_one_language_are_refused_with_their_line(tmp_path):
    path = write(tmp_path / "f", {"en": SIDE, "sw": SIDE}, {"en": SIDE, "sw": SIDE, "swh_Latn": SIDE})
    with pytest.raises(InputError, match="f:2: 'sw' and 'swh_Latn' are the same language: leave one"):
        read_rows(path)


def test_keys_that_are_no_languages_stay(tmp_path):
    record = {"en": SIDE, "in": "some input", "no": 5, "is": None}
    row, = read_rows(write(tmp_path / "f", record), targets=["id"])
    assert (row["in"], row["no"]) == ("some input", 5)


def test_a_language_nobody_holds_comes_with_the_nearest():
    with pytest.raises(InputError, match=r"no row holds swahilli \(did you mean sw\?\); languages in the data: en, sw"):
        require_languages([{"row_id": "1", "en": SIDE, "sw": SIDE}], "swahilli")


def test_names_are_known_with_and_without_accents():
    assert normal("Norwegian Bokmål") == normal("norwegian bokmal") == normal("nb")
    assert normal("Serbian (Latin)") == "sr_Latn"


def test_the_demos_translator_knows_any_spelling():
    languages = load_tokenizer(translate.Path("demo/m2m100")).languages
    assert languages[normal("swh_Latn")] == languages["sw"] and languages[normal("ns")] == languages["nso"]


@pytest.mark.parametrize("text, code", [("sw", "SW-KE"), ("swh_Latn", "SW-KE"), ("SW_KE", "SW-KE"), ("pt", "PT-BR"),
                                        ("zh", "ZH-CN"), ("arabic", "AR-XY")])
def test_benchmarks_take_any_spelling(text, code):
    assert mmmlu_code(text) == code


def test_a_language_that_a_benchmark_lacks_is_told_with_the_nearest():
    with pytest.raises(InputError, match=r"--lang zh_TW: MMMLU has AR-XY, .* \(did you mean zh\?\)"):
        mmmlu_code("zh_TW")


@pytest.mark.slow
def test_of_real_translations_few_are_in_the_wrong_script_and_english_still_is(shared, capsys):
    rows = read_rows(shared / "pairs" / "alpaca_en_zh.jsonl")
    rows = [row for row in rows if row["en"]["response"] != row["zh"]["response"]]
    human = sum(wrong_script(row["zh"]["response"], "zh") for row in rows) / len(rows)
    english = [row["en"]["response"] for row in rows if len(prose(row["en"]["response"]).split()) > 7]
    left = sum(wrong_script(text, "zh") for text in english) / len(english)
    with capsys.disabled():
        print(f"\nwrong script: {100 * human:.2f} % of people's translations, "
              f"{100 * left:.2f} % of English replies of eight words or more, code not counted")
    assert human <= 0.005 and left >= 0.97
