"""The tables of docs/scale.md: parameters, memory and step time of the usual models on 1, 8 and 64 GPUs.

    python -m bench.tables
    python -m bench.tables --tflops 300 --link-gb 25 --device-gb 80

Everything is computed from the models' shapes by engine/scale.py; nothing is measured.
"""

import argparse

from engine import flags, scale
from engine.files import run
from formats.configs import Config
from formats.weights import DTYPES

# Shapes from the models' own config.json.
MODELS = {
    "Llama-3.2-1B": Config(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True),
    "Llama-3.2-3B": Config(128256, 3072, 8192, 28, 24, 8, 128, tie_word_embeddings=True),
    "Llama-3-8B": Config(128256, 4096, 14336, 32, 32, 8, 128),
    "Qwen2.5-14B": Config(152064, 5120, 13824, 48, 40, 8, 128, qkv_bias=True),
    "Qwen2.5-32B": Config(152064, 5120, 27648, 64, 40, 8, 128, qkv_bias=True),
    "Llama-3-70B": Config(128256, 8192, 28672, 80, 64, 8, 128),
}


def table(train: str, plan: scale.Plan, device_bytes: float, step_tokens: int) -> str:
    """Markdown: a row for each model, GB of a device and seconds of a step on 1, 8 and 64 devices, sharded
    beyond one."""
    lines = ["| model | parameters | trainable | 1 GPU: GB | s | 8: GB | s | 64: GB | s |",
             "|---|" + "---:|" * 8]
    for name, c in MODELS.items():
        cells = []
        for gpus in (1, 8, 64):
            used = scale.Plan(**vars(plan) | {"train": train, "gpus": gpus, "shard": gpus > 1})
            size = sum(scale.memory(c, used).values())
            fits = size <= device_bytes
            seconds = f"{scale.step_seconds(c, used, step_tokens)['step']:.2g}" if fits else "does not fit"
            cells += [f"{size / scale.GB:.0f}", seconds]
        total, learned = sum(scale.parameters(c).values()), scale.trainable_parameters(c, used)
        cells = [f"| {name}", f"{total / 1e9:.2f} B", f"{learned / 1e6:,.1f} M", *cells]
        lines.append(" | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args(argv=None) -> argparse.Namespace:
    parser = flags.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dtype", default="bf16", choices=list(DTYPES), help="compute type")
    add("--lora-rank", type=flags.positive_int, default=16, help="rank R")
    add("--row-tokens", type=flags.positive_int, default=4096, help="tokens of a packed row")
    add("--step-tokens", type=flags.positive_int, default=64 * 4096,
        help="row tokens of an optimiser step on all devices")
    add("--recompute", action="store_true", help="run blocks again in the backward")
    add("--tflops", type=flags.positive, default=380.0,
        help="TFLOP/s a device achieves: 55 %% of an H200's sustained bf16")
    add("--link-gb", type=flags.positive, default=50.0,
        help="GB/s a device sends to others: a port of 400 Gbit/s")
    add("--device-gb", type=flags.positive, default=141.0, help="memory of a device: an H200's")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    for train in ("lora", "attention", "full"):
        plan = scale.Plan(train, args.lora_rank, args.dtype, args.row_tokens, recompute=args.recompute,
                          tflops=args.tflops, link_gb=args.link_gb)
        print(f"--train {train}\n\n{table(train, plan, args.device_gb * scale.GB, args.step_tokens)}\n")


if __name__ == "__main__":
    run(main)
