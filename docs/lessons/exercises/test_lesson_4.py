"""What the exercises of lesson 4 have to fulfil."""

import math
from importlib.util import find_spec

import pytest
import torch
from lesson_4 import head_gradient, row_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Looked for, not imported: the interpreter has to be asked for first, which lesson_4_kernel does.
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")


def log_odds(target_logit, most, total):
    return ((target_logit - most) - total.log()).squeeze(1)


def test_1_row_step_by_hand():
    *known, q = row_step(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), torch.tensor([2]))
    assert log_odds(*known).item() == pytest.approx(0.5924, abs=5e-5)
    assert q.tolist()[0] == pytest.approx([0.2447, 0.6652, 0.0, 0.0900], abs=5e-5)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_1_row_step_in_float64_and_far_from_zero(offset):
    """Sixteenths, so that the offset itself costs no digits."""
    logits = torch.randint(-80, 80, (5, 37), generator=torch.Generator().manual_seed(0)) / 16
    targets = torch.tensor([0, 36, 3, 9, 20])
    true = logits.double()
    others = true.scatter(1, targets[:, None], -torch.inf)
    *known, q = row_step(logits + offset, targets)
    wanted = true.gather(1, targets[:, None])[:, 0] - others.logsumexp(1)
    torch.testing.assert_close(log_odds(*known).double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(q.double(), others.softmax(1), rtol=1e-5, atol=1e-7)


def test_1_row_step_with_the_target_in_another_tile():
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    *known, q = row_step(logits.clone(), torch.tensor([-1, 10, 10**9]))
    assert log_odds(*known).tolist() == [-math.inf] * 3
    torch.testing.assert_close(q, logits.softmax(1))


@needs_triton
def test_2_lane_kernel():
    from lesson_4_kernel import logsumexp
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0), device=DEVICE) * 20
    for block in (16, 128, 512):                          # 512: lanes that see nothing but the fill
        torch.testing.assert_close(logsumexp(logits, block), logits.logsumexp(1), rtol=1e-6, atol=1e-5)


@needs_triton
def test_2_lane_kernel_where_words_cannot_come():
    from lesson_4_kernel import logsumexp
    logits = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), device=DEVICE)
    logits[0, ::2] = logits[1, :63] = -torch.inf          # half of the lanes; all but one
    torch.testing.assert_close(logsumexp(logits, block=16), logits.logsumexp(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("words", [7, 16, 100])
def test_3_head_gradient(words):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(50, 8, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(50, (12,), generator=generator)
    targets[3:5] = targets[0]                             # a word that comes more than once
    grad = torch.randn(12, dtype=torch.float64, generator=generator)
    logp = (hidden @ weight.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    logp.backward(grad)
    found = head_gradient(hidden, weight.detach(), targets, grad, words)
    torch.testing.assert_close(found, weight.grad)
