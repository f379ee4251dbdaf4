"""Lesson 4, exercise 4.2, solved."""

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
    """Lane i reads the words i, i + BLOCK_V, ... One that sees only -inf keeps its first maximum, which must
    be a number: -inf - -inf is none. With a finite one, its sum stays exp(-inf) = 0; merging it adds 0."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    m = tl.full((BLOCK_V,), -3.0e38, tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, N_WORDS, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + offs_v, mask=offs_v < N_WORDS, other=-float("inf"))
        larger = tl.maximum(m, z)
        s = s * tl.exp(m - larger) + tl.exp(z - larger)
        m = larger
    most = tl.max(m, 0)
    total = tl.sum(s * tl.exp(m - most), 0)
    tl.store(lse_ptr + row, most + tl.log(total))


def logsumexp(logits, block):
    """Log of the sum of exponentials of each row, (N, V) -> (N,)."""
    lse = logits.new_full((len(logits),), float("nan"))      # stays where the kernel stores nothing
    lane_kernel[(len(logits),)](logits, lse, logits.stride(0), N_WORDS=logits.shape[1], BLOCK_V=block)
    return lse
