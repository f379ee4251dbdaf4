"""Tokens per second and memory of beam search, ours, transformers' and CTranslate2's; chrF of a translator.

    python -m bench.translate                 # random M2M100, paired and interleaved in one process
    python -m bench.translate --chrf          # the demo's translator on the test split of demo/eval.jsonl
    python -m bench.translate --device cuda --dtype bfloat16
        --width 1024 --ffn 4096 --layers 12 --vocab 128112

All contenders translate the same inputs into the same number of tokens: the end token cannot win, since its
row of the table is zero. Every round runs all of them in turn, ratios are taken within a round, and the
median over rounds is printed with the range. transformers runs in one batch and at its best batch size (found
first, in batches of like length). Memory is that of a process of its own, which loads one contender and runs
it once (--no-memory leaves it out): how far its peak lies above what was resident before. Needs transformers, for --chrf sacrebleu;
CTranslate2 takes part where it is installed.
"""

import argparse
import importlib.util
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import translate
from formats.records import read_rows
from m2m100.beam import beam_search
from m2m100.network import Config, M2M100, load_model
from formats.weights import DTYPE_NAMES, save_tensors

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MADE_UP = 8  # ids that M2M100 has at the end, without use
Contender = Callable[[], list[list[int]]]


def make_checkpoint(directory: Path, args) -> None:
    """A random M2M100 in Hugging Face layout. Pieces are called p4, p5, ...; two of them play the languages.
    A tokenizer is there because CTranslate2's converter wants one."""
    config = Config(
        d_model=args.width, encoder_layers=args.layers, decoder_layers=args.layers, encoder_ffn_dim=args.ffn,
        encoder_attention_heads=args.width // 64, decoder_attention_heads=args.width // 64,
        decoder_ffn_dim=args.ffn, vocab_size=args.vocab)
    torch.manual_seed(0)
    model = M2M100(config).requires_grad_(False)
    model.head[[config.pad_token_id, config.eos_token_id]] = 0.0
    specials = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    raw = asdict(config) | {"model_type": "m2m_100", "architectures": ["M2M100ForConditionalGeneration"]}
    pieces = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces += [f"p{i}" for i in range(4, args.vocab - MADE_UP)]
    for name, content in (("config.json", raw), ("generation_config.json", specials),
                          ("vocab.json", {piece: i for i, piece in enumerate(pieces)})):
        (directory / name).write_text(json.dumps(content))
    name = "sentencepiece.bpe.model"
    (directory / name).write_bytes((Path("demo/m2m100") / name).read_bytes())
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "M2M100Tokenizer"}')
    save_tensors(directory / "model.safetensors", dict(model.named_parameters()))


def make_sources(args) -> tuple[list[list[int]], int]:
    """Inputs of lengths spread evenly over --lengths, in random order, and the target language's id."""
    rng, (low, high) = random.Random(0), args.lengths
    source, target = args.vocab - MADE_UP - 2, args.vocab - MADE_UP - 1
    lengths = [low + (high - low) * i // max(1, args.sentences - 1) for i in range(args.sentences)]
    rng.shuffle(lengths)
    return [[source, *rng.choices(range(4, source), k=length - 2), 2] for length in lengths], target


def ours(directory: Path, sources: list, language: int, args) -> Contender:
    model = load_model(directory, args.device, DTYPES[args.dtype])
    return lambda: beam_search(model, sources, language, [args.tokens] * len(sources), args.beams)


def theirs(directory: Path, sources: list, language: int, args) -> Callable[[int], list[list[int]]]:
    """transformers, given a batch size; batches hold inputs of like length."""
    import transformers
    model = transformers.M2M100ForConditionalGeneration.from_pretrained(directory, dtype=DTYPES[args.dtype])
    model.to(args.device).eval()
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))

    def generate(size: int) -> list[list[int]]:
        found = {}
        for some in (order[first:first + size] for first in range(0, len(order), size)):
            tokens = [torch.tensor(sources[i], device=args.device) for i in some]
            tokens = torch.nn.utils.rnn.pad_sequence(tokens, True, 1)
            out = model.generate(tokens, attention_mask=(tokens != 1).long(), num_beams=args.beams,
                                 early_stopping=True, length_penalty=1.0, do_sample=False,
                                 forced_bos_token_id=language, max_new_tokens=args.tokens,
                                 min_new_tokens=args.tokens)
            found |= zip(some, out[:, 1:].tolist())
        return [found[i] for i in range(len(sources))]

    return generate


def ctranslate(directory: Path, sources: list, language: int, args) -> Contender:
    """CTranslate2 on the same weights, converted by its own converter when they have not been yet."""
    import ctranslate2
    converted = directory / "ctranslate2"
    if not converted.exists():
        ctranslate2.converters.TransformersConverter(str(directory)).convert(str(converted))
    translator = ctranslate2.Translator(str(converted), device=args.device, intra_threads=args.threads,
                                        compute_type=args.dtype)
    names = json.loads((converted / "shared_vocabulary.json").read_text())
    ids = {name: i for i, name in enumerate(names)}
    texts = [[names[i] for i in source] for source in sources]

    def run() -> list[list[int]]:
        results = translator.translate_batch(
            texts, target_prefix=[[names[language]]] * len(texts), beam_size=args.beams, length_penalty=1.0,
            max_decoding_length=args.tokens, min_decoding_length=args.tokens, max_batch_size=args.sentences)
        return [[ids[token] for token in result.hypotheses[0]] for result in results]

    return run


RUNS = []      # what a process of its own runs: see apart


def prepare_apart(*arguments) -> None:
    RUNS.append(ctranslate(*arguments))


def run_apart() -> list[list[int]]:
    return RUNS[0]()


def apart(*arguments) -> Contender:
    """CTranslate2 in a process of its own: with its threads in ours, ours took half as long again."""
    pool = multiprocessing.get_context("spawn").Pool(1, prepare_apart, arguments)
    return lambda: pool.apply(run_apart)


def timed(function: Contender, clock: Callable[[], float]) -> float:
    started = clock()
    lengths = {len(ids) for ids in function()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = clock() - started
    assert len(lengths) == 1, f"outputs of {sorted(lengths)} tokens were to be of one length"
    return elapsed


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def measure_memory(directory: Path, name: str, argv: list[str]) -> float:
    """MB by which the peak of a run of one contender lies above what was resident once it was loaded."""
    command = [sys.executable, "-m", "bench.translate", *argv, "--alone", name, "--directory", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def resident_kb(which: str) -> int:
    """VmRSS, what this process has in memory, or VmHWM, the most it had (getrusage counts the parent's)."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(which))


def run_alone(directory: Path, args) -> None:
    """Print the MB by which one run raises the peak of this process, or of the GPU."""
    sources, language = make_sources(args)
    make = {"ours": ours, "transformers": theirs, "CTranslate2": ctranslate}[args.alone]
    run = make(directory, sources, language, args)
    call = (lambda: run(args.sentences)) if args.alone == "transformers" else run
    if args.device != "cpu":
        before = torch.cuda.memory_allocated()
        call()
        print((torch.cuda.max_memory_allocated() - before) / 1e6)
        return
    before = resident_kb("VmRSS")
    call()
    print((resident_kb("VmHWM") - before) / 1e3)


def compare(directory: Path, args, argv: list[str]) -> None:
    sources, language = make_sources(args)
    generate = theirs(directory, sources, language, args)
    contenders = {"ours": ours(directory, sources, language, args),
                  f"transformers, batch {args.sentences}": lambda: generate(args.sentences)}
    if importlib.util.find_spec("ctranslate2"):
        start = ctranslate if args.cpu_time else apart        # another process's time would not be counted
        contenders["CTranslate2"] = start(directory, sources, language, args)
    else:
        print("CTranslate2 is not installed (pip install ctranslate2): it is left out")
    answers = {name: run() for name, run in contenders.items()}         # this warms up, too
    for name, answer in list(answers.items())[1:]:
        same = sum(a == b for a, b in zip(answers["ours"], answer))
        print(f"{name} writes the same tokens as ours for {same} of {len(sources)} inputs", flush=True)
    clock = time.process_time if args.cpu_time else time.perf_counter
    trials = {size: timed(lambda: generate(size), clock) for size in args.sizes}
    best = min(trials, key=trials.get)
    print("transformers, s by batch size:", *(f"{size}: {s:.1f}" for size, s in trials.items()), flush=True)
    contenders[f"transformers, batch {best}"] = lambda: generate(best)
    seconds = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, run in contenders.items():
            seconds[name].append(timed(run, clock))
        print("s:", ", ".join(f"{name} {times[-1]:.1f}" for name, times in seconds.items()), flush=True)
    memory = {}
    if not args.no_memory:
        memory = {name: measure_memory(directory, name.split(",")[0], argv) for name in answers}
    print("\n| | tokens/s | ours has x its tokens/s | memory of the run, MB |\n|---|---:|---:|---:|")
    for name, times in seconds.items():
        speeds = [args.sentences * args.tokens / s for s in times]
        ratios = [other / own for own, other in zip(seconds["ours"], times)]
        print(f"| {name} | {spread(speeds, 0)} | {spread(ratios)} "
              f"| {format(memory[name], ',.0f') if name in memory else ''} |")


def chrf(args) -> None:
    """A Markdown table: chrF and exact translations of the test split, per language."""
    import sacrebleu
    translator = translate.load(args.translator, args.device)
    rows = [row for row in read_rows("demo/eval.jsonl") if row["split"] == "test"]
    print(f"{args.translator}, {len(rows)} questions and answers each, {args.beams} beams\n")
    print("| | chrF | exact, % |\n|---|---:|---:|")
    for code in translator.languages:
        texts, truth = ([row[lang][part] for row in rows for part in ("prompt", "response")]
                        for lang in ("en", code))
        found = translate.translate(texts, "en", code, translator, args.beams)
        exact = 100 * sum(a == b for a, b in zip(found, truth)) / len(truth)
        print(f"| {code} | {sacrebleu.corpus_chrf(found, [truth]).score:.1f} | {exact:.1f} |", flush=True)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--width", type=int, default=512, help="hidden width; heads are 64 wide")
    add("--ffn", type=int, default=2048, help="feed-forward width")
    add("--layers", type=int, default=6, help="of the encoder, and of the decoder")
    add("--vocab", type=int, default=32_000)
    add("--device", default="cpu", help="cpu, cuda")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add = parser.add_argument_group("work").add_argument
    add("--sentences", type=int, default=64, help="inputs")
    add("--lengths", type=int, nargs=2, default=(10, 60), help="tokens of the shortest and the longest input")
    add("--tokens", type=int, default=32, help="new tokens of every output")
    add("--beams", type=int, default=5)
    add("--sizes", type=int, nargs="+", default=(8, 16, 32), help="batch sizes to try for transformers")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--cpu-time", action="store_true", help="count computing, not waiting: one thread beside other work")
    add("--no-memory", action="store_true", help="speed alone: no further process for each contender")
    add = parser.add_argument_group("other modes").add_argument
    add("--chrf", action="store_true", help="measure --translator's quality instead")
    add("--translator", default="demo/m2m100", help="for --chrf")
    add("--alone", choices=("ours", "transformers", "CTranslate2"), help="one run of one contender: its MB")
    add("--directory", type=Path, help="for --alone: the checkpoint")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.chrf:
        chrf(args)
    elif args.alone:
        run_alone(args.directory, args)
    else:
        with tempfile.TemporaryDirectory() as directory:
            make_checkpoint(Path(directory), args)
            compare(Path(directory), args, argv)


if __name__ == "__main__":
    main()
