"""Whatever a file holds, reading it gives a result or one line of complaint: no traceback, no hang,
no huge allocation."""

import json
import shutil
from pathlib import Path

import pytest

import model as llama
import translate
from conftest import write_checkpoint
from engine.files import InputError
from formats.chat import load_tokenizer
from formats.records import read_rows
from formats.weights import Weights
from m2m100 import tokenizer as spm


hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings, strategies as st  # noqa: E402

pytestmark = pytest.mark.slow
# The same inputs each time: what decides whether a change lands must not find a fault of another one. To
# search further, take derandomize away and more examples.
FUZZ = settings(max_examples=150, derandomize=True, deadline=10_000, suppress_health_check=list(HealthCheck))
SCALARS = (st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False)
           | st.text(max_size=8))
JSON = st.recursive(SCALARS, lambda inner: (st.lists(inner, max_size=4)
                                            | st.dictionaries(st.text(max_size=8), inner, max_size=4)),
                    max_leaves=8)
WORDS = st.sampled_from(["en", "sw", "id", "row_id", "prompt", "response", "instruction", "input", "output",
                         "messages", "role", "content", "conversations", "from", "value", "message_id",
                         "parent_id", "text", "replies", "rank", "lang", "tree_state", "message_tree_id",
                         "user", "assistant", "prompter", "system", "history", "split", "completion",
                         "review_result", "deleted", "synthetic", "chosen", "rejected", "data", "conversation",
                         "context", "inputs", "targets", "question", "answer", "choices", "tool_calls", "type",
                         "language", "train", "human", "gpt", "tool", "\n\nHuman: q\n\nAssistant: r"])
RECORDS = st.recursive(SCALARS | WORDS, lambda inner: (st.lists(inner, max_size=4)
                                                       | st.dictionaries(WORDS, inner, max_size=5)),
                       max_leaves=12)


def complains_or_works(read) -> None:
    try:
        read()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) > 10


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fuzz") / "base")


def mutated(draw, original, file: Path) -> None:
    path = draw(st.sampled_from(list(places(original))))
    file.write_text(json.dumps(replaced(original, path, draw(JSON | RECORDS))))


@FUZZ
@given(st.lists(RECORDS, max_size=4), st.sampled_from(["en", "sw", "id"]), st.sampled_from(["first", "all"]))
def test_any_records(tmp_path_factory, records, language, turns):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    complains_or_works(lambda: read_rows(path, language, turns))


@FUZZ
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda t: t.encode("utf-8", "surrogatepass"))
       | st.binary(max_size=50).map(lambda b: b"\x1f\x8b" + b))
def test_any_bytes_as_a_data_file(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(content)
    complains_or_works(lambda: read_rows(path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json",
                                  "generation_config.json"])
def test_any_change_of_one_value_in_a_checkpoints_json(base, tmp_path, name):
    directory = tmp_path / "copy"
    shutil.copytree(base, directory)
    original = json.loads((base / name).read_text())
    if name == "tokenizer.json":                    # most of it is a long vocabulary: try the rest more often
        original["model"]["vocab"] = dict(list(original["model"]["vocab"].items())[-12:])
        original["model"]["merges"] = []

    @FUZZ
    @given(st.data())
    def run(draw_from):
        mutated(draw_from.draw, original, directory / name)

        def read():
            tokenizer = load_tokenizer(directory)
            tokenizer.response_ids("It is."), tokenizer.prompt_ids("What?")
        complains_or_works(read)
        complains_or_works(lambda: llama.load(directory))
    run()


def test_any_change_in_a_translators_config(tmp_path):
    original = {"model_type": "m2m_100", "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
                "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8,
                "decoder_ffn_dim": 8, "vocab_size": 120}

    @FUZZ
    @given(st.data())
    def run(draw_from):
        mutated(draw_from.draw, original, tmp_path / "config.json")
        complains_or_works(lambda: translate.load(tmp_path))
    run()


def test_any_header_of_a_safetensors_file(base, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(base, directory)
    raw = (base / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:8 + size]), raw[8 + size:]

    @FUZZ
    @given(st.data())
    def run(draw_from):
        path = draw_from.draw(st.sampled_from(list(places(header))))
        new = json.dumps(replaced(header, path, draw_from.draw(JSON))).encode()
        length = draw_from.draw(st.sampled_from([len(new), 0, 2**63, len(new) + 10**6]))
        (directory / "model.safetensors").write_bytes(length.to_bytes(8, "little") + new + body)
        complains_or_works(lambda: llama.load(directory))
    run()


def test_any_index(base, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(base, directory)
    names = list(Weights(base))
    original = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}

    @FUZZ
    @given(st.data())
    def run(draw_from):
        mutated(draw_from.draw, original, directory / "model.safetensors.index.json")
        complains_or_works(lambda: llama.load(directory))
    run()


def test_any_sentencepiece_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.json").write_text(json.dumps({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4}))

    @FUZZ
    @given(st.binary(max_size=120))
    @example(b"\x02" + b"\xff" * 8 + b"\x7f")                    # a field longer than any file
    def run(content):
        (tmp_path / "sentencepiece.bpe.model").write_bytes(content)
        complains_or_works(lambda: spm.load_tokenizer(tmp_path))
    run()
