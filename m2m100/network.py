"""M2M100 and NLLB: the encoder-decoder by hand, under the checkpoint's own parameter names.

    model = load_model("demo/m2m100")

The network is Fan et al. 2020 (arXiv:2010.11125), which NLLB's dense models (arXiv:2207.04672) keep: a
pre-norm Transformer with ReLU and biases, one table E for the embeddings of both sides and the head.
Shapes: B sentences, K beams, T tokens, S source tokens, H hidden width, V vocabulary, D head width, R rows.

    x = E[id] sqrt(H) + pos(p)       p = pad + 1, pad + 2, ... over the tokens that are not padding   (eq. 1)
    pos(p) = [sin(p f), cos(p f)]    f_i = 10000^(-i / (H/2 - 1)); the halves are concatenated        (eq. 2)
"""

import math
import pickle
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.files import InputError, as_kind, first_line, need, read_json, refuse_pointer
from formats.weights import Weights

TIED = ("model.shared.weight", "lm_head.weight", "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight")


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
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        B, T, H = x.shape
        split = x.view(B, T, self.heads, H // self.heads)
        return split.transpose(1, 2)  # (B, heads, T, D)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.k_proj(x)), self.split(self.v_proj(x))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask=None, causal=False) -> Tensor:
        """x (B, T, H) looks at key, value (B, heads, S, D); mask (B, 1, T or 1, S) says at which."""
        query = self.split(self.q_proj(x))
        mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        mixed = mixed.transpose(1, 2).flatten(2)
        return self.out_proj(mixed)


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def feed_forward(self, x: Tensor) -> Tensor:
        y = self.fc1(self.final_layer_norm(x))
        y = F.relu(y, inplace=True)
        return x + self.fc2(y)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.self_attn_layer_norm(x)
        keys = self.self_attn.keys(y)
        return self.feed_forward(x + self.self_attn(y, *keys, mask))


class DecoderLayer(EncoderLayer):
    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__(width, heads, ffn)
        self.encoder_attn = Attention(width, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory, memory_mask: Tensor, cache=None, mask=None) -> Tensor:
        """x (B, T, H); memory: keys and values of the source. Without a cache, self-attention is causal."""
        y = self.self_attn_layer_norm(x)
        keys = self.self_attn.keys(y)
        if cache is not None:
            keys = cache.append_(*keys)
        x = x + self.self_attn(y, *keys, mask, causal=cache is None)
        y = self.encoder_attn_layer_norm(x)
        return self.feed_forward(x + self.encoder_attn(y, *memory, memory_mask))


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module], width: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(width)


class M2M100(nn.Module):
    """Encoder-decoder whose parameters carry the checkpoint's own names. It has no dropout."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        encoder = (c.d_model, c.encoder_attention_heads, c.encoder_ffn_dim)
        decoder = (c.d_model, c.decoder_attention_heads, c.decoder_ffn_dim)
        encoders = [EncoderLayer(*encoder) for _ in range(c.encoder_layers)]
        decoders = [DecoderLayer(*decoder) for _ in range(c.decoder_layers)]
        table = torch.empty(c.vocab_size, c.d_model)
        self.model = nn.ModuleDict({
            "shared": nn.Embedding.from_pretrained(table, freeze=False),
            "encoder": Stack(encoders, c.d_model),
            "decoder": Stack(decoders, c.d_model)})
        if not self.head.is_meta:  # random numbers on the meta device import half of torch's compiler
            nn.init.normal_(self.head, std=c.d_model**-0.5)  # as an embedding, eq. 1 scales it to 1

    @property
    def head(self) -> Tensor:
        """(V, H): the embedding table is the head."""
        return self.model.shared.weight

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Eq. 1 and 2 of tokens (B, T) at positions (B or 1, T); a padding token has no position."""
        c = self.config
        half = c.d_model // 2
        channel = torch.arange(half, device=tokens.device)
        step = -math.log(10000) / (half - 1)
        frequency = torch.exp(channel * step)
        angle = positions[..., None].float() * frequency
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)
        padding = positions[..., None] == c.pad_token_id
        waves = waves.masked_fill(padding, 0.0).to(self.head.dtype)
        scale = math.sqrt(c.d_model) if c.scale_embedding else 1.0
        return self.model.shared(tokens) * scale + waves

    def encode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The source (B, S) as (B, S, H); mask (B, S) is False on padding."""
        positions = mask.cumsum(1) * mask
        x = self.embed(tokens, self.config.pad_token_id + positions)
        for layer in self.model.encoder.layers:
            x = layer(x, mask[:, None, None, :])
        return self.model.encoder.layer_norm(x)

    def memory(self, encoded: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the encoded source for each decoder layer, made once a sentence."""
        return [layer.encoder_attn.keys(encoded) for layer in self.model.decoder.layers]

    def decode(self, tokens: Tensor, start: int, memory, source_mask: Tensor, caches=None, visible=None):
        """Hidden states (B, T, H), after the final norm, of target tokens (B, T).

        Without caches the T tokens follow each other, from place `start` on. With them they are T beams, all
        at place `start`, and visible (B, T, slots) says what each sees of the cache, itself included.
        """
        T = tokens.shape[1] if caches is None else 1
        first = self.config.pad_token_id + 1 + start
        places = torch.arange(first, first + T, device=tokens.device)
        x = self.embed(tokens, places[None])
        source = source_mask[:, None, None, :]
        seen = None if visible is None else visible[:, None]
        for i, layer in enumerate(self.model.decoder.layers):
            x = layer(x, memory[i], source, caches and caches[i], seen)
        return self.model.decoder.layer_norm(x)

    def forward(self, source: Tensor, source_mask: Tensor, target: Tensor) -> Tensor:
        """Teacher forcing: hidden states (B, T, H) of target (B, T), which starts with eq. 3's two tokens.

        Row t has seen the target up to t and predicts t + 1. Logits are hidden @ head.T.
        """
        memory = self.memory(self.encode(source, source_mask))
        return self.decode(target, 0, memory, source_mask)


def read_config(path: Path) -> Config:
    file = path / "config.json"
    raw = read_json(file)
    if raw.get("model_type") != "m2m_100":
        raise InputError(f"{file}: model_type {raw.get('model_type')!r} is neither M2M100 nor NLLB")
    if raw.get("activation_function", "relu") != "relu":
        raise InputError(f"{file}: activation_function is {raw['activation_function']!r}, not relu")
    for field in fields(Config):
        if field.default is MISSING:
            as_kind(need(raw, field.name, file), int, f"{file}: {field.name}")
    given = {field.name: raw[field.name] for field in fields(Config) if field.name in raw}
    return Config(**given)


def read_weights(path: Path):
    """Tensors by name, from safetensors if there are any, else from pytorch_model.bin (no code is run)."""
    old = path / "pytorch_model.bin"
    if not old.exists() or any(path.glob("model*.safetensors*")):
        return Weights(path)
    refuse_pointer(old, old.open("rb").read(1024))
    try:
        return torch.load(old, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{old} cannot be read ({first_line(error)}): download it again") from None


def load_model(path, device="cpu", dtype: torch.dtype = torch.float32) -> M2M100:
    """The network with the directory's weights. One table stands for its up to four tied copies."""
    path = Path(path)
    config = read_config(path)
    weights = read_weights(path)
    with torch.device("meta"):
        model = M2M100(config)
    stored = {name: name for name in weights if name not in TIED and "embed_positions" not in name}
    stored |= {TIED[0]: name for name in reversed(TIED) if name in weights}
    state = {}
    for name, key in stored.items():
        state[name] = weights[key].to(device=device, dtype=dtype, copy=True)  # a copy: the file stays
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # its second line names what is missing, unknown or of another shape
        reason = str(error).splitlines()[1].strip()
        raise InputError(f"{path}: weights and config.json do not match: {reason:.200}") from None
    return model.requires_grad_(False).eval()
