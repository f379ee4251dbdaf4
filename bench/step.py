"""A training step side by side: ours, TRL's DPOTrainer with PEFT, and the bare matrix products of our step.

    python -m bench.step                         # the shape of its defaults, paired in one run
    python -m bench.step --model DIR --data FILE --samples 6 --sides ours products hf     # a real model
    python -m bench.step --trl-batch 1           # TRL where it is fastest on a CPU; its own default is 8
    python -m bench.step --sides ours --recompute
    python -m bench.step --flat                  # cost per token while the number of samples grows
    python -m bench.step --device cuda --shape Llama-3-8B --row-tokens 4096 --samples 256 --trl-liger

A *sample* is a bilingual row: an English and a translated question with a response each. They make two
preference pairs, each response being chosen for one question and rejected for the other. Both sides get the
same checkpoint, the same pairs, LoRA on q, k, v, o, the sigmoid loss and AdamW, and both compute the
reference log-probs of every pair once, inside the time. Lengths are log-normal: the medians and sigma of the
options, prompts and responses cut so that a fork fits a row.

Every side runs in a process of its own; its peak is the most memory that process ever held (resident, imports
and model included; on CUDA what PyTorch allocated there). The clock starts when model and data are ready and
one small step has warmed the side up. Both sides print the mean log-prob of the chosen responses of the first
step under the base model; they have to agree, since the work is the same. `products` is every product of an
activation with a frozen weight that our step needs, and nothing between them: the time left when all else is
free. tflops counts those products for ours too. Beside the wall clock stands processor time, which with
--threads 1 is what to compare on a machine that does other work too.

`hf` is plain transformers with PEFT on the same sequences, each in full: sorted by length, four a batch, padded
to the longest, reference pass included, and the gradient that the loss has at the first step.

TRL's reference is the model with its adapter switched off, inside every step; --trl-precompute has it compute
all of them first. Needs trl and peft (tests/requirements.txt).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

import clo
import data
import model as llama
from bench import tables
from engine import ranks, scale
from engine.files import run, write_json
from evals import heldout
from formats.checkpoints import save
from formats.configs import Config
from formats.weights import DTYPES
from kernels.chunks import chunk_rows

BOS, EOS, SPECIAL = 0, 1, 2                                       # ids; words follow the special tokens
HF_BATCH = 4                                                      # plain transformers: sequences a forward pass
MAX_PROMPT, MAX_RESPONSE = 200, 400                               # tokens: 200 + 2 * 400 fit a row of 1024


# --------------------------------------------------------------------------------------------------- the work

def make_samples(args) -> list[list[data.Fork]]:
    """Forks of every sample, [English, target]: the first rows of --data, or random words of log-normal
    lengths."""
    if args.data:
        rows = data.read_rows(args.data, "en")[:args.samples]
        target = next(language for language in data.languages_of(rows[0]) if language != "en")
        return data.make_forks(rows, data.load_tokenizer(args.model), "en", target, args.row_tokens)[0]
    generator = torch.Generator().manual_seed(1)

    def words(median: int, most: int) -> list[int]:
        length = median * math.exp(args.sigma * torch.randn((), generator=generator).item())
        return torch.randint(SPECIAL, args.vocab, (min(most, max(2, round(length))),),
                             generator=generator).tolist()
    samples = []
    for row in range(args.samples):
        prompts = [[BOS] + words(args.prompt, MAX_PROMPT) for _ in range(2)]
        replies = [words(args.response, MAX_RESPONSE) + [EOS] for _ in range(2)]
        samples.append([data.Fork(prompts[own], [replies[own], replies[1 - own]], language, row, own)
                        for own, language in enumerate(("en", "tgt"))])
    return samples


def shape_of(args) -> Config:
    if args.shape:
        return tables.MODELS[args.shape]
    heads = args.width // args.head_dim
    return Config(args.vocab, args.width, args.mlp, args.layers, heads, heads, args.head_dim)


def make_model(directory: Path, args, compiler=None) -> llama.Llama:
    """The checkpoint's model; with --init-on-device random weights that never were on the CPU or a disk."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    if not args.init_on_device:
        return llama.load(directory, device, dtype, None, args.recompute, compiler)
    with torch.device("meta"):
        model = llama.Llama(shape_of(args), dtype, args.recompute, compiler).to(dtype)
    return llama.initialise_(model.to_empty(device=device)).requires_grad_(False).eval()


def write_checkpoint(directory: Path, args) -> None:
    """A random Llama, and a tokenizer to which every word is one token, for those who want text."""
    if args.init_on_device or args.model:
        return
    with torch.device(args.device):
        model = llama.initialise_(llama.Llama(shape_of(args)))
    save(model, directory, DTYPES[args.dtype])
    words = {"<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(SPECIAL, args.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, "</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    write_json(directory / "tokenizer_config.json",
                    special | {"tokenizer_class": "PreTrainedTokenizerFast"})


def clock() -> tuple[float, float]:
    """Seconds of wall clock and of processor time: the second hardly feels what else the machine does."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def elapsed(since: tuple[float, float]) -> dict:
    return {name: now - then for name, now, then in zip(("seconds", "cpu_seconds"), clock(), since)}


# ------------------------------------------------------------------------------------------------------ sides

DPO = clo.Objective(lam=0.0, nll=(), beta=0.1)


def make_steps(samples: list[list[data.Fork]], args) -> list[list[data.Batch]]:
    packing = data.packing_for(args.device, args.batch_size, args.row_tokens, args.micro_rows)
    return data.make_steps(samples, DPO, packing, seed=None)


def run_ours(directory: Path, args) -> dict:
    """The reference pass and an epoch, with clo.py's own functions."""
    device = torch.device(args.device)
    if device.type == "cuda":
        ranks.fix_order_of_sums()
    model = make_model(directory, args, "inductor" if device.type == "cuda" else None)
    parameters = clo.make_trainable(model, "lora", args.rank, 32, 0)
    optimizer = torch.optim.AdamW(parameters.values(), args.lr, weight_decay=0.0, fused=device.type == "cuda")
    samples = make_samples(args)
    steps = make_steps(samples, args)
    batches = [batch for step in steps for batch in step]
    warm = make_steps(samples[:1], args)[0]
    still = torch.optim.SGD(parameters.values(), lr=0.0)
    heldout.summed_logps(model, warm, "warm")             # both modes: what one of them compiles is not timed
    clo.train_step(model, warm, DPO, still, 1.0)
    started = clock()
    for batch, logp in zip(batches, heldout.summed_logps(model, batches, "reference")):
        batch.ref_logp = logp
    reference_seconds = elapsed(started)["seconds"]
    for step in steps:
        clo.train_step(model, step, DPO, optimizer, 1.0)
    spent = elapsed(started)
    if args.profile:
        spent |= profile_step(lambda: clo.train_step(model, steps[0], DPO, still, 1.0), args.profile)
    chosen = torch.cat([batch.ref_logp[batch.chosen] for batch in steps[0]])
    tflops = product_flops(model.config, batches) / spent["seconds"] / 1e12
    return spent | {"reference_seconds": reference_seconds,
                    "step_seconds": spent["seconds"] - reference_seconds, "tflops": tflops,
                    "chosen_logp": chosen.mean().item()}


# What a GPU's kernel does, by what its name holds; the first that fits.
KERNELS = {"attention": ("flex_attention", "fmha", "flash"), "head_rows": ("row_kernel",),
           "products": ("gemm", "nvjet", "cutlass", "xmma", "splitk"), "fused": ("triton_",),
           "copies": ("memcpy", "memset")}


def kernel_kind(name: str) -> str:
    for kind, marks in KERNELS.items():
        if any(mark in name.lower() for mark in marks):
            return kind
    return "other"


def profile_step(step, path: str) -> dict[str, float]:
    """Two more steps, after the timed ones. The second is profiled: its kernels as a table, and a trace
    (chrome://tracing) in path. Returned are seconds of a GPU by kind of kernel, and `busy`, their sum as a
    share of the first step's time: what is left, the GPU waited for the program."""
    started = clock()
    step()
    undisturbed = elapsed(started)["seconds"]
    with torch.profiler.profile() as profile:
        step()
        clock()
    order = "self_cuda_time_total" if torch.cuda.is_initialized() else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=25), file=sys.stderr)
    profile.export_chrome_trace(path)
    if not torch.cuda.is_initialized():
        return {}
    spent = dict.fromkeys((*KERNELS, "other"), 0.0)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            spent[kernel_kind(event.name)] += event.time_range.elapsed_us() / 1e6
    return spent | {"busy": sum(spent.values()) / undisturbed}


def product_flops(c: Config, batches: list[data.Batch]) -> float:
    """FLOPs of run_products: 2 a weight and token forward, twice (reference and policy),
    and for the gradient of the input. Padding is nobody's work."""
    counts = scale.parameters(c)
    shapes = scale.attention_shapes(c)
    first = sum(rows * columns for name, (rows, columns) in shapes.items() if name != "o_proj")
    body = 3 * (counts["attention"] + counts["mlp"]) - first
    head = 3 * c.vocab_size * c.hidden_size
    return 2 * sum(batch.used * body + len(batch.targets) * head for batch in batches)


@torch.no_grad()
def run_products(directory: Path, args) -> dict:
    """The products of run_ours with frozen weights:
    forward twice (reference and policy), gradients of inputs once."""
    model = make_model(directory, args)
    weights = [(name, weight) for name, weight in model.named_parameters() if name.endswith("_proj.weight")]
    # the first input needs no gradient
    first = tuple(f"layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    batches = [batch for step in make_steps(make_samples(args), args) for batch in step]
    widths = {width for _, weight in weights for width in weight.shape}

    def work(tokens: int, predicted: int, backward: bool) -> None:
        x = {width: torch.randn(tokens, width, device=args.device, dtype=model.head.dtype)
             for width in widths}
        for name, weight in weights:
            F.linear(x[weight.shape[1]], weight)
            if backward and not name.endswith(first):
                x[weight.shape[0]] @ weight
        rows = chunk_rows(predicted, len(model.head), model.head.dtype, model.head.device, 0)
        for start in range(0, predicted, rows):
            logits = x[model.config.hidden_size][:min(rows, predicted - start)] @ model.head.T
            if backward:
                logits @ model.head
    work(256, 256, True)
    started = clock()
    for batch in batches:
        work(batch.used, len(batch.targets), backward=False)
    reference_seconds = elapsed(started)["seconds"]
    for batch in batches:
        work(batch.used, len(batch.targets), backward=True)
    spent = elapsed(started)
    return spent | {"reference_seconds": reference_seconds,
                    "step_seconds": spent["seconds"] - reference_seconds,
                    "tflops": product_flops(model.config, batches) / spent["seconds"] / 1e12}


def run_hf(directory: Path, args) -> dict:
    """Reference pass and an epoch of plain transformers with PEFT on the same sequences, each in full."""
    import transformers
    from peft import LoraConfig, get_peft_model
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[args.dtype])
    model = model.to(args.device)
    lora = LoraConfig(r=args.rank, lora_alpha=32, target_modules=list(clo.ATTENTION), task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, args.lr, weight_decay=0.0)
    sequences = []                                       # (prompt, continuation, +1 if it is right, else -1)
    for fork in [fork for group in make_samples(args) for fork in group]:
        for i, ids in enumerate(fork.continuations):
            sequences.append((fork.prompt, ids, -1 if i else 1))
    sequences.sort(key=lambda one: len(one[0]) + len(one[1]))
    batches = [sequences[first:first + HF_BATCH] for first in range(0, len(sequences), HF_BATCH)]

    def logps(batch: list[tuple]) -> torch.Tensor:
        """Summed log-prob of each continuation."""
        longest = max(len(prompt) + len(ids) for prompt, ids, _ in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.int64, device=args.device)
        counted = torch.zeros_like(tokens, dtype=torch.bool)
        seen = torch.zeros_like(tokens)
        for row, (prompt, ids, _) in enumerate(batch):
            end = len(prompt) + len(ids)
            tokens[row, :end] = torch.tensor(prompt + ids)
            counted[row, len(prompt):end] = True
            seen[row, :end] = 1
        logits = model(tokens, attention_mask=seen).logits[:, :-1]
        token_logps = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return (token_logps * counted[:, 1:]).sum(1)

    def step(batches: list[list[tuple]], update: bool) -> None:
        for batch in batches:
            weights = torch.tensor([0.5 * DPO.beta * sign / len(sequences) for _, _, sign in batch])
            (-weights.to(args.device) * logps(batch)).sum().backward()
        if update:
            optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logps(batches[0][:1])
    step([batches[0][:1]], update=False)
    started = clock()
    with torch.no_grad():
        reference = [logps(batch) for batch in batches]
    reference_seconds = elapsed(started)["seconds"]
    size = 4 * args.batch_size // HF_BATCH               # a sample is four sequences
    for first in range(0, len(batches), size):
        step(batches[first:first + size], update=True)
    spent = elapsed(started)
    signs = torch.tensor([sign for *_, sign in sequences])
    chosen = torch.cat(reference).cpu()[signs > 0]
    return spent | {"reference_seconds": reference_seconds,
                    "step_seconds": spent["seconds"] - reference_seconds,
                    "chosen_logp": chosen.mean().item()}


def run_trl(directory: Path, args) -> dict:
    """The same pairs through TRL's DPOTrainer with PEFT, for one epoch."""
    import datasets
    import transformers
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    forks = [fork for group in make_samples(args) for fork in group]
    rows = [{"prompt": tokenizer.decode(fork.prompt), "chosen": " " + tokenizer.decode(fork.continuations[0]),
             "rejected": " " + tokenizer.decode(fork.continuations[1])} for fork in forks]
    config = DPOConfig(
        output_dir=str(directory / "trl"), per_device_train_batch_size=args.trl_batch, num_train_epochs=1,
        gradient_accumulation_steps=2 * args.batch_size // args.trl_batch, learning_rate=args.lr, beta=0.1,
        lr_scheduler_type="constant", max_length=1024, gradient_checkpointing=args.trl_checkpointing,
        bf16=args.dtype == "bf16", use_cpu=args.device == "cpu", use_liger_kernel=args.trl_liger,
        precompute_ref_log_probs=args.trl_precompute, train_sampling_strategy=args.trl_sampling, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[args.dtype])
    adapter = LoraConfig(r=args.rank, lora_alpha=32,
                         target_modules=list(clo.ATTENTION), task_type="CAUSAL_LM")
    started = clock()
    trainer = DPOTrainer(model, args=config, train_dataset=datasets.Dataset.from_list(rows),
                         processing_class=tokenizer, peft_config=adapter)
    first_pass = elapsed(started) if args.trl_precompute else {"seconds": 0.0, "cpu_seconds": 0.0}
    first = trainer.train_dataset[0]
    assert ((first["prompt_ids"], first["chosen_ids"], first["rejected_ids"])
            == (forks[0].prompt, *forks[0].continuations))
    if not args.trl_precompute:
        trainer.model.eval()                             # so that its log-probs are not logged as training's
        trainer.compute_loss(trainer.model, trainer.data_collator([first])).backward()
        trainer.model.zero_grad()
    started = clock()
    trainer.train()
    spent = {name: seconds + first_pass[name] for name, seconds in elapsed(started).items()}
    chosen = trainer.state.log_history[0]["logps/chosen"]
    return spent | {"reference_seconds": first_pass["seconds"], "chosen_logp": chosen}


SIDES = {"ours": run_ours, "trl": run_trl, "products": run_products, "hf": run_hf}


def run_apart(side: str, given: list[str], directory: str, args) -> dict:
    """The result of a side, run in a process of its own."""
    command = [sys.executable, "-m", "bench.step", *given, "--run", directory, "--sides", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    if args.profile:
        print(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------- flat

def run_flat(directory: Path, args) -> None:
    """Processor time per token of a step, and memory, for growing numbers of samples:
    a step may not depend on them."""
    model = llama.load(directory, dtype=DTYPES[args.dtype])
    parameters = clo.make_trainable(model, "lora", args.rank, 32, 0)
    still = torch.optim.SGD(parameters.values(), lr=0.0)
    for args.samples in (400, 1600, 6400):
        groups = make_samples(args)
        started = time.process_time()
        steps = make_steps(groups, args)
        packing, each = time.process_time() - started, []
        for step in steps[::max(1, len(steps) // args.flat_steps)]:
            started = time.process_time()
            clo.train_step(model, step, DPO, still, 1.0)
            each.append((time.process_time() - started) / sum(batch.used for batch in step))
        print(f"{args.samples:6} samples: packing {1e6 * packing / args.samples:5.0f} us a sample; "
              f"step {1e6 * statistics.median(each):6.1f} us a token (median of {len(each)} steps); "
              f"peak {scale.peak_memory_gb():.2f} GB")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda")
    add("--shape", default=None, choices=list(tables.MODELS),
        help="of a known model, instead of the next five")
    add("--model", default=None, help="a model's directory, instead of random weights of the next five sizes")
    add("--data", default=None, help="with --model: parallel rows; the first --samples train")
    add("--width", type=int, default=512, help="hidden width")
    add("--mlp", type=int, default=1376, help="mlp width")
    add("--layers", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--vocab", type=int, default=32_000)
    add("--samples", type=int, default=24, help="bilingual rows, of two pairs each")
    add("--prompt", type=int, default=30, help="median tokens of a prompt")
    add("--response", type=int, default=130, help="median tokens of a response")
    add("--sigma", type=float, default=0.7, help="of the logarithm of lengths")
    add("--rank", type=int, default=16, help="of LoRA")
    add("--lr", type=float, default=1e-4)
    add("--batch-size", type=int, default=8, help="samples per optimiser step")
    add("--row-tokens", type=int, default=1024, help="ours: tokens of a packed row")
    add("--micro-rows", type=int, default=None,
        help=f"ours: most packed rows per forward pass; else 1, on a CPU in bf16 {scale.MOST_BF16_ROWS}")
    add("--recompute", action="store_true", help="ours: run blocks again in the backward")
    add("--trl-batch", type=int, default=8, help="TRL: pairs per forward pass, gradients accumulate")
    add("--trl-checkpointing", action="store_true", help="TRL: recompute activations")
    add("--trl-liger", action="store_true", help="TRL: with liger-kernel, where that is installed")
    add("--trl-precompute", action="store_true", help="TRL: reference log-probs in a pass of their own")
    add("--trl-sampling", default="sequential", choices=["sequential", "random", "group_by_length"],
        help="TRL: order")
    add("--init-on-device", action="store_true",
        help="random weights made on the device, for large shapes: nothing is written, so no side trl")
    add("--profile", metavar="FILE", default=None,
        help="ours: profile one more step; a table to stderr, a trace to FILE, on a GPU seconds by kind")
    add("--dtype", default="fp32", choices=list(DTYPES))
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=1)
    add("--sides", nargs="+", default=["ours", "trl", "products"], choices=list(SIDES))
    add("--flat", action="store_true",
        help="cost per token with 400 to 6,400 samples instead (give a small model)")
    add("--flat-steps", type=int, default=20, help="steps timed for each number of samples")
    add("--run", default=None,
        help="directory of the checkpoint: run one side here (the program does it by itself)")
    args = parser.parse_args(argv)
    if args.init_on_device and ("trl" in args.sides or args.flat):
        parser.error("--init-on-device writes no checkpoint: give --sides ours products")
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together: a real model reads real rows")
    if args.micro_rows is None:
        small = args.device != "cpu" or args.dtype != "bf16"
        args.micro_rows = 1 if small else scale.MOST_BF16_ROWS
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.shape:
        args.vocab = tables.MODELS[args.shape].vocab_size
    if args.run:
        result = SIDES[args.sides[0]](Path(args.run), args)
        print(json.dumps(result | {"peak_gb": scale.peak_memory_gb()}))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), args)
        directory = args.model or directory
        if args.flat:
            run_flat(Path(directory), args)
            return
        results = {side: [] for side in args.sides}
        for _ in range(args.rounds):
            for side in args.sides:
                result = run_apart(side, argv or sys.argv[1:], directory, args)
                results[side].append(result)
                print(f"{side:9}" + ", ".join(f"{name} {value:.4g}" for name, value in result.items())
                      + f": {args.samples / result['seconds']:.3f} samples/s", flush=True)
    for other in [side for side in args.sides if side != "ours" and "ours" in args.sides]:
        ratio = {name: statistics.median(b[name] / a[name] for a, b in zip(results["ours"], results[other]))
                 for name in ("seconds", "cpu_seconds", "peak_gb", "reference_seconds", "step_seconds")
                 if results[other][0].get(name)}
        parts = [f"{part} {ratio[part + '_seconds']:.2f}" for part in ("reference", "step")
                 if part + "_seconds" in ratio]
        print(f"ours / {other}: {ratio['seconds']:.2f} of its samples/s "
              f"({ratio['cpu_seconds']:.2f} by processor time{'; ' if parts else ''}{', '.join(parts)}), "
              f"{1 / ratio['peak_gb']:.2f} of its peak memory")


if __name__ == "__main__":
    run(main)
