"""Lesson 2, preference losses: write the bodies.

    python -m pytest docs/lessons/exercises/test_lesson_2.py       # what is still open?

Log-probs are sums over an answer's tokens, tensors (P,), one number for each pair.
"""


def slope(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    """How the mean of -log sigmoid(beta * margin) changes with each policy_chosen_logp, (P,).

    By hand: without autograd. Margins of -2000 and of 2000 give finite numbers.
    """
    raise NotImplementedError("exercise 2.1 is open")


def clo_part(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, tgt_logp,
             tgt_tokens, pairs, beta, lam):
    """What a part of a step adds to CLO's loss, a scalar.

    The first four: the part's own pairs. tgt_logp: the log-probs of the part's target answers. tgt_tokens
    and pairs: how many there are in the *whole* step. The parts of a step, however it was cut, add up to
    its loss.
    """
    raise NotImplementedError("exercise 2.2 is open")


def anchor(policy_logp, ref_logp, tokens):
    """How far answers fell below the reference, in nats per token: a scalar.

    tokens: of all answers together. An answer that did not fall adds nothing, and does not pay for one that did.
    """
    raise NotImplementedError("exercise 2.3 is open")
