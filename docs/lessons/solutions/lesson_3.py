"""Lesson 3, solved."""

import torch


def mask(fork, branch, positions, window=None):
    """Indexing with None turns (B, T) into a column of queries (B, T, 1) and a row of keys (B, 1, T)."""
    T = fork.shape[1]
    order = torch.arange(T)
    same_fork = fork[:, :, None] == fork[:, None, :]
    not_later = order[None, :] <= order[:, None]                       # (T, T), the same for every row
    in_prompt = branch[:, None, :] == 0
    same_continuation = branch[:, :, None] == branch[:, None, :]
    seen = same_fork & not_later & (in_prompt | same_continuation)
    if window is not None:
        distance = positions[:, :, None] - positions[:, None, :]
        seen = seen & (distance < window)
    padding = fork[:, :, None] < 0
    itself = torch.eye(T, dtype=torch.bool)
    return torch.where(padding, itself, seen)


def predictions(prompt, continuations):
    """The prompt's last token predicts the first token of every continuation; then each token the next."""
    row_index, targets, sequence = [], [], []
    start = len(prompt)                              # where the continuation lies in the row
    for number, ids in enumerate(continuations):
        row_index.append(len(prompt) - 1)
        row_index.extend(range(start, start + len(ids) - 1))
        targets.extend(ids)
        sequence.extend([number] * len(ids))
        start += len(ids) - 1
    return row_index, targets, sequence


def shared(prompt, continuations):
    """All but one copy of the prompt, and of the triangle of pairs inside it. The pairs between a
    continuation and the prompt, and inside a continuation, are needed either way."""
    copies = len(continuations) - 1
    return copies * prompt, copies * prompt * (prompt + 1) // 2
