"""What the exercise of docs/change/3-model-family.md has to fulfil.

    python -m pytest docs/change/exercises/test_change_3.py        # is it still open?
"""

import json
from importlib.util import find_spec

import torch
import torch.nn.functional as F

import model
from formats.checkpoints import save
from formats.configs import config_dict, read_config

RAW = {"model_type": "olmo2", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40,
       "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500.0}


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, theta):
    """x (Q, T, D): channels i and i + D/2 are turned by position * theta^(-2i/D)."""
    Q, T, D = x.shape
    angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    first, second = x[..., :D // 2], x[..., D // 2:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def attention(x, w, eps):
    """One text, head by head. x (T, H); w: the weights of self_attn."""
    T, H = x.shape
    q = norm(x @ w["q_proj.weight"].T, w["q_norm.weight"], eps).view(T, 4, -1).transpose(0, 1)
    k = norm(x @ w["k_proj.weight"].T, w["k_norm.weight"], eps).view(T, 2, -1).transpose(0, 1)
    v = (x @ w["v_proj.weight"].T).view(T, 2, -1).transpose(0, 1)
    q, k = rotate(q, 500.0), rotate(k, 500.0)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    heads = []
    for head in range(4):
        scores = q[head] @ k[head // 2].T / q.shape[-1] ** 0.5
        heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[head // 2])
    return torch.cat(heads, -1) @ w["o_proj.weight"].T


def plain_logits(weights, tokens, eps=1e-5):
    """(T, V) of one text (T,), by the equations of the page."""
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(2):
        begins = f"model.layers.{layer}."
        w = {name.removeprefix(begins): tensor for name, tensor in weights.items() if name.startswith(begins)}
        heads = {name.removeprefix("self_attn."): tensor for name, tensor in w.items()}
        x = x + norm(attention(x, heads, eps), w["post_attention_layernorm.weight"], eps)
        gate, up = x @ w["mlp.gate_proj.weight"].T, x @ w["mlp.up_proj.weight"].T
        mlp = (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
        x = x + norm(mlp, w["post_feedforward_layernorm.weight"], eps)
    return norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def test_1_olmo2(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    config = read_config(tmp_path)
    assert (config.model_type, config.rms_norm_eps) == ("olmo2", 1e-5)
    ours = model.Llama(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0.5, 0.5, generator=generator)
    save(ours, tmp_path)                                                  # config.json, too, and back again
    assert read_config(tmp_path) == config and config_dict(config)["architectures"] == ["Olmo2ForCausalLM"]
    ours = model.load(tmp_path, dtype=torch.float64)
    weights = dict(ours.named_parameters())
    assert not any("input_layernorm" in name for name in weights)
    tokens = torch.randint(50, (1, 9), generator=generator)
    logits = ours(tokens) @ ours.head.T
    torch.testing.assert_close(logits[0], plain_logits(weights, tokens[0]))
    if find_spec("transformers"):
        from transformers import AutoModelForCausalLM
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(theirs(tokens).logits.double(), logits, rtol=1e-4, atol=1e-4)
    names = {name for name, _ in model.load("demo/llama").named_parameters()}
    assert "model.layers.0.input_layernorm.weight" in names                      # a Llama is what it was
    assert not any("feedforward" in name for name in names)
