"""config.json of a Llama-family checkpoint: the numbers that shape the model, or one line why not."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from engine.files import InputError, read_json

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class Config:
    """The numbers that shape a model, under the names config.json uses."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    model_type: str = "llama"


def read_config(directory) -> Config:
    """Config from config.json in the spelling of transformers 4 or 5;
    refuses by name what this model does not do."""
    path = Path(directory) / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise InputError(f"{path}: model_type {kind!r} is not supported, "
                              f"only {', '.join(sorted(ARCHITECTURES))}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    refuse_unsupported(path, raw, rope)
    number, flag = partial(positive, path, raw), partial(boolean, path, raw)
    heads, width = number("num_attention_heads"), number("hidden_size")
    bias = flag("attention_bias")
    window = raw.get("sliding_window") if kind == "mistral" else None
    config = Config(
        vocab_size=number("vocab_size"), hidden_size=width, intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"), num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", width // heads if width >= heads else 1),
        rms_norm_eps=number("rms_norm_eps", 1e-6, float),
        rope_theta=positive(path, {**raw, **rope}, "rope_theta", 10000.0, float),
        rope_scaling=read_rope_scaling(path, rope),
        max_position_embeddings=number("max_position_embeddings", 2048),
        tie_word_embeddings=flag("tie_word_embeddings"), qkv_bias=bias or kind == "qwen2",
        o_bias=bias and kind != "qwen2", mlp_bias=flag("mlp_bias"), qk_norm=kind == "qwen3",
        sliding_window=number("sliding_window") if window is not None else None, model_type=kind)
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise InputError(f"{path}: {heads} query heads over {config.num_key_value_heads} kv heads "
                              f"of width {config.head_dim} do not divide evenly")
    return config


def positive(path, raw: dict, key: str, default=None, kind=int):
    """raw[key], or the default where it is null or absent, as `kind`.
    InputError unless it is a positive number."""
    value = default if raw.get(key) is None else raw[key]
    good = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, good) or not 0 < value < 1e12:
        raise InputError(f"{path}: {key} is {value!r}, a positive {kind.__name__} was expected")
    return kind(value)


def boolean(path, raw: dict, key: str) -> bool:
    """raw[key], false where it is null or absent. InputError when it is neither true nor false."""
    value = False if raw.get(key) is None else raw[key]
    if not isinstance(value, bool):
        raise InputError(f"{path}: {key} is {value!r}, true or false was expected")
    return value


def refuse_unsupported(path, raw: dict, rope: dict) -> None:
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_scaling is {rope!r}, an object was expected")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(key):
            raise InputError(f"{path}: {key} = {raw[key]}: mixture-of-experts models are not supported")
    if raw.get("quantization_config"):
        raise InputError(f"{path}: quantization_config: "
                              f"use the unquantised checkpoint (fp32, bf16 or fp16)")
    for where in (raw, rope):
        if where.get("partial_rotary_factor", 1) not in (1, None):
            raise InputError(f"{path}: partial_rotary_factor = {where['partial_rotary_factor']} "
                                  f"is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path}: hidden_act = {raw['hidden_act']!r} is not supported, only silu")
    if any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"{path}: rope_parameters of their own for each kind of layer "
                              f"are not supported")
    if raw.get("model_type") in ("qwen2", "qwen3"):
        if raw.get("use_sliding_window") or "sliding" in str(raw.get("layer_types")):
            raise InputError(f"{path}: use_sliding_window, sliding layer_types: "
                                  f"not supported for {raw['model_type']}")


def read_rope_scaling(path, rope: dict) -> dict | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                "original_max_position_embeddings")}
    if kind not in needed:
        raise InputError(f"{path}: rope_scaling of type {kind!r} is not supported, "
                              f"only llama3 and linear")
    for key in needed[kind]:
        positive(f"{path}: rope_scaling", rope, key, kind=float)
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(f"{path}: rope_scaling: low_freq_factor is not below high_freq_factor")
    return {"rope_type": kind, **{key: rope[key] for key in needed[kind]}}


def config_dict(config: Config) -> dict:
    """config.json for a model made here, in the spelling every version of transformers reads."""
    raw = asdict(config)
    raw["attention_bias"] = config.o_bias
    for key in ("qkv_bias", "o_bias", "qk_norm"):
        del raw[key]
    return {"architectures": [ARCHITECTURES[config.model_type]], "hidden_act": "silu", **raw}
