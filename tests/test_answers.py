"""evals/answers.py: what counts as correct, what is asked, scored and kept."""

import json
import math
import unicodedata
from types import SimpleNamespace

import pytest

from engine.files import InputError, read_records, write_jsonl
from evals import answers
from evals.answers import Decoding, answer_and_score, is_correct, normalise, read_answers, score
from evals.language import fit_languages, texts_by_language
from formats.chat import load_tokenizer

TEXTS = {"en": ["The lion eats meat.", "What is the capital of France?", "The river is long."],
         "sw": ["Simba anakula nyama.", "Mji mkuu wa Ufaransa ni upi?", "Mto ni mrefu."],
         "ko": ["사자는 고기를 먹어요.", "프랑스의 수도는 어디예요?", "강은 길어요."]}
TOKENIZER = SimpleNamespace(fingerprint="0123456789abcdef")


# -------------------------------------------------------------------------------------------- correct replies

@pytest.mark.parametrize("reply, expected", [
    ("The lion eats meat", "The lion eats meat."), ("  the LION\n eats meat!", "The lion eats meat."),
    ("狮子吃肉", "狮子吃肉。"), ("Kìnnìún ń jẹ ẹran".replace("ì", "i\u0300"), "Kìnnìún ń jẹ ẹran."),
    ("शेर मांस खाता है।", "शेर मांस खाता है"), ("هل هذا أسد؟", "هل هذا أسد"),
    ("አንበሳ ሥጋ ይበላል።", "አንበሳ ሥጋ ይበላል"),
    ("یہ شیر ہے۔", "یہ شیر ہے"), ("առյուծ։", "առյուծ"), ("ခြင်္သေ့။", "ခြင်္သေ့"), ("狮子｡", "狮子"),
    ("狮子！？", "狮子"),
    ("El león…", "El león"), ("Se llama «León»", "Se llama «León».”"), ("『ライオン』", "『ライオン"),
    ("Paris\u00a0est\u202fbelle !", "Paris est belle"), ("Pa\u200bris\ufeff", "Paris"),
    ("co\u00adop", "coop"),
    ("ＡＢＣ　１２", "abc 12"), ("ﾗｲｵﾝ", "ライオン"), ("\u200fאריה\u200e.", "אריה"), ("ΟΔΟΣ", "οδος"), ("ΟΔΟΣ", "οδοσ"),
    ("İstanbul", "istanbul"), ("e\u0301tE\u0301", "été"), ("C++.", "c++"), ("It is 3.5.", "it is 3.5")])
def test_case_spaces_final_punctuation_and_unicode_form_do_not_count(reply, expected):
    assert normalise(reply) == normalise(expected)


@pytest.mark.parametrize("reply, expected", [
    ("The lion eats", "The lion eats meat."), ("The lion, eats meat.", "The lion eats meat."),
    ("Lion eats meat.", "The lion eats meat."), ("Kìnnìún n jẹ ẹran", "Kìnnìún ń jẹ ẹran."),
    ("-5", "5"), ("−5", "5"), ("C++", "C"), ("C#", "C"), ("C＃", "C"), ("3.5", "35"), ("3.5", "3"),
    ("50%", "50"), ("50٪", "50"), ("A*", "A"), ("A-", "A"), ("A+", "A"), ("5²", "52"), ("½", "1/2"),
    ("①", "1"),
    ("[0, 1)", "[0, 1]"), ("f′", "f"), ("6'", "6"), ('12"', "12"), ("12＂", "12"), ("1914–", "1914"),
    ("?", "!"), ("…", ""), (".", ","), ("Maße", "Masse"), ("५", "5"), ("🏴\U000e0067\U000e007f", "🏴"),
    ("ıssız", "issiz"), ("می\u200cخورد", "میخورد"), ("a b", "ab"), ("año", "ano"), ("", "Paris")])
def test_what_is_part_of_an_answer_counts(reply, expected):
    assert normalise(reply) != normalise(expected)


def test_small_and_capital_i_are_those_of_the_language():
    assert is_correct("ILIK SU", "ılık su", "tr") and not is_correct("ILIK SU", "ilik su", "tr")
    assert is_correct("DİYARBAKIR", "Diyarbakır", "tur_Latn") and is_correct("IT IS", "it is", "en")


def test_every_mark_that_ends_a_sentence_in_some_script_is_final():
    for mark in ".!?。．｡！？؟۔।॥።፧፨։՞။༎៕᙮᠃⁇⁈‼…⸮;·؛:,،、，\u037e":
        assert unicodedata.category(unicodedata.normalize("NFC", mark))[0] == "P"
        assert normalise(f"abc {mark} {mark}") == "abc", mark


def test_normalising_twice_changes_nothing():
    hypothesis = pytest.importorskip("hypothesis")

    @hypothesis.given(hypothesis.strategies.text(max_size=12))
    @hypothesis.settings(deadline=None, max_examples=300)
    def check(text):
        assert normalise(normalise(text)) == normalise(text)
    check()


# ----------------------------------------------------------------------------------------------------- scores

def rows_of(*texts):
    return [{"row_id": str(i), "en": {"prompt": p, "response": r}, "sw": {"prompt": q, "response": s}}
            for i, (p, r, q, s) in enumerate(texts)]


def reply_with(monkeypatch, replies, tokens=7):
    monkeypatch.setattr(Decoding, "replies", lambda self, model, tokenizer, questions, on_replies: [
        (replies(question), tokens) for question in questions])


ROWS = rows_of(("a", "The lion eats meat.", "b", "Simba anakula nyama."), ("c", "Paris", "d", "paris."),
               ("e", "The river is long.", "f", "Mto ni mrefu."))
REPLIES = {"a": "The lion eats meat", "b": "The lion eats meat.", "c": "Paris", "d": "Paris",
           "e": "Mto", "f": "Mto ni mrefu"}


def test_scores_leave_equal_responses_out_of_the_language_figure(tmp_path, monkeypatch):
    reply_with(monkeypatch, REPLIES.get)
    scores = answer_and_score(None, TOKENIZER, ROWS, ("en", "sw"), fit_languages(TEXTS), 8, None,
                              tmp_path / "answers.jsonl")
    assert (scores["en"]["correct"], scores["en"]["right_language"], scores["en"]["n_language"]) == (
        66.67, 50.0, 2)
    assert (scores["sw"]["correct"], scores["sw"]["right_language"], scores["sw"]["n"]) == (66.67, 50.0, 3)
    assert scores["sw"]["ends"] == 100 and scores["sw"]["stderr"]["correct"] > 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6


def test_the_first_rows_alone_are_answered_when_a_limit_is_given(tmp_path, monkeypatch):
    reply_with(monkeypatch, REPLIES.get, tokens=8)
    path = tmp_path / "answers.jsonl"
    scores = answer_and_score(None, TOKENIZER, ROWS, ("en", "sw"), fit_languages(TEXTS), 8, None, path,
                              limit=2, nats={"en": [3.0, 4.0], "sw": [1.0, 2.0]})
    assert scores["en"]["n"] == 2 and scores["questions"] == 3 and scores["en"]["ends"] == 0
    lines = read_answers(path, scores)
    assert [line["row_id"] for line in lines] == ["0", "1"] * 2
    assert [line.get("reference_nll") for line in lines] == [3.0, 4.0, 1.0, 2.0]
    bits, size = (1 + 2) / math.log(2), len("Simba anakula nyama.paris.")
    assert scores["sw"]["bits_per_byte"] == pytest.approx(bits / size, abs=1e-4)


def test_a_score_says_whether_its_exact_answers_mean_something():
    line = {"row_id": "0", "language": "en", "prompt": "q", "reply": "r", "expected": "r", "correct": True,
            "reply_language": None, "judged": False}
    short, long = score([line]), score([line, line | {"expected": "word " * 30, "correct": False}])
    assert short["answers_short"] and not long["answers_short"] and long["correct"] == 50
    assert short["right_language"] == 0 and short["n_language"] == 0


ANSWER = {"row_id": "0", "language": "en", "prompt": "q", "reply": "r", "expected": "r", "correct": True,
          "reply_language": "en", "judged": True}


@pytest.mark.parametrize("text, told", [
    (None, "holds 0 answers, 2 were written: delete the result.json"), ("", "holds 0 answers, 2 were"),
    (json.dumps(ANSWER), "holds 1 answers, 2 were written"), ("{}\n", ':1: "row_id" is missing'),
    (json.dumps(ANSWER) + '\n{"row', ":2: not valid JSON"), ("5\n", ":1: dict expected, found int")])
def test_answers_that_are_not_all_there_are_one_clear_line(tmp_path, text, told):
    path, scores = tmp_path / "answers.jsonl", {"en": {"n": 2, "n_language": 2}, "heldout": {}, "seconds": 3}
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as error:
        read_answers(path, scores)
    assert str(error.value).startswith(str(path)) and told in str(error.value)
    write_jsonl(path, [ANSWER] * 2)
    assert read_answers(path, scores) == [ANSWER] * 2


def test_several_languages_are_answered_and_a_response_shared_by_two_is_not_judged(tmp_path, monkeypatch):
    rows = [{"row_id": "0", **{code: {"prompt": f"{code} {TEXTS[code][0]}", "response": TEXTS[code][0]}
                               for code in TEXTS}},
            {"row_id": "1", **{code: {"prompt": f"{code} {TEXTS[code][1]}",
                                      "response": TEXTS["en" if code == "sw" else code][1]}
                               for code in TEXTS}}]
    reply_with(monkeypatch, lambda question: question.split(" ", 1)[1])
    languages = tuple(TEXTS)
    classifier = fit_languages(texts_by_language(rows, languages))
    scores = answer_and_score(None, TOKENIZER, rows, languages, classifier, 8, None,
                              tmp_path / "answers.jsonl")
    assert {code: (scores[code]["n"], scores[code]["n_language"]) for code in TEXTS} == {
        "en": (2, 1), "sw": (2, 1), "ko": (2, 2)}
    assert ([scores[code]["correct"] for code in TEXTS] == [100, 50, 100]
            and scores["ko"]["right_language"] == 100)
    lines = [line["language"] for _, line in read_records(tmp_path / "answers.jsonl")]
    assert lines == ["en"] * 2 + ["sw"] * 2 + ["ko"] * 2


# ---------------------------------------------------------------------------------------------------- replies

def test_answers_equal_generate_one_at_a_time(checkpoint):
    import model as llama
    model, tokenizer = llama.load(checkpoint), load_tokenizer(checkpoint)
    questions = ["What is it?", "Mji mkuu wa Ufaransa ni upi?", "x"]
    how = Decoding(None, 9)
    together = how.replies(model, tokenizer, questions)
    assert together == [how.replies(model, tokenizer, [question])[0] for question in questions]


def test_replies_are_counted_as_they_finish_those_that_are_cut_too(checkpoint):
    import model as llama
    model, counted = llama.load(checkpoint), []
    prompts = [[5, 6], [7], [9, 8, 7], [3]]
    whole = llama.generate(model, prompts, 6, set(), batch_size=3)
    llama.generate(model, prompts, 6, {whole[0][2]}, batch_size=3, progress=counted.append)
    assert sum(counted) == len(prompts) and len(counted) > 2


def test_a_reply_ends_by_itself_when_a_stop_token_came_in_time(tmp_path, monkeypatch):
    replies = iter([[5] * 8, [5] * 7, []])
    tokenizer = SimpleNamespace(prompt_ids=lambda question, system: [1], stop_ids={0}, decode=str,
                                fingerprint="")
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=99))
    monkeypatch.setattr(answers.llama, "generate",
                        lambda model, prompts, *_: [next(replies) for _ in prompts])
    path = tmp_path / "answers.jsonl"
    answer_and_score(model, tokenizer, ROWS, ("en",), fit_languages(TEXTS), 8, None, path)
    assert [line["ends"] for _, line in read_records(path)] == [False, True, True]
