"""config.json of a Llama-family checkpoint: the numbers that shape the model, or one line why not."""

from dataclasses import asdict, dataclass
from pathlib import Path

from engine.files import InputError, as_kind, read_json

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM"}
# What a key that config.json leaves out means, per model_type: the defaults of transformers'
# configuration_*.py. Keys that are not here are not read. A null is a value of its own.
SAME = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": None,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None,
    "rope_parameters": None, "tie_word_embeddings": False,
}
WINDOWED = {"sliding_window": 4096, "layer_types": None}
QWEN = SAME | WINDOWED | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "max_window_layers": 28,
}
DEFAULTS = {
    "llama": SAME | {
        "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None,
        "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": SAME | WINDOWED | {
        "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 131072},
    "qwen2": QWEN,
    "qwen3": QWEN | {"head_dim": 128, "attention_bias": False},
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SLIDING, FULL = "sliding_attention", "full_attention"
# Keys that mean another model when they say anything, and what to do about them.
UNSUPPORTED = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"),
                    "mixture-of-experts models are not supported"),
    "quantization": "use the unquantised checkpoint (fp32, bf16 or fp16)",
    "quantization_config": "use the unquantised checkpoint (fp32, bf16 or fp16)",
    "transformers_weights": "call the file model.safetensors, and take the key out",
}
ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


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
    if str(kind) not in ARCHITECTURES:
        raise InputError(f"{path}: model_type {kind!r} is not supported, only {', '.join(ARCHITECTURES)}")
    values = {key: raw.get(key, default) for key, default in DEFAULTS[kind].items()}
    refuse_unsupported(path, raw, values)
    bias = boolean(path, values, "attention_bias")
    config = Config(
        **read_sizes(path, values),
        **read_rope(path, raw, values),
        rms_norm_eps=positive(path, values, "rms_norm_eps", float),
        max_position_embeddings=positive(path, values, "max_position_embeddings"),
        tie_word_embeddings=boolean(path, values, "tie_word_embeddings"),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        mlp_bias=boolean(path, values, "mlp_bias"),
        qk_norm=kind == "qwen3",
        sliding_window=read_window(path, values),
        model_type=kind)
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise InputError(f"{path}: {config.num_attention_heads} query heads over "
                         f"{config.num_key_value_heads} kv heads of width {config.head_dim} "
                         f"do not divide evenly")
    return config


def positive(path, raw: dict, key: str, kind=int):
    """raw[key] as `kind`. InputError unless it is a positive number."""
    value = raw.get(key)
    if type(value) not in (int, kind) or not 0 < value < 1e12:
        raise InputError(f"{path}: {key} is {value!r}, a positive {kind.__name__} was expected")
    return kind(value)


def boolean(path, raw: dict, key: str) -> bool:
    """raw[key], false for a model_type without it. InputError when it is neither true nor false."""
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"{path}: {key} is {value!r}, true or false was expected")
    return value


def refuse_unsupported(path, raw: dict, values: dict) -> None:
    for key, remedy in UNSUPPORTED.items():
        if raw.get(key):
            raise InputError(f"{path}: {key} = {raw[key]!r:.80}: {remedy}")
    for name in raw.get("architectures") or ():
        if not str(name).endswith("ForCausalLM"):
            raise InputError(f"{path}: architectures has {name}: only language models (...ForCausalLM) are "
                             f"read here")
    if values["hidden_act"] != "silu":
        raise InputError(f"{path}: hidden_act = {values['hidden_act']!r} is not supported, only silu")


def read_sizes(path, values: dict) -> dict[str, int]:
    """The widths and numbers of the layers. A head_dim or num_key_value_heads of null follows from others."""
    sizes = {name: positive(path, values, name) for name in SIZES}
    heads = sizes["num_attention_heads"]
    follows = {"num_key_value_heads": heads, "head_dim": max(sizes["hidden_size"] // heads, 1)}
    given = {name: value for name, value in values.items() if value is not None}
    return sizes | {name: positive(path, follows | given, name) for name in follows}


def read_window(path, values: dict) -> int | None:
    """How many of the last tokens a token sees, in every layer; None for all of them. layer_types tells the
    layers' kinds of attention, else max_window_layers how many of the first see all."""
    asked = boolean(path, {"use_sliding_window": True} | values, "use_sliding_window")
    window = values.get("sliding_window") if asked else None
    kinds, full = values.get("layer_types"), values.get("max_window_layers", 0)
    if kinds is None:
        if type(full) is not int:
            raise InputError(f"{path}: max_window_layers is {full!r}, a number of layers was expected")
        windowed = [FULL] * (full > 0) + [SLIDING] * (full < values["num_hidden_layers"])
        kinds = [FULL] if window is None else windowed
    kinds = {*map(str, as_kind(kinds, list, f"{path}: layer_types"))}
    if kinds == {FULL} and (window is None or "use_sliding_window" in values):
        return None                                            # Mistral's window does not ask layer_types
    if kinds == {SLIDING} and window is not None:
        return positive(path, values, "sliding_window")
    raise InputError(f"{path}: sliding_window {window} with layers of {', '.join(sorted(kinds))} is not "
                     f"supported, only one window in all layers or none (use_sliding_window, layer_types)")


def read_rope(path, raw: dict, values: dict) -> dict:
    """rope_theta and rope_scaling (None, or its type and numbers), as transformers 5 finds them."""
    rope = as_kind(values["rope_scaling"] or values["rope_parameters"] or {}, dict, f"{path}: rope_scaling")
    if any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"{path}: rope_parameters of their own for each kind of layer are not supported")
    rotary = (raw | rope).get("partial_rotary_factor")
    if rotary not in (None, 1):
        raise InputError(f"{path}: partial_rotary_factor = {rotary} is not supported")
    theta = positive(path, {"rope_theta": values["rope_theta"]} | rope, "rope_theta", float)
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in ROPE_KEYS:
        raise InputError(f"{path}: rope_scaling of type {kind!r} is not supported, only llama3 and linear")
    context = "original_max_position_embeddings"
    rope = {context: values["max_position_embeddings"]} | rope
    rope[context] = raw.get(context, rope[context])
    for key in ROPE_KEYS[kind]:
        positive(f"{path}: rope_scaling", rope, key, float)
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(f"{path}: rope_scaling: low_freq_factor is not below high_freq_factor")
    scaling = {"rope_type": kind} | {key: rope[key] for key in ROPE_KEYS[kind]}
    return {"rope_theta": theta, "rope_scaling": scaling}


def config_dict(config: Config) -> dict:
    """config.json for a model made here, in the spelling every version of transformers reads."""
    raw = asdict(config)
    raw["attention_bias"] = config.o_bias
    for key in ("qkv_bias", "o_bias", "qk_norm"):
        del raw[key]
    if "use_sliding_window" in DEFAULTS[config.model_type]:
        raw |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return {"architectures": [ARCHITECTURES[config.model_type]], "hidden_act": "silu", **raw}
