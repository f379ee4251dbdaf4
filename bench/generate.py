"""Tokens per second of greedy generation: ours, transformers' `generate`, and the bare matrix products.

    python -m bench.generate            # the shape of its defaults, paired and interleaved in one process
    python -m bench.generate --model DIR --tokens 48 --batch 1 --dtype bf16                # a real model
    python -m bench.generate --device cuda --dtype bf16 --shape Llama-3.2-1B --batch 1

Every round runs all contenders in turn, and ratios are taken within a round; the median over rounds is
printed with the middle half. The bare products are one F.linear for every weight matrix and pass, of the same
shapes and weights, nothing between them: what is left of the time when attention, norms, cache and
bookkeeping are free. Prompts are of mixed lengths. Needs transformers (tests/requirements.txt).
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
import transformers

import model as llama
from bench import tables
from engine.files import run
from formats.checkpoints import save
from formats.configs import Config
from formats.weights import DTYPES


def shape_of(args) -> Config:
    if args.shape:
        return tables.MODELS[args.shape]
    heads = args.width // args.head_dim
    return Config(args.vocab, args.width, args.mlp, args.layers, heads, args.kv_heads or heads, args.head_dim)


def make_prompts(args, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(args.prompt // 2, args.prompt, args.batch).round().int().tolist()
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def their_generate(theirs, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    width = max(map(len, prompts))
    tokens = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    tokens, mask = torch.tensor(tokens, device=theirs.device), torch.tensor(mask, device=theirs.device)
    with torch.no_grad():
        out = theirs.generate(tokens, attention_mask=mask, max_new_tokens=max_tokens,
                              min_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
    return out[:, width:].tolist()


@torch.no_grad()
def bare_products(model: llama.Llama, rows: int, width: int, max_tokens: int) -> None:
    """The products of one pass over the prompts (the head for the last position alone),
    then of one token a step."""
    inner = [parameter for name, parameter in model.named_parameters() if name.endswith("_proj.weight")]
    like = {"device": model.head.device, "dtype": model.head.dtype}
    widths = {weight.shape[1] for weight in inner}
    inputs = {(N, H): torch.randn(N, H, **like) for N in (rows * width, rows) for H in widths}
    last = torch.randn(rows, model.head.shape[1], **like)
    for N in [rows * width] + [rows] * (max_tokens - 1):
        for weight in inner:
            F.linear(inputs[N, weight.shape[1]], weight)
        F.linear(last, model.head)


def timed(function, clock=time.perf_counter) -> float:
    started = clock()
    function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - started


def quartiles(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})"


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--model", help="a real checkpoint, instead of random weights of a shape")
    parser.add_argument("--shape", choices=list(tables.MODELS), help="of a known model, not of the next six")
    parser.add_argument("--width", type=int, default=512, help="hidden width")
    parser.add_argument("--mlp", type=int, default=1376, help="mlp width")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: as many as query heads")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=8, help="prompts")
    parser.add_argument("--prompt", type=int, default=32,
                        help="tokens of the longest prompt; the shortest has half")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true",
                        help="seconds of CPU, not of the clock: on a busy machine, one thread")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    with tempfile.TemporaryDirectory() as directory:
        if not args.model:
            with torch.device(args.device):
                save(llama.initialise_(llama.Llama(shape_of(args))), directory, dtype)
        model = llama.load(args.model or directory, args.device, dtype)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model or directory, dtype=dtype)
        theirs = theirs.to(args.device)
    prompts = make_prompts(args, model.config.vocab_size)
    contenders = {"ours": lambda: llama.generate(model, prompts, args.tokens, set()),
                  "transformers": lambda: their_generate(theirs, prompts, args.tokens),
                  "bare products": lambda: bare_products(model, args.batch, args.prompt, args.tokens)}
    same = [one == other for pair in zip(contenders["ours"](), contenders["transformers"]())
            for one, other in zip(*pair)]
    # Near-ties fall either way.
    print(f"{sum(same) / len(same):.1%} of the tokens are those of transformers")
    seconds = {name: [] for name in contenders}
    for round in range(args.rounds + 1):
        for name, function in contenders.items():
            elapsed = timed(function, time.process_time if args.cpu_time else time.perf_counter)
            if round:                                                      # the first round warms up
                seconds[name].append(elapsed)
    for name, times in seconds.items():
        print(f"{name:14}{args.batch * args.tokens / statistics.median(times):8.0f} tokens/s")
    for name in ("transformers", "bare products"):
        ratios = [(other / own) for own, other in zip(seconds["ours"], seconds[name])]
        print(f"ours / {name}: {quartiles(ratios)} of its tokens/s")


if __name__ == "__main__":
    run(main)
