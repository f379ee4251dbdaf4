"""What the exercises of lesson 3 have to fulfil."""

import torch
from lesson_3 import mask, predictions, shared

import data

FORKS = [data.Fork([11, 12, 13], [[21, 22], [31, 32, 33]], "en", "a"),
         data.Fork([14, 15], [[23, 24, 25]], "en", "b"),
         data.Fork([16], [[26, 27], [34], [41, 42]], "en", "c")]


def seen_by(batch, row, q, window=None):
    """The tokens that q sees, word by word from the definition."""
    fork, branch, positions = (x[row].tolist() for x in (batch.fork, batch.branch, batch.positions))
    if fork[q] < 0:
        return [q]
    found = []
    for k in range(q + 1):
        near = window is None or positions[q] - positions[k] < window
        if fork[k] == fork[q] and branch[k] in (0, branch[q]) and near:
            found.append(k)
    return found


def check_mask(window):
    batch, = data.micro_batches(FORKS, row_tokens=14, rows=1, trim=False)
    assert (batch.fork < 0).any(), "the example has padding"
    found = mask(batch.fork, batch.branch, batch.positions, window)
    B, T = batch.tokens.shape
    assert found.shape == (B, T, T) and found.dtype == torch.bool
    for row in range(B):
        for q in range(T):
            assert found[row, q].nonzero()[:, 0].tolist() == seen_by(batch, row, q, window), (row, q)


def test_1_mask():
    check_mask(window=None)


def test_1_mask_with_a_window():
    check_mask(window=2)


def test_2_predictions():
    for fork in FORKS:
        batch, = data.micro_batches([fork], row_tokens=16, rows=1)
        wanted = batch.row_index.tolist(), batch.targets.tolist(), batch.sequence.tolist()
        assert predictions(fork.prompt, fork.continuations) == wanted


def test_3_shared():
    for fork in FORKS:
        batch = data.pack([fork], row_tokens=16)
        packed_pairs = sum(len(seen_by(batch, 0, q)) for q in range(batch.tokens.shape[1]))
        lengths = [len(fork.prompt) + len(ids) - 1 for ids in fork.continuations]    # the last token is no input
        plain_pairs = sum(n * (n + 1) // 2 for n in lengths)
        found = shared(len(fork.prompt), [len(ids) for ids in fork.continuations])
        assert found == (sum(lengths) - batch.used, plain_pairs - packed_pairs)
