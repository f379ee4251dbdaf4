"""The translator by hand: network and search against transformers, tokenizers against sentencepiece."""

import json
import random
import struct
from pathlib import Path

import pytest
import tokenizers
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import translate
from engine.files import InputError
from formats.languages import normal
from formats.records import read_rows
from formats.weights import save_tensors
from m2m100 import tokenizer as spm
from m2m100.beam import BLOCK, HEAD_ROWS, Cache, beam_search, best_tokens
from m2m100.network import Config, M2M100, load_model, read_config

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
        banned = token[:, :2], torch.tensor([[True, False]] * 7)
        ours = best_tokens(hidden, head, count - 1, torch.empty(7 * (V + BLOCK)), banned)
        assert torch.equal(ours[1], token[:, 1:])


def test_log_probs_of_a_bf16_model_are_those_of_fp32_logits():
    torch.manual_seed(0)
    hidden, head = (torch.randn(7, 6) * 5).bfloat16(), torch.randn(3 * HEAD_ROWS + 5, 6).bfloat16()
    logp, token = (hidden.double() @ head.double().T).log_softmax(-1).topk(10)
    ours = best_tokens(hidden, head, 10, torch.empty(7 * (len(head) + BLOCK)))
    assert ours[0].dtype == torch.float32 and torch.equal(ours[1], token)
    assert torch.allclose(ours[0], logp.float(), atol=1e-5)
    rounded = (hidden @ head.T).float().log_softmax(-1).topk(10)[0]
    assert not torch.allclose(rounded, logp.float(), atol=1e-2), "logits in bf16 would not do"


def log_prob(model, source, answer):
    """Of an answer by teacher forcing."""
    source, target = torch.tensor([source]), torch.tensor([[END, *answer]])
    hidden = model(source, torch.ones_like(source, dtype=torch.bool), target)[0]
    logp = (hidden.double() @ model.head.double().T).log_softmax(-1)
    return logp[torch.arange(1, len(answer)), torch.tensor(answer[1:])].sum().item()


def test_a_bf16_search_finds_translations_nearly_as_probable(checkpoint):
    exact, short = load_model(checkpoint), load_model(checkpoint, dtype=torch.bfloat16)
    sources = random_sources(20, high=12)
    wanted, found = (beam_search(model, sources, 51, [12] * 20) for model in (exact, short))
    losses = [(log_prob(exact, source, a) / len(a) - log_prob(exact, source, b) / len(b))
              for source, a, b in zip(sources, wanted, found)]
    assert sum(a == b for a, b in zip(wanted, found)) >= 10
    assert sorted(losses)[-3] < 0.1, losses


class Syncs(TorchDispatchMode):
    """Counts what makes a GPU's host wait: the number or the places in a tensor asked for."""
    waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.waits += function in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        if function is torch.ops.aten.index.Tensor:
            self.waits += any(index is not None and index.dtype == torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("beams, no_repeat", [(5, 0), (1, 4)])
def test_a_step_of_the_search_waits_for_the_device_once(translator, monkeypatch, beams, no_repeat):
    steps, tidied, lists = [], [], []
    decode, keep, tolist = M2M100.decode, Cache.keep_, torch.Tensor.tolist
    monkeypatch.setattr(M2M100, "decode", lambda *args: steps.append(1) or decode(*args))
    monkeypatch.setattr(Cache, "keep_", lambda *args: tidied.append(1) or keep(*args))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or tolist(tensor))
    with Syncs() as syncs:
        beam_search(translator.model, random_sources(9), 51, [30] * 9, beams, no_repeat=no_repeat)
    layers = len(translator.model.model.decoder.layers)
    assert len(steps) > 10 and len(lists) == 1, "the answers, at the end"
    # The first decoding is that of the start token; to tidy the caches asks once more.
    assert len(steps) - 1 <= syncs.waits <= len(steps) - 1 + len(tidied) // layers


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


def test_a_dtype_is_chosen_by_the_device_and_may_be_given(checkpoint):
    assert load_model(checkpoint).head.dtype == torch.float32
    assert translate.load(checkpoint).model.head.dtype == torch.float32
    assert translate.load(checkpoint, "cpu", torch.bfloat16).model.head.dtype == torch.bfloat16


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
    (lambda d: (d / "config.json").unlink(), "there is no config.json"),
    (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "neither M2M100 nor NLLB"),
    (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors"),
    (lambda d: (d / "vocab.json").unlink(), "has no tokenizer"),
    (lambda d: (d / "sentencepiece.bpe.model").write_bytes(b"\x0a\xffrubbish"), "no SentencePiece model"),
    (lambda d: (d / "sentencepiece.bpe.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
     "git lfs pull"),
    (lambda d: (d / "sentencepiece.bpe.model").write_bytes(
        spm_bytes(extra=wire(1, wire(1, b"x") + wire(3, 4)))), "user-defined"),
    (lambda d: edit_json(d / "config.json", encoder_ffn_dim=41), r"size mismatch for .*\[40, 24\]"),
    (lambda d: edit_json(d / "config.json", decoder_layers=4), "Missing key.*decoder.layers.3"),
    (lambda d: edit_json(d / "config.json", decoder_layers=2), "Unexpected key.*decoder.layers.2"),
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


def test_what_a_training_left_in_a_tokenizer_file_cuts_and_pads_no_text(tmp_path):
    write_nllb_tokenizer(tmp_path)
    expected = spm.load_tokenizer(tmp_path).encode("the inner lion")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.enable_truncation(3)
    inner.enable_padding(length=40)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert spm.load_tokenizer(tmp_path).encode("the inner lion") == expected


def test_a_damaged_tokenizer_file_is_told_in_one_line(tmp_path):
    write_nllb_tokenizer(tmp_path)
    damaged = json.loads((tmp_path / "tokenizer.json").read_text()) | {"model": {"type": "BPE"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
    with pytest.raises(InputError, match="tokenizer.json: not a usable tokenizer"):
        spm.load_tokenizer(tmp_path)


def test_the_languages_of_nllb_go_by_their_normal_codes(tmp_path):
    write_nllb_tokenizer(tmp_path)
    tokenizer = spm.load_tokenizer(tmp_path)
    known = tokenizer.languages
    assert known[normal("swh_Latn")] == known["sw"] and known[normal("zho_Hans")] == known["zh"] != known["zh_Hant"]
    assert "ko" not in known and "ace_Arab" in known
    assert not {END, known["sw"]} & set(tokenizer.encode("the lion </s> swh_Latn")), (
        "special tokens in a text are text")
    assert tokenizer.decode([known["sw"], *tokenizer.encode("the inner lion"), END]) == "the inner lion"
