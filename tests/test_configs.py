"""config.json as transformers reads it, key by key, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch

import model as llama
from engine.files import InputError, write_json
from formats.configs import Config, DEFAULTS, config_dict, read_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
TINY = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}


def refuse(checkpoint, match: str):
    with pytest.raises(InputError, match=match) as error:
        llama.load(checkpoint)
    assert "\n" not in str(error.value)


def read(directory, raw: dict) -> Config:
    write_json(directory / "config.json", raw)
    return read_config(directory)


# ---- what an absent key and a null mean

@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_key_that_is_absent_means_what_transformers_class_says(kind):
    """Every key that we read, and their class's value for it; rope_theta has a place of its own there."""
    transformers = pytest.importorskip("transformers")
    theirs = type(transformers.AutoConfig.for_model(kind))
    fields = {field.name: field.default for field in theirs.__dataclass_fields__.values()}
    ours = dict(DEFAULTS[kind])
    assert ours.pop("rope_theta") == theirs.default_theta
    assert ours.pop("rope_scaling") is None                      # the old name of rope_parameters
    read_by_name = {"head_dim": None, "layer_types": None}       # not in all classes: taken where it is given
    assert ours == {key: fields.get(key, read_by_name.get(key, "absent")) for key in ours}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_keys_left_out_one_by_one_give_the_config_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    for key in DEFAULTS[kind]:
        raw = {"model_type": kind, **TINY, "hidden_size": 384, "num_attention_heads": 64,
               "sliding_window": 5, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
        raw.pop(key, None)
        ours = read(tmp_path, raw)
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        for name in ("vocab_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings",
                     "tie_word_embeddings"):
            assert getattr(ours, name) == getattr(theirs, name), (key, name)
        width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert ours.head_dim == width, key
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"], key
        assert ours.sliding_window == (theirs.sliding_window if kind == "mistral" else None), key


@pytest.mark.parametrize("kind, raw, expected", [
    ("mistral", {"sliding_window": None}, None), ("mistral", {}, 4096), ("mistral", {"sliding_window": 7}, 7),
    ("mistral", {"sliding_window": 7, "layer_types": ["sliding_attention"] * 2}, 7),
    ("llama", {"sliding_window": 7}, None),
    ("qwen2", {"sliding_window": 7}, None), ("qwen2", {"use_sliding_window": True}, None),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, 4096),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, None),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, 7),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 2}, 7),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["full_attention"] * 2}, None),
    ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None)])
def test_the_window_is_that_of_transformers(kind, raw, expected, tmp_path):
    raw = {"model_type": kind, **TINY, **raw}
    config = read(tmp_path, raw)
    assert config.sliding_window == expected
    assert read(tmp_path, config_dict(config)) == config
    transformers = pytest.importorskip("transformers")
    write_json(tmp_path / "config.json", raw)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), attn_implementation="eager").double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    ours = llama.Llama(config).double()
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(41, (1, 23))
    torch.testing.assert_close(ours(tokens) @ ours.head.T, theirs(tokens).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("raw", [
    {"rope_theta": 5e5}, {"rope_scaling": None, "rope_parameters": None},
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 7e5},
    {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 7e5},
    {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_parameters": {"rope_theta": 5e5}},
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    {"rope_scaling": {key: LLAMA3[key] for key in LLAMA3 if "original" not in key},
     "max_position_embeddings": 64}])
def test_positions_turn_by_the_angles_of_transformers(raw, tmp_path):
    transformers = pytest.importorskip("transformers")
    rotary = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding
    config = read(tmp_path, {"model_type": "llama", **TINY, **raw})
    theirs = rotary(transformers.AutoConfig.from_pretrained(tmp_path))
    torch.testing.assert_close(llama.rope_frequencies(config), theirs.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("bias", [False, True])
def test_biases_are_those_of_transformers(kind, bias, tmp_path):
    """attention_bias means nothing to Mistral and Qwen2, mlp_bias to all but Llama."""
    transformers = pytest.importorskip("transformers")
    config = read(tmp_path, {"model_type": kind, **TINY, "attention_bias": bias, "mlp_bias": bias})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path))
        ours = llama.Llama(config)
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}


@pytest.mark.parametrize("kind, extra", [
    ("llama", {"o_bias": True, "qkv_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3}),
    ("mistral", {}), ("mistral", {"sliding_window": 5}), ("qwen2", {"qkv_bias": True}),
    ("qwen2", {"qkv_bias": True, "sliding_window": 5}), ("qwen3", {"qk_norm": True})])
def test_a_config_written_is_read_back(kind, extra, tmp_path):
    config = replace(Config(**TINY), model_type=kind, **extra)
    assert read(tmp_path, config_dict(config)) == config


# ---- the real models

LLAMA3_ROPE = LLAMA3 | {"original_max_position_embeddings": 8192}


REAL = {name: dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                        "num_key_value_heads", "vocab_size"), sizes), **more) for name, sizes, more in [
    ("Llama-2-7B", (4096, 11008, 32, 32, 32, 32000), {}),
    ("Llama-2-13B", (5120, 13824, 40, 40, 40, 32000), {}),
    ("Llama-3-8B", (4096, 14336, 32, 32, 8, 128256), {"rope_theta": 5e5}),
    ("Llama-3.1-8B", (4096, 14336, 32, 32, 8, 128256), {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}),
    ("Llama-3.2-1B", (2048, 8192, 16, 32, 8, 128256),
     {"rope_theta": 5e5, "head_dim": 64, "tie_word_embeddings": True,
      "rope_scaling": LLAMA3_ROPE | {"factor": 32.0}}),
    ("Mistral-7B-v0.1", (4096, 14336, 32, 32, 8, 32000), {"model_type": "mistral", "sliding_window": 4096}),
    ("Mistral-7B-v0.3", (4096, 14336, 32, 32, 8, 32768),
     {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6}),
    ("Qwen2.5-3B", (2048, 11008, 36, 16, 2, 151936),
     {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True,
      "sliding_window": 32768, "use_sliding_window": False}),
    ("Qwen3-0.6B", (1024, 3072, 28, 16, 8, 151936),
     {"model_type": "qwen3", "rope_theta": 1e6, "tie_word_embeddings": True,
      "head_dim": 128, "attention_bias": False})]}


PARAMETERS = {"Llama-2-7B": 6_738_415_616, "Llama-2-13B": 13_015_864_320, "Llama-3-8B": 8_030_261_248,
              "Llama-3.1-8B": 8_030_261_248, "Llama-3.2-1B": 1_235_814_400,
              "Mistral-7B-v0.1": 7_241_732_096, "Mistral-7B-v0.3": 7_248_023_552,
              "Qwen2.5-3B": 3_085_938_688, "Qwen3-0.6B": 596_049_920}      # model cards


@pytest.mark.parametrize("name", REAL)
def test_every_tensor_of_the_real_models_is_accounted_for(name, tmp_path):
    """Their config.json on the meta device: names and shapes are transformers', the number of parameters
    the published one."""
    raw = {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu",
           "max_position_embeddings": 4096} | REAL[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        ours = {key: tuple(tensor.shape)
                for key, tensor in llama.Llama(read_config(tmp_path)).named_parameters()}
    assert sum(map(math.prod, ours.values())) == PARAMETERS[name]
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert ours == {key: tuple(tensor.shape) for key, tensor in theirs.named_parameters()}


def test_both_spellings_of_config_keys_mean_the_same(checkpoint):
    path = checkpoint / "config.json"
    raw = json.loads(path.read_text())
    scaling = LLAMA3
    path.write_text(json.dumps(raw | {"rope_theta": 5e5, "rope_scaling": scaling}))
    old = read_config(checkpoint)
    for key in ("rope_theta", "rope_scaling"):
        del raw[key]
    path.write_text(json.dumps(raw | {"rope_parameters": {"rope_theta": 5e5, **scaling}}))
    assert read_config(checkpoint) == old


# ---- refused

@pytest.mark.parametrize("change, match", [
    ({"model_type": "gemma"}, "model_type 'gemma'"), ({"num_local_experts": 8}, "num_local_experts"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"quantization": {"bits": 4}}, "quantization"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification: only language models"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "yarn"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    ({"n_routed_experts": 4}, "n_routed_experts"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_size": "16"}, "hidden_size"), ({"hidden_size": -1}, "hidden_size"),
    ({"num_key_value_heads": 3}, "divide"), ({"vocab_size": 999}, "embed_tokens.weight has shape"),
    ({"num_hidden_layers": 3}, r"layers\.2.* is missing"),
    ({"num_hidden_layers": 1}, r"layers\.1.* is unknown"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"), ({"rms_norm_eps": None}, "rms_norm_eps is None"),
    ({"rope_theta": None}, "rope_theta is None"), ({"attention_bias": None}, "attention_bias is None"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": -1, "max_window_layers": 0},
     "sliding_window is -1"),
    ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": None},
     "max_window_layers is None"),
    ({"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"model_type": "mistral", "sliding_window": 5, "layer_types": ["full_attention"] * 2}, "layer_types"),
    ({"num_hidden_layers": 10**9}, r"layers\.999999999.* is missing"),
    ({"rope_theta": math.inf}, "rope_theta is inf"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"), ({"num_experts": 8}, "num_experts"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
     "use_sliding_window"),
    ({"model_type": "mixtral"}, "model_type 'mixtral'"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
     "each kind of layer"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor"),
    ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "factor is nan")])
def test_a_config_that_does_not_fit_is_refused_by_name(checkpoint, change, match):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refuse(checkpoint, match)
