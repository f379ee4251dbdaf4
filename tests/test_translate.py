"""translate.py against transformers and sentencepiece, and its promises: layout, checks, resuming."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch

import translate
from engine.files import InputError
from formats.records import languages_of, read_rows, write_rows
from m2m100 import tokenizer as spm
from m2m100.beam import BLOCK, HEAD_ROWS, beam_search, best_tokens
from m2m100.network import Config, M2M100, load_model, read_config
from formats.weights import save_tensors

ROOT = Path(__file__).parents[1]
SHARED, DEMO = ROOT.parent / "shared" / "data", ROOT / "demo"
CONFIG = {"model_type": "m2m_100", "d_model": 24, "encoder_layers": 2, "decoder_layers": 3,
          "encoder_attention_heads": 3, "decoder_attention_heads": 2, "encoder_ffn_dim": 40,
          "decoder_ffn_dim": 36, "max_position_embeddings": 64}
LETTERS = "abcdefghijklmnopqrstuvwxyz.?!,[]0123456789"
MERGED = ["he", "▁t", "▁the", "in", "er", "▁a"]
END = 2


def wire(number, value):
    """A protobuf field, for writing SentencePiece models without SentencePiece."""
    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def spm_bytes(kind=2, extra=b""):
    """A BPE (2) or Unigram (1) model of letters and a few merges; specials first, as usual."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(piece, -float(i), 1) for i, piece in enumerate(MERGED + ["▁", *LETTERS])]
    body = b"".join(wire(1, wire(1, piece.encode()) + wire(2, score) + wire(3, type_))
                    for piece, score, type_ in pieces)
    return body + extra + wire(2, wire(3, kind)) + wire(3, wire(3, 1) + wire(4, 1))


def write_m2m100_tokenizer(path):
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    # not the .model's order
    vocab |= {piece: 4 + i for i, piece in enumerate(reversed(MERGED + ["▁", *LETTERS]))}
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "sentencepiece.bpe.model").write_bytes(spm_bytes())
    return len(vocab) + 108


def write_nllb_tokenizer(path):
    vocab = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, *MERGED])}
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("i", "n"), ("e", "r"), ("▁", "a")]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    inner.decoder = tokenizers.decoders.Metaspace("▁", prepend_scheme="always")
    inner.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    inner.add_special_tokens(["ace_Arab", "eng_Latn", "swh_Latn", "zho_Hans", "zho_Hant", "<mask>"])
    inner.save(str(path / "tokenizer.json"))
    return inner.get_vocab_size()


def make_checkpoint(path, seed=4, tokenizer=write_m2m100_tokenizer, **changes):
    """A random M2M100 or NLLB directory whose output lengths vary: the end token's logit is raised
    a little."""
    path.mkdir(parents=True, exist_ok=True)
    raw = CONFIG | {"vocab_size": tokenizer(path)} | changes
    (path / "config.json").write_text(json.dumps(raw))
    (path / "generation_config.json").write_text(json.dumps(
        {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
         "max_length": 200}))
    torch.manual_seed(seed)
    model = M2M100(read_config(path))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.4 if parameter.ndim == 2 else 0.1)
                            + ("norm.weight" in name))
        for layer in model.model.decoder.layers:  # the source must matter
            layer.encoder_attn.out_proj.weight.mul_(6)
            layer.encoder_attn.q_proj.weight.mul_(6)
        end = model.head[END]
        model.head[1] = -end  # nobody writes padding
        model.model.decoder.layer_norm.weight.fill_(1.0)
        # sentences must come to an end
        model.model.decoder.layer_norm.bias.copy_(2 * end / end.square().sum())
    save_tensors(path / "model.safetensors", {name: p.detach() for name, p in model.named_parameters()})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("m2m100"), clo_languages=["sw", "zh", "de", "id"])


@pytest.fixture(scope="module")
def translator(checkpoint):
    return translate.load(checkpoint)


@pytest.fixture
def echo(monkeypatch):
    """A translator that repeats what it is given; the list fills with the texts it saw."""
    seen = []

    def translate_sentences(texts, job, beams, no_repeat=0):
        seen.extend(texts)
        return [(text, None) for text in texts]

    monkeypatch.setattr(translate, "translate_sentences", translate_sentences)
    return seen


def random_sources(count, low=1, high=20, seed=0, language=50):
    rng = random.Random(seed)
    return [[language] + [rng.randint(4, 40) for _ in range(rng.randint(low, high))] + [END]
            for _ in range(count)]


# ---- network and search ----

def hf_model(path):
    """transformers' model in float64: near-ties in float32 fall differently from machine to machine."""
    transformers = pytest.importorskip("transformers")
    return transformers.M2M100ForConditionalGeneration.from_pretrained(path).double().eval()


def hf_search(theirs, sources, language, limit, beams, alpha=1.0):
    """transformers' search, decided in float64 too: `generate` rounds logits to float32 whatever the
    model's type, so a hook keeps them as they were and a processor, the last before the choice, takes
    them up again."""
    kept, batch = [], padded(sources)
    hook = theirs.lm_head.register_forward_hook(lambda module, inputs, logits: kept.append(logits[:, -1]))

    def exact(ids, scores):
        return scores if ids.shape[1] == 1 else kept[-1].log_softmax(-1)  # the first token is forced

    output = theirs.generate(
        input_ids=batch, attention_mask=(batch != 1).long(), num_beams=beams, early_stopping=beams > 1,
        length_penalty=alpha, forced_bos_token_id=language, max_new_tokens=limit, do_sample=False,
        logits_processor=[exact])
    hook.remove()
    assert kept[-1].dtype == torch.float64
    return [[token for token in row[1:] if token != 1] for row in output.tolist()]


def padded(sources):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sources], True, 1)


FAMILIES = pytest.mark.parametrize("tokenizer", [write_m2m100_tokenizer, write_nllb_tokenizer])


@FAMILIES
def test_logits_equal_transformers(tmp_path, tokenizer):
    make_checkpoint(tmp_path, tokenizer=tokenizer)
    source, target = padded(random_sources(5)), torch.randint(4, 40, (5, 7))
    given = dict(input_ids=source, attention_mask=(source != 1).long(), decoder_input_ids=target)
    ours, theirs = load_model(tmp_path), hf_model(tmp_path)
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-6)):  # both make positions in float32
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        assert (ours(source, source != 1, target) @ ours.head.T - theirs(**given).logits).abs().max() < bound


@FAMILIES
@pytest.mark.parametrize("beams, alpha", [(1, 1.0), (5, 1.0), (5, 0.2), (5, 2.0)])
def test_beam_search_equals_transformers_token_for_token(tmp_path, tokenizer, beams, alpha):
    make_checkpoint(tmp_path, tokenizer=tokenizer)
    ours = translate.load(tmp_path, dtype=torch.float64)
    target, limit = ours.tokenizer.languages["zh"], 20
    sources = random_sources(100, high=30, seed=beams, language=ours.tokenizer.languages["en"])
    theirs = hf_search(hf_model(tmp_path), sources, target, limit, beams, alpha)
    assert beam_search(ours.model, sources, target, [limit] * 100, beams, alpha) == theirs
    assert (len({len(ids) for ids in theirs}) > 3
            and len({str(ids) for ids in theirs}) > 40), "outputs want variety"


def plain_beam_search(model, source, language, limit, beams):
    """The textbook version: lists, no cache, no batch. Ends when `beams` hypotheses have ended."""
    source, alive, ended = torch.tensor([source]), [(0.0, [language])], []
    while True:
        options = []
        for score, ids in alive:
            logits = model(source, source > 0, torch.tensor([[END] + ids]))[0, -1] @ model.head.T
            options += [(score + logp, ids + [i]) for i, logp in enumerate(logits.log_softmax(-1).tolist())]
        options.sort(reverse=True)
        last = len(alive[0][1]) + 1 == limit
        for score, ids in options[:beams]:
            if (ids[-1] == END or last):
                ended.append((score / len(ids), ids))
        if len(ended) >= beams or last:
            return max(ended)[1]
        alive = [option for option in options[:2 * beams] if option[1][-1] != END][:beams]


@pytest.mark.parametrize("beams", [1, 3])
def test_beam_search_equals_the_textbook_version(checkpoint, beams):
    sources, model = random_sources(6, 1, 12, seed=3), load_model(checkpoint, dtype=torch.float64)
    plain = [plain_beam_search(model, ids, 51, 14, beams) for ids in sources]
    assert beam_search(model, sources, 51, [14] * 6, beams) == plain


def test_a_translation_does_not_depend_on_its_batch(checkpoint):
    sources, model = random_sources(11), load_model(checkpoint, dtype=torch.float64)
    limits = [2 * len(ids) + 9 for ids in sources]
    together = beam_search(model, sources, 51, limits)
    assert together == [beam_search(model, [ids], 51, [n])[0] for ids, n in zip(sources, limits)]


def test_the_best_tokens_are_those_of_a_log_softmax():
    torch.manual_seed(0)
    for V, count in ((9, 4), (BLOCK, 3), (3 * HEAD_ROWS + 5, 10)):
        hidden, head = torch.randn(7, 6) * 5, torch.randn(V, 6)
        logp, token = (hidden @ head.T).log_softmax(-1).topk(count)
        ours = best_tokens(hidden, head, count, torch.empty(7 * (V + BLOCK)))
        assert torch.allclose(ours[0], logp, atol=1e-5) and torch.equal(ours[1], token)
        banned = token[:, 0].tolist(), list(range(7))
        ours = best_tokens(hidden, head, count - 1, torch.empty(7 * (V + BLOCK)), banned)
        assert torch.equal(ours[1], token[:, 1:])


@pytest.mark.slow
def test_the_demo_translator_equals_transformers_and_sentencepiece():
    sentencepiece = pytest.importorskip("sentencepiece")
    if not (DEMO / "m2m100" / "model.safetensors").exists():
        pytest.skip("demo/m2m100 is not built")
    translator, theirs = translate.load(DEMO / "m2m100", dtype=torch.float64), hf_model(DEMO / "m2m100")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "m2m100" / "sentencepiece.bpe.model"))
    vocab = json.loads((DEMO / "m2m100" / "vocab.json").read_text("utf-8"))
    rows = read_rows(DEMO / "eval.jsonl")[::20]
    texts = [row["en"]["prompt"] for row in rows] + [row["de"]["prompt"] for row in rows]
    ids = [translator.tokenizer.encode(text) for text in texts]
    assert ids == [[vocab.get(piece, 3) for piece in pieces.encode(text, out_type=str)] for text in texts]
    known = translator.tokenizer.languages
    sources, limits = [[known["en"], *row, END] for row in ids], [40] * len(ids)
    for code in translator.languages:
        ours = beam_search(translator.model, sources, known[code], limits)
        assert ours == hf_search(theirs, sources, known[code], 40, 5)


def test_no_repeat_forbids_repeated_ngrams(translator):
    for ids in beam_search(translator.model, random_sources(8), 51, [40] * 8, 1, no_repeat=2):
        pairs = list(zip(ids, ids[1:]))
        assert len(set(pairs)) == len(pairs)


def test_gradients_reach_every_parameter_in_teacher_forcing():
    config = Config(**{k: v for k, v in CONFIG.items() if k != "model_type"}, vocab_size=60)
    model = M2M100(config)
    source = padded(random_sources(3))
    hidden = model(source, source != 1, torch.randint(4, 50, (3, 6)))
    (hidden @ model.head.T).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- loading ----

def test_pytorch_bin_gives_the_same_model(checkpoint, tmp_path):
    for name in ("config.json", "vocab.json", "sentencepiece.bpe.model"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    state = dict(load_model(checkpoint).state_dict())
    state["lm_head.weight"] = state["model.encoder.embed_tokens.weight"] = state.pop("model.shared.weight")
    state["model.encoder.embed_positions.weights"] = torch.zeros(66, 24)
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours, saved = load_model(tmp_path).state_dict(), load_model(checkpoint).state_dict()
    assert all(torch.equal(ours[name], saved[name]) for name in saved)


def test_a_pickle_that_runs_code_is_refused(checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    torch.save({"model.shared.weight": Path("/")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin cannot be read"):
        load_model(tmp_path)


@pytest.mark.parametrize("break_, message", [
    (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "neither M2M100 nor NLLB"),
    (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors"),
    (lambda d: (d / "vocab.json").unlink(), "has no tokenizer"),
    (lambda d: (d / "sentencepiece.bpe.model").write_bytes(b"\x0a\xffrubbish"), "no SentencePiece model"),
    (lambda d: (d / "sentencepiece.bpe.model").write_bytes(
        spm_bytes(extra=wire(1, wire(1, b"x") + wire(3, 4)))), "user-defined"),
    (lambda d: edit_json(d / "config.json", encoder_ffn_dim=41), r"has shape \[40, 24\]"),
    (lambda d: edit_json(d / "config.json", decoder_layers=4), "decoder.layers.3.* is missing"),
    (lambda d: edit_json(d / "config.json", decoder_layers=2), "decoder.layers.2.* is unknown"),
    (lambda d: edit_json(d / "config.json", clo_languages=["xx"]), "clo_languages has 'xx'"),
])
def test_a_bad_checkpoint_is_one_clear_line(tmp_path, break_, message):
    make_checkpoint(tmp_path)
    break_(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        translate.load(tmp_path)
    assert "\n" not in str(caught.value)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unknown_language_is_named_with_the_known_ones(translator):
    with pytest.raises(InputError, match="'xx'; it knows de, id, sw, zh"):
        translate.translate(["a"], "en", "xx", translator)


# ---- tokenizers ----

def test_m2m100_language_ids_start_where_the_vocabulary_ends(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({f"piece{i}": i for i in range(128004)}))
    (tmp_path / "sentencepiece.bpe.model").write_bytes(spm_bytes())
    languages = spm.load_tokenizer(tmp_path).languages
    known = dict(en=128022, zh=128102, de=128020, ko=128052, id=128041, sw=128088, yo=128101, fr=128028,
                 hi=128036)
    assert len(languages) == 100 and {code: languages[code] for code in known} == known


def test_bpe_merges_the_best_piece_first_and_decoding_drops_special_ids(translator):
    tokenizer = translator.tokenizer
    pieces = {4 + i: piece for i, piece in enumerate(reversed(MERGED + ["▁", *LETTERS]))}
    ids = tokenizer.encode("  in the   inner")
    assert [pieces[i] for i in ids] == ["▁", "in", "▁the", "▁", "in", "n", "er"]
    swahili = tokenizer.languages["sw"]
    assert tokenizer.decode([swahili, *ids, 3, 1, END]) == "in the inner"
    # neighbours fuse, as in SentencePiece
    assert tokenizer.encode("a\u4e00\u4e01b").count(tokenizer.unknown) == 1


def test_control_pieces_are_never_read_from_text(tmp_path):
    for kind in (1, 2):
        (tmp_path / "m").write_bytes(spm_bytes(kind))
        inner, pieces, normalize = spm.read_sentencepiece(tmp_path / "m")
        ids = inner.encode(normalize("a<s>b</s>"), add_special_tokens=False).ids
        assert not {pieces.index("<s>"), pieces.index("</s>")} & set(ids)


LANGUAGES = ("en", "de", "zh", "ko", "id", "sw", "yo")


def odd_lines():
    """Odd spaces, marks and symbols, and words of seven languages thrown together."""
    lines = ["", " ", "  two  spaces ", "tab\there", "ﬁ ① ｆｕｌｌ　ｗｉｄｔｈ", "Ẹ̀yà ẹranko wo ni kọ̀lọ̀kọ̀lọ̀ jẹ́?",
             "e\u0301\u0323 n\u0304\u0301", "😀😀 ok 👩‍👩‍👧", "....!!!! ---- ____", "<s> [x] </s>",
             "사자는 어디에 살아요?", "狮子住在哪里？", "a\u200bb\u00a0c", "▁x ▁▁y"]
    rng = random.Random(0)
    words = "simba anaishi wapi der Löwe größer ọ̀rọ̀ 동물 动物 hewan apa 3.14 (a) x-y don't".split()
    return lines + [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(1000)]


def demo_lines():
    """The demo's sentences in seven languages."""
    rows = read_rows(DEMO / "eval.jsonl") + read_rows(DEMO / "english.jsonl")
    return [row[code][part] for row in rows for code in LANGUAGES if code in row
            for part in ("prompt", "response")]


def news_lines():
    """Real news in seven languages, where it is present."""
    file = SHARED / "parallel" / "ntrex_1000.jsonl"
    rows = map(json.loads, file.read_text("utf-8").splitlines()) if file.exists() else []
    return [row[code] for row in rows for code in LANGUAGES]


def differing(model, lines):
    """The lines of which our ids of a .model are not sentencepiece's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    inner, pieces, normalize = spm.read_sentencepiece(model)
    assert pieces == [theirs.id_to_piece(i) for i in range(theirs.get_piece_size())]
    return [line for line, ids in zip(lines, theirs.encode(lines))
            if inner.encode(normalize(line), add_special_tokens=False).ids != ids]


@pytest.mark.parametrize("kind, normalization",
                         [("bpe", "nmt_nfkc"), ("bpe", "identity"), ("unigram", "nmt_nfkc")])
def test_ids_equal_sentencepiece_on_thousands_of_lines(tmp_path, kind, normalization):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(demo_lines()[:1500]), model_prefix=str(tmp_path / "m"), model_type=kind,
        vocab_size=2400, normalization_rule_name=normalization, hard_vocab_limit=False,
        character_coverage=0.999, minloglevel=2)
    lines = demo_lines() + odd_lines()
    assert len(lines) > 6000
    wrong = differing(tmp_path / "m.model", lines)
    assert len(wrong) <= (len(lines) // 3000 if kind == "unigram" else 0), wrong


@pytest.mark.slow
@pytest.mark.parametrize("model, wrong_of",
                         [("llama2/tokenizer.model", 0), ("mbart_unigram/sentencepiece.bpe.model", 3000)])
def test_ids_of_real_models_equal_sentencepiece(model, wrong_of):
    if not (SHARED / "tokenizers" / model).exists():
        pytest.skip("no shared data")
    lines = news_lines() + demo_lines() + odd_lines()
    assert len(lines) > 13_000
    wrong = differing(SHARED / "tokenizers" / model, lines)
    assert len(wrong) <= (len(lines) // wrong_of if wrong_of else 0), wrong


def test_llama2_ids_equal_the_golden_ones():
    folder = SHARED / "tokenizers" / "llama2"
    if not folder.exists():
        pytest.skip("no shared data")
    inner, _, normalize = spm.read_sentencepiece(folder / "tokenizer.model")
    for line in (folder / "golden_ids.jsonl").read_text("utf-8").splitlines():
        case = json.loads(line)
        assert (inner.encode(normalize(case["text"]), add_special_tokens=False).ids
                == case["ids"]), case["text"]


def test_nllb_takes_short_codes_and_its_own(tmp_path):
    write_nllb_tokenizer(tmp_path)
    tokenizer = spm.load_tokenizer(tmp_path)
    known = tokenizer.languages
    assert known["sw"] == known["swh_Latn"] and known["zh"] == known["zho_Hans"] != known["zho_Hant"]
    assert "ko" not in known and "ace_Arab" in known
    assert not {END, known["sw"]} & set(tokenizer.encode("the lion </s> swh_Latn")), (
        "special tokens in a text are text")
    assert tokenizer.decode([known["sw"], *tokenizer.encode("the inner lion"), END]) == "the inner lion"


def test_nllb_s_sources_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    make_checkpoint(tmp_path, tokenizer=write_nllb_tokenizer)
    theirs = transformers.NllbTokenizer(tokenizer_file=str(tmp_path / "tokenizer.json"), src_lang="eng_Latn")
    job = translate.Job(translate.load(tmp_path), "en", "sw")
    for text in ("the lion", "a [0] b, c?", "inner", ""):
        assert job.source_ids(text) == theirs(text).input_ids


# ---- documents ----

DOCUMENT = """# A heading

First sentence. Second one!  Third, by Dr. Smith, costs 3.14 dollars?
  - a list item with `code. Inside` and https://a.example/x?y=z.
> 1) quoted, nested
```python
print("do. Not. Touch")

```
| Name | Value |
|:---|---|
| lion | $x^2$ here |\r
\t$$ E = mc^2. A $$
Emoji 😀 and {placeholder} stay. 12345

Trailing spaces   \nno end"""


def test_a_document_comes_back_byte_for_byte_from_a_translator_that_echoes(translator, echo):
    texts = [DOCUMENT, "", "\n\n", "```\nopen fence. To the end", "one", " \t "]
    assert translate.translate(texts, "en", "sw", translator) == texts
    assert not any("Touch" in text or "https" in text or "\n" in text or "^2" in text for text in echo)


def test_parsing_loses_nothing_of_real_replies(translator):
    file = SHARED / "oasst" / "en_100_tree.jsonl.gz"
    if not file.exists():
        pytest.skip("no shared data")
    for row in read_rows(file, "en", "all"):
        for text in row["en"].values():
            assert "".join(part for _, part in translate.parse(text, lambda s: len(s) < 200)) == text


def kept(text, translation):
    """Whether line breaks, what lines begin with, code, links, formulas and other spans are
    in the translation."""
    def blocks(x):
        return [part for i, part in enumerate(translate.BLOCK.split(x)) if i % 2]

    def spans(x):
        return Counter(translate.INLINE.findall(translate.BLOCK.sub("", x)))

    lines = zip(text.split("\n"), translation.split("\n"))
    return (text.count("\n") == translation.count("\n") and blocks(text) == blocks(translation)
            and not spans(text) - spans(translation)
            and all(b.startswith(translate.MARKER.match(a)[0].rstrip()) for a, b in lines))


@pytest.mark.slow
def test_real_conversations_go_through_the_demo_translator(tmp_path, capsys):
    file = SHARED / "oasst" / "en_100_tree.jsonl.gz"
    if not file.exists():
        pytest.skip("no shared data")
    rows, translator = read_rows(file, "en", "all"), translate.load(DEMO / "m2m100")
    done = translate.translate_rows(rows, translator, "en", "sw", tmp_path / "sw.jsonl", beams=1,
                                    keep_failed=True)
    assert len(done) == len(rows)
    wrong = [row["sw"][part] for row in done for part in ("prompt", "response")
             if not kept(row["en"][part], row["sw"][part])]
    assert not wrong, wrong[:1]
    assert "segments: unknown words" in capsys.readouterr().out, "failures are counted by reason"


def test_protected_spans_survive_a_translator_that_changes_everything(translator, monkeypatch):
    monkeypatch.setattr(translate, "translate_sentences",
                        lambda texts, job, beams, no_repeat=0: [(text.upper(), None) for text in texts])
    out = translate.translate([DOCUMENT], "en", "sw", translator)[0]
    for kept in ("`code. Inside`", "https://a.example/x?y=z", 'print("do. Not. Touch")', "$x^2$",
                 "{placeholder}", "😀", "|:---|---|", "$$ E = mc^2. A $$"):
        assert kept in out
    assert "LIST ITEM WITH" in out and out.count("\n") == DOCUMENT.count("\n")


def test_a_lost_mark_sends_the_texts_around_it_on_their_own(translator, monkeypatch):
    calls = []

    def forgetful(texts, job, beams, no_repeat=0):
        calls.append(list(texts))
        return [(text.replace("[0]", "").upper(), None) for text in texts]

    monkeypatch.setattr(translate, "translate_sentences", forgetful)
    assert translate.translate(["use `ls -l` to list"], "en", "sw", translator) == ["USE `ls -l` TO LIST"]
    assert ["to list", "use"] in calls
    assert translate.translate(["See (the page [https://a.example], *or* not)!"], "en", "sw", translator) == [
        "SEE (THE PAGE [https://a.example], *OR* NOT)!"]


@pytest.mark.parametrize("text, expected", [
    ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
    ("Dr. Smith met J. Doe in the U.S. army, e.g. here. Then left.",
     ["Dr. Smith met J. Doe in the U.S. army, e.g. here. ", "Then left."]),
    ("It costs 3.5 and is v1.2.3 now", ["It costs 3.5 and is v1.2.3 now"]),
    ('He said "Go." Then "No!" she said.', ['He said "Go." ', 'Then "No!" she said.']),
    ("狮子住在哪里？草原。", ["狮子住在哪里？", "草原。"]),
    ("see `a. B` now", ["see `a. B` now"]),
])
def test_sentences_end_where_a_reader_would_end_them(text, expected):
    assert translate.split_sentences(text) == expected


def test_long_sentences_are_cut_at_clauses_then_words_until_they_fit():
    text = "alpha beta gamma, delta epsilon; zeta eta theta iota " * 4
    pieces = translate.cut(text, lambda s: len(s) <= 40)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 40
    assert all(piece.endswith((" ", ",", ";")) for piece in pieces)
    pieces = translate.cut("狮" * 9, lambda s: len(s) <= 4)
    assert "".join(pieces) == "狮" * 9 and max(map(len, pieces)) <= 4


def test_long_paragraphs_reach_the_model_in_parts_that_fit(translator, echo):
    text = "the inner heat in a `long. span` there, then " * 30 + "end. " + "antheninanther" * 20 + "."
    assert translate.translate([text], "en", "sw", translator) == [text]
    job = translate.Job(translator, "en", "sw")
    assert len(echo) > 4 and all(job.fits(segment) and segment.count("[") == segment.count("]")
                                 for segment in echo)


def test_languages_without_spaces_get_none_between_sentences(translator, echo):
    assert translate.translate(["One. Two.\nThree. Four."], "en", "zh", translator) == [
        "One.Two.\nThree.Four."]
    assert translate.translate(["一。二。\n三。"], "zh", "de", translator) == ["一。 二。\n三。"]


# ---- checks ----

def judge(translator, source, text, target="sw", ids=None):
    job = translate.Job(translator, "en", target)
    ids = list(range(10, 10 + len(text.split()))) + [END] if ids is None else ids
    return job.fault(source, [5, 6, 7], text, ids)


LONG = "the quick brown fox jumps over the lazy dog and then it sleeps for a while"


@pytest.mark.parametrize("source, text, target, ids, reason", [
    (LONG, "Mbweha mwepesi wa kahawia anaruka juu ya mbwa mvivu kisha analala kidogo", "sw", None, None),
    (LONG, "敏捷的棕色狐狸跳过懒狗，然后睡了一会儿", "zh", None, None),
    ("Yes.", "Ndiyo.", "sw", None, None),
    ("The lion is a mammal.", "狮子是哺乳动物。", "zh", None, None),
    ("What is it?", "그것은 무엇인가요?", "ko", None, None),
    ("Paris", "Paris", "sw", None, None),
    (LONG, "Mbweha mwepesi", "sw", [10, 11], "cut at the limit"),
    (LONG, "", "sw", None, "empty"),
    (LONG, "samahani " * 12, "sw", [9, 10] * 12 + [END], "repetition"),
    (LONG, "Der schnelle braune Fuchs springt", "zh", None, "wrong script"),
    (LONG, "敏捷的棕色狐狸跳过懒狗，然后睡了一会儿", "sw", None, "wrong script"),
    (LONG, LONG + ".", "sw", None, "copied"),
    (LONG, "Mbweha.", "sw", None, "length"),
    (LONG, "敏捷的棕色狐狸跳过懒狗，然后睡了一会儿" * 6, "zh", None, "length"),
])
def test_every_fault_has_its_name_and_good_translations_none(translator, source, text, target, ids, reason):
    assert judge(translator, source, text, target, ids) == reason


def test_people_s_translations_raise_no_alarm(translator):
    file = SHARED / "parallel" / "ntrex_1000.jsonl"
    if not file.exists():
        pytest.skip("no shared data")
    alarms = {}
    for line in file.read_text("utf-8").splitlines():
        row = json.loads(line)
        for code in ("de", "zh", "ko", "id", "sw", "yo"):
            reason = judge(translator, row["en"], row[code], code) if code in row else None
            alarms[reason] = alarms.get(reason, 0) + 1
    assert sum(n for reason, n in alarms.items() if reason) <= 5, alarms


def test_loops_are_seen_at_any_period_and_plain_text_is_not_one():
    assert translate.loops([7] * 9 + [1, 2]) and translate.loops([1, 2, 3] * 4)
    assert translate.loops(list(range(20)) * 3)
    assert not translate.loops([5, 5, 5, 5, 1, 2, 3, 1, 2, 3, 4]) and not translate.loops([])


def test_a_failed_segment_is_tried_again_and_then_marked(translator, monkeypatch):
    def stubborn(texts, job, beams, no_repeat=0):
        return [("good" if no_repeat and "mend" in text else text,
                 None if no_repeat and "mend" in text else "length") for text in texts]

    monkeypatch.setattr(translate, "translate_sentences", stubborn)
    known = translate.translate_segments(["mend me", "hopeless"], translate.Job(translator, "en", "sw"))
    assert known == {"mend me": ("good", None), "hopeless": ("hopeless", "length")}


# ---- rows ----

def make_rows(count):
    return [{"row_id": f"r{i}", "split": "train",
             "en": {"prompt": f"what is {i}?", "response": f"it is\n{i} things."}} for i in range(count)]


@pytest.fixture
def shout(monkeypatch):
    """A quick translator: upper case, "length" for what holds a 5. The list fills with what it translated."""
    seen = []

    def translate_sentences(texts, job, beams, no_repeat=0):
        seen.extend(texts)
        return [(f"{job.target} {text.upper()}", "length" if "5" in text else None) for text in texts]

    monkeypatch.setattr(translate, "translate_sentences", translate_sentences)
    return seen


def test_a_run_killed_after_any_byte_ends_with_the_same_file(translator, tmp_path, shout):
    rows, whole = make_rows(7), tmp_path / "whole.jsonl"
    expected = translate.translate_rows(rows, translator, "en", "sw", whole, chunk=2)
    raw = whole.read_bytes()
    for size in [*range(0, len(raw), 97), len(raw) - 1, len(raw)]:
        path = tmp_path / "cut.jsonl"
        path.write_bytes(raw[:size])
        shout.clear()
        assert translate.translate_rows(rows, translator, "en", "sw", path, chunk=2) == expected
        assert path.read_bytes() == raw
        assert bool(shout) == (size < len(raw))


def test_a_failed_row_is_left_out_until_it_is_asked_for(translator, tmp_path, shout):
    rows, path = make_rows(7), tmp_path / "out.jsonl"
    kept = translate.translate_rows(rows, translator, "en", "sw", path)
    assert [row["row_id"] for row in kept] == ["r0", "r1", "r2", "r3", "r4", "r6"]
    assert kept[0] == rows[0] | {"sw": {"prompt": "sw WHAT IS 0?", "response": "sw IT IS\nsw 0 THINGS."}}
    readable = [row for row in read_rows(path) if "sw" in languages_of(row)]
    assert [row["row_id"] for row in readable] == [row["row_id"] for row in kept]
    failed = json.loads(path.read_text().splitlines()[5])
    assert failed["clo"]["failed"] == {"sw": {"length": 2}} and "sw" not in failed
    shout.clear()
    assert len(translate.translate_rows(rows, translator, "en", "sw", path, keep_failed=True)) == 7
    assert not shout and "sw" in json.loads(path.read_text().splitlines()[5])


def test_changed_rows_are_translated_again_and_others_are_not(translator, tmp_path, shout):
    rows, path = make_rows(4), tmp_path / "out.jsonl"
    translate.translate_rows(rows, translator, "en", "sw", path)
    shout.clear()
    rows[2]["en"]["prompt"] = "another question?"
    translate.translate_rows(rows[1:], translator, "en", "sw", path)
    assert "another question?" in shout and "what is 1?" not in shout
    assert sorted(json.loads(line)["id"] for line in path.read_text().splitlines()) == [
        "r0", "r1", "r2", "r3"]


def test_two_languages_share_a_line_and_indonesian_keeps_its_key(translator, tmp_path, shout):
    path = tmp_path / "out.jsonl"
    rows = translate.translate_rows(make_rows(2), translator, "en", ["id", "de"], path)
    assert rows[0]["id"]["prompt"] == "id WHAT IS 0?" and rows[0]["de"]["prompt"] == "de WHAT IS 0?"
    again = read_rows(path)
    assert again[1]["row_id"] == "r1" and set(languages_of(again[1])) == {"en", "id", "de"}


def test_a_language_that_is_there_is_not_translated(translator, tmp_path, shout):
    rows = [row | {"sw": {"prompt": "swali", "response": "jibu"}} for row in make_rows(1)]
    assert translate.translate_rows(rows, translator, "en", "sw", tmp_path / "o.jsonl") == rows and not shout


@pytest.mark.parametrize("damage", [
    lambda record: record.update(sw=5), lambda record: record.update(sw={"prompt": "x", "response": 5}),
    lambda record: record.update(sw=None), lambda record: record.pop("sw"),
    lambda record: record.update(id="\ud800"), lambda record: record["clo"].update(failed={"sw": 5}),
    lambda record: record["clo"].update(failed=5), lambda record: record["clo"].update(hash=[])])
def test_a_damaged_line_is_named_and_the_file_left_alone(translator, tmp_path, shout, damage):
    path = tmp_path / "out.jsonl"
    translate.translate_rows(make_rows(2), translator, "en", "sw", path)
    first, second = map(json.loads, path.read_text().splitlines())
    damage(second)
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match="out.jsonl:2: not written by translate.py, or damaged: .*the line"):
        translate.translate_rows(make_rows(2), translator, "en", "sw", path)
    assert path.read_bytes() == before


def test_a_file_of_someone_else_is_left_alone(translator, tmp_path, shout):
    path = tmp_path / "english.jsonl"
    write_rows(path, make_rows(2))
    before = path.read_bytes()
    with pytest.raises(InputError, match="english.jsonl:1: not written by translate.py"):
        translate.translate_rows(make_rows(2), translator, "en", "sw", path)
    assert path.read_bytes() == before


def test_the_real_model_runs_through_rows(translator, tmp_path):
    rows = translate.translate_rows(make_rows(3), translator, "en", "de", tmp_path / "o.jsonl", 2,
                                    keep_failed=True)
    assert len(rows) == 3 and all(row["de"]["response"].count("\n") == 1 for row in rows)


# ---- command line ----

def command(checkpoint, rows, out, *launcher, lang="sw,de"):
    """translate.py in a process of its own; a random translator's work fails its checks and is filed
    all the same."""
    return [sys.executable, *launcher, "translate.py", "--lang", lang, "--data", str(rows), "--out", str(out),
            "--translator", str(checkpoint), "--beams", "2", "--device", "cpu"]


def run(*words):
    """One thread each: sums of a different number of threads are rounded differently."""
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(checkpoint, tmp_path):
    one, two, rows = tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "rows.jsonl"
    write_rows(rows, make_rows(32 + 5))
    alone = run(*command(checkpoint, rows, one))
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    together = run(*command(checkpoint, rows, two, *torchrun))
    assert one.read_bytes() == two.read_bytes() and one.read_bytes().count(b"\n") == 37
    assert together.stdout.replace(str(two), str(one)) == alone.stdout, (
        "one process prints, and counts the same faults")
    whole = two.read_bytes()
    two.write_bytes(whole[:len(whole) // 2])
    run(*command(checkpoint, rows, two, *torchrun))
    assert sorted(two.read_bytes().split(b"\n")) == sorted(whole.split(b"\n"))


@pytest.mark.slow
def test_a_process_killed_without_warning_goes_on_where_it_was(checkpoint, tmp_path):
    rows, whole, out = tmp_path / "rows.jsonl", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    write_rows(rows, make_rows(64))
    run(*command(checkpoint, rows, whole, lang="sw"))
    process = subprocess.Popen(command(checkpoint, rows, out, lang="sw"), cwd=ROOT, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < out.stat().st_size < whole.stat().st_size, "the kill was to come in the middle"
    again = run(*command(checkpoint, rows, out, lang="sw"))
    assert out.read_bytes() == whole.read_bytes()
    assert "tokens/s" in again.stderr and "64/64" in again.stderr
