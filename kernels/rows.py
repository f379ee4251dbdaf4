"""The row step as a Triton kernel: a row of logits in, four numbers and the row's gradient out.

Notation and equations are those of `chunks.py`. ( ) is a tensor in memory, [ ] a tile in registers.

    in    logits (C, U) fp32: on a GPU all words of the vocabulary, U = V
          targets (C,) int64, counted from the first of the U words; one outside 0..U-1 lies in another tile
    out   target_logit (C,) fp32, -inf if the target is outside
          most, total (C,) fp32: a and s, over the words that are not the target                      eq. 1
          q (C, U) in the weight's dtype, norm (C,) fp32: q / norm is the softmax of these words,
          0 at the target                                                                             eq. 4

Which program handles what: program i takes row i and walks it once in blocks of BLOCK_V logits. A row is far
too long for registers (128,256 logits are half a megabyte), so what is not written when a block is at hand
costs a second read. The softmax exp(z - a) / s needs a and s of the whole row; but a softmax is a quotient in
which any number may stand for a, if it stands above and below:

    q_v = exp(z_v - anchor)     norm = sum of q     q / norm = exp(z - a) / s     for every anchor

The anchor is the largest logit of the first block. `chunks.py` divides q @ weight by norm, H numbers a row in
the place of U. Why not always 0? fp32 and bf16 end at exp(88), fp16 at exp(11), and exp(x) is only as exact
as x: rounded to fp32, x = 60 is off by 2e-6, and so is exp(x), relatively. Hence the anchor stays within
LIMIT of the largest logit so far: a block that tops it by more becomes the anchor, and brings what was
written and summed before to its scale ("online softmax", Milakov and Gimelshein 2018; eq. 6):

    q, norm  <-  q * exp(anchor - anchor'), norm * exp(anchor - anchor')

No q is larger than exp(LIMIT) = 2981, and norm is at least 1, what the anchor itself adds. At the end most
is known, and total = norm * exp(anchor - most).

By hand, z = [1, 2, 3, 0], y = 2, BLOCK_V = 2 (a test repeats it). The target's place holds -inf, and the last
block comes first:

    block [-inf, 0]:  anchor = 0, q = [0, exp(0)]             = [0, 1]
    block [1, 2]:     2 - 0 < LIMIT; q = [exp(1), exp(2)]     = [2.7183, 7.3891]
    norm = 0 + 1 + 2.7183 + 7.3891                            = 11.1073
    most = 2, total = 11.1073 * exp(0 - 2)                    = 1.5032
    q / norm                                                  = [0.2447, 0.6652, 0, 0.0900]
    log_odds = 3 - 2 - log 1.5032 = 0.5924,  logp = -log(1 + exp(-0.5924)) = -0.4402

(and logsumexp(z) = 3.4402 gives the same logp, 3 - 3.4402.) With a LIMIT of 1 the second block would become
the anchor: the first one's q = [0, 1] times exp(0 - 2) = [0, 0.1353], then q = [exp(-1), 1], norm = 1.5032.

q goes to the memory of the logits, so a chunk needs one buffer. A bf16 row is half as long as the fp32 row it
replaces; it takes the upper half:

    fp32 row    | z0 | z1 | z2 | z3 | z4 | z5 | z6 | z7 |       block k of z: from slot kB to kB + B
    bf16 row                        |q0 q1|q2 q3|q4 q5|q6 q7|   block k of q: from (U + kB) / 2, B/2 slots

Going down, block k of q starts at (U + kB) / 2 >= kB, so it never touches a block that is still to be read.
It may touch its own block: hence the barrier; all threads hold their part before any of them stores.

Without a gradient nobody wants q. Whether it is written is decided at run time: two compiled kernels would
give a thread other logits to sum (8 beside a bf16 store, else 4), and then the log-probs of a reference pass
would not be, to the last bit, those of training.

Memory traffic, a chunk: one read of (C, U) fp32 and one write in the weight's dtype, 6 bytes a logit for
bf16, against about ten passes in plain PyTorch (the cast, log_softmax, gather, and their backward).
"""

import torch
import triton
import triton.language as tl

BLOCK_V = 2048
WARPS = 8
LIMIT = tl.constexpr(8.0)  # nats; the docstring says what bounds it from above, and rescaling from below
LOWEST = tl.constexpr(-3.0e38)  # below every logit, and yet a number: -inf - -inf would be none


@triton.jit(do_not_specialize=["keep_q"])
def row_kernel(
    logits_ptr, targets_ptr,  # in: (C, U), (C,)
    target_logit_ptr, most_ptr, total_ptr, norm_ptr,  # out: (C,) each
    q_ptr,  # out: (C, U); may share memory with logits
    stride_logits, stride_q,  # elements from a row to the next
    keep_q,  # 0: no q is written. No constexpr, and its value not looked at by the compiler: one binary
    N_WORDS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    # 1. Locate the row. In int64: C * U passes 2^31 at 16,744 rows of 128,256.
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    q_ptr += row * stride_q
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < N_WORDS)
    target_logit = tl.load(logits_ptr + target, mask=inside, other=-float("inf"))

    # 2. The sweep, last block first. Fill with -inf: exp(-inf) adds nothing, and -inf is never the largest.
    anchor = LOWEST
    most = LOWEST
    sums = tl.zeros((BLOCK_V,), tl.float32)  # one for each lane: the loop reduces nothing but the maximum
    for done in range(0, N_WORDS, BLOCK_V):
        first = (N_WORDS - 1) // BLOCK_V * BLOCK_V - done
        offs_v = first + tl.arange(0, BLOCK_V)
        mask_v = offs_v < N_WORDS
        z = tl.load(logits_ptr + offs_v, mask=mask_v, other=-float("inf"))
        # The target leaves here and not by the load's mask, which would cut 16-byte loads into single ones.
        z = tl.where(offs_v == target, -float("inf"), z)
        peak = tl.max(z, 0)
        most = tl.maximum(most, peak)
        if peak > anchor + LIMIT:
            factor = tl.exp(anchor - peak)  # 0 for the first block
            sums *= factor
            anchor = peak
            if keep_q != 0:
                tl.debug_barrier()  # another thread may have written what this one reads
                above = first + BLOCK_V
                while above < N_WORDS:
                    old_v = above + tl.arange(0, BLOCK_V)
                    old = tl.load(q_ptr + old_v, mask=old_v < N_WORDS, other=0.0).to(tl.float32)
                    tl.debug_barrier()
                    tl.store(q_ptr + old_v, old * factor, mask=old_v < N_WORDS)
                    above += BLOCK_V
        q = tl.exp(z - anchor)
        sums += q
        if keep_q != 0:
            tl.debug_barrier()
            tl.store(q_ptr + offs_v, q, mask=mask_v)

    # 3. Combine the lanes, and store what eq. 1 asks for. Without any other word (all -inf) norm would be 0.
    norm = tl.sum(sums, 0)
    tl.store(target_logit_ptr + row, target_logit)
    tl.store(most_ptr + row, most)
    tl.store(total_ptr + row, norm * tl.exp(anchor - most))
    tl.store(norm_ptr + row, tl.maximum(norm, 1.0))


def row_step_(logits, targets, dtype, gradient, block=BLOCK_V):
    """Same contract as `chunks.row_step_`, for contiguous fp32 logits (C, U).

    q is a view of the logits' memory in `dtype`: of all of it for fp32, of the upper half of each row for
    bf16 and fp16.
    """
    C, U = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous(), f"{logits.dtype}, {logits.stride()}"
    target_logit, most, total, norm = logits.new_empty(4, C, 1)
    q = logits if dtype == torch.float32 else logits.view(dtype)[:, U:]
    with torch.cuda.device_of(logits):  # Triton launches on the current GPU, which may be another
        row_kernel[(C,)](logits, targets, target_logit, most, total, norm, q, logits.stride(0), q.stride(0),
                         int(gradient), N_WORDS=U, BLOCK_V=block, num_warps=WARPS)
    return target_logit, most, total, *((q, norm) if gradient else (None, None))
