"""evals/language.py: the language of a reply, of those the classifier was fitted on, of two, or of none."""

import itertools
import json
import math
from collections import Counter

import pytest

from evals import language
from evals.language import (BLEND, MIXED, NEW, OTHER, SWITCH, fit_languages, foreign_share, gains, letters,
                            likeliest_path, reply_language, split_words, texts_by_language)
from formats.records import read_rows

CODES = ("de", "en", "id", "ko", "sw", "yo", "zh")
SHORT = 20                                # letters; shorter replies are reported apart
TEXTS = {"en": ["The lion eats meat.", "What is the capital of France?", "The river is long."],
         "sw": ["Simba anakula nyama.", "Mji mkuu wa Ufaransa ni upi?", "Mto ni mrefu."],
         "ko": ["사자는 고기를 먹어요.", "프랑스의 수도는 어디예요?", "강은 길어요."]}
ENGLISH = """the old man walked slowly down to the river every morning before the sun came up
there was nothing in the house but a table, two chairs and a small iron stove
she told the children that the story had happened a long time ago in another country
we should have left earlier because the road is always full of people at this hour
if you want to learn how to cook this dish you will need some patience and fresh fish
they were surprised to see how quickly the weather had changed during the night
nobody knows why the birds fly away in autumn and how they find their way back
he put the letter on the desk, closed the window and went out without a word
the teacher asked which of these numbers is greater than the sum of the others
most of the water that we drink comes from the mountains in the north of the country
it is not easy to say what makes a good friend, but everybody knows one when they meet
the shop sells bread, milk, apples and sometimes flowers when the season is right""".splitlines()
SWAHILI = """mzee alitembea polepole hadi mtoni kila asubuhi kabla ya jua kuchomoza
hapakuwa na kitu chochote ndani ya nyumba isipokuwa meza na viti viwili
aliwaambia watoto kwamba hadithi hiyo ilitokea zamani sana katika nchi nyingine
tulipaswa kuondoka mapema kwa sababu barabara hujaa watu wakati huu
kama unataka kujifunza kupika chakula hiki utahitaji uvumilivu na samaki wabichi
walishangaa kuona jinsi hali ya hewa ilivyobadilika haraka wakati wa usiku
hakuna anayejua kwa nini ndege huruka mbali na jinsi wanavyopata njia ya kurudi
aliweka barua juu ya meza, akafunga dirisha na kutoka nje bila kusema neno
mwalimu aliuliza ni ipi kati ya namba hizi ni kubwa kuliko jumla ya nyingine
maji mengi tunayokunywa hutoka kwenye milima iliyo kaskazini mwa nchi
si rahisi kusema nini humfanya mtu kuwa rafiki mzuri lakini kila mtu anamjua
duka linauza mikate, maziwa, matunda na wakati mwingine maua msimu ukifika""".splitlines()
NEITHER = {
    "fr": "le vieil homme descendait lentement vers la rivière chaque matin avant que le soleil ne se lève",
    "de": "niemand weiß, warum die vögel im herbst wegfliegen und wie sie ihren weg zurück finden",
    "fi": "vanha mies käveli hitaasti joelle joka aamu ennen kuin aurinko nousi metsän takaa",
    "tr": "yaşlı adam her sabah güneş doğmadan önce yavaş yavaş nehre doğru yürürdü",
    "vi": "ông lão chậm rãi đi bộ xuống bờ sông mỗi buổi sáng trước khi mặt trời mọc",
    "yo": "bàbá àgbà náà máa ń rìn lọ sí etí odò ní gbogbo òwúrọ̀ kí oòrùn tó yọ",
    "ru": "Старик каждое утро медленно спускался к реке.", "el": "Ο γέρος περπατούσε αργά προς το ποτάμι.",
    "zh": "老人每天早上慢慢地走到河边。", "ja": "おじいさんは毎朝ゆっくりと川まで歩いていった。",
    "ko": "노인은 매일 아침 천천히 강가로 걸어갔다.", "ar": "كان الرجل العجوز يمشي ببطء إلى النهر كل صباح",
    "hi": "बूढ़ा आदमी हर सुबह धीरे-धीरे नदी तक जाता था", "th": "ชายชราเดินช้าๆ ลงไปที่แม่น้ำทุกเช้า",
    "am": "ሽማግሌው በየቀኑ ጠዋት ቀስ ብሎ ወደ ወንዙ ይሄድ ነበር"}


@pytest.fixture(scope="module")
def two():
    return fit_languages({"en": ENGLISH, "sw": SWAHILI})


def test_scripts_and_words_are_known_and_a_reply_without_letters_abstains():
    languages = fit_languages(TEXTS)
    assert reply_language("The capital is Paris.", languages)[0] == "en"
    assert reply_language("Mji mkuu ni Paris.", languages)[0] == "sw"
    # no syllable of it seen but by script
    assert reply_language("개는 물을 마셔요.", languages)[0] == "ko"
    for text in ("", "42", "?!", "\U0001f600 3.14", "```\nprint(x)\n```", "https://example.org/the-lion"):
        assert reply_language(text, languages) == (None, 0.0) and letters(text) == 0


def test_a_reply_that_fits_two_languages_equally_abstains():
    languages = fit_languages({"aa": ["mama papa"], "bb": ["mama papa"]})
    assert reply_language("mama", languages) == (None, pytest.approx(0.5))


def test_gains_are_those_of_the_equation_worked_by_hand(monkeypatch):
    monkeypatch.setattr(language, "CONTEXT", 1)
    languages = fit_languages({"xx": ["aé aé", "aé aé"], "yy": ["é"]})
    # in xx "aé" is said 4 times and weighs 2: the counts are a 2, é 2, " " 2; in yy é 1, " " 1
    def mixed(count, kinds, total, shorter):                        # Witten and Bell
        return (count + kinds * shorter) / (total + kinds)

    p = {letter: mixed(2, 3, 6, NEW) for letter in "aé "}
    after = {pair: mixed(2, 1, 2, p[pair[1]]) for pair in (" a", "aé", "é ")}
    q_a = mixed(2, 3, 8, 1 / 3)                                     # of all: a 2, é 3, " " 3
    q_b = mixed(3, 3, 8, 1 / 3)
    script = mixed(4, 1, 4, NEW)
    expected = 2 * math.log(script) + sum(
        math.log((1 - BLEND) * found / usual + BLEND)
        for found, usual in ((after[" a"], q_a), (after["aé"], q_b), (after["é "], q_b)))
    assert gains("aé", languages)["xx"] == pytest.approx(expected)


def test_the_confidence_is_the_posterior_over_the_languages(two):
    found = gains("mountain", two)
    expected = 1 / (1 + math.exp(found["sw"] - found["en"]))
    assert reply_language("mountain", two) == ("en", pytest.approx(expected))


@pytest.mark.parametrize("code", NEITHER)
def test_a_text_in_a_language_never_seen_is_called_other(two, code):
    found, confidence = reply_language(NEITHER[code], two)
    assert found == OTHER and confidence > 0.9


@pytest.mark.parametrize("text, expected", [
    ("a small house stands between the road and the river", "en"),
    ("nyumba ndogo iko kati ya barabara na mto mkubwa", "sw"),
    ("the the the the the the the", "en"), ("na na na na na na na na na", "sw"),
    ("남 남 남 남 남 남", OTHER), ("남", OTHER), ("狮子 狮子 狮子", OTHER), ("лев лев лев лев", OTHER),
    ("xqzt xqzt xqzt xqzt xqzt", OTHER)])
def test_own_texts_and_broken_repetitions_are_called_what_they_are(two, text, expected):
    assert reply_language(text, two)[0] == expected


def test_repeating_a_word_adds_less_than_other_words(two):
    once, often = (reply_language(" ".join(["ambia"] * n), two)[1] for n in (1, 9))
    odds = [math.log(share / (1 - share)) for share in (once, often)]
    assert odds[1] == pytest.approx(3 * odds[0], rel=0.02)


def test_one_language_of_three_and_a_fourth_is_other():
    languages = fit_languages({"en": ENGLISH, "sw": SWAHILI, "ko": TEXTS["ko"]})
    assert reply_language("사자는 물을 마셔요.", languages)[0] == "ko"
    assert reply_language(NEITHER["zh"], languages)[0] == OTHER
    assert reply_language(NEITHER["de"], languages)[0] == OTHER


@pytest.mark.parametrize("addition", [
    "\n```python\nfor word in words:\n    print(the_length_of(word), end='')\n```\n",
    " https://www.example.org/what/the/children/of/the/river/ate?source=the%20old%20house",
    " $$\\frac{the sum of all the numbers}{the others}$$", " mwalimu.the.teacher@school.example.org",
    "\n\n| kitu | bei |\n|---|---|\n| samaki | 20 |\n",
    " <a href=\"https://example.org/the-old-man\">mzee</a>", " `the_old_man_walked_slowly_down(river)`",
    "\nimport the_words\nprint(the_words.of_the_river(the_children=5))\n", " #theoldmanandtheriver @theteacher",
    " /usr/local/share/the/river --the-children=where", " the_river.txt na the.teacher(children)",
    " (New York Times, National Geographic Society, United Nations)"])
def test_code_links_formulas_and_names_in_a_swahili_reply_leave_it_swahili(two, addition):
    text = "Mzee alitembea polepole hadi mtoni kila asubuhi." + addition
    assert reply_language(text, two)[0] == "sw"


def test_a_reply_in_two_languages_is_mixed_and_a_loan_word_does_not_make_one(two):
    found, share = reply_language(f"{ENGLISH[0]}, {SWAHILI[4]}", two)
    assert found == MIXED and 0.2 <= share <= 0.8
    assert reply_language("simba ni mnyama mkubwa wa National Geographic Society", two)[0] == "sw"
    assert reply_language("mzee aliweka iron juu ya meza", two)[0] == "sw"


def test_the_path_is_the_likeliest_of_all_paths():
    gains_of = [(0.0, -9.0), (0.0, -9.0), (-20.0, 0.0), (-1.0, 0.0)]
    evidence = [{"en": en, "sw": sw} for en, sw in gains_of]

    def worth(path):
        changes = sum(a != b for a, b in zip(path, path[1:]))
        return sum(row[code] for row, code in zip(evidence, path)) - SWITCH * changes

    best = max(itertools.product(("en", "sw"), repeat=4), key=worth)
    assert best == ("en", "en", "sw", "sw") and likeliest_path(evidence) == [*best]
    assert foreign_share(["aaaa", "bb", "cc", "dd"], likeliest_path(evidence)) == (0.4, "en")


def test_words_are_cut_where_the_script_changes_and_marks_stay():
    assert split_words("Tokyo東京タワーへ") == ["Tokyo", "東京", "タワーへ"]
    assert split_words("Kí ni o\u0300wu\u0301ro\u0323\u0300?") == ["Kí", "ni", "òwúrọ\u0300"]
    assert letters("Kí ni o\u0300wu\u0301ro\u0323\u0300?") == 9


def test_what_looks_like_code_is_cut_from_what_is_written_beside_it():
    assert split_words("看README.md文件 os.walk(x) na/au C# 你好。") == ["看", "文件", "你好"]
    assert split_words("tembo, simba (nyoka). 'kiboko'") == ["tembo", "simba", "nyoka", "kiboko"]


def test_of_many_texts_some_prompts_and_some_responses_are_read(monkeypatch):
    texts = [f"{kind} {i}" for i in range(100) for kind in ("prompt", "response")]
    assert language.enough(texts) == texts
    monkeypatch.setattr(language, "ENOUGH", 400)
    kept = language.enough(texts)
    assert 300 <= sum(map(len, kept)) <= 800
    assert {text.split()[0] for text in kept} == {"prompt", "response"} and kept[-1][-2:] > "95"


def test_a_language_without_texts_is_never_the_answer():
    languages = fit_languages({"en": ENGLISH, "sw": []})
    assert reply_language(ENGLISH[0], languages)[0] == "en"


def news(shared):
    lines = (shared / "parallel" / "ntrex_1000.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_other_languages_are_neither_and_own_lines_are_kept_on_real_news(shared, capsys):
    """Fitted on 500 lines of English and another language: 98 % of the five others are called neither, 95 % of
    the worst, and at most 0.5 % of own lines abstain."""
    lines, shares, brief = news(shared), {}, Counter()
    own = Counter()
    for target in [code for code in CODES if code != "en"]:
        languages = fit_languages({code: [line[code] for line in lines[:500]] for code in ("en", target)})
        right = total = 0
        for code in CODES:
            verdicts = [(reply_language(line[code], languages)[0], letters(line[code]) < SHORT)
                        for line in lines[500:]]
            long = [found for found, is_short in verdicts if not is_short]
            brief.update(found in ("en", target) for found, is_short in verdicts if is_short)
            if code in ("en", target):
                right, total = right + long.count(code), total + len(long)
                own.update(found in ("en", target) for found in long)
            else:
                shares[target, code] = sum(found not in ("en", target) for found in long) / len(long)
        assert right / total >= 0.995
    mean, worst = sum(shares.values()) / len(shares), min(shares.values())
    with capsys.disabled():
        print(f"\ncalled neither: {100 * mean:.2f} % on average, {100 * worst:.1f} % at worst; own lines "
              f"abstained: {100 * own[False] / own.total():.2f} %; under {SHORT} letters: {dict(brief)}")
    assert mean >= 0.98 and worst >= 0.95 and own[False] <= 0.005 * own.total()


@pytest.mark.slow
def test_rows_with_lists_and_code_do_not_open_a_language_to_others(shared):
    """Fitted on 200 rows of instructions, some of which hold hardly a sentence."""
    rows = read_rows(shared / "pairs" / "alpaca_en_pt.jsonl")
    languages = fit_languages(texts_by_language(rows[:200], ("en", "pt")))
    found = Counter(reply_language(line["de"], languages)[0] for line in news(shared)[500:])
    assert found["en"] + found["pt"] <= 0.08 * found.total()
    for code in ("en", "pt"):
        own = [text for text in (row[code]["response"] for row in rows[2000:]) if letters(text) >= SHORT]
        found = Counter(reply_language(text, languages)[0] for text in own)
        assert found[OTHER] <= 0.015 * len(own)


def half(text, code, first):
    """The first or second half of a text, between words where there are any."""
    pieces = list(text) if code == "zh" else text.split()
    part = pieces[:len(pieces) // 2] if first else pieces[len(pieces) // 2:]
    return ("" if code == "zh" else " ").join(part)


@pytest.mark.slow
def test_seven_languages_are_told_apart_and_halves_of_two_are_mixed(shared):
    lines = news(shared)
    languages = fit_languages({code: [line[code] for line in lines[:500]] for code in CODES})
    found = [reply_language(line[code], languages)[0] == code for line in lines[500::4] for code in CODES]
    assert sum(found) / len(found) >= 0.97
    mixtures = [half(line[a], a, True) + " " + half(line[b], b, False)
                for line in lines[500::25] for a, b in itertools.permutations(CODES, 2)]
    assert sum(reply_language(text, languages)[0] == MIXED for text in mixtures) / len(mixtures) >= 0.9


def test_the_demos_classifier_does_not_take_chinese_korean_or_yoruba_for_swahili():
    rows = read_rows("demo/eval.jsonl")
    languages = fit_languages({code: [row[code][part] for row in rows for part in ("prompt", "response")]
                               for code in ("en", "sw")})
    for code in ("zh", "ko", "yo"):
        assert {reply_language(row[code]["response"], languages)[0] for row in rows[::5]} == {OTHER}
    for code in ("en", "sw"):
        assert {reply_language(row[code]["response"], languages)[0] for row in rows[::5]} == {code}
