"""Checkpoints and adapters: others' read by us, ours read by transformers and PEFT, and what is refused."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

import clo
import eval as evaluation
import model as llama
from conftest import with_lora, write_adapter, write_checkpoint
from engine.files import InputError, fill_directory, read_json, write_json
from evals.systems import tokenizer_for
from formats import weights
from formats.chat import load_tokenizer
from formats.checkpoints import check_outputs, save, save_merged
from formats.configs import Config
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


def write_merged(checkpoint, adapter, directory: Path) -> Path:
    tokenizer = load_tokenizer(checkpoint)
    fill_directory(directory, lambda path: save_merged(path, checkpoint, adapter, tokenizer))
    return directory


# ---- LoRA

@pytest.mark.parametrize("family", [
    {}, {"model_type": "qwen2", "qkv_bias": True, "tie_word_embeddings": False},
    {"model_type": "mistral", "sliding_window": 5}, {"model_type": "qwen3", "qk_norm": True}])
def test_the_merged_directory_gives_transformers_our_logits_prompts_and_replies(
        family, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 9000)
    base = write_checkpoint(tmp_path / "base", **family)
    model = with_lora(base)
    merged = write_merged(base, write_adapter(model, base, tmp_path / "adapter"), tmp_path / "merged")
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


def test_who_may_read_a_config_may_read_the_weights(checkpoint, tmp_path):
    merged = write_merged(checkpoint, write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter"),
                          tmp_path / "merged")
    for directory in (merged, tmp_path / "adapter"):
        assert len({path.stat().st_mode for path in directory.iterdir()}) == 1


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


PATTERNS = [{}, {"rank_pattern": {"down_proj": 5}}, {"alpha_pattern": {"q_proj": 2, "down_proj": 40}},
            {"alpha_pattern": {r"layers\.1\..*_proj": 2.5, "v_proj": 30},
             "rank_pattern": {r".*\.0\..*v_proj": 2}},
            {"alpha_pattern": {"proj": 99, "model.layers.0.self_attn.q_proj": 1, "q_proj": 50}},
            {"alpha_pattern": {r"^model\.layers\.0\.self_attn\.(q|v)_proj": 1}}]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", PATTERNS)
def test_an_adapter_made_by_peft_gives_our_loader_its_logits(checkpoint, tmp_path, rslora, patterns):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"],
                             use_rslora=rslora, init_lora_weights=False, **patterns)
    theirs = peft_model(checkpoint, config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = llama.load(checkpoint, adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), theirs(TOKENS).logits, rtol=0, atol=1e-4)
    assert not torch.allclose(logits(ours), logits(llama.load(checkpoint)), atol=1e-2)
    assert adapter_base(tmp_path / "adapter") == str(checkpoint)


def peft_model(base, config, dtype=torch.float32):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_that_peft_saved_beside_the_factors_are_taken_when_they_are_the_bases(
        tmp_path, tied, dtype):
    peft = pytest.importorskip("peft")
    base = write_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    theirs = peft_model(base, peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False), dtype)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} & set(held)
    theirs.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    with_them, without = (llama.load(base, adapter=tmp_path / name) for name in ("adapter", "plain"))
    assert torch.equal(logits(with_them), logits(without))
    theirs.base_model.model.get_output_embeddings().weight.data[5] += 1
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(InputError, match="weight, trained or resized.*merge_and_unload"):
        llama.load(base, adapter=tmp_path / "adapter")


def test_a_head_that_was_adapted_is_merged_and_its_base_layer_is_no_obstacle(tmp_path):
    peft = pytest.importorskip("peft")
    base = write_checkpoint(tmp_path / "base", tie_word_embeddings=False)
    theirs = peft_model(base, peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "adapter")
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    ours = llama.load(base, adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), theirs(TOKENS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_a_module_that_peft_saves_whole_is_taken_only_as_it_was(tmp_path, trained):
    peft = pytest.importorskip("peft")
    base = write_checkpoint(tmp_path / "base", tie_word_embeddings=False)
    theirs = peft_model(base, peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False,
                                              modules_to_save=["lm_head", "embed_tokens"]))
    if trained:
        theirs.base_model.model.lm_head.modules_to_save["default"].weight.data[7] += 1
    theirs.save_pretrained(tmp_path / "adapter")
    if trained:
        with pytest.raises(InputError, match="carries base_model.model.lm_head.weight, trained or resized"):
            llama.load(base, adapter=tmp_path / "adapter")
    else:
        ours = llama.load(base, adapter=tmp_path / "adapter")
        torch.testing.assert_close(logits(ours), theirs(TOKENS).logits, rtol=0, atol=1e-4)


def test_adapted_or_resized_embeddings_are_refused_by_name(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft_model(checkpoint, peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"]))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="embed_tokens.lora_embedding_A, .*merge_and_unload"):
        llama.load(checkpoint, adapter=tmp_path / "adapter")
    peft_model(checkpoint, peft.LoraConfig(target_modules=["lm_head"])).save_pretrained(tmp_path / "tied")
    with pytest.raises(InputError, match="changes lm_head, which is the embedding"):
        llama.load(checkpoint, adapter=tmp_path / "tied")
    model = peft_model(checkpoint, peft.LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.model.resize_token_embeddings(330)
    model.save_pretrained(tmp_path / "grown", save_embedding_layers=True)
    with pytest.raises(InputError, match="weight, trained or resized"):
        llama.load(checkpoint, adapter=tmp_path / "grown")


@pytest.mark.parametrize("change, match", [
    ({"peft_type": "IA3"}, "IA3"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"),
    ({"lora_alpha": "x"}, "lora_alpha"),
    ({"r": 5}, r"factors \[.*, 4\] x \[4, .*\], adapter_config.json says rank 5"),
    ({"rank_pattern": {"q_proj": 5}}, "q_proj: factors .*, adapter_config.json says rank 5"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: q_proj is 'x'"),
    ({"alpha_pattern": [4]}, "dict expected"),
    ({"alpha_pattern": {"(": 4}}, "no regular expression"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens")])
def test_adapters_of_other_kinds_are_refused_by_key(checkpoint, tmp_path, change, match):
    adapter = write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(InputError, match=match):
        llama.load(checkpoint, adapter=adapter)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_an_adapter_that_is_more_than_lora_is_refused_with_the_remedy(checkpoint, tmp_path, change):
    adapter = write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(InputError, match="merge it with PEFT"):
        llama.load(checkpoint, adapter=adapter)


@pytest.mark.parametrize("change", [
    lambda tensors: tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    lambda tensors: tensors.pop("base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"),
    lambda tensors: tensors.update({"base_model.model.score.weight": torch.ones(2, 16)}),
    lambda tensors: tensors.clear()])
def test_an_adapter_with_more_or_less_than_pairs_of_factors_is_refused(checkpoint, tmp_path, change):
    adapter = write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="no factor of a pair|carries .*score|holds no LoRA factors"):
        llama.load(checkpoint, adapter=adapter)


@pytest.mark.parametrize("change, match", [
    (lambda factor: torch.tensor(1.0), "adapter_config.json says rank 4"),
    (lambda factor: factor[:0], "adapter_config.json says rank 4"),
    (lambda factor: factor[0], "adapter_config.json says rank 4"),
    (lambda factor: factor.long(), "int64. holds other than finite numbers"),
    (lambda factor: factor * math.nan, "holds other than finite numbers"),
    (lambda factor: factor + math.inf, "holds other than finite numbers")])
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


@pytest.mark.parametrize("change, told", [
    ({"base_model_name_or_path": "../nowhere/llama-7b-hf"}, "no such directory.* names this base, --model would take"),
    ({"revision": "step1000"}, "at its revision 'step1000'.*--model")])
def test_a_base_that_cannot_be_had_is_told_with_the_adapter_that_names_it(checkpoint, tmp_path, change, told):
    adapter = write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(InputError, match=told):
        evaluation.main(["ask", "--adapter", str(adapter), PROMPT])


def test_an_adapter_is_asked_in_the_tokenizer_and_template_that_it_brings(checkpoint, tmp_path, capsys):
    """As TRL, Axolotl, LLaMA-Factory and Unsloth save them; ours bring none."""
    adapter = write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter")
    base = load_tokenizer(checkpoint)
    assert tokenizer_for(checkpoint, adapter).fingerprint == base.fingerprint
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, adapter / name)
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}Q {{ m.content }}{{ eos_token }}A {% endfor %}")
    own = tokenizer_for(checkpoint, adapter)
    assert own.decode(own.prompt_ids("Who")).startswith("Q Who") and own.rows == base.rows
    assert base.config_stops <= own.stop_ids
    assert f"{adapter} brings a tokenizer and a chat template" in capsys.readouterr().out


@pytest.mark.parametrize("rename, told", [
    (lambda key: key.removeprefix("base_model.model."), "does not begin with base_model.model."),
    (lambda key: key.replace("lora_A.weight", "lora_A.default.weight"), "is no name that PEFT writes")])
def test_factors_that_peft_would_leave_out_are_refused(checkpoint, tmp_path, rename, told):
    adapter = write_adapter(with_lora(checkpoint), checkpoint, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({rename(key): tensor for key, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=told):
        llama.load(checkpoint, adapter=adapter)


def test_weights_of_another_kind_are_told_for_what_they_are(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    file = copy / "model.safetensors"
    tensors = load_file(file)
    save_file({f"_orig_mod.{key}": tensor for key, tensor in tensors.items()}, file)
    with pytest.raises(InputError, match="_orig_mod.model.layers.1.input_layernorm.weight is there: save the model"):
        llama.load(copy)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match="git lfs pull"):
        llama.load(copy)
    file.rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds neither .*of a .bin file, load it with transformers"):
        llama.load(copy)


def test_an_adapter_of_another_model_is_refused(checkpoint, tmp_path):
    for shape, match in (({"num_hidden_layers": 3}, "is no parameter"),
                         ({"hidden_size": 20}, "does not fit the weight")):
        other = write_checkpoint(tmp_path / match, **shape)
        adapter = write_adapter(with_lora(other), other, tmp_path / "adapter")
        with pytest.raises(InputError, match=match):
            llama.load(checkpoint, adapter=adapter)


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


def test_what_16_bits_round_of_a_long_way_is_no_fault_and_half_of_the_way_is_one(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "base", num_hidden_layers=8)

    def check(with_added):
        """Of a model in bf16 that LoRA took a long way."""
        model = with_lora(checkpoint, dtype=torch.bfloat16)
        added = [parameter for name, parameter in model.named_parameters() if ".lora_B" in name]
        for parameter in added:
            parameter.data *= 20
        if not adapter.exists():
            write_adapter(model, checkpoint, adapter)
        check_outputs(model, {adapter: {"path": checkpoint, "adapter": adapter}}, list(range(5, 12)),
                      added if with_added else ())
    adapter = tmp_path / "adapter"
    check(True)
    assert "(the untrained model's by 1." in capsys.readouterr().out
    with pytest.raises(InputError, match="do not use it"):      # by what 16 bits round of any model
        check(False)
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", config | {"lora_alpha": config["lora_alpha"] / 2})
    with pytest.raises(InputError, match="do not use it"):
        check(True)


def tiny_run(tmp_path: Path, base: Path, flags: list[str]) -> None:
    rows = [{"row_id": str(i), "en": {"prompt": f"What is {i}?", "response": f"It is {i}."},
             "sw": {"prompt": f"{i} ni nini?", "response": f"Ni {i}."}} for i in range(12)]
    write_rows(tmp_path / "rows.jsonl", rows)
    clo.main(["--lang", "sw", "--model", str(base), "--data", str(tmp_path / "rows.jsonl"),
              "--out", str(tmp_path / "run"), "--baseline", "none", "--epochs", "1", "--row-tokens", "200",
              "--max-new-tokens", "2", "--device", "cpu", *flags])


@pytest.mark.parametrize("flags, outputs", [
    (["--merge"], {"adapter": "adapter", "model": "whole"}), ([], {"adapter": "adapter"}),
    (["--train", "attention"], {"model": "whole"}), (["--train", "full"], {"model": "whole"})])
def test_a_run_writes_and_checks_the_outputs_of_its_mode(tmp_path, capsys, flags, outputs):
    base = write_checkpoint(tmp_path / "base")
    tiny_run(tmp_path, base, flags)
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


# ---- tokenizers and chat templates of what was written

NAMED = {"default": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
         "tool_use": "{{ bos_token }}{% for m in messages %}T {{ m.content }}{{ eos_token }}{% endfor %}",
         "rag": "{{ bos_token }}{% for m in messages %}R {{ m.content }}{{ eos_token }}{% endfor %}"}


def put_templates(base: Path, layout: str) -> None:
    """The templates of NAMED, in one of the places where transformers looks for them."""
    config = read_json(base / "tokenizer_config.json")
    if layout == "list":
        named = [{"name": name, "template": template} for name, template in NAMED.items()]
        write_json(base / "tokenizer_config.json", config | {"chat_template": named})
    elif layout == "files":
        more = base / "additional_chat_templates"
        more.mkdir()
        (base / "chat_template.jinja").write_text(NAMED["default"])
        for name in ("tool_use", "rag"):
            (more / f"{name}.jinja").write_text(NAMED[name])
    elif layout == "string":
        write_json(base / "tokenizer_config.json", config | {"chat_template": NAMED["default"]})


@pytest.mark.parametrize("layout", ["list", "files", "string", "none"])
@pytest.mark.parametrize("flags", [["--merge"], ["--train", "full"]])
def test_what_a_run_writes_renders_every_template_as_its_base(tmp_path, layout, flags):
    transformers = pytest.importorskip("transformers")
    base = write_checkpoint(tmp_path / "base")
    put_templates(base, layout)
    tiny_run(tmp_path, base, flags)
    written = tmp_path / "run" / "clo" / "model"
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(path) for path in (written, base))
    messages = [{"role": "user", "content": PROMPT}]
    if layout == "none":                                 # ours, which the base did not bring
        ids = ours.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert theirs.chat_template is None and ids == load_tokenizer(base).prompt_ids(PROMPT)
        return
    assert ours.chat_template == theirs.chat_template
    for name in theirs.chat_template if isinstance(theirs.chat_template, dict) else [None]:
        texts = [tokenizer.apply_chat_template(messages, chat_template=name, tokenize=False)
                 for tokenizer in (ours, theirs)]
        assert texts[0] == texts[1] and PROMPT in texts[0]
    assert load_tokenizer(written).fingerprint == load_tokenizer(base).fingerprint


LLAMA2 = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
          "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}")
SCHEMES = {"prepended": None, "always": "always", "first": "first"}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_transformers_tokenises_what_was_written_as_it_was_trained(tmp_path, scheme, legacy, kind):
    """Sentencepiece as Llama has it: a space before a text's start alone, or before every stretch between
    special tokens. transformers 5 goes by "legacy" and not by tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    base = write_checkpoint(tmp_path / "base")
    write_sentencepiece(base, SCHEMES[scheme])
    config = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
              "chat_template": LLAMA2}
    write_json(base / "tokenizer_config.json", config | ({} if legacy is None else {"legacy": legacy}))
    adapter = write_adapter(with_lora(base), base, tmp_path / "adapter")
    written = write_merged(base, adapter, tmp_path / "merged")
    ours, theirs = load_tokenizer(base), transformers.AutoTokenizer.from_pretrained(written)
    assert read_json(written / "tokenizer_config.json")["legacy"] == (scheme != "first")
    messages = [{"role": "user", "content": "where is it"}]
    prompt = ours.prompt_ids("where is it")
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == prompt
    messages.append({"role": "assistant", "content": "here it is"})
    whole = theirs.apply_chat_template(messages, return_dict=False)
    assert whole == prompt + ours.response_ids("here it is")


def write_sentencepiece(directory: Path, scheme: str | None) -> None:
    """A tokenizer.json in the layouts Llama's converters wrote: the space prepended by the normalizer (None),
    or by Metaspace's scheme."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *"[]/INSThereiswt", "\u2581he", "\u2581i", "\u2581is"]
    merges = [("\u2581", "h"), ("\u2581h", "e"), ("\u2581", "i"), ("\u2581i", "s")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "\u2581h"]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    if scheme:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(directory / "tokenizer.json"))


# ---- loading

def random_model(**shape) -> llama.Llama:
    config = Config(**{"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                       "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
                       "tie_word_embeddings": True} | shape)
    return llama.initialise_(llama.Llama(config)).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
def test_files_of_every_dtype_load_in_every_dtype(dtype, max_shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", max_shard_bytes)
    model = random_model(tie_word_embeddings=False)
    save(model, tmp_path, dtype)
    for wanted in (torch.float32, torch.bfloat16, torch.float16):
        for (name, expected), (_, found) in zip(model.named_parameters(),
                                                llama.load(tmp_path, dtype=wanted).named_parameters()):
            assert found.dtype == wanted and torch.equal(found, expected.to(dtype).to(wanted)), name


def test_changing_a_loaded_model_changes_no_file(checkpoint):
    before = (checkpoint / "model.safetensors").read_bytes()
    model = llama.load(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    save(model, checkpoint)                     # over the very file it is mapped from
    again = llama.load(checkpoint)
    assert (checkpoint / "model.safetensors").read_bytes() != before
    for (name, expected), (_, found) in zip(model.named_parameters(), again.named_parameters()):
        assert torch.equal(found, expected), name


def test_loading_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    """Peak resident memory of a process that loads eight bf16 shards as fp32: the model, and little more
    than a shard."""
    config = Config(vocab_size=32, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
                          num_attention_heads=8, num_key_value_heads=8, head_dim=128)
    with torch.device("meta"):
        model = llama.Llama(config)
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 35_000_000)
    save(model.to_empty(device="cpu"), tmp_path, torch.bfloat16)
    del model
    shards = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    code = """if True:
        import re, sys, torch, model
        def kilobytes(name):
            return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
        torch.zeros(1, dtype=torch.bfloat16).to(torch.float32)
        before = kilobytes("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")
        loaded = model.load(sys.argv[1])
        print(1024 * (kilobytes("VmHWM") - before), sum(x.nbytes for x in loaded.parameters()))"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    root = Path(__file__).parents[1]
    peak, size = map(int, subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root,
                                         capture_output=True, text=True, check=True).stdout.split())
    assert len(shards) >= 8 and size > 500e6
    assert peak <= size + 1.15 * max(shards)


def test_saved_and_sharded_models_load_back_bit_for_bit(tmp_path, monkeypatch):
    model = random_model(tie_word_embeddings=False)
    save(model, tmp_path / "one")
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 2000)
    save(model, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    for name in ("one", "many"):
        again = llama.load(tmp_path / name)
        assert again.config == model.config
        for (key, expected), (_, found) in zip(model.named_parameters(), again.named_parameters()):
            assert torch.equal(expected, found), key


def test_a_tied_head_may_lie_under_either_name_but_not_differ(checkpoint):
    expected = llama.load(checkpoint).head.clone()
    tensors = load_file(checkpoint / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    for extra in ({"lm_head.weight": embedding},
                  {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding.clone()}):
        save_file(tensors | extra, checkpoint / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(llama.load(checkpoint).head, expected)
    save_file(tensors | {"lm_head.weight": embedding + 1, "model.embed_tokens.weight": embedding},
              checkpoint / "model.safetensors", metadata={"format": "pt"})
    refuse(checkpoint, "differ: if both were trained, write tie_word_embeddings false")
    save_file(tensors | {"lm_head.weight": embedding[:-1].clone(), "model.embed_tokens.weight": embedding},
              checkpoint / "model.safetensors", metadata={"format": "pt"})
    refuse(checkpoint, "differ: if both were trained, write tie_word_embeddings false")


def test_old_files_with_rotary_tables_load(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)}
    expected = llama.load(checkpoint).head.clone()
    save_file(tensors | tables, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(llama.load(checkpoint).head, expected)


def test_a_shard_that_is_missing_or_lacks_what_the_index_promises_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 3000)
    save(random_model(), tmp_path)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    refuse(tmp_path, f"promises .* in {second.name}, which does not hold it")
    second.unlink()
    refuse(tmp_path, f"{second.name} is missing")


def test_an_adapter_adds_its_product_to_the_weights(checkpoint, tmp_path):
    base = llama.load(checkpoint)
    name, weight = ("model.layers.1.self_attn.k_proj",
                    dict(base.named_parameters())["model.layers.1.self_attn.k_proj.weight"])
    A, B = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 7, "r": 3}))
    save_file({f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B},
              adapter / "adapter_model.safetensors")
    tuned = llama.load(checkpoint, adapter=adapter)
    for key, found in tuned.named_parameters():
        expected = dict(base.named_parameters())[key]
        if key == name + ".weight":
            expected = (expected.double() + 7 / 3 * B.double() @ A.double()).float()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def refuse(checkpoint, match: str):
    with pytest.raises(InputError, match=match) as error:
        llama.load(checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 64, b"not weights at all"])
def test_damaged_weights_are_refused(checkpoint, content):
    (checkpoint / "model.safetensors").write_bytes(content)
    refuse(checkpoint, "model.safetensors is missing, damaged or not")


def test_missing_files_are_named(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    refuse(checkpoint, "neither model.safetensors nor")
    (checkpoint / "config.json").write_text('{"model_type')
    refuse(checkpoint, "config.json:1: not valid JSON")
    refuse(tmp_path / "nowhere", "nowhere: no such directory")
    (checkpoint / "config.json").unlink()
    refuse(checkpoint, "no config.json with a model_type")


@pytest.mark.parametrize("stale", ["missing", "whole"])
def test_a_whole_file_beside_an_index_is_what_transformers_loads_and_that_is_said(tmp_path, capsys, stale):
    """Saved in shards, then trained on and saved whole: the index of the shards stays."""
    transformers = pytest.importorskip("transformers")
    base = write_checkpoint(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = {path: path.read_bytes() for path in (tmp_path / "model").glob("model*")}
    theirs.model.norm.weight.data += 1
    theirs.save_pretrained(tmp_path / "model")
    for path in shards if stale == "whole" else [tmp_path / "model" / "model.safetensors.index.json"]:
        path.write_bytes(shards[path])
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")(TOKENS).logits
    for _ in range(2):
        ours = llama.load(tmp_path / "model")
        torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-4)
    assert capsys.readouterr().out.count("model.safetensors is read, as transformers does, and no shard") == 1


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": False},
                                   {"model_type": "mistral", "sliding_window": 5},
                                   {"model_type": "qwen2", "qkv_bias": True},
                                   {"model_type": "qwen3", "qk_norm": True}])
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "9KB"}, {"dtype": torch.bfloat16}])
def test_what_transformers_saves_gives_us_its_logits(tmp_path, shape, how):
    transformers = pytest.importorskip("transformers")
    base = write_checkpoint(tmp_path / "base", **shape)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=how.get("dtype", torch.float32))
    theirs.save_pretrained(tmp_path / "model", **{key: how[key] for key in how if key != "dtype"})
    again = llama.load(tmp_path / "model", dtype=torch.float64)
    expected = theirs.double()(TOKENS).logits
    torch.testing.assert_close(again(TOKENS) @ again.head.T, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_head_that_says_it_is_not_tied_is_told_the_remedy(checkpoint):
    config = read_json(checkpoint / "config.json")
    write_json(checkpoint / "config.json", config | {"tie_word_embeddings": False})
    refuse(checkpoint, "no lm_head.weight.*write tie_word_embeddings true")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "weights.bin", 3])
def test_an_index_may_only_name_safetensors_files_of_its_directory(checkpoint, name):
    index = {"weight_map": {"model.norm.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint / "model.safetensors").unlink()
    refuse(checkpoint, "not a safetensors file of its directory")


def test_a_truncated_file_is_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    refuse(checkpoint, "damaged")
