"""Lesson 2, solved."""

import torch
import torch.nn.functional as F


def slope(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    """The slope by the margin is -beta * sigmoid(-beta * margin), the margin's slope by the chosen log-prob
    is 1, and a mean over P pairs gives each one part in P."""
    margin = (policy_chosen_logp - ref_chosen_logp) - (policy_rejected_logp - ref_rejected_logp)
    return -beta * torch.sigmoid(-beta * margin) / len(margin)


def clo_part(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, tgt_logp,
             tgt_tokens, pairs, beta, lam):
    """Sums, not means: only the whole step knows what to divide by. logsigmoid, because log(sigmoid(x)) is
    -inf as soon as sigmoid(x) is rounded to 0."""
    margin = (policy_chosen_logp - ref_chosen_logp) - (policy_rejected_logp - ref_rejected_logp)
    preference = -F.logsigmoid(beta * margin).sum() / pairs
    nll = -tgt_logp.sum() / tgt_tokens
    return lam * nll + (1 - lam) * preference


def anchor(policy_logp, ref_logp, tokens):
    """relu before the sum: after it, answers that rose would pay for answers that fell."""
    return F.relu(ref_logp - policy_logp).sum() / tokens
