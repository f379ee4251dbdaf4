"""Translate an instruction data set with M2M100 or NLLB: a hand-written encoder-decoder, its tokenizer, beam search, documents.

    python translate.py --lang sw --data demo/english.jsonl --out swahili.jsonl

Dimension key: B sentences, S source tokens, T target tokens, d model width, K beams, V vocabulary, D head width.

The network is Fan et al. 2020 (arXiv:2010.11125), the same as NLLB's dense models: pre-norm Transformer, ReLU, biases
everywhere, sinusoidal positions, one embedding table shared by encoder, decoder and head.

    x = E[id] * sqrt(d) + pos(p)           p = pad + 1, pad + 2, ... for real tokens             (eq. 1)
    pos(p) = [sin(p f), cos(p f)]          f_i = 10000^(-i / (d/2 - 1)), halves concatenated     (eq. 2)
    source = [lang] pieces [eos]           target = [eos] [lang] pieces [eos]                    (eq. 3)
"""

import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import CheckpointError, open_weights, read_json

TIED = ("model.shared.weight", "lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")


@dataclasses.dataclass
class Config:
    """The keys of an M2M100 config.json that the network depends on."""

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
    clo_languages: list | None = None  # the languages a small M2M100 was really trained on; None: all of its format


class Attention(nn.Module):
    """Multi-head attention; keys and values are made apart from the queries, so that they can be kept."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def split(self, x):
        B, T, d = x.shape
        return x.view(B, T, self.heads, d // self.heads).transpose(1, 2)  # (B, heads, T, D)

    def keys(self, x):
        return self.split(self.k_proj(x)), self.split(self.v_proj(x))

    def forward(self, x, key, value, mask=None, causal=False):
        """x (B, T, d) attends to key, value (B, heads, S, D) where mask (B, 1, 1|T, S) is True."""
        query = self.split(self.q_proj(x))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    def __init__(self, width, heads, ffn):
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = Attention(width, heads), nn.LayerNorm(width)
        self.fc1, self.fc2, self.final_layer_norm = nn.Linear(width, ffn), nn.Linear(ffn, width), nn.LayerNorm(width)

    def forward(self, x, mask):
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, *self.self_attn.keys(y), mask)
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x))))


class DecoderLayer(EncoderLayer):
    def __init__(self, width, heads, ffn):
        super().__init__(width, heads, ffn)
        self.encoder_attn, self.encoder_attn_layer_norm = Attention(width, heads), nn.LayerNorm(width)

    def forward(self, x, memory, memory_mask, cache=None, mask=None):
        """x (B, T, d); memory: keys and values of the encoded source; without a cache self-attention is causal."""
        y = self.self_attn_layer_norm(x)
        key, value = self.self_attn.keys(y) if cache is None else cache.append(*self.self_attn.keys(y))
        x = x + self.self_attn(y, key, value, mask, causal=cache is None)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), *memory, memory_mask)
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x))))


class Stack(nn.Module):
    def __init__(self, layers, width):
        super().__init__()
        self.layers, self.layer_norm = nn.ModuleList(layers), nn.LayerNorm(width)


class M2M100(nn.Module):
    """Encoder-decoder whose parameters carry the checkpoint's names; in training as in use it has no dropout."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        encoder = [EncoderLayer(c.d_model, c.encoder_attention_heads, c.encoder_ffn_dim) for _ in range(c.encoder_layers)]
        decoder = [DecoderLayer(c.d_model, c.decoder_attention_heads, c.decoder_ffn_dim) for _ in range(c.decoder_layers)]
        self.model = nn.ModuleDict({
            "shared": nn.Embedding(c.vocab_size, c.d_model),
            "encoder": Stack(encoder, c.d_model),
            "decoder": Stack(decoder, c.d_model),
        })

    @property
    def head(self):
        """(V, d): the embedding table is the head."""
        return self.model.shared.weight

    def embed(self, tokens, positions):
        """eq. 1 and 2 for tokens (B, T) at positions (B or 1, T); computed in fp32, as the table it replaces."""
        half = self.config.d_model // 2
        frequency = torch.exp(torch.arange(half, device=tokens.device) * (-math.log(10000) / (half - 1)))
        angle = positions.unsqueeze(-1).float() * frequency
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)
        waves = waves.masked_fill((positions == self.config.pad_token_id).unsqueeze(-1), 0.0)  # padding has no position
        scale = math.sqrt(self.config.d_model) if self.config.scale_embedding else 1.0
        return self.model.shared(tokens) * scale + waves.to(self.head.dtype)

    def encode(self, tokens, mask):
        """Encoded source (B, S, d) of tokens (B, S); mask (B, S) is False on padding."""
        positions = self.config.pad_token_id + mask.cumsum(1) * mask
        x, mask = self.embed(tokens, positions), mask[:, None, None, :]
        for layer in self.model.encoder.layers:
            x = layer(x, mask)
        return self.model.encoder.layer_norm(x)

    def memory(self, encoded):
        """Keys and values of the encoded source, per decoder layer: computed once a sentence."""
        return [layer.encoder_attn.keys(encoded) for layer in self.model.decoder.layers]

    def decode(self, tokens, position, memory, memory_mask, cache=None, mask=None):
        """Hidden states (B, T, d) after the final norm; positions (1, T) count from pad + 1."""
        x = self.embed(tokens, position)
        for i, layer in enumerate(self.model.decoder.layers):
            x = layer(x, memory[i], memory_mask, cache and cache[i], mask)
        return self.model.decoder.layer_norm(x)

    def forward(self, source, source_mask, target):
        """Teacher-forced hidden states (B, T, d): row t has seen target (B, T) up to t and predicts t + 1; logits are hidden @ head.T."""
        memory = self.memory(self.encode(source, source_mask))
        positions = self.config.pad_token_id + 1 + torch.arange(target.shape[1], device=target.device)[None]
        return self.decode(target, positions, memory, source_mask[:, None, None, :])


def read_config(path):
    """Config of the directory `path`; CheckpointError when it is no M2M100 or NLLB."""
    file = Path(path) / "config.json"
    values = read_json(file)
    names = {field.name for field in dataclasses.fields(Config)}
    missing = {field.name for field in dataclasses.fields(Config) if field.default is dataclasses.MISSING} - set(values)
    if values.get("model_type", "m2m_100") != "m2m_100":
        raise CheckpointError(f"{file}: model_type {values['model_type']!r} is no translator; give an M2M100 or NLLB directory")
    if missing:
        raise CheckpointError(f"{file}: missing {', '.join(sorted(missing))}")
    config = Config(**{name: values[name] for name in names & set(values)})
    if config.activation_function != "relu":
        raise CheckpointError(f"{file}: activation_function {config.activation_function!r}; M2M100 and NLLB use relu")
    return config


def read_weights(path):
    """Mapping of name to tensor: safetensors if there are any, else pytorch_model.bin (plain tensors only, memory-mapped)."""
    old = Path(path) / "pytorch_model.bin"
    if old.exists() and not any(Path(path).glob("model*.safetensors*")):
        return torch.load(old, map_location="cpu", weights_only=True, mmap=True)
    return open_weights(path)


def load_model(path, device="cpu", dtype=torch.float32):
    """M2M100 from a Hugging Face directory; CheckpointError names the missing, unknown or misshapen tensor."""
    config, found = read_config(path), read_weights(path)
    with torch.device("meta"):
        model = M2M100(config)
    table = next((name for name in TIED if name in found), TIED[0])
    weights = {}
    for name, parameter in model.state_dict().items():
        stored = table if name == TIED[0] else name
        if stored not in found:
            raise CheckpointError(f"{path}: no tensor {name}; is the file complete?")
        tensor = found[stored]
        if tensor.shape != parameter.shape:
            raise CheckpointError(f"{path}: {stored} is {tuple(tensor.shape)}, config.json asks for {tuple(parameter.shape)}")
        weights[name] = tensor.to(device, dtype)
    unknown = [name for name in found if name not in weights and name not in TIED and "embed_positions" not in name]
    if unknown:
        raise CheckpointError(f"{path}: unknown tensor {unknown[0]}; config.json does not describe this file")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()
