"""Time to load a random checkpoint: ours against safetensors' `load_file` and `.to` of every tensor.

    python -m bench.load       # 1 GB of bf16 in four files, as bf16, as fp32; both paired in one process
    python -m bench.load --device cuda

Ours builds the model and checks every name and shape besides. A tensor that keeps its dtype on the CPU is
only mapped by both, in milliseconds whatever its size, and its bytes come from disk when they are first used:
"used" times the loading and one sum over every tensor. The first round, which is not counted, puts the files
into the page cache. The median ratio of the rounds and its middle half.
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import model as llama
from bench.generate import quartiles
from engine.files import run
from formats.checkpoints import save
from formats.configs import Config
from formats.weights import DTYPE_NAMES

BLOCK = {"hidden_size": 2048, "intermediate_size": 5632,
         "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}


def write_checkpoint(directory: str, gigabytes: float, files: int) -> None:
    with torch.device("meta"):
        block = sum(parameter.numel() for parameter in
                    llama.Block(Config(32, num_hidden_layers=1, **BLOCK)).parameters())
    layers = max(1, round(gigabytes * 1e9 / (2 * block)))
    model = llama.Llama(Config(32, num_hidden_layers=layers, **BLOCK))
    save(llama.initialise_(model), directory, torch.bfloat16, int(2.05 * layers * block / files))


def plain_load(directory: str, device, dtype) -> list[torch.Tensor]:
    tensors = []
    for path in sorted(Path(directory).glob("*.safetensors")):
        tensors += [tensor.to(device, dtype) for tensor in load_file(path).values()]
    return tensors


def our_load(directory: str, device, dtype) -> list[torch.Tensor]:
    return list(llama.load(directory, device, dtype).parameters())


def timed(load, used: bool, *arguments) -> float:
    """Seconds of load(*arguments), with `used` including one sum over every tensor."""
    gc.collect()
    started = time.perf_counter()
    tensors = load(*arguments)
    if used:
        sum(tensor.sum(dtype=torch.float32) for tensor in tensors).item()
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint, 1e9 bytes")
    parser.add_argument("--files", type=int, default=4, help="shards")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv=None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(directory, args.gigabytes, args.files)
        for dtype, used in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
            seconds = {plain_load: [], our_load: []}
            for round in range(args.rounds + 1):
                for load, times in seconds.items():
                    elapsed = timed(load, used, directory, args.device, dtype)
                    if round:                                                 # the first round warms up
                        times.append(elapsed)
            ratios = [own / plain for plain, own in zip(*seconds.values())]
            plain, own = (statistics.median(times) for times in seconds.values())
            print(f"bf16 file as {DTYPE_NAMES[dtype]:9}{'used' if used else 'loaded':8}"
                  f"load_file {plain:.3f} s, ours {own:.3f} s, ours / load_file {quartiles(ratios)}",
                  flush=True)


if __name__ == "__main__":
    run(main)
