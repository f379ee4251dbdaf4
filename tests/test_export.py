"""What a run writes, opened by the tools it is written for: PEFT, transformers, and our own loader."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import clo
import eval as evaluation
import model as llama
from conftest import write_checkpoint
from engine.files import InputError, fill_directory, write_json
from formats.chat import load_tokenizer
from formats.checkpoints import check_outputs, save_adapter, save_delta, save_merged, save_model
from formats.records import write_rows
from formats.weights import adapter_base

PROMPT = "Mji mkuu wa Ufaransa ni upi?"
TOKENS = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model) -> torch.Tensor:
    return (model(TOKENS) @ model.head.T).float()


def as_dtype(checkpoint: Path, dtype) -> Path:
    """The checkpoint with its tensors in another dtype."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


def with_lora(checkpoint, rank=4, alpha=12) -> llama.Llama:
    """The checkpoint in fp32 with LoRA factors that are not at their start."""
    model = clo.add_lora(llama.load(checkpoint), rank, alpha)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return model.requires_grad_(False)


def write_adapter(model, checkpoint, directory: Path) -> Path:
    fill_directory(directory, lambda path: save_adapter(
        model, path, str(checkpoint), clo.ATTENTION, 4, 12, load_tokenizer(checkpoint).template))
    return directory


def write_merged(checkpoint, adapter, directory: Path, max_shard_bytes=10**9) -> Path:
    tokenizer = load_tokenizer(checkpoint)
    fill_directory(directory,
                        lambda path: save_merged(path, checkpoint, adapter, tokenizer, max_shard_bytes))
    return directory


# ---- LoRA

@pytest.mark.parametrize("family", [
    {}, {"model_type": "qwen2", "qkv_bias": True, "tie_word_embeddings": False},
    {"model_type": "mistral", "sliding_window": 5}, {"model_type": "qwen3", "qk_norm": True}])
def test_the_merged_directory_gives_transformers_our_logits_prompts_and_replies(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    base = write_checkpoint(tmp_path / "base", **family)
    model = with_lora(base)
    merged = write_merged(base, write_adapter(model, base, tmp_path / "adapter"), tmp_path / "merged", 9000)
    assert len(list(merged.glob("model-*.safetensors"))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(theirs(TOKENS).logits, logits(model), rtol=0, atol=1e-4)
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(merged), load_tokenizer(merged)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True,
                                        return_dict=False)
    assert ids == ours.prompt_ids(PROMPT) == load_tokenizer(base).prompt_ids(PROMPT)
    reply = theirs.double().generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=1)
    reply = reply[0, len(ids):].tolist()
    end = next((i for i, token in enumerate(reply) if token in ours.stop_ids), len(reply))
    assert llama.generate(llama.load(merged, dtype=torch.float64), [ids], 20, ours.stop_ids)[0] == reply[:end]


def test_merging_adds_in_fp32_rounds_once_and_leaves_the_rest_its_bits(checkpoint, tmp_path):
    as_dtype(checkpoint, torch.bfloat16)
    model = with_lora(checkpoint)
    merged = load_file(
        write_merged(checkpoint, write_adapter(model, checkpoint, tmp_path / "adapter"), tmp_path / "merged")
        / "model.safetensors")
    parameters = dict(model.named_parameters())
    for name, old in load_file(checkpoint / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem + ".lora_A" in parameters:
            A, B = (parameters[stem + factor].double() for factor in (".lora_A", ".lora_B"))
            exact = old.double() + 12 / 4 * B @ A
            error = (merged[name].double() - exact).abs() / exact.abs()
            # one rounding, to 8 bits
            assert merged[name].dtype == torch.bfloat16 and error.max() < 2 ** -8, name
        else:
            assert torch.equal(merged[name], old), name


def test_all_stop_ids_reach_the_generation_config(checkpoint, tmp_path):
    write_json(checkpoint / "generation_config.json", {"eos_token_id": 7, "temperature": 0.6})
    merged = write_merged(checkpoint, write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter"),
                          tmp_path / "merged")
    assert json.loads((merged / "generation_config.json").read_text()) == {
        "eos_token_id": [1, 7], "temperature": 0.6}
    (checkpoint / "generation_config.json").unlink()
    again = write_merged(checkpoint, tmp_path / "adapter", tmp_path / "again")
    assert json.loads((again / "generation_config.json").read_text()) == {
        "bos_token_id": 0, "eos_token_id": 1}


def test_a_tied_head_is_written_once_under_the_name_all_readers_know(checkpoint, tmp_path):
    model = with_lora(checkpoint)
    adapter = write_adapter(model, checkpoint, tmp_path / "adapter")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    merged = write_merged(checkpoint, adapter, tmp_path / "merged")
    assert set(load_file(merged / "model.safetensors")) == {
        name for name, _ in llama.load(checkpoint).named_parameters()}
    torch.testing.assert_close(logits(llama.load(merged)), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [{}, {"down_proj": 5}])
def test_an_adapter_made_by_peft_gives_our_loader_its_logits(checkpoint, tmp_path, rslora, ranks):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"],
                             use_rslora=rslora, rank_pattern=ranks, init_lora_weights=False,
                             task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(checkpoint), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = llama.load(checkpoint, adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), theirs(TOKENS).logits, rtol=0, atol=1e-4)
    assert not torch.allclose(logits(ours), logits(llama.load(checkpoint)), atol=1e-2)
    assert adapter_base(tmp_path / "adapter") == str(checkpoint)


@pytest.mark.parametrize("change, match", [
    ({"peft_type": "IA3"}, "IA3"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"lora_alpha": "x"}, "lora_alpha"),
    ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens")])
def test_adapters_of_other_kinds_are_refused_by_key(checkpoint, tmp_path, change, match):
    adapter = write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(InputError, match=match):
        llama.load(checkpoint, adapter=adapter)


@pytest.mark.parametrize("change", [
    lambda tensors: tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    lambda tensors: tensors.pop("base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"),
    lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(320, 16)}),
    lambda tensors: tensors.clear()])
def test_an_adapter_with_more_or_less_than_pairs_of_factors_is_refused(checkpoint, tmp_path, change):
    adapter = write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="no factor of a pair|holds no LoRA factors"):
        llama.load(checkpoint, adapter=adapter)


@pytest.mark.parametrize("change, match", [
    (lambda factor: torch.tensor(1.0), "do not fit each other"),
    (lambda factor: factor[:0], "do not fit each other"), (lambda factor: factor[0], "do not fit each other"),
    (lambda factor: factor.long(), "has dtype torch.int64"),
    (lambda factor: factor * math.nan, "NaN or infinite"),
    (lambda factor: factor + math.inf, "NaN or infinite")])
def test_factors_that_no_training_gives_are_refused(checkpoint, tmp_path, change, match):
    adapter = write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=match) as error:
        llama.load(checkpoint, adapter=adapter)
    assert str(adapter) in str(error.value) and "layers.0.self_attn.q_proj" in str(error.value)


@pytest.mark.parametrize("base", [5, None, "", ["a"]])
def test_an_adapter_without_a_base_asks_for_one(checkpoint, tmp_path, base):
    adapter = write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {"base_model_name_or_path": base})
    with pytest.raises(InputError, match="names no base model .* --model"):
        evaluation.main(["ask", "--adapter", str(adapter), PROMPT])
    evaluation.main(["ask", "--adapter", str(adapter), "--model", str(checkpoint), "--max-tokens", "2",
                     PROMPT])


def test_an_adapter_of_another_model_is_refused(checkpoint, tmp_path):
    for shape, match in (({"num_hidden_layers": 3}, "is no parameter"),
                         ({"hidden_size": 20}, "does not fit the weight")):
        other = write_checkpoint(tmp_path / match, **shape)
        adapter = write_adapter(with_lora(other), other, tmp_path / "adapter")
        with pytest.raises(InputError, match=match):
            llama.load(checkpoint, adapter=adapter)


# ---- attention and full training

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2 ** -7)])
def test_the_delta_over_the_base_is_the_written_model(checkpoint, tmp_path, dtype, tolerance):
    as_dtype(checkpoint, dtype)
    model, tokenizer = llama.load(checkpoint), load_tokenizer(checkpoint)
    parameters = clo.make_trainable(model, "attention", 0, 0, 0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 20
    whole, delta = tmp_path / "whole", tmp_path / "attn_delta.safetensors"
    fill_directory(whole, lambda path: save_model(path, checkpoint, tokenizer,
                                                            lambda name, old: parameters.get(name, old)))
    save_delta(delta, checkpoint, parameters, "owner/base")
    assert delta.stat().st_size < (whole / "model.safetensors").stat().st_size / 2
    assert adapter_base(delta) == "owner/base"
    for (name, one), (_, other) in zip(llama.load(whole).named_parameters(),
                                       llama.load(checkpoint, adapter=delta).named_parameters()):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance / 10, msg=name)
        if name not in parameters:
            assert torch.equal(one, other), name
    with safe_open(whole / "model.safetensors", framework="pt") as file:
        assert (file.metadata() == {"format": "pt"}
                and {file.get_tensor(key).dtype for key in file.keys()} == {dtype})


NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("metadata, tensors, match", [
    ({}, {QUERY: torch.ones(24, 16)}, "names no base model"),
    ({"base_model_name_or_path": "b"}, {}, "holds no tensors"),
    ({"base_model_name_or_path": "b"}, {QUERY: torch.ones(24, 16), NORM: torch.ones(16)}, f"holds {NORM}"),
    ({"base_model_name_or_path": "b"}, {QUERY: torch.full((24, 16), math.nan)}, "holds NaN or infinite")])
def test_what_is_no_delta_is_not_added_to_the_weights(checkpoint, tmp_path, metadata, tensors, match):
    delta = tmp_path / "attn_delta.safetensors"
    save_file(tensors, delta, metadata={"format": "pt", **metadata})
    with pytest.raises(InputError, match=match):
        llama.load(checkpoint, adapter=delta)
    with pytest.raises(InputError, match="a whole model is given by its directory, with --model"):
        llama.load(checkpoint, adapter=checkpoint / "model.safetensors")


# ---- the check after writing

def test_what_was_written_is_loaded_and_compared(checkpoint, tmp_path, capsys):
    model = with_lora(checkpoint)
    adapter = write_adapter(model, checkpoint, tmp_path / "adapter")
    check_outputs(model, {adapter: {"path": checkpoint, "adapter": adapter}}, [5, 6, 7])
    assert f"{adapter}: written, loaded again" in capsys.readouterr().out


def test_an_output_that_is_not_the_trained_model_stops_the_program(checkpoint, tmp_path):
    model = with_lora(checkpoint)
    adapter = write_adapter(model, checkpoint, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {"lora_alpha": 13})
    with pytest.raises(InputError, match="do not use it"):
        check_outputs(model, {adapter: {"path": checkpoint, "adapter": adapter}}, [5, 6, 7])


@pytest.mark.parametrize("flags, outputs", [
    (["--merge"], {"adapter": "adapter", "model": "whole"}), ([], {"adapter": "adapter"}),
    (["--train", "attention"], {"attn_delta.safetensors": "adapter", "model": "whole"}),
    (["--train", "full"], {"model": "whole"})])
def test_a_run_writes_and_checks_the_outputs_of_its_mode(tmp_path, capsys, flags, outputs):
    base = write_checkpoint(tmp_path / "base")
    rows = [{"row_id": str(i), "en": {"prompt": f"What is {i}?", "response": f"It is {i}."},
             "sw": {"prompt": f"{i} ni nini?", "response": f"Ni {i}."}} for i in range(12)]
    write_rows(tmp_path / "rows.jsonl", rows)
    clo.main(["--lang", "sw", "--model", str(base), "--data", str(tmp_path / "rows.jsonl"),
              "--out", str(tmp_path / "run"), "--baseline", "none", "--epochs", "1", "--row-tokens", "200",
              "--max-new-tokens", "2", "--device", "cpu", *flags])
    said, found = capsys.readouterr().out, {}
    assert said.count("written, loaded again") == len(outputs)
    for name, kind in outputs.items():
        path = tmp_path / "run" / "clo" / name
        assert f"{path}: written, loaded again" in said
        found[name] = logits(llama.load(base, adapter=path) if kind == "adapter" else llama.load(path))
        assert math.isfinite(found[name].sum()) and not torch.equal(found[name], logits(llama.load(base)))
        torch.testing.assert_close(found[name], next(iter(found.values())), rtol=0, atol=1e-4)


def test_a_directory_is_replaced_whole_or_not_at_all(checkpoint, tmp_path):
    adapter = write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter")
    merged = write_merged(checkpoint, adapter, tmp_path / "merged")
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    shutil.rmtree(adapter)
    with pytest.raises(InputError):
        write_merged(checkpoint, adapter, merged)
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before


def test_ask_finds_the_base_of_an_adapter_and_of_a_delta(checkpoint, tmp_path, capsys):
    model = with_lora(checkpoint)
    adapter, delta = (write_adapter(model, checkpoint, tmp_path / "adapter"),
                      tmp_path / "attn_delta.safetensors")
    merged = dict(clo.merge_lora(model).named_parameters())
    save_delta(delta, checkpoint, {name: merged[name] for name in merged if ".self_attn." in name},
                    str(checkpoint))
    said = []
    for path in (adapter, delta):
        for sampling in ([], ["--temperature", "0.9", "--top-p", "0.8", "--seed", "3"]):
            evaluation.main(["ask", "--adapter", str(path), "--max-tokens", "8", *sampling, PROMPT])
            said.append(capsys.readouterr().out)
    assert said[:2] == said[2:] and said[0] != said[1]
