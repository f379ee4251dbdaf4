"""What the exercises of lesson 2 have to fulfil."""

import pytest
import torch
from lesson_2 import anchor, clo_part, slope

import clo


def example(P=6):
    """Four (P,) tensors of log-probs, one margin far below zero, one far above."""
    generator = torch.Generator().manual_seed(0)
    logps = -20 * torch.rand(4, P, generator=generator)
    logps[0, :2] = torch.tensor([-2020.0, -20.0])
    logps[1, :2] = torch.tensor([-20.0, -2020.0])
    logps[2:, :2] = -20.0
    return logps


def test_1_slope():
    logps = example()
    for beta in (0.1, 2.0):
        chosen = logps[0].clone().requires_grad_()
        margin = clo.margins(chosen, *logps[1:])
        clo.preference_losses(margin, beta=beta).mean().backward()
        assert torch.allclose(slope(*logps, beta), chosen.grad, atol=1e-7)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_2_clo_part(cut):
    logps, tgt_logp, lengths = example(), torch.tensor([-9.0, -4.0, -30.0]), [7, 3, 12]
    whole = clo.clo_loss(*logps, tgt_logp, sum(lengths), beta=0.5, lam=0.3)
    first = clo_part(*logps[:, :cut], tgt_logp[:1], sum(lengths), 6, beta=0.5, lam=0.3)
    rest = clo_part(*logps[:, cut:], tgt_logp[1:], sum(lengths), 6, beta=0.5, lam=0.3)
    assert torch.allclose(first + rest, whole)


def test_3_anchor():
    policy = torch.tensor([-5.0, -2.0, -4.0], requires_grad=True)
    ref = torch.tensor([-4.0, -9.0, -4.0])
    penalty = anchor(policy, ref, tokens=10)
    assert penalty.item() == pytest.approx(0.1)
    penalty.backward()
    assert policy.grad.tolist()[:2] == pytest.approx([-0.1, 0.0])
