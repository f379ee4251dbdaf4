"""Multiple choice side by side with lm-evaluation-harness: questions per second of the same model.

    python -m bench.eval --mmlu DIR --tokenizer DIR [--questions 100] [--shots 5]

Both score " A" to " D" after every question in fp32 on the CPU, tokenisation included, loading excluded.
The harness (its Hugging Face back end) is run at every batch size given and its best one counts. They take
turns subject by subject, so that a busy machine slows both, and CPU seconds stand beside those of the
clock. The printed ratios are those of the medians over --repeats. The log-probs of the two are compared as
well. Needs tests/requirements.txt.
"""

import argparse
import contextlib
import io
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import model as llama
from engine.files import run
from engine.progress import progress
from evals import choice as benchmarks
from evals.report import table
from formats.chat import load_tokenizer
from formats.checkpoints import save
from formats.configs import Config


def random_checkpoint(directory: Path, tokenizer: Path, width: int, layers: int) -> Path:
    """A random Llama of the tokenizer's vocabulary."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, directory / name)
    vocabulary = load_tokenizer(directory).vocab_size
    config = Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=11 * width // 4 // 32 * 32,
        num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=width // 64,
        head_dim=64, max_position_embeddings=4096)
    save(llama.initialise_(llama.Llama(config)), directory)
    return directory


def harness(checkpoint: Path, batch_size: int):
    """score(questions) -> [log-probs of the choices], by lm-evaluation-harness."""
    logging.disable(logging.WARNING)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    with contextlib.redirect_stderr(io.StringIO()):
        judge = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=batch_size)

    def score(questions):
        requests = [Instance("loglikelihood", {}, (question.header + question.text, " " + letter), i)
                    for question in questions for i, letter in enumerate(benchmarks.LETTERS)]
        found = iter(judge.loglikelihood(requests, disable_tqdm=True))
        return [[next(found)[0] for _ in benchmarks.LETTERS] for question in questions]
    return score


def ours(checkpoint: Path, batch_tokens: int):
    model, tokenizer = llama.load(checkpoint), load_tokenizer(checkpoint)
    return lambda questions: [
        found["logp"] for found in benchmarks.multiple_choice(model, tokenizer, questions, batch_tokens)]


def spread(questions: list, count: int) -> list[list]:
    """`count` questions, as many of each subject as go; a list for each subject."""
    subjects = {}
    for question in questions:
        subjects.setdefault(question.subject, []).append(question)
    sizes = [count // len(subjects) + (i < count % len(subjects)) for i in range(len(subjects))]
    return [part[:size] for part, size in zip(subjects.values(), sizes) if size]


def compete(rivals: dict, subjects: list[list], repeats: int) -> tuple[dict, dict]:
    """({name: (seconds, CPU seconds) of every repeat}, {name: log-probs});
    the rivals take turns after each subject."""
    times, scores = {name: np.zeros((repeats, 2)) for name in rivals}, {}
    for score in rivals.values():
        score(subjects[0][:2])
    with progress(total=repeats * len(subjects) * len(rivals), desc="turns") as bar:
        for repeat in range(repeats):
            scores = {name: [] for name in rivals}
            for questions in subjects:
                for name, score in rivals.items():
                    began = np.array([time.perf_counter(), time.process_time()])
                    scores[name] += score(questions)
                    times[name][repeat] += np.array([time.perf_counter(), time.process_time()]) - began
                    bar.update()
    return times, scores


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--mmlu", required=True, help="directory of MMLU as distributed")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with a tokenizer.json")
    parser.add_argument("--questions", type=int, default=100, help="spread over the subjects")
    parser.add_argument("--shots", type=int, default=5, help="worked examples before each question")
    parser.add_argument("--width", type=int, default=512, help="hidden width of the random model")
    parser.add_argument("--layers", type=int, default=8, help="its layers")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of one of our forward passes")
    parser.add_argument("--batch-sizes", default="1,2,4", help="of the harness")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    subjects = spread(benchmarks.read_benchmark("mmlu", args.mmlu, args.shots).questions, args.questions)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint(Path(folder), args.tokenizer, args.width, args.layers)
        rivals = {"ours": ours(checkpoint, args.batch_tokens)}
        rivals |= {f"harness, batch {size}": harness(checkpoint, int(size))
                   for size in args.batch_sizes.split(",")}
        times, scores = compete(rivals, subjects, args.repeats)
    medians, count = ({name: np.median(found, axis=0) for name, found in times.items()},
                      sum(map(len, subjects)))
    print(table(["", "questions/s", "seconds", "CPU seconds"],
                [[name, f"{count / median[0]:.2f}",
                  *(", ".join(f"{value:.1f}" for value in column) for column in times[name].T)]
                 for name, median in medians.items()]))
    best = min((name for name in rivals if name != "ours"), key=lambda name: medians[name][0])
    gap = max(abs(a - b) for mine, theirs in zip(scores["ours"], scores[best]) for a, b in zip(mine, theirs))
    clock, cpu = medians[best] / medians["ours"]
    print(f"ours / {best}: {clock:.2f} x the questions/s, 1/{cpu:.2f} of the CPU seconds; "
          f"log-probs differ by at most {gap:.1e}")
    settings = {"torch": torch.__version__,
                "tokens of a prompt": prompt_tokens(sum(subjects, []), args.tokenizer)}
    print(json.dumps(vars(args) | settings, default=str))


def prompt_tokens(questions: list, tokenizer: Path) -> float:
    """Mean length of header and question."""
    prompts = [prompt for prompt, _ in benchmarks.encode_questions(load_tokenizer(tokenizer), questions)]
    return sum(map(len, prompts)) / len(prompts)


if __name__ == "__main__":
    run(main)
