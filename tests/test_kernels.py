"""The head's ops against float64, plain PyTorch and arithmetic by hand (Triton interpreted without a GPU)."""

import math
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from bench.contenders import SMALL_CHUNK_BYTES
from kernels import chunks, linear_cross_entropy, ops, reference, token_logp

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["torch"] + ["triton"] * bool(find_spec("triton"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRIANGLE = [[1.0, 2.0, 3.0, 0.0]]  # the logits of the worked example, target 2


@pytest.fixture(params=[*BACKENDS, "torch, narrow", *(backend + ", narrow" for backend in BACKENDS[1:])])
def walk(request, monkeypatch):
    """A backend; "narrow": with tiles of at most 16 words (torch) or blocks of 32 (triton), where V is 101."""
    backend, _, narrow = request.param.partition(", ")
    if narrow and backend == "torch":
        monkeypatch.setattr(chunks, "CPU_TILE_WORDS", 16)
    elif narrow:
        from kernels import rows
        monkeypatch.setattr(rows, "row_step_", partial(rows.row_step_, block=32))
    return backend


def row_step(backend, logits, targets, dtype, block=4, gradient=True):
    """(log-odds of eq. 1 (C,), q of eq. 4 or None) by either row step, on a copy of `logits`."""
    if backend == "torch":
        outputs = chunks.row_step_(logits.clone(), targets, dtype, gradient)
    else:
        from kernels import rows
        outputs = rows.row_step_(logits.clone(), targets, dtype, gradient, block)
    target_logit, most, total, q, norm = outputs
    if norm is not None:
        q = q.float() / norm
    return ((target_logit - most) - total.log()).squeeze(1), q


def example(N=37, H=24, V=101, dtype=torch.float32, seed=0):
    """hidden, weight (leaves), targets at both ends of the vocabulary too, upstream gradients of any sign."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator).to(dtype)
    weight = (torch.randn(V, H, generator=generator) * 0.5).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    targets[:2] = torch.tensor([0, V - 1])[:N]
    upstream = torch.randn(N, generator=generator) * torch.randint(3, (N,), generator=generator)
    return (hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_(), targets.to(DEVICE),
            upstream.to(DEVICE))


def gradients(function, hidden, weight, targets, upstream=None):
    """[output, gradient of hidden, gradient of weight] of leaves of our own."""
    hidden, weight = (x.detach().clone().requires_grad_(x.requires_grad) for x in (hidden, weight))
    output = function(hidden, weight, targets)
    output.backward(None if upstream is None else upstream.to(output.dtype))
    return [output.detach(), hidden.grad, weight.grad]


def in_float64(*tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def error(outputs, truth):
    """Root mean square difference of each output from the truth."""
    return [(x.double() - true).square().mean().sqrt().item() for x, true in zip(outputs, truth, strict=True)]


def assert_within_plain_error(ours, plain, truth):
    """At most 1.5 times the error of plain PyTorch in the same dtype, or below the resolution of fp32."""
    for mine, theirs, true in zip(error(ours, truth), error(plain, truth), truth):
        assert mine <= 1.5 * max(theirs, 1e-7 * true.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_worked_example_comes_out_as_by_hand(backend):
    logits, targets = torch.tensor(TRIANGLE, device=DEVICE), torch.tensor([2], device=DEVICE)
    log_odds, q = row_step(backend, logits, targets, torch.float32, block=2)
    assert log_odds.item() == pytest.approx(0.5924, abs=5e-5)
    assert F.logsigmoid(log_odds).item() == pytest.approx(-0.4402, abs=5e-5)
    assert q.tolist()[0] == pytest.approx([0.2447, 0.6652, 0, 0.0900], abs=5e-5)
    assert logits.logsumexp(1).item() == pytest.approx(3.4402, abs=5e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [2, 7, 16, 37, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_step_matches_float64(backend, V, dtype):
    """Blocks that divide V, that do not, and larger than V; q written over the logits it came from."""
    logits = (torch.randn(5, V, generator=torch.Generator().manual_seed(V)) * 3).to(DEVICE)
    targets = torch.tensor([0, V - 1, V // 2, 1, 0], device=DEVICE)
    others = logits.double().scatter(1, targets[:, None], -torch.inf)
    true_odds = logits.double().gather(1, targets[:, None])[:, 0] - others.logsumexp(1)
    for block in (2, 16, 128):
        log_odds, q = row_step(backend, logits, targets, dtype, block)
        quiet, none = row_step(backend, logits, targets, dtype, block, gradient=False)
        assert torch.equal(quiet, log_odds) and none is None
        torch.testing.assert_close(log_odds.double(), true_odds, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(q.double(), others.softmax(1), rtol=2 * torch.finfo(dtype).eps,
                                       atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_in_another_tile_leaves_a_plain_softmax(backend):
    logits = (torch.randn(3, 10, generator=torch.Generator().manual_seed(0)) * 3).to(DEVICE)
    targets = torch.tensor([-1, 10, 10**9], device=DEVICE)  # before, behind, far behind
    log_odds, q = row_step(backend, logits, targets, torch.float32)
    assert log_odds.tolist() == [-math.inf] * 3
    torch.testing.assert_close(q, logits.softmax(1), rtol=1e-5, atol=1e-7)


def ramp(kind, V):
    """Logits (V,) hundreds apart, so that the block read first lies far below, or above, or between."""
    words = torch.arange(V, dtype=torch.float32)
    return {"up": 900 * words / V, "down": -900 * words / V, "zigzag": (words % 37) * 20,
            "one far above": torch.where(words == V // 3, 700.0, 0.0),
            "all far below": words / V - 1e4}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["up", "down", "zigzag", "one far above", "all far below"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_far_apart_neither_overflow_nor_lose_digits(backend, kind, dtype):
    V = 200
    noise = torch.randn(6, V, generator=torch.Generator().manual_seed(0))
    logits = (ramp(kind, V) + noise).to(DEVICE)
    targets = torch.tensor([0, V - 1, V // 3, V // 2, -1, V], device=DEVICE)
    true = logits.double()
    inside = (targets >= 0) & (targets < V)
    column = targets.clamp(0, V - 1)[:, None]
    logit = true.gather(1, column).where(inside[:, None], -torch.inf)
    others = true.scatter(1, column, true.gather(1, column).masked_fill(inside[:, None], -torch.inf))
    for block in (16, 64, 256):
        log_odds, q = row_step(backend, logits, targets, dtype, block)
        quiet, _ = row_step(backend, logits, targets, dtype, block, gradient=False)
        assert torch.equal(quiet, log_odds)
        torch.testing.assert_close(log_odds.double(), logit[:, 0] - others.logsumexp(1), rtol=2e-7, atol=1e-6)
        torch.testing.assert_close(q.double(), others.softmax(1), rtol=2 * torch.finfo(dtype).eps,
                                   atol=max(2e-7, 6e-8 * (dtype == torch.float16)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_minus_infinity_are_words_that_cannot_come(backend, dtype):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[0, 20:] = logits[1, :20] = logits[2, ::2] = -torch.inf
    targets = torch.tensor([0, 39, 1], device=DEVICE)
    others = logits.double().scatter(1, targets[:, None], -torch.inf)
    odds = logits.double().gather(1, targets[:, None])[:, 0] - others.logsumexp(1)
    log_odds, q = row_step(backend, logits, targets, dtype, block=16)
    torch.testing.assert_close(log_odds.double(), odds, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(q.double(), others.softmax(1), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_a_word_without_any_other_is_certain_and_has_no_gradient():
    log_odds, q = row_step("triton", torch.full((2, 1), 3.0, device=DEVICE),
                           torch.tensor([0, -1], device=DEVICE), torch.float32)
    assert log_odds.tolist() == [math.inf, -math.inf] and q.tolist() == [[0.0], [1.0]]


def test_the_kernel_serves_gpus_in_every_dtype_but_float64():
    assert [ops.backend_for("cpu", dtype) for dtype in DTYPES] == ["torch"] * 3
    expected = ["triton" if find_spec("triton") else "torch"] * 3 + ["torch"]
    assert [ops.backend_for("cuda", dtype) for dtype in (*DTYPES, torch.float64)] == expected


@pytest.mark.parametrize("widths", [(5, 32), (2, 2, 33), (36, 1)])
def test_tiles_merged_say_what_the_whole_row_says(widths):
    """Eq. 6 in float64, over tiles whose logits lie 600 apart; a tile of one word too."""
    logits = torch.randn(4, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0, -20:] += 600
    logits[1, -20:] -= 600
    targets = torch.tensor([0, 35, 4, 20])
    whole = chunks.row_step_(logits.clone(), targets, torch.float64, gradient=True)
    rows, q, start = None, torch.empty(4, 0, dtype=torch.float64), 0
    for width in widths:
        words = slice(start, start + width)
        tile = chunks.Tile(words, *chunks.row_step_(logits[:, words].clone(), targets - start, torch.float64,
                                                    gradient=True))
        rows, share = (tile, torch.ones(4, 1)) if rows is None else chunks.merge(rows, tile)
        q, start = torch.cat([q * (1 - share), tile.q * share], 1), start + width
    assert rows.words == slice(0, 37)
    for mine, true in zip((rows.target_logit, rows.most, rows.total, q), whole):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n_vocab", [2, chunks.CPU_TILE_WORDS, chunks.CPU_TILE_WORDS + 1, 32000, 128256])
def test_tiles_cover_the_vocabulary_and_none_holds_the_target_alone(n_vocab):
    words = chunks.tile_words(n_vocab, torch.device("cpu"))
    assert [word for piece in words for word in range(n_vocab)[piece]] == list(range(n_vocab))
    assert all(2 <= piece.stop - piece.start <= chunks.CPU_TILE_WORDS for piece in words)
    assert chunks.tile_words(n_vocab, torch.device("cuda")) == [slice(0, n_vocab)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_common_offset_of_the_logits_costs_no_digits(backend):
    logits = torch.randint(-300, 300, (5, 37), generator=torch.Generator().manual_seed(0)).to(DEVICE) / 64
    targets = torch.tensor([0, 36, 3, 9, 20], device=DEVICE)
    near, _ = row_step(backend, logits, targets, torch.float32)
    far, _ = row_step(backend, logits + 1000, targets, torch.float32)
    assert torch.equal(near, far)


@pytest.mark.parametrize("keep_bytes", [0, ops.KEEP_BYTES], ids=["recomputed", "kept"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logp_errs_no_more_than_plain_pytorch(walk, dtype, keep_bytes):
    """37 rows in chunks of 16: the last is ragged. The head trains, its signs kept or computed again."""
    data = example(dtype=dtype)
    truth = gradients(reference.token_logp, *in_float64(*data[:2]), *data[2:])
    plain = gradients(reference.token_logp, *data)
    options = {"chunk_bytes": 16 * 101 * 4, "keep_bytes": keep_bytes, "backend": walk}
    ours = gradients(lambda *x: token_logp(*x, **options), *data)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    assert_within_plain_error(ours, plain, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy_errs_no_more_than_plain_pytorch(walk, dtype):
    """In 20 chunks of 8 rows, where a head's gradient summed in bf16 would stop growing."""
    hidden, weight, targets, _ = example(N=157, dtype=dtype)
    targets[::5] = -100

    def plain_loss(hidden, weight, targets):
        logits = hidden @ weight.T
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
    truth = gradients(plain_loss, *in_float64(hidden, weight), targets)
    options = {"chunk_bytes": 8 * 101 * 4, "backend": walk}
    ours = gradients(lambda *x: linear_cross_entropy(*x, **options), hidden, weight, targets)
    assert_within_plain_error(ours, gradients(plain_loss, hidden, weight, targets), truth)


@pytest.mark.parametrize("tile_words", [chunks.CPU_TILE_WORDS, 16])
def test_float64_stays_float64(tile_words, monkeypatch):
    monkeypatch.setattr(chunks, "CPU_TILE_WORDS", tile_words)
    hidden, weight, targets, upstream = example(dtype=torch.float64)
    ours = gradients(token_logp, hidden, weight, targets, upstream)
    for mine, true in zip(ours, gradients(reference.token_logp, hidden, weight, targets, upstream)):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-13)
    assert linear_cross_entropy(hidden, weight, targets).dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_confident_target_keeps_its_digits(walk, dtype):
    """At p_y = 1 - 1e-6, 1 - p_y from a difference in fp32 would be 6 % off; at 1 - 1e-10, zero. (fp16 has no
    gradient below 6e-8.)"""
    def exact(hidden, weight, targets):  # log_softmax would cancel in float64 too
        z = hidden @ weight.T
        others = z.scatter(1, targets[:, None], -torch.inf).logsumexp(1)
        return F.logsigmoid(z.gather(1, targets[:, None])[:, 0] - others)
    V = 40
    rests = torch.tensor([1e-1, 1e-2, 1e-3, 1e-6, 1e-10][:3 if dtype == torch.float16 else 5]).double()
    hidden = ((1 - rests) / rests * (V - 1)).log().to(dtype)[:, None].to(DEVICE).requires_grad_()  # (5, 1)
    weight = torch.eye(V, 1, dtype=dtype, device=DEVICE).requires_grad_()  # token 0 has hidden for a logit
    targets = torch.zeros(len(rests), dtype=torch.int64, device=DEVICE)
    rtol = max(5e-6, 3 * torch.finfo(dtype).eps)
    upstream = (1 / rests).to(DEVICE)  # every token counts the same in the head's gradient
    truth = gradients(exact, *in_float64(hidden, weight), targets, upstream)
    ours = gradients(lambda *x: token_logp(*x, backend=walk), hidden, weight, targets, upstream)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=5e-6, atol=0)
    for mine, true in zip(ours[1:], truth[1:]):
        torch.testing.assert_close(mine.double(), true, rtol=rtol, atol=0)
    for row in hidden.detach().split(1):
        data = row.requires_grad_(), weight
        truth = gradients(lambda *x: -exact(*x).mean(), *in_float64(*data), targets[:1])
        loss = gradients(lambda *x: linear_cross_entropy(*x, backend=walk), *data, targets[:1])
        for mine, true in zip(loss, truth):
            torch.testing.assert_close(mine.double(), true, rtol=rtol, atol=0)


@pytest.mark.parametrize("N", [0, 1, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_rows_will_do(backend, N):
    hidden, weight, targets, upstream = example(N=max(N, 2))
    data = hidden[:N].detach().requires_grad_(), weight, targets[:N], upstream[:N]
    for mine, true in zip(gradients(lambda *x: token_logp(*x, backend=backend), *data),
                          gradients(reference.token_logp, *data)):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


def test_with_nothing_to_count_the_loss_is_nan_and_its_gradients_zero():
    hidden, weight, targets, _ = example(N=3)
    ignored = torch.full_like(targets, -100)
    loss, grad_hidden, grad_weight = gradients(linear_cross_entropy, hidden, weight, ignored)
    assert loss.isnan() and not grad_hidden.any() and not grad_weight.any()
    assert linear_cross_entropy(hidden[:0], weight, targets[:0]).isnan()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a device-side assertion ends the process's use of the GPU")
@pytest.mark.parametrize("wrong", [-1, 101])
def test_a_target_outside_the_vocabulary_is_refused(wrong):
    hidden, weight, targets, _ = example()
    targets[5] = wrong
    for function in (token_logp, linear_cross_entropy):
        with pytest.raises(RuntimeError, match="outside 0..100"):
            function(hidden, weight, targets)


def test_inputs_that_do_not_fit_are_named():
    hidden, weight, targets, _ = example(N=3)
    for wrong, message in (((hidden, weight[:, 1:], targets), "weight"),
                           ((hidden, weight, targets[:2]), "targets"),
                           ((hidden, weight.half(), targets), "float16"),
                           ((hidden, weight, targets.int()), "int32"),
                           ((hidden, weight[:1], targets * 0), "vocabulary")):
        with pytest.raises(AssertionError, match=message):
            token_logp(*wrong)


def test_a_frozen_head_gets_no_gradient_and_only_the_directions_are_kept():
    hidden, weight, targets, upstream = example()
    weight.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        logp = token_logp(hidden, weight, targets)
    logp.backward(upstream)
    assert weight.grad is None and hidden.grad is not None and saved == [hidden.shape]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="profiles the CPU's allocator")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "frozen"])
def test_no_allocation_is_larger_than_a_chunk(grad):
    """N x V would be 1.2 MB, V x H 0.5 MB; a chunk of 8 rows is 32 kB."""
    hidden, weight, targets, upstream = example(N=320, H=128, V=1000)
    weight.requires_grad_(False)
    token_logp(hidden[:8], weight, targets[:8])
    with torch.profiler.profile(profile_memory=True) as profile, torch.set_grad_enabled(grad):
        logp = token_logp(hidden, weight, targets, chunk_bytes=8 * 1000 * 4)
        if grad:
            logp.backward(upstream)
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert hidden.nbytes * grad <= max(sizes) <= max(hidden.nbytes * grad, 8 * 1000 * 4)


@pytest.mark.parametrize("keep_bytes", [0, ops.KEEP_BYTES])
def test_backward_works_twice(walk, keep_bytes):
    hidden, weight, targets, upstream = example()
    logp = token_logp(hidden, weight, targets, keep_bytes=keep_bytes, backend=walk)
    logp.backward(upstream, retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    logp.backward(upstream)
    assert torch.equal(hidden.grad, 2 * once[0]) and torch.equal(weight.grad, 2 * once[1])


def test_two_runs_and_a_run_without_gradient_agree_to_the_last_bit(walk):
    """No atomics anywhere, on a GPU neither: the bits depend on the matrix products alone."""
    data = example()
    options = {"chunk_bytes": 16 * 101 * 4, "backend": walk}
    runs = [gradients(lambda *x: token_logp(*x, **options), *data) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    data[1].requires_grad_(False)
    frozen = gradients(lambda *x: token_logp(*x, **options), *data)
    assert torch.equal(frozen[0], runs[0][0]) and torch.equal(frozen[1], runs[0][1])
    with torch.no_grad():
        assert torch.equal(token_logp(*data[:3], **options), runs[0][0])


def test_autocast_leaves_fp32_alone():
    data = example()
    plain = gradients(token_logp, *data)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(gradients(token_logp, *data), plain))


@pytest.mark.parametrize("N, V, expected", [(512, 32000, 512), (513, 32000, 264), (3, 32000, 8), (0, 5, 8)])
def test_chunks_are_even_and_within_the_budget(N, V, expected):
    assert chunks.chunk_rows(N, V, torch.float32, torch.device("cpu"), 0) == expected
    budget = 10**6
    rows = chunks.chunk_rows(N, V, torch.float32, torch.device("cuda"), budget)
    assert rows * V * 4 <= max(budget, 8 * V * 4) and rows % 8 == 0


@pytest.mark.parametrize("N, H, V", [(8192, 4096, 128256), (8192, 2048, 151936)])
@pytest.mark.parametrize("chunk_bytes, limit", [(0, 1.2e9), (SMALL_CHUNK_BYTES, 320e6)])
def test_the_budgets_of_a_gpu_hold_on_the_shapes_of_large_models(N, H, V, chunk_bytes, limit):
    """By arithmetic, frozen head in bf16: logits, directions, q @ weight in fp32, the targets' weights."""
    rows = chunks.chunk_rows(N, V, torch.bfloat16, torch.device("cuda"), chunk_bytes)
    assert chunks.tile_words(V, torch.device("cuda")) == [slice(0, V)]
    assert rows * V * 4 + N * H * 2 + rows * H * 4 + rows * H * 2 < limit


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("train_head", [False, True])
def test_the_ops_keep_every_promise_torch_checks(train_head, keep):
    hidden, weight, targets, upstream = example(N=9, H=4, V=12)
    weight.requires_grad_(train_head)
    torch.library.opcheck(ops.logp_op, (hidden, weight, targets, True, keep, 0, ""))
    torch.library.opcheck(ops.mean_nll_op, (hidden, weight, targets, -100, True, train_head, 0, ""))
    logp = token_logp(hidden, weight, targets).detach()
    kept = hidden.new_zeros(9 if keep else 0, 12)
    inputs = (hidden.detach(), weight.detach(), targets, logp, kept, upstream, 0, "")
    torch.library.opcheck(ops.logp_backward_op, inputs)


def test_compiling_breaks_no_graph():
    hidden, weight, targets, upstream = example()

    def loss(hidden, weight):
        logp = token_logp(hidden * 2, weight, targets)
        return (logp * upstream).sum() + linear_cross_entropy(hidden, weight, targets)
    torch.compiler.reset()
    expected = gradients(lambda h, w, _: loss(h, w), hidden, weight, targets)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mine, true in zip(gradients(lambda h, w, _: compiled(h, w), hidden, weight, targets), expected):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6)


def test_a_uniform_model_gives_minus_log_v():
    hidden, weight = torch.zeros(4, 6, device=DEVICE), torch.ones(50, 6, device=DEVICE)
    logp = token_logp(hidden, weight, torch.arange(4, device=DEVICE))
    assert logp.tolist() == pytest.approx([-math.log(50)] * 4)
