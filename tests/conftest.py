"""Before anything imports triton: without a GPU its kernels run in the interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import contextlib  # noqa: E402
import resource  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

import clo  # noqa: E402
import model as llama  # noqa: E402
from engine.files import fill_directory, write_json  # noqa: E402
from formats.chat import load_tokenizer  # noqa: E402
from formats.checkpoints import save, save_adapter  # noqa: E402

LINES = ["What is the capital of France?", "The capital of France is Paris.", "Mji mkuu wa Ufaransa ni upi?",
         "Mji mkuu wa Ufaransa ni Paris.", "Kìnnìún ń jẹ ẹran.", "The lion eats meat."]


def write_checkpoint(directory: Path, seed: int = 0, **shape) -> Path:
    """A tiny random Llama with a byte-level tokenizer, as a Hugging Face directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (pre_tokenizers.ByteLevel(add_prefix_space=False),
                                                  decoders.ByteLevel())
    tokenizer.train_from_iterator(LINES * 5, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json",
                    {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
                     "tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    config = llama.Config(**{"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 16,
                             "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                             "num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True,
                             "max_position_embeddings": 256} | shape)
    model = llama.initialise_(llama.Llama(config), seed)
    with torch.no_grad():                    # large enough that every layer matters
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    save(model, directory)
    return directory


def with_lora(checkpoint, rank=4, alpha=12, dtype=torch.float32) -> llama.Llama:
    """The checkpoint with LoRA factors that are not at their start."""
    model = clo.add_lora(llama.load(checkpoint, dtype=dtype), rank, alpha)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return model.requires_grad_(False)


def write_adapter(model, checkpoint, directory: Path) -> Path:
    fill_directory(directory, lambda path: save_adapter(
        model, path, str(checkpoint), clo.ATTENTION, 4, 12, load_tokenizer(checkpoint).template))
    return directory


class Recorder:
    """Stands for an optimiser: keeps the gradients of a step, by name, and moves nothing."""

    def __init__(self, parameters: dict):
        self.parameters, self.gradients = parameters, {}
        self.param_groups = [{"params": list(parameters.values())}]

    def step(self) -> None:
        self.gradients = {name: parameter.grad for name, parameter in self.parameters.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "base")


@pytest.fixture
def full_disk():
    """full_disk(size): within it no file can grow beyond so many bytes."""
    @contextlib.contextmanager
    def limit(size: int):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return limit


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data laid beside the project, where there is some."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no real data beside the project")
    return path


# ---- what passed is not run twice

def pytest_addoption(parser):
    parser.addoption("--passed", type=Path, help="a file of tests that passed before, which are left out; those "
                                                 "that pass now are added to it")


def pytest_collection_modifyitems(config, items):
    path = config.getoption("--passed")
    before = set(path.read_text().splitlines()) if path and path.exists() else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in before])
    items[:] = [item for item in items if item.nodeid not in before]


def pytest_sessionfinish(session):
    path = session.config.getoption("--passed")
    if path:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        with path.open("a") as file:
            file.writelines(f"{report.nodeid}\n" for report in reporter.stats.get("passed", []))
