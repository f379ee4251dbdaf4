"""model.py against independent references: separate sequences, the dense mask, transformers."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import data
import model as llama
from conftest import write_checkpoint
from formats.configs import Config
from kernels import layers
from kernels.layers import RMSNormFunction, Rotate, Span, pieces_of

FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "llama2": {"num_key_value_heads": 4, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    "llama3": {"rope_theta": 5e5, "max_position_embeddings": 64, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "mistral": {"model_type": "mistral", "sliding_window": 5, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True},
}


def random_model(window=None, dtype=torch.float64, **shape) -> llama.Llama:
    config = Config(**{"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24,
                             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                             "head_dim": 6, "tie_word_embeddings": True, "sliding_window": window} | shape)
    model = llama.initialise_(llama.Llama(config)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator,
                                            dtype=torch.float64).to(dtype)
    return model.requires_grad_(False)


def packed_row():
    """Two rows: a fork of 3 + (2, 4) tokens, one of 2 + (3, 1, 2), padding; one of 4 + (1). And their spans."""
    layout = [[(0, 3, (2, 4)), (1, 2, (3, 1, 2))], [(2, 4, (1,))]]
    T = 18
    grids = torch.zeros(3, 2, T, dtype=torch.int64)
    grids[0] = -1
    parts, spans = {}, []
    for b, row in enumerate(layout):
        cursor = 0
        for fork, prompt, lengths in row:
            start = cursor
            spans.append(Span(b * T + start, prompt, lengths))
            for branch, length in enumerate((prompt, *lengths)):
                here = slice(cursor, cursor + length)
                first = prompt if branch else 0
                grids[0, b, here], grids[1, b, here] = fork, branch
                grids[2, b, here] = torch.arange(first, first + length)
                if branch:
                    parts[fork, branch] = (b, slice(start, start + prompt), here)
                cursor += length
    tokens = torch.randint(41, (2, T), generator=torch.Generator().manual_seed(2))
    return tokens, *grids, parts, spans


@pytest.mark.parametrize("window", [None, 3])
def test_packed_forks_equal_separate_sequences(window):
    model = random_model(window)
    tokens, fork, branch, positions, parts, spans = packed_row()
    packed = model(tokens, positions, fork, branch, spans)
    for b, prompt, own in parts.values():
        alone = model(torch.cat((tokens[b, prompt], tokens[b, own]))[None])[0]
        together = torch.cat((packed[b, prompt], packed[b, own]))
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("shape", [(1, 1, 7), (1, 7), (2, 1, 7), (0, 7)])
def test_a_single_row_is_multiplied_as_many_or_none(shape, dtype, tolerance):
    x, weight, bias = (torch.randn(size, dtype=dtype) for size in (shape, (5, 7), (5,)))
    expected = F.linear(x.double(), weight.double(), bias.double())
    found = llama.linear(x, weight, bias)
    assert found.shape == expected.shape and found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("short, masked", [(0, []), (8, [8, 5]), (9, [9, 8, 5]), (layers.SHORT, [17, 5])])
@pytest.mark.parametrize("header", [0, 5])
def test_attention_fork_by_fork_equals_the_dense_mask_with_its_gradients(header, short, masked,
                                                                             monkeypatch):
    """All three forks in pieces; the longest alone; each with a mask; two under one mask."""
    monkeypatch.setattr(layers, "SHORT", short)
    _, fork, branch, positions, _, spans = packed_row()
    pieces = pieces_of(spans, 18, header)
    assert [len(piece.mask) for piece in pieces if piece.mask is not None] == masked
    q, k, v = (torch.randn(2, tokens, heads, 6, dtype=torch.float64, requires_grad=True)
               for tokens, heads in ((18, 4), (18 + header, 2), (18 + header, 2)))
    real = fork >= 0
    dense = llama.sdpa(q, k, v, llama.dense_mask(fork, branch, positions + header, None, header))[real]
    walked = llama.attend_spans(q, k, v, pieces)
    assert not walked[~real].any()
    torch.testing.assert_close(walked[real], dense, rtol=0, atol=1e-12)
    weights = torch.randn_like(dense)
    for one, other in zip(torch.autograd.grad((dense * weights).sum(), (q, k, v)),
                          torch.autograd.grad((walked[real] * weights).sum(), (q, k, v))):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_rope_and_rms_norm_have_the_values_and_gradients_of_plain_operations():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = llama.rotation(Config(41, 24, 16, 1, 3, 3, 8), torch.arange(5).expand(2, 5), torch.float64)
    turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
    plain = x * cos + turned * sin.abs() * sin[..., 4:].sign().repeat(1, 1, 1, 2)
    torch.testing.assert_close(Rotate.apply(x, cos, sin), plain, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, cos, sin), (x,))
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.rms_norm(x, (8,), weight, 1e-5)
    torch.testing.assert_close(RMSNormFunction.apply(x, weight, 1e-5), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: RMSNormFunction.apply(x, w, 1e-5), (x, weight))


def test_rms_norm_in_bf16_rounds_as_transformers_does():
    llama_class = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs = llama_class.LlamaRMSNorm(64, 1e-5).to(torch.bfloat16)
    theirs.weight.data.normal_()
    x = torch.randn(7, 64).to(torch.bfloat16).requires_grad_()
    ours = RMSNormFunction.apply(x, theirs.weight.detach(), 1e-5)
    assert (ours != theirs(x)).float().mean() < 0.02
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs(x))]
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02)


def test_visibility_is_the_predicate_of_the_design():
    _, fork, branch, positions, _, _ = packed_row()
    seen = llama.dense_mask(fork, branch, positions, window=4)[:, 0]
    for b in range(2):
        for q in range(18):
            for k in range(18):
                same = fork[b, q] == fork[b, k] and k <= q and branch[b, k] in (0, branch[b, q])
                expected = (k == q) if fork[b, q] < 0 else same and positions[b, q] - positions[b, k] < 4
                assert bool(seen[b, q, k]) == bool(expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_in_one_pass_and_token_by_token(name, tmp_path):
    """23 tokens: far beyond Mistral's window of 5 and the context that llama3's frequencies were
    stretched from."""
    transformers = pytest.importorskip("transformers")
    path = write_checkpoint(tmp_path, **FAMILIES[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32,
                                                               attn_implementation="eager")
    ours = llama.load(path)
    tokens = torch.randint(2, 300, (3, 23), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens) @ ours.head.T, expected, rtol=0, atol=1e-4)
    cache = llama.Cache(ours.config, torch.zeros(3, dtype=torch.int64), 23, torch.float32)
    for t in range(23):
        step = ours(tokens[:, t:t + 1], torch.full((3, 1), t), cache=cache)[:, 0] @ ours.head.T
        torch.testing.assert_close(step, expected[:, t], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_replies_to_prompts_of_mixed_lengths_equal_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = write_checkpoint(tmp_path, **FAMILIES[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(2, 300, (length,), generator=generator).tolist() for length in (1, 9, 4, 14, 9)]
    left = torch.tensor([[0] * (14 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (14 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    stops = [1, *range(2, 320, 9)]               # many ids end a reply, so that rows end at different steps
    replies = theirs.generate(left, attention_mask=mask, max_new_tokens=24, do_sample=False,
                              eos_token_id=stops, pad_token_id=1)
    expected = []
    for reply in replies[:, 14:].tolist():
        end = next((i for i, token in enumerate(reply) if token in stops), len(reply))
        expected.append(reply[:end])
    assert llama.generate(llama.load(path, dtype=torch.float64), prompts, 24, set(stops)) == expected
    assert len(set(map(len, expected))) > 1


@pytest.mark.parametrize("window", [None, 4])
def test_the_cache_gives_token_by_token_what_one_pass_gives(window):
    model = random_model(window)
    tokens = torch.randint(41, (2, 11))
    whole = model(tokens)
    cache = llama.Cache(model.config, torch.zeros(2, dtype=torch.int64), 11, torch.float64)
    parts = [model(tokens[:, :3], cache=cache)]
    for t in range(3, 11):
        parts.append(model(tokens[:, t:t + 1], torch.full((2, 1), t), cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_a_reply_does_not_depend_on_its_batch():
    model = random_model()
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(41, (length,), generator=generator).tolist() for length in (1, 7, 3, 7, 12, 2)]
    alone = [llama.generate(model, [prompt], 15, {4, 9})[0] for prompt in prompts]
    assert llama.generate(model, prompts, 15, {4, 9}) == alone
    assert llama.generate(model, prompts, 15, {4, 9}, batch_size=2) == alone
    assert any(len(reply) < 15 for reply in alone) and all(not {4, 9} & set(reply) for reply in alone)


def test_sampling_is_repeatable_and_top_p_zero_is_greedy():
    model = random_model()
    first = llama.generate(model, [[1, 2]], 20, set(), temperature=1.5, seed=3)
    assert first == llama.generate(model, [[1, 2]], 20, set(), temperature=1.5, seed=3)
    assert first != llama.generate(model, [[1, 2]], 20, set(), temperature=1.5, seed=4)
    assert (llama.generate(model, [[1, 2]], 20, set(), temperature=1.5, top_p=1e-9)
            == llama.generate(model, [[1, 2]], 20, set()))


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("top_p", [0.0, 1e-45, 1e-9, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_sampling_is_finite_at_any_temperature_and_top_p(temperature, top_p, scale):
    logits = scale * torch.randn(3, 41, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = -torch.inf
    chosen = llama.pick_token(logits, temperature, top_p, torch.Generator().manual_seed(0))
    assert (chosen != 7).all()
    if temperature < 1e6 and (top_p < 1e-3 or temperature < 1e-30):                  # at 1e6 all are equal
        assert torch.equal(chosen, logits.argmax(-1))


def test_continuation_logps_are_sums_over_separate_sequences():
    """Forks of two and of three continuations, one in the same row as another, behind a header too."""
    model, header = random_model(), [3, 1, 4, 1]
    forks = [data.Fork([5, 6, 7], [[8, 9], [10]], "en", "0"),
             data.Fork([11], [[12, 13], [14], [15, 1]], "sw", "1"),
             data.Fork([2, 3], [[4, 5, 6, 7], [8]], "en", "2")]
    batch = data.micro_batches(forks, 16, 2)[0]
    for shared in ([], header):
        prefix = llama.keys_and_values(model, shared) if shared else None
        found = llama.continuation_logps(model, batch, prefix)
        expected = []
        for fork in batch.forks:
            for ids in fork.continuations:
                tokens = torch.tensor([shared + fork.prompt + ids])
                logp = (model(tokens)[0] @ model.head.T).log_softmax(-1)
                first = len(shared) + len(fork.prompt)
                expected.append(sum(logp[first - 1 + i, token] for i, token in enumerate(ids)))
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-10)


def test_real_checkpoint_continues_as_the_independent_reference(shared):
    path = shared / "models" / "story_llama"
    reference = json.loads((path / "reference_output.json").read_text())
    prompt, whole = reference["prompt_ids"], reference["greedy_ids"]
    ours = llama.load(path, dtype=torch.float64)
    assert prompt + llama.generate(ours, [prompt], len(whole) - len(prompt), set())[0] == whole


def test_flex_mask_hides_and_shows_what_eq_1_says():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    _, fork, branch, positions, _, _ = packed_row()
    dense = llama.dense_mask(fork, branch, positions, window=4)[:, 0]
    sees = llama.fork_predicate(fork, branch, positions, 4)
    assert (fork < 0).any()
    assert torch.equal(flex.create_mask(sees, 2, 1, 18, 18, device="cpu")[:, 0], dense)


@pytest.mark.parametrize("device, tokens, head_dim, header, expected", [
    ("cpu", 1024, 128, None, False), ("mps", 1024, 128, None, False), ("cuda", 1024, 128, None, True),
    ("cuda", 128, 16, None, True), ("cuda", 200, 80, None, True), ("cuda", 1024, 8, None, False),
    ("cuda", 96, 64, None, False), ("cuda", 1024, 128, 7, False), ("cuda", 1024, 128, 0, False)])
def test_flex_attention_gets_what_its_kernels_take(device, tokens, head_dim, header, expected):
    assert llama.flex_takes(device, tokens, head_dim, header) == expected


def test_forks_are_walked_where_a_batch_says_where_they_lie_and_a_mask_hides_the_rest_where_not():
    _, fork, branch, positions, _, spans = packed_row()
    longest = 7
    for window, header, walked in ((None, None, True), (longest, None, True), (longest - 1, None, False),
                                   (None, 3, True), (longest + 3, 3, True), (longest + 2, 3, False)):
        attend = llama.fork_attention(fork, branch, positions, 6, window, header, spans)
        assert (attend.func is llama.attend_spans) == walked
    attend = llama.fork_attention(fork, branch, positions, 6)
    assert attend.func is llama.sdpa
    q, k, v = (torch.randn(2, 18, heads, 6, dtype=torch.float64) for heads in (4, 2, 2))
    assert torch.equal(attend(q, k, v), llama.sdpa(q, k, v, llama.dense_mask(fork, branch, positions)))


@pytest.mark.parametrize("device, masked, copied", [
    ("cuda", True, True), ("cuda", False, False), ("cpu", True, False)])
def test_kv_heads_are_copied_where_a_mask_would_keep_cuda_from_a_fused_kernel(device, masked, copied):
    """Shapes alone (fake tensors need no GPU): with 6 query heads for 2 of keys, a mask on CUDA."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode

    class Calls(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.scaled_dot_product_attention:
                seen.append((args[1].shape[1], args[2].shape[1], kwargs["enable_gqa"]))
            return function(*args, **(kwargs or {}))
    seen = []
    with FakeTensorMode(), Calls():
        q, k = (torch.zeros(2, 9, heads, 8, device=device) for heads in (6, 2))
        mask = torch.ones(2, 1, 9, 9, dtype=torch.bool, device=device) if masked else None
        out = llama.sdpa(q, k, k, mask, causal=not masked)
    assert out.shape == q.shape and seen == [(6, 6, False) if copied else (2, 2, True)]


def test_window_only_matters_beyond_its_length():
    q, k, v = (torch.randn(1, 6, 2, 4) for _ in range(3))
    short = partial(llama.attend_causal, q[:, :5], k[:, :5], v[:, :5])
    torch.testing.assert_close(short(window=5), short())
    assert not torch.allclose(llama.attend_causal(q, k, v, window=3), llama.attend_causal(q, k, v))


@pytest.mark.parametrize("window", [None, 5])
def test_forks_behind_a_header_equal_whole_sequences(window):
    model = random_model(window)
    tokens, fork, branch, positions, parts, spans = packed_row()
    header = torch.randint(41, (4,), generator=torch.Generator().manual_seed(5))
    prefix = llama.keys_and_values(model, header.tolist())
    packed = model(tokens, positions, fork, branch, spans, prefix=prefix)
    for b, prompt, own in parts.values():
        alone = model(torch.cat((header, tokens[b, prompt], tokens[b, own]))[None])[0, len(header):]
        torch.testing.assert_close(torch.cat((packed[b, prompt], packed[b, own])), alone, rtol=0, atol=1e-10)
    empty = model(tokens, positions, fork, branch, spans, prefix=llama.keys_and_values(model, []))
    torch.testing.assert_close(empty[fork >= 0], model(tokens, positions, fork, branch)[fork >= 0],
                               rtol=0, atol=1e-12)


