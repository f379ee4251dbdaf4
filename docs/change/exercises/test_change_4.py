"""What the exercises of docs/change/4-translator.md have to fulfil.

    python -m pytest docs/change/exercises/test_change_4.py        # what is still open?
"""

import json

import pytest

import translate
from engine.files import InputError

LION = {"en": "The lion is a mammal.", "sw": "Simba ni mamalia.", "de": "Der Löwe ist ein Säugetier."}
HOME = {"en": "Where does the lion live?", "sw": "Simba anaishi wapi?"}
LONG = {"en": "The lion " + "and the lion " * 300 + "live.", "sw": "Simba " + "na simba " * 300 + "wanaishi."}
ASKED = {"row_id": "1", "en": {"prompt": HOME["en"], "response": LION["en"]}}
OTHER = {"row_id": "2", "en": {"prompt": HOME["en"], "response": "In the forest."}}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return translate.load(path)


def test_1_memory(tmp_path):
    memory = write(tmp_path / "memory.jsonl", LION, HOME, LONG)
    asked = [f"{LION['en']} {HOME['en']}", f"- {HOME['en']}\n- {LONG['en']}"]
    wanted = [f"{LION['sw']} {HOME['sw']}", f"- {HOME['sw']}\n- {LONG['sw']}"]
    assert translate.translate(asked, "en", "sw", memory) == wanted
    assert translate.translate([LION["sw"]], "sw", "de", memory) == [LION["de"]]
    done, = translate.translate([f"{LION['en']} {HOME['en']}"], "en", "de", memory)
    assert done == f"{LION['de']} {HOME['en']}" and done.faults == {"unknown sentence": 1}
    for source, target in (("en", "ko"), ("ko", "en"), ("en", "en")):
        with pytest.raises(InputError):
            translate.translate(["a"], source, target, memory)


def test_1_memory_that_has_learned_more_makes_rows_anew(tmp_path):
    memory = write(tmp_path / "memory.jsonl", LION, HOME)
    done = translate.translate_rows([ASKED, OTHER], memory, "en", "sw", tmp_path / "out.jsonl")
    assert [row["sw"] for row in done] == [{"prompt": HOME["sw"], "response": LION["sw"]}]
    memory = write(tmp_path / "memory.jsonl", LION, HOME, {"en": "In the forest.", "sw": "Msituni."})
    done = translate.translate_rows([ASKED, OTHER], memory, "en", "sw", tmp_path / "out.jsonl")
    assert [row["sw"]["response"] for row in done] == [LION["sw"], "Msituni."]


def test_2_numbers():
    direction = translate.Direction(translate.load("demo/m2m100"), "en", "sw")
    tokenizer, end = direction.translator.tokenizer, direction.translator.model.config.eos_token_id

    def fault(source, text):
        ids = [tokenizer.languages["sw"], *tokenizer.encode(text), end]
        return direction.fault(source, direction.source_ids("The lion is a mammal."), text, ids)

    assert fault("The lion has 30 teeth.", "Simba ana meno 30.") is None
    assert fault("The lion has 30 teeth.", "Simba ana meno 13.") == "numbers"
    assert fault("The lion has 30 teeth.", "Simba ana meno.") == "numbers"
    assert fault("The lion has 30 or 40 teeth.", "Simba ana meno 40 au 30.") is None
    assert fault("The lion has thirty teeth.", "Simba ana meno 30.") is None
    assert fault("The lion has 2 ears.", "Simba ana masikio mawili.") is None
    assert fault("The lion weighs 1,000 stones.", "Simba ana uzito wa mawe 1.000.") is None
    assert fault("The lion weighs 1,000 stones.", "Simba ana uzito wa mawe 100.") == "numbers"
    assert fault("The lion has ٣٠ teeth.", "Simba ana meno 30.") is None
    assert fault("The lion has 30 teeth.", "") == "empty"                       # what others find comes first
