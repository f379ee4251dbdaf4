"""The training step: what it keeps in memory, what it leaves out, what it compiles;
and what scale.py predicts of it."""

import math
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import clo
import data
import model as llama
from bench import tables
from conftest import Recorder
from engine import job, ranks, scale
from engine.adamw import AdamW
from engine.files import InputError
from evals import heldout
from formats.configs import Config
from kernels import layers

CPU = torch.device("cpu")
SHAPES = {
    "llama": Config(31, 16, 24, 3, 4, 2, 6),
    "tied": Config(31, 16, 24, 2, 4, 4, 4, tie_word_embeddings=True,
                         mlp_bias=True, qkv_bias=True, o_bias=True),
    "qwen2": Config(31, 16, 40, 3, 4, 1, 8, qkv_bias=True, model_type="qwen2"),
    "qwen3": Config(31, 16, 24, 3, 4, 2, 8, qk_norm=True, model_type="qwen3"),
}
TRAIN = ("lora", "attention", "full")


def make_model(shape: str = "llama", train: str = "lora", dtype=torch.float64, recompute: bool = False,
               compiler=None) -> llama.Llama:
    model = llama.Llama(SHAPES[shape], None, recompute, compiler)
    llama.initialise_(model).to(dtype)
    for name, parameter in clo.make_trainable(model, train, rank=3, alpha=6, seed=0).items():
        if name.endswith("lora_B"):                      # at its start, zero, half of the gradients are
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(4))
    return model


def make_forks(number: int = 6) -> list[list[data.Fork]]:
    rng = random.Random(3)

    def ids():
        return [rng.randrange(31) for _ in range(rng.randint(1, 9))]
    return [[data.Fork(ids(), [ids(), ids()], language, row, side) for side, language in enumerate(("en", "sw"))]
            for row in range(number)]


CLO = clo.Objective(0.5, ("tgt",))
ASKED = clo.Stage("clo", CLO, 1.0, 1e-3, 0.1, 0.0, 1.0, 0, 0, 100)
SMALL = data.Packing(batch_size=3, row_tokens=40, micro_rows=2)


def make_steps(packing=SMALL):
    return data.make_steps(make_forks(), CLO, packing, seed=0)


def train_step(model, step, objective=CLO) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a step logs, and its gradients by name; nothing moves."""
    recorder = Recorder({name: p for name, p in model.named_parameters() if p.requires_grad})
    result = clo.train_step(model, step, objective, recorder, math.inf)
    return result, recorder.gradients


def gradients(model, step) -> dict[str, torch.Tensor]:
    return train_step(model, step)[1]


def kept_bytes(model, batch: data.Batch) -> int:
    """Bytes of the tensors that a forward pass keeps for its backward: each memory once, and the weights not
    at all. In float64, so that integers and what all blocks share (tables of angles, of at most D a token)
    can be told apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        memory = tensor.untyped_storage()
        angles = tensor.dim() == 4 and tensor.shape[2:] == (1, model.config.head_dim)
        if memory.data_ptr() not in own and tensor.is_floating_point() and not angles:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(batch.tokens, batch.positions, batch.fork, batch.branch, batch.spans)
    assert hidden.requires_grad
    return sum(kept.values())


# --------------------------------------------------------------------------------------------------- the step

def test_swiglu_has_the_gradient_of_what_it_computes():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.equal(layers.SwiGLU.apply(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(layers.SwiGLU.apply, (gate, up))


class Mutations(TorchDispatchMode):
    """Records the operations that write into a tensor they were given."""
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.is_mutable:
            self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_no_autograd_function_that_is_compiled_works_in_place():
    """The compiler of torch 2.11 gives the inputs of one that does a gradient of zero, without a word."""
    functions = {value for value in vars(llama).values()
                 if isinstance(value, type) and issubclass(value, torch.autograd.Function)}
    assert functions == {layers.ForkAttention, layers.SwiGLU, layers.Rotate, layers.RMSNormFunction}
    x, y = (torch.randn(3, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    angle, weight = torch.randn(3, 5, 1, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    before = x.detach().clone(), y.detach().clone()
    with Mutations() as mutations:
        for result in (layers.SwiGLU.apply(x, y), layers.Rotate.apply(x, angle, angle),
                       layers.RMSNormFunction.apply(x, weight.requires_grad_(), 1e-5)):
            torch.autograd.grad(result.sum(), x)
    assert mutations.seen == [] and torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_recomputed_activations_give_bit_for_bit_the_same_gradients(shape, train):
    step = make_steps()[0]
    expected = gradients(make_model(shape, train), step)
    found = gradients(make_model(shape, train, recompute=True), step)
    assert (expected.keys() == found.keys()
            and all(torch.equal(found[name], expected[name]) for name in expected))
    assert any(gradient.abs().max() > 0 for gradient in expected.values())


def test_recomputing_keeps_one_vector_per_token_and_block():
    model, batch = make_model(recompute=True), make_steps()[0][0]
    c = model.config
    tokens = batch.tokens.numel()
    # Beside every block's input: the last norm's, and its 1 / rms per token.
    assert kept_bytes(model, batch) <= tokens * (c.num_hidden_layers * c.hidden_size + c.hidden_size + 1) * 8


def test_rows_of_one_shape_for_a_gpu_change_no_gradient():
    model = make_model()
    plain, fixed = make_steps(), make_steps(data.Packing(3, 40, 4, trim=False))
    shapes = {tuple(batch.tokens.shape) for step in fixed for batch in step}
    assert shapes == {(3, 40)} and {len(batch.tokens) for step in plain for batch in step} == {1, 2}
    for trimmed, padded in zip(plain, fixed):
        expected, found = gradients(model, trimmed), gradients(model, padded)
        assert all((found[name] - expected[name]).abs().max() < 1e-13 for name in expected)


def equal_forks(number: int = 3) -> list[list[data.Fork]]:
    """Samples whose responses are the same in both languages: no pair."""
    return [[replace(fork, continuations=[fork.continuations[0]] * 2) for fork in group]
            for group in make_forks(number)]


def test_a_step_without_a_pair_learns_from_its_responses_alone():
    model = make_model()
    step, = data.make_steps(equal_forks(), CLO, SMALL, seed=0)
    result, _ = train_step(model, step)
    clo.check_first_rewards(result["rewards"])
    assert result["rewards"].shape == (2, 0) and result["loss"] == 0.5 * result["nll"] > 0


def test_methods_that_prefer_refuse_data_without_any_pair():
    with pytest.raises(InputError, match="the same response in all languages, so clo finds"):
        job.check_pairs(equal_forks(), "rows", methods("sft", "clo"))
    job.check_pairs(equal_forks(), "rows", methods("sft", "sft-en"))
    job.check_pairs(equal_forks() + make_forks(1), "rows", methods("sft", "clo"))
    with pytest.raises(InputError, match="so sft.dpo finds"):
        job.check_pairs(equal_forks(), "rows", methods("sft+dpo", "clo"))


def methods(*names: str) -> dict[str, list[clo.Stage]]:
    return {name: clo.stages_of(name, ASKED, 0.0, 1.0) for name in ("base", *names)}


def test_each_stage_has_its_own_rate_and_a_single_one_is_for_all():
    def rates_of(*rates):
        stages = clo.stages_of("sft+dpo", ASKED, 0.0, 1.0, rates)
        return [stage.rate for stage in stages]
    assert rates_of() == [ASKED.rate, ASKED.rate * clo.PREFERENCE_PART]
    assert rates_of(0.3) == [0.3, 0.3]
    assert rates_of(0.3, 0.01) == [0.3, 0.01]
    assert [stage.rate for stage in clo.stages_of("sft", ASKED, 0.0, 1.0, (0.3, 0.01))] == [0.3]


def test_our_adamw_is_torchs_bit_for_bit():
    ours, theirs = ([torch.nn.Parameter(torch.arange(-3.0, 4.0)), torch.nn.Parameter(torch.ones(2, 3))]
                    for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.03}
    optimizers = [AdamW(ours, **options), torch.optim.AdamW(theirs, foreach=False, fused=False, **options)]
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(one, other) and one.grad is None for one, other in zip(ours, theirs))
    for one, other in zip(ours, theirs):
        found, expected = optimizers[0].state[one], optimizers[1].state[other]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


class Waits(TorchDispatchMode):
    """Records operations that would make the program wait for a GPU:
    a number read, or a shape that depends on values."""
    NAMES = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        mask = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for x in (args[1] if isinstance(args[1], (list, tuple)) else []))
        if name in self.NAMES or mask:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_what_waits():
    with Waits() as waits:
        x = torch.arange(3.0)
        x[0].item()
        x[x > 1]
    assert waits.seen == ["_local_scalar_dense", "index"]


@pytest.mark.parametrize("changes", [{}, {"anchor": 0.5}, {"kind": "simpo"}, {"kind": "ipo"}])
def test_nothing_in_a_step_waits_for_the_device(changes):
    model, [step, *_] = make_model(), make_steps(data.Packing(6, 40, 1))
    for batch, logp in zip(step, heldout.summed_logps(model, step, "reference")):
        batch.ref_logp = logp
    assert len(step) > 2
    counts = clo.Counts.of(step)            # of what lies on the host
    with Waits() as waits:
        for batch in step:
            logp = llama.continuation_logps(model, batch)
            replace(CLO, **changes).loss(logp, batch, counts).backward()
            clo.batch_figures(logp.sum(), logp.detach(), batch, CLO, counts)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    assert waits.seen == []


def test_every_op_of_a_step_has_a_fixed_order_of_sums_on_cuda():
    """Under deterministic algorithms CUDA has one for all but a few ops: those of
    torch.use_deterministic_algorithms' list that could ever stand in a step."""
    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))
    model, steps = make_model(), make_steps()
    model.requires_grad_(True)
    with Names() as names:
        train_step(model, steps[0])
    assert {"index_add", "index_select"} <= names.seen
    assert not names.seen & {"cumsum", "histc", "bincount", "median", "put_",
                             "nll_loss_forward", "nll_loss2d_forward"}


def test_deterministic_algorithms_are_asked_for_without_filling_memory():
    fill, blas = (torch.utils.deterministic.fill_uninitialized_memory,
                  os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
    try:
        ranks.fix_order_of_sums()
        assert (torch.are_deterministic_algorithms_enabled()
                and torch.is_deterministic_algorithms_warn_only_enabled())
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"]
                and not torch.utils.deterministic.fill_uninitialized_memory)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        (os.environ.pop("CUBLAS_WORKSPACE_CONFIG") if blas is None
         else os.environ.update(CUBLAS_WORKSPACE_CONFIG=blas))


@pytest.mark.slow
def test_one_compiled_graph_serves_all_blocks_and_the_pass_without_gradient():
    from torch._dynamo.testing import CompileCounterWithBackend
    model, batch = make_model(), make_steps()[0][0]
    rows = (batch.tokens, batch.positions, batch.fork, batch.branch)        # no spans: a mask, as on a GPU
    counter = CompileCounterWithBackend("aot_eager")
    expected, model = model(*rows), make_model(compiler=counter)
    for _ in range(2):
        assert torch.equal(model(*rows), expected)
    with torch.no_grad():
        found = model(*rows)
    assert torch.equal(found, expected) and not found.requires_grad
    assert counter.frame_count == 2                              # the first block's input has no gradient


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"))])
def test_compiled_blocks_have_the_gradients_of_plain_ones(backend, recompute):
    step = make_steps()[0][:1]                          # every other shape of rows is compiled anew
    expected = gradients(make_model(), step)
    torch.compiler.reset()
    found = gradients(make_model(recompute=recompute, compiler=backend), step)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def peak_bytes(function) -> int:
    """The most memory that was taken at one time while function ran, beyond what there was before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("gradient, recompute", [(False, False), (False, True), (True, True)])
def test_compiled_blocks_keep_nothing_that_is_not_needed_again(gradient, recompute):
    """Six more blocks may take their inputs alone where each is run again, and without a gradient nothing."""
    batch, peaks = make_steps()[0][0], {}
    rows = (batch.tokens, batch.positions, batch.fork, batch.branch)        # no spans: a mask, as on a GPU
    for depth in (2, 8):
        torch.compiler.reset()
        model = llama.Llama(replace(SHAPES["llama"], num_hidden_layers=depth), None, recompute, "aot_eager")
        llama.initialise_(model).double()
        clo.make_trainable(model, "lora", rank=3, alpha=6, seed=0)
        with torch.set_grad_enabled(gradient):
            model(*rows)        # compiles
            peaks[depth] = peak_bytes(lambda: model(*rows))
    inputs = 6 * batch.tokens.numel() * 16 * 8
    assert peaks[8] - peaks[2] <= (1.1 * inputs if gradient else 0.1 * inputs)


@pytest.mark.slow
def test_a_compiled_block_takes_the_mask_of_other_rows_without_compiling_again():
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    counter = CompileCounterWithBackend("eager")
    compiled, flex = (torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
                      for function, backend in ((llama.run_block, counter), (flex_attention, "eager")))
    model = llama.initialise_(llama.Llama(Config(31, 16, 24, 1, 4, 2, 4))).requires_grad_(False)
    block = model.model["layers"][0]
    angles = torch.randn(1, 24, 1, 4)
    for number in range(3):
        batch = data.micro_batches(make_forks()[number][:1], 24, 1, trim=False)[0]
        fork, branch, positions = batch.fork, batch.branch, batch.positions
        x = torch.randn(1, 24, 16)
        mask = create_block_mask(llama.fork_predicate(fork, branch, positions), 1, None, 24, 24, device="cpu")
        found = compiled(block, x, angles, angles, llama.partial(llama.attend_flex, mask=mask, flex=flex))
        dense = llama.partial(llama.sdpa, mask=llama.dense_mask(fork, branch, positions))
        expected = block(x, angles, angles, dense)
        assert (found - expected)[fork >= 0].abs().max() < 1e-5
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_the_compiled_block_of_a_gpu_run_equals_the_plain_one():
    """Mask, attention and block as on CUDA, by the real compiler; for a CPU it knows the forward alone."""
    model = llama.initialise_(llama.Llama(Config(31, 64, 96, 1, 4, 2, 16)))
    clo.add_lora(model, rank=3)
    block, run = model.model["layers"][0], torch.compile(llama.run_block, dynamic=False, fullgraph=True)
    for number in range(2):
        batch = data.micro_batches(make_forks()[number], 128, 2, trim=False)[0]
        rows = (batch.fork, batch.branch, batch.positions)
        x, angles = torch.randn(2, 128, 64), torch.randn(2, 128, 1, 16)
        attend = llama.partial(llama.attend_flex, mask=llama.flex_mask(*rows), flex=llama.compiled_flex()[0])
        with torch.no_grad():
            found = run(block, x, angles, angles, attend)
            expected = block(x, angles, angles, llama.partial(llama.sdpa, mask=llama.dense_mask(*rows)))
        assert (found - expected).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------- calculator

@pytest.mark.parametrize("shape", SHAPES)
def test_predicted_parameter_counts_are_those_of_the_model(shape):
    c = SHAPES[shape]
    with torch.device("meta"):
        names = dict(llama.Llama(c).named_parameters())
    assert sum(scale.parameters(c).values()) == sum(parameter.numel() for parameter in names.values())
    part = {"attention": "_proj", "mlp": ".mlp.", "embedding": "embed_tokens", "head": "lm_head"}
    for name, mark in part.items():
        found = sum(p.numel() for key, p in names.items()
                    if mark in key and (name != "attention" or ".self_attn." in key))
        assert scale.parameters(c)[name] == found
    for train in TRAIN:
        trainable = clo.make_trainable(llama.initialise_(llama.Llama(c)), train, 3, 6, 0)
        assert (scale.trainable_parameters(c, scale.Plan(train, 3))
                == sum(parameter.numel() for parameter in trainable.values()))


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_predicted_activations_are_within_two_percent_of_the_bytes_kept(shape, train, recompute):
    model = make_model(shape, train, recompute=recompute)
    batch = make_steps(data.Packing(3, 80, 2))[0][0]
    c, tokens = model.config, batch.tokens.numel()
    plan = scale.Plan(train, 3, "fp64", row_tokens=tokens, recompute=recompute, device="cpu")
    predicted = scale.activation_bytes(c, plan)
    if recompute:                                                # the block that is run again comes later
        predicted -= tokens * max(scale.block_bytes(c, plan, first) for first in (True, False))
    assert kept_bytes(model, batch) == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Llama-3-8B", "Llama-3-70B"])
def test_micro_batches_are_the_largest_power_of_two_that_fits_with_a_margin(name):
    c, plan = tables.MODELS[name], scale.Plan(row_tokens=1024)

    def needed(rows):
        return sum(scale.memory(c, replace(plan, micro_rows=rows)).values())
    for device_gb in (24, 80, 141):
        limit = (1 - scale.MARGIN) * device_gb * scale.GB
        rows = scale.fitting_micro_rows(c, plan, device_gb * scale.GB)
        assert rows in (1, 2, 4, 8, 16, 32, 64)
        assert rows == 1 or needed(rows) <= limit
        assert rows == scale.MOST_MICRO_ROWS or needed(2 * rows) > limit
    assert scale.fitting_micro_rows(c, plan, 1e15) == scale.MOST_MICRO_ROWS
    assert scale.fitting_micro_rows(c, plan, 1e6) == 1


@pytest.mark.parametrize("dtype, device_gb, rows", [
    ("fp32", 1000, 1), ("bf16", 9, 4), ("bf16", 8, 2), ("bf16", 5, 1)])
def test_on_a_cpu_bf16_takes_the_micro_batches_that_fit_up_to_four_rows(dtype, device_gb, rows):
    plan = scale.Plan(dtype=dtype, device="cpu", micro_rows=None)
    assert scale.choose(tables.MODELS["Llama-3.2-1B"], plan, device_gb * scale.GB).micro_rows == rows


def test_a_plan_for_gpus_takes_what_fits_them_whatever_this_machine_is():
    plan = scale.Plan(dtype="bf16", micro_rows=None)
    assert scale.choose(tables.MODELS["Llama-3.2-1B"], plan, scale.DEVICE_BYTES).micro_rows > 4


def test_a_window_shorter_than_a_row_keeps_rows_apart_on_a_cpu():
    c, plan = tables.MODELS["Llama-3.2-1B"], scale.Plan(dtype="bf16", device="cpu", micro_rows=None)
    for window, rows in ((1023, 1), (1024, 4)):
        assert scale.choose(replace(c, sliding_window=window), plan, 1e12).micro_rows == rows


def test_a_process_counts_on_its_part_of_what_the_container_may_take(monkeypatch, tmp_path):
    for limit, processes, expected in (("12000\n", "3", 4000), ("12000", "1", 12000)):
        (tmp_path / "memory.max").write_text(limit)
        monkeypatch.setattr(scale, "CONTAINER_LIMIT", tmp_path / "memory.max")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert scale.device_bytes(torch.device("cpu")) == expected
    (tmp_path / "memory.max").write_text("max\n")
    host = scale.device_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").unlink()
    assert scale.device_bytes(torch.device("cpu")) == host > 1e9


@pytest.mark.parametrize("units, seconds, dtype", [
    (False, None, "fp32"), (True, {"bfloat16": 1.0, "float32": 3.0}, "bf16"),
    (True, {"bfloat16": 3.0, "float32": 2.0}, "fp32")])
def test_auto_on_a_cpu_is_bf16_where_a_measurement_says_faster(monkeypatch, units, seconds, dtype):
    monkeypatch.setattr(scale, "cpu_multiplies_bf16", lambda: units)
    monkeypatch.setattr(scale, "products_seconds", lambda c, type: seconds[str(type).split(".")[1]])
    plan = scale.choose(tables.MODELS["Llama-3.2-1B"], scale.Plan(dtype="auto", device="cpu"), 1e12)
    assert plan.dtype == dtype
    assert ("measured" in plan.dtype_why) == units


def test_auto_measures_nothing_for_a_small_model_on_another_device_or_when_a_type_is_asked_for(monkeypatch):
    monkeypatch.setattr(scale, "products_seconds", None)                     # calling it would be an error
    monkeypatch.setattr(scale, "cpu_multiplies_bf16", lambda: True)
    large = tables.MODELS["Llama-3.2-1B"]
    small = make_model().config
    assert scale.choose(small, scale.Plan(dtype="auto", device="cpu"), 1e12).dtype == "fp32"
    assert scale.choose(large, scale.Plan(dtype="auto", device="mps"), 1e12).dtype == "fp32"
    assert scale.choose(large, scale.Plan(dtype="auto", device="cuda"), 1e12).dtype == "bf16"
    assert scale.choose(large, scale.Plan(dtype="fp32", device="cpu"), 1e12).dtype == "fp32"


def test_what_is_measured_are_products_of_the_models_shapes():
    c = replace(tables.MODELS["Llama-3-8B"], hidden_size=96, intermediate_size=64)
    assert 0 < scale.products_seconds(c, torch.bfloat16) < 10


def test_sharding_divides_weights_and_leaves_activations():
    c = tables.MODELS["Llama-3-8B"]
    one, eight = (scale.memory(c, scale.Plan(train="full", gpus=gpus, shard=gpus > 1)) for gpus in (1, 8))
    assert eight["trainables, gradients, AdamW"] * 8 == one["trainables, gradients, AdamW"]
    assert eight["activations"] == one["activations"]
    assert sum(eight.values()) < sum(one.values())


def test_the_calculator_says_what_does_not_fit_what_recomputing_saves_and_the_committed_tables(capsys):
    c = tables.MODELS["Llama-3-70B"]
    text = scale.describe(c, scale.Plan(row_tokens=4096), scale.DEVICE_BYTES)
    assert ("too much for the device" in text and "--recompute would save" in text
            and f"{70_553_706_496:,}" in text)
    tables.main([])
    shown = re.findall(r"(?:\|.*\n)+", capsys.readouterr().out)
    told = (Path(clo.__file__).parent / "docs/scale.md").read_text(encoding="utf-8")
    assert len(shown) == 3 and all(table in told for table in shown)


def test_the_stand_in_of_a_dry_run_has_the_shape_of_the_model_with_fewer_layers():
    model = scale.stand_in(SHAPES["qwen3"], 2, CPU, torch.float32)
    expected = {name: p.shape for name, p in llama.Llama(replace(SHAPES["qwen3"], num_hidden_layers=2)
                                                         ).named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == expected
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
