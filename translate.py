"""Translate an instruction data set with M2M100 or NLLB: documents in, documents out, every sentence checked.

    python translate.py --lang sw --data demo/english.jsonl --out swahili.jsonl
    python translate.py --lang de,ko --text "The capital of France is Paris."

A document is split into segments (lines, then sentences); code, links, formulas and markup are set aside and
come back untouched. Segments are translated in batches by beam search and checked; what fails is tried again,
then marked. The row of a marked segment is left out of training.

Shapes: B sentences, K beams, T tokens, S source tokens, H hidden width, V vocabulary, D head width.
The network is Fan et al. 2020 (arXiv:2010.11125), which NLLB's dense models (arXiv:2207.04672) keep: a
pre-norm Transformer with ReLU and biases, one table E for the embeddings of both sides and the head.

    x = E[id] sqrt(H) + pos(p)       p = pad + 1, pad + 2, ... over the tokens that are not padding   (eq. 1)
    pos(p) = [sin(p f), cos(p f)]    f_i = 10000^(-i / (H/2 - 1)); the halves are concatenated        (eq. 2)
    source: [lang] pieces [eos]      target: [eos] [lang] pieces [eos], the first two are given       (eq. 3)
    score of a finished hypothesis = sum of its log-probs / (its tokens after the first)^alpha        (eq. 4)
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import struct
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models
from torch import Tensor, nn
from tqdm import tqdm

import data
import hub
from data import DataError
from model import CheckpointError, Embedding, open_weights, read_json

# M2M100's languages in the order of their ids, which start where vocab.json ends.
M2M100_LANGUAGES = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi "
    "hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc "
    "or pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
).split()
# NLLB's codes are ISO 639-3 and script; these go by a short one too.
NLLB_CODES = dict(pair.split(":") for pair in (
    "am:amh_Ethi ar:arb_Arab bg:bul_Cyrl bn:ben_Beng cs:ces_Latn da:dan_Latn de:deu_Latn el:ell_Grek "
    "en:eng_Latn es:spa_Latn fa:pes_Arab fi:fin_Latn fr:fra_Latn ha:hau_Latn he:heb_Hebr hi:hin_Deva "
    "hu:hun_Latn id:ind_Latn ig:ibo_Latn it:ita_Latn ja:jpn_Jpan km:khm_Khmr ko:kor_Hang lo:lao_Laoo "
    "ms:zsm_Latn my:mya_Mymr ne:npi_Deva nl:nld_Latn no:nob_Latn pl:pol_Latn pt:por_Latn ro:ron_Latn "
    "ru:rus_Cyrl so:som_Latn sv:swe_Latn sw:swh_Latn ta:tam_Taml te:tel_Telu th:tha_Thai tl:tgl_Latn "
    "tr:tur_Latn uk:ukr_Cyrl ur:urd_Arab vi:vie_Latn wo:wol_Latn xh:xho_Latn yo:yor_Latn zh:zho_Hans "
    "zu:zul_Latn").split())
# Language, or NLLB's script tag -> first word of the Unicode names of its letters. What is not here is Latin.
SCRIPTS = {word: line.split()[0] for line in (
    "CJK zh Hans Hant", "HANGUL ko Hang", "KANA ja Jpan", "CYRILLIC ba be bg kk mk mn ru sr uk Cyrl",
    "GREEK el Grek", "ARABIC ar fa ps sd ur Arab", "HEBREW he yi Hebr", "DEVANAGARI hi mr ne Deva",
    "BENGALI bn Beng", "GUJARATI gu Gujr", "GURMUKHI pa Guru", "TAMIL ta Taml", "TELUGU Telu",
    "KANNADA kn Knda", "MALAYALAM ml Mlym", "ORIYA or Orya", "SINHALA si Sinh", "ETHIOPIC am Ethi",
    "ARMENIAN hy Armn", "GEORGIAN ka Geor", "THAI th Thai", "LAO lo Laoo", "KHMER km Khmr",
    "MYANMAR my Mymr", "TIBETAN Tibt", "TIFINAGH Tfng", "OL Olck") for word in line.split()[1:]}
KANA = ("HIRAGANA", "KATAKANA", "CJK")
UNSPACED = ("CJK", "KANA", "THAI", "LAO", "KHMER", "MYANMAR")  # scripts without spaces between sentences

MAX_SOURCE = 150      # tokens of a segment: the models were trained on sentences
MAX_LOGITS = 2**26    # elements of the largest logits matrix: bounds the batch when the vocabulary is large
NO_REPEAT = 4         # the second try of a segment bans every repeated n-gram of this length
UNKNOWN_SHARE = 0.1   # a source with more unknown tokens than this cannot be translated
LENGTH_RATIO = {"CJK": 0.35, "KANA": 0.45, "HANGUL": 0.55, "yo": 1.5, "en": 1.0}  # characters, English 1
LENGTH_BOUNDS = 0.4, 2.5  # of a translation over what is expected; people's go from 0.55 to 2.05 (NTREX)
LENGTH_SLACK = 15         # characters added to both, so that short segments are not judged by their length

TIED = ("model.shared.weight", "lm_head.weight", "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight")
NORMAL, UNKNOWN, USER_DEFINED, BYTE = 1, 2, 4, 6  # kinds of SentencePiece's pieces


# ---- network ----

@dataclass
class Config:
    """The keys of config.json that the network depends on."""
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    vocab_size: int
    max_position_embeddings: int = 1024
    scale_embedding: bool = True
    activation_function: str = "relu"
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    decoder_start_token_id: int = 2
    clo_languages: list | None = None  # those a small M2M100 learned to write; None: all of its format


class Attention(nn.Module):
    """Multi-head attention. Keys and values are made apart from queries, so that they can be kept."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        B, T, H = x.shape
        return x.view(B, T, self.heads, H // self.heads).transpose(1, 2)  # (B, heads, T, D)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.k_proj(x)), self.split(self.v_proj(x))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask=None, causal=False) -> Tensor:
        """x (B, T, H) looks at key, value (B, heads, S, D) where mask (B, 1, T or 1, S) is True."""
        query = self.split(self.q_proj(x))
        mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = Attention(width, heads), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x))))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.self_attn_layer_norm(x)
        return self.feed_forward(x + self.self_attn(y, *self.self_attn.keys(y), mask))


class DecoderLayer(EncoderLayer):
    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__(width, heads, ffn)
        self.encoder_attn, self.encoder_attn_layer_norm = Attention(width, heads), nn.LayerNorm(width)

    def forward(self, x: Tensor, memory, memory_mask: Tensor, cache=None, mask=None) -> Tensor:
        """x (B, T, H); memory: keys and values of the source. Without a cache, self-attention is causal."""
        y = self.self_attn_layer_norm(x)
        keys = self.self_attn.keys(y) if cache is None else cache.append_(*self.self_attn.keys(y))
        x = x + self.self_attn(y, *keys, mask, causal=cache is None)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), *memory, memory_mask)
        return self.feed_forward(x)


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module], width: int):
        super().__init__()
        self.layers, self.layer_norm = nn.ModuleList(layers), nn.LayerNorm(width)


class M2M100(nn.Module):
    """Encoder-decoder whose parameters carry the checkpoint's own names. It has no dropout."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        encoder = (c.d_model, c.encoder_attention_heads, c.encoder_ffn_dim)
        decoder = (c.d_model, c.decoder_attention_heads, c.decoder_ffn_dim)
        self.model = nn.ModuleDict({
            "shared": Embedding(c.vocab_size, c.d_model),
            "encoder": Stack([EncoderLayer(*encoder) for _ in range(c.encoder_layers)], c.d_model),
            "decoder": Stack([DecoderLayer(*decoder) for _ in range(c.decoder_layers)], c.d_model)})
        if not self.head.is_meta:  # random numbers on the meta device import half of torch's compiler
            nn.init.normal_(self.head, std=c.d_model**-0.5)  # as an embedding, eq. 1 scales it to 1

    @property
    def head(self) -> Tensor:
        """(V, H): the embedding table is the head."""
        return self.model.shared.weight

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Eq. 1 and 2 of tokens (B, T) at positions (B or 1, T); a padding token has no position."""
        half = self.config.d_model // 2
        frequency = torch.exp(torch.arange(half, device=tokens.device) * (-math.log(10000) / (half - 1)))
        angle = positions.unsqueeze(-1).float() * frequency
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)
        waves = waves.masked_fill((positions == self.config.pad_token_id).unsqueeze(-1), 0.0)
        scale = math.sqrt(self.config.d_model) if self.config.scale_embedding else 1.0
        return self.model.shared(tokens) * scale + waves.to(self.head.dtype)

    def encode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The source (B, S) as (B, S, H); mask (B, S) is False on padding."""
        x = self.embed(tokens, self.config.pad_token_id + mask.cumsum(1) * mask)
        for layer in self.model.encoder.layers:
            x = layer(x, mask[:, None, None, :])
        return self.model.encoder.layer_norm(x)

    def memory(self, encoded: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the encoded source for each decoder layer, made once a sentence."""
        return [layer.encoder_attn.keys(encoded) for layer in self.model.decoder.layers]

    def decode(self, tokens: Tensor, start: int, memory, source_mask: Tensor, caches=None, mask=None):
        """Hidden states (B, T, H), after the final norm, of target tokens (B, T).

        Without caches the T tokens follow each other, from place `start` on. With them they are T beams, all
        at place `start`, and mask (B, 1, T, slots) says what each sees of the cache, itself included.
        """
        first = self.config.pad_token_id + 1 + start
        places = torch.arange(tokens.shape[1] if caches is None else 1, device=tokens.device)[None] + first
        x = self.embed(tokens, places)
        for i, layer in enumerate(self.model.decoder.layers):
            x = layer(x, memory[i], source_mask[:, None, None, :], caches and caches[i], mask)
        return self.model.decoder.layer_norm(x)

    def forward(self, source: Tensor, source_mask: Tensor, target: Tensor) -> Tensor:
        """Teacher forcing: hidden states (B, T, H) of target (B, T), which starts with eq. 3's two tokens.

        Row t has seen the target up to t and predicts t + 1. Logits are hidden @ head.T.
        """
        return self.decode(target, 0, self.memory(self.encode(source, source_mask)), source_mask)


# ---- loading ----

@dataclass
class Translator:
    """A model and its tokenizer. languages: those it can write. fingerprint: hash of its files."""
    model: M2M100
    tokenizer: "Tokenizer"
    languages: list[str]
    fingerprint: str


def load(path, device="cpu", dtype: torch.dtype = torch.float32) -> Translator:
    """The translator of an M2M100 or NLLB directory or hub id. CheckpointError says what is wrong with it."""
    path = hub.local(path, hub.TRANSLATOR_SETTINGS, hub.TRANSLATOR_WEIGHTS)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: give that of an M2M100 or NLLB checkpoint")
    model, tokenizer = load_model(path, device, dtype), load_tokenizer(path)
    known, trained = tokenizer.languages, model.config.clo_languages
    if max(known.values()) >= model.config.vocab_size:
        raise CheckpointError(f"{path}: the tokenizer has more ids than the vocab_size of config.json, "
                              f"{model.config.vocab_size}: files of different models?")
    for code in trained or []:
        if code not in known:
            raise CheckpointError(f"{path}/config.json: clo_languages has {code!r}, the tokenizer has not")
    return Translator(model, tokenizer, sorted(known if trained is None else trained), fingerprint(path))


def read_config(path: Path) -> Config:
    file = path / "config.json"
    raw = read_json(file)
    if raw.get("model_type") != "m2m_100":
        raise CheckpointError(f"{file}: model_type {raw.get('model_type')!r} is neither M2M100 nor NLLB")
    for field in fields(Config):
        if field.default is MISSING and not isinstance(raw.get(field.name), int):
            raise CheckpointError(f"{file}: {field.name} is {raw.get(field.name)!r}, a number was expected")
    if raw.get("activation_function", "relu") != "relu":
        raise CheckpointError(f"{file}: activation_function is {raw['activation_function']!r}, not relu")
    return Config(**{field.name: raw[field.name] for field in fields(Config) if field.name in raw})


def read_weights(path: Path):
    """Tensors by name, from safetensors if there are any, else from pytorch_model.bin (no code is run)."""
    old = path / "pytorch_model.bin"
    if not old.exists() or any(path.glob("model*.safetensors*")):
        return open_weights(path)
    try:
        return torch.load(old, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{old} cannot be read ({reason}): download it again") from None


def load_model(path, device="cpu", dtype: torch.dtype = torch.float32) -> M2M100:
    """The network with the directory's weights. One table stands for its up to four tied copies."""
    path = Path(path)
    config, weights = read_config(path), read_weights(path)
    with torch.device("meta"):
        model = M2M100(config)
    table = next((name for name in TIED if name in weights), TIED[0])
    state = {}
    for name, parameter in model.named_parameters():
        stored = table if name == TIED[0] else name
        if stored not in weights:
            raise CheckpointError(f"{path}: tensor {stored} is missing: weights and config.json do not match")
        tensor = weights[stored]
        if tensor.shape != parameter.shape:
            raise CheckpointError(f"{path}: tensor {stored} has shape {list(tensor.shape)}, config.json asks "
                                  f"for {list(parameter.shape)}")
        state[name] = tensor.to(device=device, dtype=dtype, copy=True)  # a copy: the file stays as it is
    surplus = [name for name in weights if name not in (*state, *TIED) and "embed_positions" not in name]
    if surplus:
        raise CheckpointError(f"{path}: tensor {surplus[0]} is unknown: weights and config.json do not match")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def fingerprint(path: Path) -> str:
    """Hash of a checkpoint: names, sizes and ends of its files (to read gigabytes would take a minute)."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".model", ".safetensors", ".bin"):
            with open(file, "rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - 2**20))
                digest.update(f"{file.name} {size} ".encode() + stream.read())
    return digest.hexdigest()[:16]


# ---- tokenizer ----

@dataclass
class Tokenizer:
    """Text <-> model ids. to_model maps the tokenizer's own ids to the model's (None: they are the same)."""
    inner: tokenizers.Tokenizer
    languages: dict[str, int]  # code -> id of its token
    unknown: int
    to_model: list[int] | None = None
    normalize: "Normalizer | None" = None  # a tokenizer.json has its own

    def __post_init__(self):
        own = range(self.inner.get_vocab_size()) if self.to_model is None else self.to_model
        special = {0, 1, 2, self.unknown, *self.languages.values()}  # <s>, <pad>, </s> come first everywhere
        self.from_model = {known: i for i, known in enumerate(own) if known not in special}

    def encode(self, text: str) -> list[int]:
        """Pieces of one line, without language and end tokens."""
        text = text if self.normalize is None else self.normalize(text)
        ids = self.inner.encode(text, add_special_tokens=False).ids
        return ids if self.to_model is None else [self.to_model[i] for i in ids]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode([self.from_model[i] for i in ids if i in self.from_model]).strip()


def load_tokenizer(path: Path) -> Tokenizer:
    """M2M100's SentencePiece model with vocab.json, or a tokenizer.json whose added tokens are languages."""
    spm, vocab, fast = path / "sentencepiece.bpe.model", path / "vocab.json", path / "tokenizer.json"
    if spm.exists() and vocab.exists():
        inner, pieces, normalize = read_sentencepiece(spm)
        ids = read_json(vocab)
        unknown = ids.get("<unk>", 3)
        languages = {code: len(ids) + i for i, code in enumerate(M2M100_LANGUAGES)}
        return Tokenizer(inner, languages, unknown, [ids.get(piece, unknown) for piece in pieces], normalize)
    if not fast.exists():
        raise CheckpointError(f"{path} has no tokenizer: {spm.name} and {vocab.name}, or {fast.name}")
    read_json(fast)  # for its error messages
    inner = tokenizers.Tokenizer.from_file(str(fast))
    inner.encode_special_tokens = True  # "</s>" or "eng_Latn" in a text is text
    languages = {}
    for i, token in inner.get_added_tokens_decoder().items():
        found = re.fullmatch(r"__([a-z]{2,3})__|([a-z]{3}_[A-Z][a-z]{3})", token.content)
        if found:
            languages[found[1] or found[2]] = i
    languages |= {short: languages[code] for short, code in NLLB_CODES.items() if code in languages}
    if not languages:
        raise CheckpointError(f"{fast} has no language tokens such as __sw__ or swh_Latn: no translator")
    return Tokenizer(inner, languages, inner.token_to_id("<unk>"))


def wire_fields(message: bytes):
    """(field number, value) of a protobuf message, whatever its schema: varints as int, the rest as bytes."""
    def varint(at):
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value, at

    at = 0
    while at < len(message):
        key, at = varint(at)
        if key & 7 == 0:
            value, at = varint(at)
        else:
            size, at = varint(at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = message[at:at + size], at + size
        yield key >> 3, value


def read_sentencepiece(path: Path) -> tuple[tokenizers.Tokenizer, list[str], "Normalizer"]:
    """A SentencePiece .model: a tokenizer with its ids, its pieces in order, what it does to a text first.

    Fields by sentencepiece_model.proto. Model: 1 piece {1 text, 2 score, 3 kind}, 2 trainer {3 algorithm},
    3 normalizer {2 charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces}.
    """
    pieces, scores, kinds, trainer, rules = [], [], [], {}, {}
    try:
        for number, value in wire_fields(path.read_bytes()):
            if number == 1:
                piece = {3: NORMAL} | dict(wire_fields(value))
                pieces.append(piece[1].decode("utf-8"))
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                kinds.append(piece[3])
            elif number in (2, 3):
                (trainer if number == 2 else rules).update(wire_fields(value))
        unknown = kinds.index(UNKNOWN)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is no SentencePiece model ({error}): download it again") from None
    if USER_DEFINED in kinds:
        piece = pieces[kinds.index(USER_DEFINED)]
        raise CheckpointError(f"{path}: user-defined pieces such as {piece!r} are not supported")
    inner = tokenizers.Tokenizer((bpe if trainer.get(3, 1) == 2 else unigram)(pieces, scores, kinds, unknown))
    normalize = Normalizer(rules.get(2, b""), bool(rules.get(3, 1)), bool(rules.get(4, 1)))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * normalize.add_dummy_prefix)
    return inner, pieces, normalize


def bpe(pieces: list[str], scores: list[float], kinds: list[int], unknown: int) -> models.BPE:
    """SentencePiece joins the neighbours that form the best piece: so every split of a piece is a merge, best
    piece first, and of its splits the longest left part first."""
    ids, merges = {piece: i for i, piece in enumerate(pieces)}, []
    for piece, score, kind in zip(pieces, scores, kinds):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))] if kind == NORMAL else []
        merges += [((score, len(a)), (a, b)) for a, b in splits if a in ids and b in ids]
    merges.sort(key=lambda merge: merge[0], reverse=True)
    return models.BPE(ids, [pair for _, pair in merges], unk_token=pieces[unknown], fuse_unk=True,
                      byte_fallback=BYTE in kinds)


def unigram(pieces: list[str], scores: list[float], kinds: list[int], unknown: int) -> models.Unigram:
    """The most probable segmentation. <s> and the like get a name that no text has."""
    named = [piece if kind in (NORMAL, BYTE) else "\0" + piece for piece, kind in zip(pieces, kinds)]
    return models.Unigram(list(zip(named, scores)), unknown, byte_fallback=BYTE in kinds)


@dataclass
class Normalizer:
    """What SentencePiece does to a text first: everywhere the longest rule of its charsmap, then the spaces.

    By hand, since tokenizers' version drops the second of two marks on a letter, and with it Yoruba's tones.
    charsmap: u32 size of a trie; the trie, a double array as the library darts-clone writes it; the
    replacements, each ending in a zero byte. A unit of the trie: bits 0-7 label, 8 "a value follows", 9 and
    10-30 scale and offset of its children.
    """
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    def __post_init__(self):
        size = int.from_bytes(self.charsmap[:4], "little")
        self.trie = struct.unpack(f"<{size // 4}I", self.charsmap[4:4 + size])
        self.texts = self.charsmap[4 + size:]

    def __call__(self, text: str) -> str:
        raw, at, out = text.encode("utf-8"), 0, bytearray()
        while at < len(raw):
            length, replacement = self.match(raw, at)
            out += replacement
            at += length
        text = out.decode("utf-8")
        if self.remove_extra_whitespaces:
            text = re.sub(" {2,}", " ", text).strip(" ")
        return (" " * (self.add_dummy_prefix and text != "") + text).replace(" ", "▁")

    def match(self, raw: bytes, at: int) -> tuple[int, bytes]:
        """(bytes taken at raw[at:], their replacement) by the longest rule, or a character as it is."""
        length = 1 if raw[at] < 0x80 else 2 if raw[at] < 0xE0 else 3 if raw[at] < 0xF0 else 4
        found, node, unit = (length, raw[at:at + length]), 0, self.trie[0] if self.trie else 0
        for end in range(at, len(raw) if self.trie else at):
            node ^= unit >> 10 << (unit >> 6 & 8) ^ raw[end]
            unit = self.trie[node]
            if unit & 0x800000FF != raw[end]:
                break
            if unit >> 8 & 1:
                start = self.trie[node ^ unit >> 10 << (unit >> 6 & 8)] & 0x7FFFFFFF
                found = end + 1 - at, self.texts[start:self.texts.index(b"\0", start)]
        return found


# ---- beam search ----

class Cache:
    """Keys and values of one decoder layer. Every token a beam ever tried has a slot: (B, heads, slots, D).

    Hypotheses form a tree. A beam that changes its parent copies nothing: a mask says which slots are its
    ancestors, and all beams of a sentence read the sentence's slots in one attention call.
    """

    def __init__(self):
        self.key, self.value, self.used = torch.empty(0), torch.empty(0), 0

    def append_(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take in key, value (B, heads, n, D) of n new tokens; give all so far, (B, heads, used, D)."""
        B, heads, n, D = key.shape
        old, self.used = self.used, self.used + n
        if old == 0 or self.used > self.key.shape[2]:  # doubling: a slot is moved about once
            room = key.new_empty(2, B, heads, 2 * self.used, D)
            if old:
                room[0, :, :, :old], room[1, :, :, :old] = self.key[:, :, :old], self.value[:, :, :old]
            self.key, self.value = room
        self.key[:, :, old:self.used], self.value[:, :, old:self.used] = key, value
        return self.key[:, :, :self.used], self.value[:, :, :self.used]

    def keep_(self, rows: Tensor) -> None:
        self.key, self.value = self.key[rows], self.value[rows]


@dataclass
class Beams:
    """The hypotheses of B sentences, K of each (one before the first step); done sentences lose their row."""
    row: Tensor        # (B,) index of the sentence
    limit: Tensor      # (B,) most tokens it may have, the language token included
    history: Tensor    # (B, K, T) its tokens after the first
    visible: Tensor    # (B, K, slots) the ancestors of each hypothesis in the cache, itself included
    score: Tensor      # (B, K) sum of log-probs
    finished: Tensor   # (B,) hypotheses that have ended; K are enough
    best: Tensor       # (B,) eq. 4 of the best of those

    @classmethod
    def start(cls, language: int, limits: list[int], device) -> "Beams":
        B = len(limits)
        return cls(torch.arange(B, device=device), torch.tensor(limits, device=device),
                   torch.full((B, 1, 1), language, device=device),
                   torch.ones(B, 1, 2, dtype=torch.bool, device=device), torch.zeros(B, 1, device=device),
                   torch.zeros(B, dtype=torch.long, device=device),
                   torch.full((B,), -math.inf, device=device))

    def keep(self, rows: Tensor) -> "Beams":
        return Beams(*(getattr(self, field.name)[rows] for field in fields(self)))


def step(state: Beams, logits: Tensor, K: int, alpha: float, end: int, answers: list[list[int]]) -> Beams:
    """Extend every hypothesis by a token, from logits (B, K, V), as transformers with early_stopping=True.

    A sentence's 2K best extensions are looked at: those that end among the first K are finished hypotheses,
    the best of which goes to `answers`; of the others K go on, and there are K, since a parent ends but once.
    """
    T, logits = state.history.shape[2] + 1, logits.float()
    top, token = logits.topk(2 * K)
    total = (top - logits.logsumexp(-1, keepdim=True) + state.score[..., None]).flatten(1)
    total, place = total.topk(2 * K)
    parent, token = place // (2 * K), token.flatten(1).gather(1, place)                       # (B, 2K)
    last = state.limit <= T
    ends = ((token == end) | last[:, None])[:, :K] & (state.finished < K)[:, None]
    best, which = (total[:, :K] / T**alpha).masked_fill(~ends, -math.inf).max(1)
    for i in (best > state.best).nonzero()[:, 0].tolist():
        j = which[i]
        answers[state.row[i]] = state.history[i, parent[i, j]].tolist() + [token[i, j].item()]
    score, alive = total.masked_fill(token == end, -math.inf).topk(K)
    parent, token = parent.gather(1, alive), token.gather(1, alive)                           # (B, K)
    own = torch.eye(K, dtype=torch.bool, device=token.device).expand(len(token), -1, -1)
    return Beams(state.row, state.limit, torch.cat([follow(state.history, parent), token[..., None]], 2),
                 torch.cat([follow(state.visible, parent), own], 2), score,
                 state.finished + ends.sum(1) + K * last, torch.maximum(state.best, best))


def follow(x: Tensor, parent: Tensor) -> Tensor:
    """x (B, K, n) in the order of parent (B, K)."""
    return x.gather(1, parent[..., None].expand(-1, -1, x.shape[2]))


def ban_repeats_(logits: Tensor, history: Tensor, n: int) -> None:
    """Forbid every token that would complete an n-gram that its hypothesis already has."""
    for row, ids in zip(logits.flatten(0, 1), history.flatten(0, 1).tolist()):
        tail = ids[len(ids) - n + 1:]
        row[[ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i:i + n - 1] == tail]] = -math.inf


@torch.inference_mode()
def beam_search(model: M2M100, sources: list[list[int]], language: int, limits: list[int], beams: int = 5,
                alpha: float = 1.0, no_repeat: int = 0) -> list[list[int]]:
    """The best translation of each source: ids that begin with `language` and end with the end token, unless
    limits[i] tokens did not suffice. What else is in the batch changes it by rounding alone.

    beams=1 is greedy; no_repeat=n allows no n-gram twice.
    """
    c, device, B = model.config, model.head.device, len(sources)
    source = [torch.tensor(ids, device=device) for ids in sources]
    source = nn.utils.rnn.pad_sequence(source, True, c.pad_token_id)
    lengths = torch.tensor([[len(ids)] for ids in sources], device=device)
    mask = torch.arange(source.shape[1], device=device) < lengths
    memory = model.memory(model.encode(source, mask))
    caches, state, answers = [Cache() for _ in memory], Beams.start(language, limits, device), [[]] * B
    model.decode(torch.full((B, 1), c.decoder_start_token_id, device=device), 0, memory, mask, caches)
    while len(state.row):
        T = state.history.shape[2]
        hidden = model.decode(state.history[:, :, -1], T, memory, mask, caches, state.visible[:, None])
        logits = hidden @ model.head.T
        if no_repeat:
            ban_repeats_(logits, state.history, no_repeat)
        state = step(state, logits, beams, alpha, c.eos_token_id, answers)
        done = state.finished >= beams
        if done.sum() * 8 >= len(done):  # dropping rows copies the caches: only when it pays
            rows = (~done).nonzero()[:, 0]
            state, mask = state.keep(rows), mask[rows]
            memory = [(key[rows], value[rows]) for key, value in memory]
            for cache in caches:
                cache.keep_(rows)
    return answers


# ---- documents ----

# Set aside whole: fenced code, display formulas, HTML code.
BLOCK = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|\$\$.*?\$\$|\\\[.*?\\\]"
                   r"|\\begin\{[\w*]+\}.*?\\end\{[\w*]+\}|<(?:pre|code)\b.*?</(?:pre|code)>)", re.DOTALL)
# Set aside at the start of a line: indentation, quote marks, headings, list markers, check boxes, numbers.
MARKER = re.compile(r"\s*(?:(?:[-*+•–>]|#{1,6}|\(?\d{1,3}[.):]|\(?[A-Za-z][.)]|\[[ xX]\])(?:\s+|$))*")
# Set aside inside a sentence: inline code, links, mail addresses, formulas, tags, placeholders, emoji.
INLINE = re.compile(
    r"(`[^`\n]+`|(?:https?://|www\.)[^\s<>]*[^\s<>.,;:!?)\]'\"*]|\]\([^)\s]+\)|[\w.+-]+@[\w-]+(?:\.\w+)+"
    r"|\\\(.*?\\\)|(?<![\w$])\$[^\s$](?:[^$\n]*[^\s$])?\$(?![\w$])|<[^<>\s][^<>\n]*>"
    r"|\{\{?[\w .-]+\}?\}|\[\d+\]|%[sd]\b|[\U0001F000-\U0001FAFF\u2190-\u21FF\u2600-\u27BF\uFE0F\u200D]+)")
WORD = re.compile(r"[^\W\d_]")
SENTENCE_END = re.compile(r"(?:[.!?…؟।]+[\"'”’)\]*]*(?=\s)|[。！？]+[”’」』）]*)\s*(?=\S)")
NOT_AN_END = set("Mr Mrs Ms Dr Prof St vs etc e.g i.e cf al No Fig Jr Sr Inc Ltd Co approx Vol pp".split())
CLAUSE_END, SPACE, ANYWHERE = re.compile(r"[;:,，、；：]\s*"), re.compile(r"\s+"), re.compile("")
TEXT, KEEP, GAP = "text", "keep", "gap"  # to translate; as it is; white space between sentences


def parse(text: str, fits: Callable[[str], bool]) -> list[tuple[str, str]]:
    """[(kind, string)], whose strings joined are `text`. fits(string): is a segment short enough?"""
    parts = []
    for i, block in enumerate(BLOCK.split(text)):
        for j, line in enumerate([block] if i % 2 else re.split(r"(\r?\n)", block)):
            if i % 2 or j % 2:
                parts.append((KEEP, line))
                continue
            table = line.lstrip().startswith("|") or line.count("|") > 1
            for cell in re.split(r"(\|)", line) if table else [line]:
                parts += parse_line(cell, fits)
    return [(kind, string) for kind, string in parts if string]


def parse_line(line: str, fits: Callable[[str], bool]) -> list[tuple[str, str]]:
    start = MARKER.match(line).end()
    end = max(start, len(line.rstrip()))
    parts = [(KEEP, line[:start])]
    for sentence in split_sentences(line[start:end]):
        for piece in cut(sentence, fits):
            body = piece.strip()
            before, _, after = piece.partition(body) if body else (piece, "", "")
            words = WORD.search(INLINE.sub("", body))
            parts += [(GAP, before), (TEXT if words else KEEP, body), (GAP, after)]
    return parts + [(KEEP, line[end:])]


def split_sentences(line: str) -> list[str]:
    """Sentences, each with the white space after it. None ends inside a protected span, after an abbreviation
    or an initial, or before a small letter."""
    spans = [match.span() for match in INLINE.finditer(line)]
    sentences, start = [], 0
    for match in SENTENCE_END.finditer(line):
        word = (line[start:match.start()].split() or [""])[-1].lstrip("\"'“‘([")
        initial = len(word) == 1 and word.isupper() and word != "I"
        short = match[0].strip() == "." and (initial or word in NOT_AN_END)
        small = line[match.end():].lstrip("\"'“‘([*¿¡")[:1].islower()
        if not (short or small or any(a < match.end() < b for a, b in spans)):
            sentences.append(line[start:match.end()])
            start = match.end()
    return sentences + [line[start:]]


def cut(sentence: str, fits: Callable[[str], bool]) -> list[str]:
    """The sentence, halved at the clause or word end nearest its middle until every part fits."""
    if fits(sentence):
        return [sentence]
    spans, middle = [match.span() for match in INLINE.finditer(sentence)], len(sentence) / 2
    for pattern, reach in ((CLAUSE_END, middle / 2), (SPACE, middle), (ANYWHERE, middle)):
        places = [match.end() for match in pattern.finditer(sentence) if abs(match.end() - middle) < reach
                  and not any(a < match.end() < b for a, b in spans)]
        if places:
            place = min(places, key=lambda p: abs(p - middle))
            return cut(sentence[:place], fits) + cut(sentence[place:], fits)
    return [sentence]


def hide(segment: str) -> tuple[str, list[str]]:
    """The segment with [0], [1], ... for its protected spans, and the spans. Most models copy such marks."""
    spans = INLINE.findall(segment)
    numbers = iter(range(len(spans)))
    return INLINE.sub(lambda match: f"[{next(numbers)}]", segment), spans


def show(text: str, spans: list[str]) -> str | None:
    """Put the spans back; None unless every mark is there exactly once."""
    parts = re.split(r"[\[［【]\s*(\d+)\s*[\]］】]", text) if spans else [text]
    if sorted(map(int, parts[1::2])) != list(range(len(spans))):
        return None
    return "".join(spans[int(part)] if i % 2 else part for i, part in enumerate(parts))


# ---- checks ----

def script_of(language: str) -> str:
    return SCRIPTS.get(language) or SCRIPTS.get(language[-4:], "LATIN")


def loops(ids: list[int]) -> bool:
    """Whether a stretch repeats itself: tokens equal to those n before, 2n of them in a row, at least 8."""
    for n in range(1, len(ids) // 3 + 1):
        run = 0
        for a, b in zip(ids, ids[n:]):
            run = run + 1 if a == b else 0
            if run >= max(8, 2 * n):
                return True
    return False


def wrong_script(text: str, language: str) -> bool:
    """Whether fewer than three letters in ten are of the language's script. Names may stay Latin."""
    script = script_of(language)
    names = [unicodedata.name(char, "") for char in text if char.isalpha()]
    right = sum(name.startswith(KANA if script == "KANA" else script) for name in names)
    return len(names) > 8 and right < 0.3 * len(names)


def copied(source: str, text: str) -> bool:
    """Whether four in five of the source's words, names left out, came back as they were."""
    words = [word for word in re.findall(r"[^\W\d_]{3,}", source) if word.islower()]
    there = set(re.findall(r"[^\W\d_]{3,}", text))
    return len(words) > 3 and sum(word in there for word in words) >= 0.8 * len(words)


def odd_length(source: str, text: str, languages: tuple[str, str]) -> bool:
    """Whether a translation is far shorter or longer than its language would have it."""
    own, other = (LENGTH_RATIO.get(code[:2]) or LENGTH_RATIO.get(script_of(code), 1.15) for code in languages)
    ratio = (len(text) + LENGTH_SLACK) / (len(source) * other / own + LENGTH_SLACK)
    return not LENGTH_BOUNDS[0] <= ratio <= LENGTH_BOUNDS[1]


# ---- translation ----

@dataclass
class Job:
    """How to translate: every function below needs most of it. progress(n) hears of n generated tokens."""
    translator: Translator
    source: str
    target: str
    beams: int = 5
    batch_tokens: int = 2048
    progress: Callable[[int], None] | None = None

    def language(self, code: str) -> int:
        languages = self.translator.tokenizer.languages
        if code not in languages:
            known = ", ".join(self.translator.languages)
            raise DataError(f"the translator does not know the language {code!r}; it knows {known}")
        return languages[code]

    def source_ids(self, text: str) -> list[int]:
        end = self.translator.model.config.eos_token_id
        return [self.language(self.source), *self.translator.tokenizer.encode(text), end]

    def fits(self, segment: str) -> bool:
        room = min(MAX_SOURCE, self.translator.model.config.max_position_embeddings)
        return len(self.source_ids(hide(segment)[0])) <= room

    def fault(self, source: str, source_ids: list[int], text: str, ids: list[int]) -> str | None:
        """Why a translation cannot be trusted, or None."""
        languages = self.source, self.target
        if source_ids.count(self.translator.tokenizer.unknown) > UNKNOWN_SHARE * len(source_ids):
            return "unknown words"
        if ids[-1] != self.translator.model.config.eos_token_id:
            return "cut at the limit"
        faults = {"empty": not text, "repetition": loops(ids) and not loops(source_ids),
                  "wrong script": wrong_script(text, self.target), "copied": copied(source, text),
                  "length": odd_length(source, text, languages)}
        return next((name for name, found in faults.items() if found), None)


def translate_sentences(texts: list[str], job: Job, beams: int, no_repeat: int = 0) -> list[tuple]:
    """(translation, its fault or None) of each text, in batches of like length."""
    model, tokenizer = job.translator.model, job.translator.tokenizer
    sources, target = [job.source_ids(text) for text in texts], job.language(job.target)
    order, results = sorted(range(len(texts)), key=lambda i: -len(sources[i])), [("", None)] * len(texts)
    while order:
        size = min(job.batch_tokens // len(sources[order[0]]), MAX_LOGITS // (beams * len(model.head)))
        batch, order = order[:max(1, size)], order[max(1, size):]
        limits = [min(2 * len(sources[i]) + 50, model.config.max_position_embeddings) for i in batch]
        outputs = beam_search(model, [sources[i] for i in batch], target, limits, beams, no_repeat=no_repeat)
        for i, ids in zip(batch, outputs):
            text = tokenizer.decode(ids)
            results[i] = text, job.fault(texts[i], sources[i], text, ids)
        if job.progress:
            job.progress(sum(map(len, outputs)))
    return results


def translate_segments(segments: list[str], job: Job) -> dict[str, tuple[str, str | None]]:
    """{segment: (translation, its fault or None)}. What fails is tried again, greedily and without repeats;
    where the model loses a protected span, the texts around the spans are translated on their own."""
    hidden = [hide(segment) for segment in segments]
    drafts = translate_sentences([text for text, _ in hidden], job, job.beams)
    again = [i for i, (_, fault) in enumerate(drafts) if fault not in (None, "unknown words")]
    for i, draft in zip(again, translate_sentences([hidden[i][0] for i in again], job, 1, NO_REPEAT)):
        drafts[i] = drafts[i] if draft[1] else draft
    whole = {segment: (show(text, spans), fault)
             for segment, (_, spans), (text, fault) in zip(segments, hidden, drafts)}
    lost = {segment: INLINE.split(segment) for segment, (text, _) in whole.items() if text is None}
    around = {piece.strip() for pieces in lost.values() for piece in pieces[::2] if WORD.search(piece)}
    known = translate_segments(sorted(around), job) if around else {}
    for segment, pieces in lost.items():
        drafts = [known.get(piece.strip(), (piece.strip(), None)) for piece in pieces]
        text = "".join(piece.replace(piece.strip(), text) for piece, (text, _) in zip(pieces, drafts))
        whole[segment] = text, next((fault for _, fault in drafts if fault), None)
    return whole


def translate_documents(texts: list[str], job: Job) -> list[tuple[str, Counter]]:
    """(translation, Counter of its segments' faults) of each document. A segment is translated once."""
    parsed = [parse(text, job.fits) for text in texts]
    known = translate_segments(sorted({s for parts in parsed for kind, s in parts if kind == TEXT}), job)
    unspaced = [script_of(code) in UNSPACED for code in (job.source, job.target)]
    documents = []
    for parts in parsed:
        out, faults, before = [], Counter(), KEEP
        for kind, string in parts:
            if kind == TEXT and before == TEXT and unspaced == [True, False]:
                out.append(" ")  # none follows 。 but one belongs behind its translation
            text, fault = known[string] if kind == TEXT else (string, None)
            out.append("" if kind == GAP and unspaced[1] else text)
            faults.update([fault] if fault else [])
            before = kind
        documents.append(("".join(out), faults))
    return documents


def translate(texts: list[str], source: str, target: str, translator: Translator, beams: int = 5,
              batch_tokens: int = 2048, progress: Callable[[int], None] | None = None) -> list[str]:
    """Each document in `target`, its lines, code, links and markup as they were."""
    job = Job(translator, source, target, beams, batch_tokens, progress)
    return [text for text, _ in translate_documents(texts, job)]


# ---- rows ----

def row_hash(row: dict, targets: list[str], job: Job) -> str:
    what = [row[job.source]["prompt"], row[job.source]["response"], job.source, targets, job.beams,
            job.translator.fingerprint, str(job.translator.model.head.dtype)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def to_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def file_failed_(record: dict, keep_failed: bool) -> bool:
    """Put failed translations beside the others, or under "clo", out of the way. True if one moved."""
    drafts = record["clo"]["drafts"]
    moving = [code for code in record["clo"]["failed"] if (code in drafts) == keep_failed]
    for code in moving:
        (record if keep_failed else drafts)[code] = (drafts if keep_failed else record).pop(code)
    return bool(moving)


def read_done(path: Path, keys: set[tuple[str, str]], keep_failed: bool) -> dict[tuple[str, str], dict]:
    """{(row id, hash): record} of those rows in `path` that need no more work. DataError for a foreign file.

    The file is written anew if it holds half a line (after a kill) or rows whose text, model or settings have
    changed since, which are dropped.
    """
    raw = path.read_bytes() if path.exists() else b""
    whole, names, done = raw[:raw.rfind(b"\n") + 1], {name for name, _ in keys}, {}
    changed = len(raw) > len(whole)
    for number, line in enumerate(whole.decode("utf-8", "replace").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            key = data.identifier(record, str(path)), record["clo"]["hash"]
            changed |= file_failed_(record, keep_failed)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}:{number}: not written by translate.py; choose another file") from None
        if key not in keys and key[0] in names or key in done:
            changed = True
        else:
            done[key] = record
    if changed:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(map(to_line, done.values())), encoding="utf-8")
        os.replace(temporary, path)
    return done


def translate_chunk(rows: list[dict], keys: list[tuple], targets: list[str], job: Job) -> list[dict]:
    """The records of some rows. A translation that a row already has stays."""
    records = []
    for row, (name, own) in zip(rows, keys):
        rest = {key: value for key, value in row.items() if key not in ("row_id", "clo")}
        label = "row_id" if "id" in (*row, *targets) else "id"  # Indonesian is called "id"
        records.append({label: name, **rest, "clo": {"hash": own, "failed": {}, "drafts": {}}})
    for target in targets:
        todo = [record for row, record in zip(rows, records) if target not in row]
        texts = [record[job.source][part] for record in todo for part in ("prompt", "response")]
        pairs = iter(translate_documents(texts, replace(job, target=target)))
        for record, (prompt, faults), (response, more) in zip(todo, pairs, pairs):
            record[target] = {"prompt": prompt, "response": response}
            if faults + more:
                record["clo"]["failed"][target] = dict(faults + more)
    return records


def translate_rows(rows: list[dict], translator: Translator, source: str, target: str | list[str], path,
                   beams: int = 5, batch_tokens: int = 2048, keep_failed: bool = False,
                   chunk: int = 32) -> list[dict]:
    """The rows with their translation into `target` (a code or several), through the JSONL file `path`.

    Every `chunk` rows their lines are appended; a run killed at any moment goes on from there. A row of which
    a segment failed is left out of the result, and its translation is filed under "clo", unless keep_failed.
    """
    path, targets = Path(path), [target] if isinstance(target, str) else list(target)
    rows, job = data.require_languages(rows, source), Job(translator, source, targets[0], beams, batch_tokens)
    job.language(next((code for code in targets if code not in translator.languages), source))
    keys = [(row["row_id"], row_hash(row, targets, job)) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_done(path, set(keys), keep_failed)
    todo = [i for i, key in enumerate(keys) if key not in done]
    title = f"{source} -> {','.join(targets)}"
    bar = tqdm(total=len(rows), initial=len(rows) - len(todo), desc=title, unit="row")
    start, tokens = time.perf_counter(), Counter()

    def progress(n: int) -> None:
        tokens["generated"] += n
        bar.set_postfix_str(f"{tokens['generated'] / (time.perf_counter() - start):,.0f} tokens/s")

    job.progress = progress
    with open(path, "ab") as file, bar:
        for some in (todo[first:first + chunk] for first in range(0, len(todo), chunk)):
            records = translate_chunk([rows[i] for i in some], [keys[i] for i in some], targets, job)
            for i, record in zip(some, records):
                file_failed_(record, keep_failed)
                done[keys[i]] = record
            file.write("".join(map(to_line, records)).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(some))
    print(describe_faults([done[key] for key in keys], targets, keep_failed))
    return [row | {code: done[key][code] for code in targets} for row, key in zip(rows, keys)
            if all(code in done[key] for code in targets)]


def describe_faults(records: list[dict], targets: list[str], keep_failed: bool) -> str:
    """How many rows failed and why, by language."""
    lines = []
    for target in targets:
        failed = [record["clo"]["failed"][target] for record in records if target in record["clo"]["failed"]]
        fate = f"; {len(failed)} with a failed segment are {'kept' if keep_failed else 'left out'}:"
        lines.append(f"{target}: {len(records) - len(failed)} of {len(records)} rows translated"
                     + fate * bool(failed))
        faults = sum(map(Counter, failed), Counter())
        lines += [f"{number:8,} segments: {fault}" for fault, number in faults.most_common()]
    return "\n".join(lines)


# ---- command line ----

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Translate a data set into the parallel format of clo.py.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--lang", required=True, help="target language, or several: sw,yo")
    add("--source", default="en", help="language of the data")
    add("--data", default="demo/english.jsonl", help="rows in any format that data.py reads")
    add("--turns", choices=("first", "all"), default="first", help="exchanges of a conversation to take")
    add("--samples", type=int, default=0, help="how many rows, from the first; 0: all")
    add("--out", default="translated.jsonl", help="JSONL file; a run goes on with what is there")
    add("--text", help="a text to translate and print instead")
    add = parser.add_argument_group("translator").add_argument
    add("--translator", default="demo/m2m100", help="directory or hub id of an M2M100 or NLLB")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and arithmetic")
    add = parser.add_argument_group("decoding and checks").add_argument
    add("--beams", type=int, default=5, help="hypotheses of a sentence")
    add("--batch-tokens", type=int, default=2048, help="source tokens of a batch: fewer need less memory")
    add("--keep-failed", action="store_true", help="keep rows of which a segment failed its checks")
    return parser.parse_args(argv)


def pick_device(name: str) -> str:
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name} cannot be used ({str(error).splitlines()[0]}): try cpu") from None
    return name


def main():
    args = parse_args()
    if args.beams < 1 or args.batch_tokens < 1 or args.samples < 0:
        raise DataError("--beams and --batch-tokens must be at least 1, --samples at least 0")
    device = pick_device(args.device)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    targets = args.lang.split(",")
    if args.text:
        translator = load(args.translator, device, dtype)
        for target in targets:
            print(*translate([args.text], args.source, target, translator, args.beams, args.batch_tokens))
        return
    rows = data.read_rows(args.data, args.source, args.turns)[:args.samples or None]
    translator = load(args.translator, device, dtype)
    print(f"{args.data}: {len(rows)} rows; {args.translator} on {device} in {args.dtype}")
    translate_rows(rows, translator, args.source, targets, args.out, args.beams, args.batch_tokens,
                   args.keep_failed)
    print(f"{args.out} is written; next: python clo.py --lang {targets[0]} --data {args.out}")


if __name__ == "__main__":
    data.run(main)
