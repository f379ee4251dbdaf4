"""What the exercises of docs/change/2-data-format.md have to fulfil.

    python -m pytest docs/change/exercises/test_change_2.py        # what is still open?
"""

import json
from collections import Counter

from formats.records import read_rows


def read(path, *records):
    """(the rows' texts, what was counted) of a file of these records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    counts = Counter()
    rows = [row["en"] for row in read_rows(path, turns="all", counts=counts)]
    return [(row["prompt"], row["response"]) for row in rows], counts


def test_1_natural_reasoning(tmp_path):
    record = {"question": "Which river?", "reference_answer": "The Tana.", "responses": [{"response": "The Nile."}]}
    others = [{"question": "q", "response": "r", "reference_answer": "no"},
              {"question": "q", "answer": "r", "reference_answer": "no"}]
    texts, _ = read(tmp_path / "file.jsonl", record, *others)
    assert texts == [("Which river?", "The Tana."), ("q", "r"), ("q", "r")]


def battle(winner, question="Which river?"):
    asked = {"role": "user", "content": question}
    first, second = ([asked, {"role": "assistant", "content": f"river {name}"}] for name in "ab")
    return {"question_id": "1", "winner": winner, "conversation_a": first, "conversation_b": second}


def test_2_arena(tmp_path):
    told = [battle(winner) for winner in ("model_a", "model_b", "tie", "tie (bothbad)", "model_c")]
    texts, counts = read(tmp_path / "file.jsonl", *told)
    assert texts == [("Which river?", f"river {name}") for name in "aba"]
    assert counts["skipped: both answers were called bad (first: file.jsonl:4)"] == 1
    assert sum(count for reason, count in counts.items() if "file.jsonl:5" in reason) == 1
    longer = battle("model_b")
    longer["conversation_b"] += [{"role": "user", "content": "And?"},
                                 {"role": "assistant", "content": "The sea."}]
    texts, _ = read(tmp_path / "longer.jsonl", longer)
    assert texts == [("Which river?", "river b"), ("And?", "The sea.")]
