"""The log-probs a language model gives to the tokens that came, without ever holding its (N, V) logits.

    token_logp(hidden (N, H), weight (V, H), targets (N,)) -> (N,)        what CLO trains with
    linear_cross_entropy(hidden, weight, targets, ignore_index=-100)      the mean of their negatives

Read in this order:

    reference.py   what is computed, in plain PyTorch
    chunks.py      the math that keeps its digits, and the walk that keeps memory small; runs anywhere
    rows.py        one step of that walk as a Triton kernel, with an example by hand
    ops.py         gradients, costs, and how torch.compile sees it all
    layers.py      what a block computes between its products on a CPU: attention, RoPE, RMSNorm, SwiGLU
    aot.py, bench.py   what the compiler made of the kernel; how fast, how large, how exact it is

Nothing else of the program is imported, but for bench.py. Exercises: docs/lessons/4-logsoftmax.md.
Numbers: docs/benchmarks.md.
"""

from . import reference
from .ops import backend_for, linear_cross_entropy, token_logp

__all__ = ["backend_for", "linear_cross_entropy", "reference", "token_logp"]
