"""What the exercises of docs/change/1-preference-loss.md have to fulfil.

    python -m pytest docs/change/exercises/test_change_1.py        # what is still open?
"""

import math
from types import SimpleNamespace

import pytest
import torch

import clo


def test_1_smooth():
    """The loss, from the two outcomes of a coin. It is least where the coin says, not at infinity."""
    assert clo.parse_args(["--lang", "sw", "--preference", "smooth"]).preference == "smooth"
    margin = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    for beta in (0.5, 2.0):
        right = 1 / (1 + torch.exp(-beta * margin))
        wrong = 1 / (1 + torch.exp(beta * margin))
        losses = clo.preference_losses(margin, "smooth", beta)
        torch.testing.assert_close(losses, -0.9 * right.log() - 0.1 * wrong.log())
        assert margin[losses.argmin()].item() == pytest.approx(math.log(9) / beta, abs=0.01)
    assert torch.isfinite(clo.preference_losses(torch.tensor([-1e6, 1e6]), "smooth", 1.0)).all()
    assert clo.preference_losses(margin, "sigmoid", 1.0)[-1] < 1e-8                   # untouched


def test_2_mean():
    """One pair: an answer of 4 tokens rose by 2 nats, one of 10 tokens fell by 5."""
    assert clo.parse_args(["--lang", "sw", "--preference", "mean"]).preference == "mean"
    ref, logp = torch.tensor([-8.0, -30.0]), torch.tensor([-6.0, -35.0])
    batch = SimpleNamespace(chosen=torch.tensor([0]), rejected=torch.tensor([1]), nll=torch.tensor([0]),
                            length=torch.tensor([4, 10]), ref_logp=ref)
    step = clo.Counts(pairs=1, nll_tokens=4, english_tokens=0)
    loss = clo.Objective(0.0, ("tgt",), beta=2.0, kind="mean").loss(logp, batch, step)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2 * (2 / 4 + 5 / 10))))
    loss = clo.Objective(0.5, ("tgt",), beta=2.0, kind="sigmoid").loss(logp, batch, step)
    assert loss.item() == pytest.approx(0.5 * 6 / 4 + 0.5 * math.log1p(math.exp(-2 * 7)))     # untouched
