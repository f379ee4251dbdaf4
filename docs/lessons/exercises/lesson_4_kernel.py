"""Lesson 4, the exercise in Triton. Without a GPU the interpreter runs it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                     # before triton is imported
import triton
import triton.language as tl


@triton.jit
def lane_kernel(
    logits_ptr, lse_ptr,  # in: (N, V); out: (N,)
    stride_logits,  # elements from a row to the next
    N_WORDS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """Exercise 4.2: the lesson's logsumexp_kernel with a running maximum and a running sum for every lane,
    both [BLOCK_V]. The loop reduces nothing; after it, once, the lanes are merged."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    # Your loop. A lane may see nothing but -inf: what must its first maximum be?


def logsumexp(logits, block):
    """Log of the sum of exponentials of each row, (N, V) -> (N,)."""
    lse = logits.new_full((len(logits),), float("nan"))      # stays where the kernel stores nothing
    lane_kernel[(len(logits),)](logits, lse, logits.stride(0), N_WORDS=logits.shape[1], BLOCK_V=block)
    return lse
