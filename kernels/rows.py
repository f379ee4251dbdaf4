"""The row step as a Triton kernel: a row of logits in, three numbers and the row's gradient out.

Notation and equations are those of `chunks.py`. ( ) is a tensor in memory, [ ] a tile in registers.

    in    logits (C, U) fp32: on a GPU all words of the vocabulary, U = V
          targets (C,) int64, counted from the first of the U words; one outside 0..U-1 lies in another tile
    out   target_logit (C,) fp32, -inf if the target is outside
          most, total (C,) fp32: a and s, over the words that are not the target                      eq. 1
          q (C, U) in the weight's dtype: the softmax over the same words, 0 at the target            eq. 4

Which program handles what: program i takes row i and walks it twice in blocks of BLOCK_V logits. A row is far
too long for registers (128,256 logits are half a megabyte), and q needs the sum of the whole row.

First sweep: `most` and `total` together, in one read ("online softmax", Milakov and Gimelshein 2018). It is
eq. 6, with a block in the place of the second tile: a larger `most` brings the old total to its scale.

    most'  = max(most, max of the block)
    total' = total * exp(most - most') + sum over the block of exp(z - most')

By hand, z = [1, 2, 3, 0], y = 2, BLOCK_V = 2 (a test repeats it). The target's place holds -inf:

    block [1, 2]:     most = 2, total = exp(-1) + exp(0)               = 1.3679
    block [-inf, 0]:  most = 2, total = 1.3679 * exp(0) + 0 + exp(-2)  = 1.5032
    q = [exp(-1), exp(0), 0, exp(-2)] / 1.5032                         = [0.2447, 0.6652, 0, 0.0900]
    log_odds = 3 - 2 - log 1.5032 = 0.5924,  logp = -log(1 + exp(-0.5924)) = -0.4402

(and logsumexp(z) = 3.4402 gives the same logp, 3 - 3.4402.)

Second sweep: read z again, write q. It runs from the last block to the first, because the blocks read last
are those that may still be in the L2 cache. q goes to the same memory, so a chunk needs one buffer. A bf16
row is half as long as the fp32 row it replaces; it takes the upper half:

    fp32 row    | z0 | z1 | z2 | z3 | z4 | z5 | z6 | z7 |       block k of z: from slot kB to kB + B
    bf16 row                        |q0 q1|q2 q3|q4 q5|q6 q7|   block k of q: from (U + kB) / 2, B/2 slots

Going down, block k of q starts at (U + kB) / 2 >= kB, so it never touches a block that is still to be read.
It may touch its own block: hence the barrier; all threads hold their part before any of them stores.

Memory traffic, a chunk: 2 reads and 1 write of (C, V), against about ten passes in plain PyTorch (the cast,
log_softmax, gather, and their backward, each reading and writing all of it).
"""

import torch
import triton
import triton.language as tl

BLOCK_V = 4096
WARPS = 8


@triton.jit
def row_kernel(
    logits_ptr, targets_ptr,  # in: (C, U), (C,)
    target_logit_ptr, most_ptr, total_ptr, q_ptr,  # out: (C,) thrice, (C, U); q may share memory with logits
    stride_logits, stride_q,  # elements from a row to the next
    GRADIENT: tl.constexpr,  # False: no q, one read of the row
    N_WORDS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    # 1. Locate the row. In int64: C * U passes 2^31 at 16,744 rows of 128,256.
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    q_ptr += row * stride_q
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < N_WORDS)
    target_logit = tl.load(logits_ptr + target, mask=inside, other=-float("inf"))

    # 2. First sweep. Fill with -inf: exp(-inf) adds nothing, and -inf is never the largest.
    most = -float("inf")
    total = 0.0
    for start in range(0, N_WORDS, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + offs_v, mask=offs_v < N_WORDS, other=-float("inf"))
        # The target leaves here and not by the load's mask, which would cut 16-byte loads into single ones.
        z = tl.where(offs_v == target, -float("inf"), z)
        new_most = tl.maximum(most, tl.max(z, 0))
        total = total * tl.exp(most - new_most) + tl.sum(tl.exp(z - new_most), 0)
        most = new_most

    # 3. Combine: what eq. 1 asks for.
    tl.store(target_logit_ptr + row, target_logit)
    tl.store(most_ptr + row, most)
    tl.store(total_ptr + row, total)

    # 4. Second sweep, eq. 4, last block first.
    if GRADIENT:
        scale = 1.0 / total
        for start in range(0, N_WORDS, BLOCK_V):
            offs_v = (N_WORDS - 1) // BLOCK_V * BLOCK_V - start + tl.arange(0, BLOCK_V)
            mask_v = offs_v < N_WORDS
            z = tl.load(logits_ptr + offs_v, mask=mask_v, other=0.0)  # what fills the rest is never stored
            tl.debug_barrier()
            q = tl.where(offs_v == target, 0.0, tl.exp(z - most) * scale)
            tl.store(q_ptr + offs_v, q, mask=mask_v)


def row_step_(logits, targets, dtype, block=BLOCK_V):
    """Same contract as `chunks.row_step_`, for contiguous fp32 logits (C, U).

    q is a view of the logits' memory in `dtype`: of all of it for fp32, of the upper half of each row for
    bf16 and fp16.
    """
    C, U = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous(), f"{logits.dtype}, {logits.stride()}"
    target_logit, most, total = logits.new_empty(3, C, 1)
    q = logits if dtype in (None, torch.float32) else logits.view(dtype)[:, U:]
    with torch.cuda.device_of(logits):  # Triton launches on the current GPU, which may be another
        row_kernel[(C,)](logits, targets, target_logit, most, total, q, logits.stride(0), q.stride(0),
                         GRADIENT=dtype is not None, N_WORDS=U, BLOCK_V=block, num_warps=WARPS)
    return target_logit, most, total, None if dtype is None else q
