"""The row step as a Triton kernel: a row of logits in, its log-odds and the signs of its gradient out.

Notation and equations are those of `chunks.py`. ( ) is a tensor in memory, [ ] a tile in registers.

    in    logits (C, V) fp32, targets (C,) int64
    out   log_odds (C,) fp32                                                                          eq. 1
          signs (C, V) in the weight's dtype: q_v, the softmax over the others; -1 at the target      eq. 4

Which program handles what: program i takes row i and walks it twice in tiles of BLOCK_V logits. A row is far
too long for registers (128,256 logits are half a megabyte), and q_v needs the sum of the whole row.

First sweep: the largest logit `most` and `total` = sum exp(z - most), together, in one read ("online
softmax", Milakov and Gimelshein 2018). A larger `most` brings the old total to its scale:

    most'  = max(most, max of the tile)
    total' = total * exp(most - most') + sum over the tile of exp(z - most')                          (6)

By hand, z = [1, 2, 3, 0], y = 2, BLOCK_V = 2 (a test repeats it). The target's slot holds -inf:

    tile [1, 2]:     most = 2, total = exp(-1) + exp(0)               = 1.3679
    tile [-inf, 0]:  most = 2, total = 1.3679 * exp(0) + 0 + exp(-2)  = 1.5032
    log_odds = 3 - 2 - log 1.5032 = 0.5924,  logp = -log(1 + exp(-0.5924)) = -0.4402
    signs    = [exp(-1), 1, -1, exp(-2)] with the exponentials over 1.5032 = [0.2447, 0.6652, -1, 0.0900]

(and logsumexp(z) = 3.4402 gives the same logp, 3 - 3.4402.)

Second sweep: read z again, write the signs. It runs from the last tile to the first, because the tiles read
last are those that may still be in the L2 cache. The signs go to the same memory, so a chunk needs one
buffer. A bf16 row is half as long as the fp32 row it replaces; it takes the upper half:

    fp32 row    | z0 | z1 | z2 | z3 | z4 | z5 | z6 | z7 |       tile k of z:     from slot kB to kB + B
    bf16 row                        |q0 q1|q2 q3|q4 q5|q6 q7|   tile k of signs: from (V + kB) / 2, B/2 slots

Going down, tile k of the signs starts at (V + kB) / 2 >= kB, so it never touches a tile that is still to be
read. It may touch its own tile: hence the barrier; all threads hold their part before any of them stores.

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
    logits_ptr, targets_ptr,  # in: (C, V), (C,)
    log_odds_ptr, signs_ptr,  # out: (C,), (C, V); signs may share memory with logits, as drawn above
    stride_logits, stride_signs,  # elements from a row to the next
    GRADIENT: tl.constexpr,  # False: the log-odds only, one read of the row
    N_VOCAB: tl.constexpr, BLOCK_V: tl.constexpr,
):
    # 1. Locate the row. In int64: C * V passes 2^31 at 16,744 rows of 128,256.
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    signs_ptr += row * stride_signs
    target = tl.load(targets_ptr + row)
    target_logit = tl.load(logits_ptr + target)

    # 2. First sweep, eq. 6. Fill with -inf: exp(-inf) adds nothing, and -inf is never the largest.
    most = -float("inf")
    total = 0.0
    for start in range(0, N_VOCAB, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + offs_v, mask=offs_v < N_VOCAB, other=-float("inf"))
        # The target leaves here and not by the load's mask, which would cut 16-byte loads into single ones.
        z = tl.where(offs_v == target, -float("inf"), z)
        new_most = tl.maximum(most, tl.max(z, 0))
        total = total * tl.exp(most - new_most) + tl.sum(tl.exp(z - new_most), 0)
        most = new_most

    # 3. Combine, eq. 1.
    tl.store(log_odds_ptr + row, (target_logit - most) - tl.log(total))

    # 4. Second sweep, eq. 4, last tile first.
    if GRADIENT:
        scale = 1.0 / total
        for start in range(0, N_VOCAB, BLOCK_V):
            offs_v = (N_VOCAB - 1) // BLOCK_V * BLOCK_V - start + tl.arange(0, BLOCK_V)
            mask_v = offs_v < N_VOCAB
            z = tl.load(logits_ptr + offs_v, mask=mask_v, other=0.0)  # what fills the rest is never stored
            tl.debug_barrier()
            signs = tl.where(offs_v == target, -1.0, tl.exp(z - most) * scale)
            tl.store(signs_ptr + offs_v, signs, mask=mask_v)


def row_step_(logits, targets, dtype, block=BLOCK_V):
    """Same contract as `chunks.row_step_`, for contiguous fp32 logits (C, V).

    `signs` is a view of `logits`' memory in `dtype`: of all of it for fp32, of the upper half of each row for
    bf16 and fp16.
    """
    C, V = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous(), f"{logits.dtype}, {logits.stride()}"
    log_odds = logits.new_empty(C)
    signs = logits if dtype in (None, torch.float32) else logits.view(dtype)[:, V:]
    row_kernel[(C,)](logits, targets, log_odds, signs, logits.stride(0), signs.stride(0),
                     GRADIENT=dtype is not None, N_VOCAB=V, BLOCK_V=block, num_warps=WARPS)
    return log_odds, None if dtype is None else signs
