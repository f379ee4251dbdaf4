"""Multiple choice side by side with lm-evaluation-harness: the same questions, the same model, questions per second.

    python -m bench.eval --mmlu DIR --tokenizer DIR [--questions 100] [--shots 5]

Both score " A" to " D" after every question in fp32 on the CPU, tokenisation included, loading excluded. The harness (its
Hugging Face back end) is run at every batch size given and its best one counts. Runs alternate, so that a busy machine slows
both; the printed ratio is that of the medians. Needs tests/requirements.txt. The log-probs of the two are compared as well.
"""

import argparse
import contextlib
import io
import json
import logging
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

import benchmarks
import data
import model as llama
from report import table


def random_checkpoint(directory: Path, tokenizer: Path, width: int, layers: int) -> Path:
    """A random Llama of the tokenizer's vocabulary."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, directory / name)
    vocabulary = data.load_tokenizer(directory).vocab_size
    config = llama.Config(vocab_size=vocabulary, hidden_size=width, intermediate_size=11 * width // 4 // 32 * 32, num_hidden_layers=layers,
                          num_attention_heads=width // 64, num_key_value_heads=width // 64, head_dim=64,
                          max_position_embeddings=4096)
    llama.save(llama.initialise_(llama.Llama(config)), directory)
    return directory


def harness(checkpoint: Path, batch_size: int):
    """score(questions) -> [log-probs of the choices], by lm-evaluation-harness."""
    logging.disable(logging.WARNING)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    with contextlib.redirect_stderr(io.StringIO()):
        judge = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=batch_size)

    def score(questions):
        requests = [Instance("loglikelihood", {}, (question.header + question.text, " " + choice), i)
                    for question in questions for i, choice in enumerate(question.choices)]
        found = iter(judge.loglikelihood(requests, disable_tqdm=True))
        return [[next(found)[0] for _ in question.choices] for question in questions]
    return score


def ours(checkpoint: Path, batch_tokens: int):
    model, tokenizer = llama.load(checkpoint), data.load_tokenizer(checkpoint)
    return lambda questions: [found["logp"] for found in benchmarks.multiple_choice(model, tokenizer, questions, batch_tokens)]


def spread(questions: list, count: int) -> list:
    """`count` questions, as many of each subject as go."""
    subjects = {}
    for question in questions:
        subjects.setdefault(question.subject, []).append(question)
    return [question for part in subjects.values() for question in part[:-(-count // len(subjects))]][:count]


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--mmlu", required=True, help="directory of MMLU as distributed")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with a tokenizer.json")
    parser.add_argument("--questions", type=int, default=100, help="spread over the subjects")
    parser.add_argument("--shots", type=int, default=5, help="worked examples before each question")
    parser.add_argument("--width", type=int, default=512, help="hidden width of the random model")
    parser.add_argument("--layers", type=int, default=8, help="its layers")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of one of our forward passes")
    parser.add_argument("--batch-sizes", default="1,4,16", help="of the harness")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each, after one of a few questions")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    questions = spread(benchmarks.read_benchmark("mmlu", args.mmlu, args.shots).questions, args.questions)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint(Path(folder), args.tokenizer, args.width, args.layers)
        rivals = {"ours": ours(checkpoint, args.batch_tokens)}
        rivals |= {f"harness, batch {size}": harness(checkpoint, int(size)) for size in args.batch_sizes.split(",")}
        seconds, scores = {name: [] for name in rivals}, {}
        for score in rivals.values():
            score(questions[::len(questions) // 4])
        for _ in range(args.repeats):
            for name, score in rivals.items():
                began = time.perf_counter()
                scores[name] = score(questions)
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    lines = [[name, f"{len(questions) / medians[name]:.2f}", ", ".join(f"{time:.1f}" for time in times)] for name, times in seconds.items()]
    print(table(["", "questions/s", "seconds"], lines))
    best = min((name for name in rivals if name != "ours"), key=medians.get)
    gap = max(abs(a - b) for mine, theirs in zip(scores["ours"], scores[best]) for a, b in zip(mine, theirs))
    print(f"ours / {best}: {medians[best] / medians['ours']:.2f} x; log-probs differ by at most {gap:.1e}")
    print(json.dumps(vars(args) | {"torch": torch.__version__, "tokens of a prompt": prompt_tokens(questions, args.tokenizer)}, default=str))


def prompt_tokens(questions: list, tokenizer: Path) -> float:
    """Mean length of header and question."""
    prompts = [prompt for prompt, _ in benchmarks.encode_questions(data.load_tokenizer(tokenizer), questions)]
    return sum(map(len, prompts)) / len(prompts)


if __name__ == "__main__":
    main()
