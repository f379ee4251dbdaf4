"""A Llama-family decoder by hand: Llama 2/3, Mistral, Qwen2.5, Qwen3 from their own safetensors files.

    model = load("demo/llama")                        # a Hugging Face directory
    hidden = model(tokens)                            # (B, T) -> (B, T, H), after the final norm
    logits = hidden @ model.head.T                    # (B, T, V)
    replies = generate(model, [[1, 17, 5]], max_tokens=32, stop_ids={2})

Shapes: B rows, T tokens, N predicted tokens, H hidden width, V vocabulary, Q query heads, G kv heads,
D head width, F mlp width, R LoRA rank, P pairs.

Every parameter carries the name it has in the checkpoint, so loading needs no rename map. `forward`
returns hidden states, not logits: training needs the head on few of the rows, and kernels/ computes
log-probs from them directly.

Packed forks. A row may hold several *forks*: a prompt followed by alternative continuations, which share the
prompt and do not see each other. With `fork` and `branch` (both (B, T)), token q sees token k iff     (eq. 1)

    fork[q] == fork[k]  and  k <= q  and  (branch[k] == 0 or branch[k] == branch[q])

and, for a sliding window of w (Mistral), positions[q] - positions[k] < w. A header that all forks begin with
(few-shot examples) is left out of them and given as `prefix`, its keys and values: every token sees them too.

References: LLaMA (arXiv 2302.13971), RoPE (arXiv 2104.09864), GQA (arXiv 2305.13245),
RMSNorm (arXiv 1910.07467), FlexAttention (arXiv 2412.05496), LoRA (arXiv 2106.09685).
"""

import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from engine.files import InputError
from formats import hub
from formats.configs import Config, read_config
from formats.weights import Weights, add_update, open_weights, read_adapter

# ---------------------------------------------------------------------------------------------- configuration


# ----------------------------------------------------------------------------------------------------- layers

class Linear(nn.Module):
    """y = x W^T + b with W in any dtype: trainable weights stay fp32 while the activations are bf16."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    """nn.Embedding without its random start,
    which on the meta device alone would import half of torch's compiler."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the mean square in at least fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.dtype.itemsize >= 4:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        normed = F.rms_norm(x.float(), weight.shape, None, self.eps)
        return weight * normed.to(x.dtype)                           # rounded as transformers rounds


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend, cache=None) -> Tensor:
        B, T, H = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)                         # (B, T, Q, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)                         # (B, T, G, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append_(k, v)                                           # (B, S, G, D), S = past + T
        return self.o_proj(attend(q, k, v).reshape(B, T, -1))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, any equal shapes. Keeps its two inputs for the backward and nothing else:
    plain autograd keeps silu(gate) as well, a fifth of all that a block keeps."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend, cache=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def rope_frequencies(config: Config, device=None) -> Tensor:
    """Angle per position of each pair of channels, (D/2,) fp32: theta^(-2i/D),
    stretched as rope_scaling says.

    llama3 leaves wavelengths short against the original context alone, divides the long ones by `factor`, and
    interpolates between (transformers' `_compute_llama3_parameters`, from Meta's llama-models).
    """
    D, scaling = config.head_dim, config.rope_scaling
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    turns = context * frequency / (2 * math.pi)                      # full ones over that context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / factor + keep * frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout of Hugging Face checkpoints: channel i turns with channel i + D/2.

    x (B, T, heads, D); cos, sin (B, T, 1, D), the first half of sin negated.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


# -------------------------------------------------------------------------------------------------- attention
# Every function below takes q (B, T, Q, D), k and v (B, S, G, D) and returns (B, T, Q, D).

def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention; G kv heads serve Q/G query heads each.
    mask (B or 1, 1, T, S): True where a query may see, or what is added to its scores."""
    B, T, Q, D = q.shape
    k, v = k.transpose(1, 2), v.transpose(1, 2)                                  # (B, G, S, D)
    G = k.shape[1]
    if T == 1:          # the query heads of a group become its queries: no key is copied for each of them
        return F.scaled_dot_product_attention(q.reshape(B, G, Q // G, D), k, v, mask).reshape(B, T, Q, D)
    q = q.transpose(1, 2)                                                        # (B, Q, T, D)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=Q != G).transpose(1, 2)


def visible(fork: Tensor, branch: Tensor, positions: Tensor, window: int | None = None,
            header: int = 0) -> Tensor:
    """Eq. 1 as a boolean mask (B, 1, T, header + T).
    A padding token sees itself, so that no row of it is empty."""
    T = fork.shape[1]
    order = torch.arange(T, device=fork.device)
    seen = (fork[:, :, None] == fork[:, None, :]) & (order[:, None] >= order[None, :])
    seen &= (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    seen &= (fork[:, :, None] >= 0) | (order[:, None] == order[None, :])
    ago = positions[:, :, None] - torch.arange(header, device=fork.device)
    return torch.cat((ago < (window or math.inf), seen), dim=-1)[:, None]


def behind(prefix: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, S, G, D) with those of the header, (1, P, G, D), before them: (B, P + S, G, D)."""
    return tuple(torch.cat((header.expand(len(x), -1, -1, -1), x), dim=1)
                 for header, x in zip(prefix, (k, v)))


def attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, prefix=None) -> Tensor:
    """The reference for packed forks: SDPA under the full mask. Pays for every pair the mask hides."""
    return sdpa(q, *((k, v) if prefix is None else behind(prefix, k, v)), mask)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Plain causal attention of T tokens, the last ones of S, each seeing at most the last `window`."""
    T, S = q.shape[1], k.shape[1]
    if T == S and (window is None or T <= window):
        return sdpa(q, k, v, causal=True)
    ago = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)[None, :]
    return sdpa(q, k, v, mask=((ago >= 0) & (ago < (window or math.inf)))[None, None])


def unfold_forks(fork: Tensor, branch: Tensor) -> tuple[list[Tensor], Tensor]:
    """How to turn packed rows into one plain causal sequence per continuation, for attention alone.

    Returns gathers, each (S, L) int64 of flat token indices (prompt + one continuation a line, right-padded;
    lines of like length share a gather, so padding stays small), and restore (B*T,) int64: where each token's
    output lies in the concatenation of the flattened gathers (a prompt's is read from its first
    continuation). Padding restores line 0.
    """
    flat_fork, flat_branch = fork.reshape(-1).tolist(), branch.reshape(-1).tolist()
    prompts, continuations = {}, {}
    for index, (f, b) in enumerate(zip(flat_fork, flat_branch)):
        if f >= 0:
            (prompts.setdefault(f, []) if b == 0 else continuations.setdefault((f, b), [])).append(index)
    lines = [(prompts.get(f, []), own) for (f, _), own in continuations.items()]
    branched = {f for f, _ in continuations}
    lines += [(prompt, []) for f, prompt in prompts.items() if f not in branched]
    lines.sort(key=lambda line: len(line[0]) + len(line[1]))
    restore, gathers, offset, bucket, seen = [0] * len(flat_fork), [], 0, [], set()
    for line, after in zip(lines, lines[1:] + [None]):
        bucket.append(line)
        length = len(line[0]) + len(line[1])
        shortest = len(bucket[0][0]) + len(bucket[0][1])
        if after is not None and len(after[0]) + len(after[1]) <= max(1.1 * shortest, shortest + 8):
            continue
        rows = torch.zeros(len(bucket), length, dtype=torch.int64)
        for i, (prompt, own) in enumerate(bucket):
            indices = prompt + own
            rows[i, :len(indices)] = torch.tensor(indices)
            start = offset + i * length
            first = 0 if not prompt or prompt[0] not in seen else len(prompt)
            seen.update(prompt[:1])
            for column in range(first, len(indices)):
                restore[indices[column]] = start + column
        gathers.append(rows.to(fork.device))
        offset += rows.numel()
        bucket = []
    return gathers, torch.tensor(restore, device=fork.device)


def attend_unfolded(q: Tensor, k: Tensor, v: Tensor, gathers: list[Tensor], restore: Tensor,
                    window: int | None = None, prefix=None) -> Tensor:
    """Packed forks on the CPU: gather each continuation behind its prompt, attend causally,
    put the rows back.

    Only attention sees the prompt once per continuation;
    projections and MLP, nearly all the work, see it once.
    """
    B, T, Q, D = q.shape
    q, k, v = q.reshape(B * T, -1), k.reshape(B * T, -1), v.reshape(B * T, -1)
    outputs = []
    for rows in gathers:
        S, L = rows.shape
        lines = [x.index_select(0, rows.view(-1)).view(S, L, -1, D) for x in (q, k, v)]
        if prefix is not None:
            lines[1:] = behind(prefix, *lines[1:])
        outputs.append(attend_causal(*lines, window=window).reshape(S * L, Q * D))
    return torch.cat(outputs).index_select(0, restore).view(B, T, Q, D)


@lru_cache(maxsize=None)
def compiled_flex():
    """FlexAttention and its mask builder, compiled at first use: import must stay cheap."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def fork_predicate(fork: Tensor, branch: Tensor, positions: Tensor, window: int | None = None):
    """Eq. 1 in the form FlexAttention asks: (row, head, query, key) -> may see."""
    def sees(b, _, q, k):
        seen = (fork[b, q] == fork[b, k]) & (k <= q) & ((branch[b, k] == 0) | (branch[b, k] == branch[b, q]))
        seen = seen & ((fork[b, q] >= 0) | (q == k))              # padding sees itself: its tiles are skipped
        return seen if window is None else seen & (positions[b, q] - positions[b, k] < window)
    return sees


def flex_mask(fork: Tensor, branch: Tensor, positions: Tensor, window: int | None = None):
    """Eq. 1 as a block-sparse mask: tiles that nobody may see are skipped, forward and backward."""
    B, T = fork.shape
    return compiled_flex()[1](fork_predicate(fork, branch, positions, window), B, None, T, T,
                              device=fork.device)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask, flex) -> Tensor:
    """flex: compiled_flex()[0], given from outside because a compiled block traces this function."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def fork_attention(fork: Tensor, branch: Tensor, positions: Tensor, window: int | None,
                   header: int | None = None):
    """The attention function for packed forks that suits the device; compared with attend_dense by the tests.
    With a header of so many tokens (scoring: row lengths differ, each would compile FlexAttention anew)
    CUDA takes the mask."""
    if fork.is_cuda and header is not None:
        return partial(attend_dense, mask=visible(fork, branch, positions, window, header))
    if fork.is_cuda:
        return partial(attend_flex, mask=flex_mask(fork, branch, positions, window), flex=compiled_flex()[0])
    gathers, restore = unfold_forks(fork, branch)
    return partial(attend_unfolded, gathers=gathers, restore=restore, window=window)


# ------------------------------------------------------------------------------------------------------ cache

class LayerCache:
    """Keys and values of one layer, (B, capacity, G, D), of which the first `length` columns are filled.

    In memory a head's columns lie side by side, (B, G, capacity, D), which is how attention reads them.
    """

    def __init__(self, B: int, capacity: int, G: int, D: int, device, dtype):
        self.k, self.v = (torch.empty(B, G, capacity, D, device=device, dtype=dtype).transpose(1, 2)
                          for _ in range(2))
        self.length = 0

    def append_(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[1]
        self.k[:, self.length:end], self.v[:, self.length:end] = k, v
        self.length = end
        return self.k[:, :end], self.v[:, :end]


class Cache:
    """KV cache of a left-padded batch. `start` (B,) is each row's number of padding columns."""

    def __init__(self, config: Config, start: Tensor, capacity: int, dtype):
        self.layers = [LayerCache(len(start), capacity, config.num_key_value_heads, config.head_dim,
                                  start.device, dtype) for _ in range(config.num_hidden_layers)]
        self.start, self.padded, self.window = start, bool(start.any()), config.sliding_window

    def attention(self, T: int):
        """Attention of T new tokens over everything cached,
        the new ones included (which `append_` adds first)."""
        past, device, dtype = self.layers[0].length, self.start.device, self.layers[0].k.dtype
        if not self.padded and (self.window is None or past + T <= self.window) and (T == 1 or past == 0):
            return partial(sdpa, causal=True)
        query = past + torch.arange(T, device=device)[:, None]
        key = torch.arange(past + T, device=device)[None, :]
        seen = (key <= query) & (key >= self.start[:, None, None])
        if self.window is not None:
            seen &= query - key < self.window
        seen |= key == query            # a padding query sees itself: an empty softmax row would be NaN
        bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -math.inf)
        return partial(sdpa, mask=bias[:, None])   # made once for all layers

    def keep_(self, rows: Tensor) -> None:
        """Drop all rows but these, so that finished replies cost nothing."""
        self.start = self.start[rows]
        self.padded = bool(self.start.any())
        for layer in self.layers:
            layer.k, layer.v = (x.transpose(1, 2)[rows].transpose(1, 2) for x in (layer.k, layer.v))


# ------------------------------------------------------------------------------------------------------ model

def run_block(block: Block, x: Tensor, cos: Tensor, sin: Tensor, attend, cache=None) -> Tensor:
    """A block as a function of its weights too: compiled, one graph serves all blocks of a model."""
    return block(x, cos, sin, attend, cache)


class Llama(nn.Module):
    """Embedding, blocks, final norm. `head` is the output matrix (V, H), which is the embedding when tied."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.compute_dtype = None   # None: that of the embedding; set when trainables are wider
        self.recompute = False      # keep a block's input alone, and run the block again in the backward
        self.compiled = None        # run_block for packed forks, set by compile_blocks_
        self.model = nn.ModuleDict({
            "embed_tokens": Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    @property
    def head(self) -> Tensor:
        return self.model["embed_tokens"].weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None, fork: Tensor | None = None,
                branch: Tensor | None = None, cache: Cache | None = None, prefix=None) -> Tensor:
        """Hidden states (B, T, H) of tokens (B, T) int64. Alone: causal. With fork and branch: eq. 1.
        With cache: T new tokens after what it holds. positions (B, T) default to 0, 1, ..., T-1 in every row.
        prefix, only with fork and branch: `keys_and_values` of the header every fork continues;
        positions count from its end."""
        B, T = tokens.shape
        window = self.config.sliding_window
        run, gradient = run_block, torch.is_grad_enabled()
        if self.compiled is not None and fork is not None and prefix is None:
            run = self.compiled
        if self.recompute and gradient:
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        if cache is not None:
            attend = cache.attention(T)
        elif fork is not None:
            header = None if prefix is None else prefix[0][0].shape[1]
            positions = positions + (header or 0)
            attend = fork_attention(fork, branch, positions, window, header)
        else:
            attend = partial(attend_causal, window=window)
        x = self.model["embed_tokens"](tokens)
        x = x.to(self.compute_dtype or x.dtype)
        angles = positions[..., None] * rope_frequencies(self.config, tokens.device)       # (B, T, D/2)
        cos, sin = angles.cos().to(x.dtype)[:, :, None], angles.sin().to(x.dtype)[:, :, None]
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)           # (B, T, 1, D)
        # Without a gradient another graph would be compiled, which rounds otherwise:
        # then no reference equals the policy.
        with torch.set_grad_enabled(gradient or run is self.compiled):
            for i, block in enumerate(self.model["layers"]):
                seen = attend if prefix is None else partial(attend, prefix=prefix[i])
                x = run(block, x, cos, sin, seen, None if cache is None else cache.layers[i])
        return self.model["norm"](x if gradient else x.detach())


def continuation_logps(model: Llama, batch, prefix=None) -> Tensor:
    """Log-prob of each of the S continuations of a data.Batch, summed over its tokens, (S,): the one walk that
    training, reference, validation, multiple choice and perplexity share. prefix as in `forward`."""
    hidden = model(batch.tokens, batch.positions, batch.fork, batch.branch, prefix=prefix)       # (B, T, H)
    predicted = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.row_index)            # (N, H)
    token_logp = kernels.token_logp(predicted, model.head.to(predicted.dtype), batch.targets)    # (N,)
    return token_logp.new_zeros(len(batch.length)).index_add(0, batch.sequence, token_logp)


def compile_blocks_(model: Llama, backend: str = "inductor") -> None:
    """Let the forward pass of packed forks run through torch.compile, a graph for all blocks;
    rows must keep one length."""
    model.compiled = torch.compile(run_block, dynamic=False, fullgraph=True, backend=backend)


@torch.no_grad()
def keys_and_values(model: Llama, tokens: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Per layer the keys and values (1, P, G, D) of P header tokens,
    for `forward(prefix=...)`. P may be 0."""
    device, dtype = model.head.device, model.compute_dtype or model.head.dtype
    cache = Cache(model.config, torch.zeros(1, dtype=torch.int64, device=device), len(tokens), dtype)
    if tokens:
        model(torch.tensor([tokens], device=device), cache=cache)
    return [(layer.k[:, :layer.length], layer.v[:, :layer.length]) for layer in cache.layers]


# ---------------------------------------------------------------------------------------------------- loading


def check_tensors(weights: Weights, shapes: dict[str, tuple]) -> None:
    """InputError unless `weights` holds exactly these names with these shapes."""
    missing = [key for key in shapes if key not in weights]
    if missing:
        raise InputError(f"{weights.directory}: tensor {missing[0]} is missing ({len(missing)} in all): "
                              f"the weights do not belong to this config.json")
    surplus = [key for key in weights if key not in shapes]
    if surplus:
        raise InputError(f"{weights.directory}: tensor {surplus[0]} is unknown to this architecture "
                              f"({len(surplus)} in all): the weights do not belong to this config.json")
    for key, shape in shapes.items():
        if weights.shape(key) != tuple(shape):
            raise InputError(f"{weights.directory}: tensor {key} has shape {list(weights.shape(key))}, "
                                  f"config.json asks for {list(shape)}")


def checkpoint_names(model: Llama, weights: Weights) -> dict[str, str]:
    """Parameter name -> tensor name. They are equal but for a tied head,
    which files hold under one or both names."""
    names = {name: name for name, _ in model.named_parameters()}
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if model.lm_head is None and head in weights:
        if embed not in weights:
            names[embed] = head
        elif weights.shape(embed) != weights.shape(head) or not torch.equal(weights[embed], weights[head]):
            raise InputError(f"{weights.directory}: tie_word_embeddings is true, "
                                  f"yet {embed} and {head} differ")
    return names


def open_checkpoint(directory) -> tuple[Llama, Weights, dict[str, str]]:
    """The model without memory (on the meta device), its tensors, and parameter name -> tensor name
    in the order of the files. InputError when anything is missing, surplus or of another shape."""
    config, weights = read_config(directory), open_weights(directory)
    last = f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight"
    if last not in weights:                                        # before any number of layers is built
        raise InputError(f"{directory}: tensor {last} is missing, though num_hidden_layers is "
                              f"{config.num_hidden_layers}: the weights do not belong to this config.json")
    with torch.device("meta"):
        model = Llama(config)
    names = checkpoint_names(model, weights)
    shapes = {names[name]: parameter.shape for name, parameter in model.named_parameters()}
    ignored = {key for key in weights if key.endswith("rotary_emb.inv_freq")}
    if model.lm_head is None:
        ignored |= {"model.embed_tokens.weight", "lm_head.weight"} - set(shapes)
    weights.where = {key: file for key, file in weights.where.items() if key not in ignored}
    check_tensors(weights, shapes)
    return model, weights, dict(sorted(names.items(), key=lambda pair: weights.where[pair[1]]))


def load(path, device="cpu", dtype: torch.dtype = torch.float32, adapter=None) -> Llama:
    """The model in a Hugging Face directory or on the hub, on `device` in `dtype`, with a PEFT LoRA adapter
    or an attn_delta.safetensors added if given.

    What is on the CPU in the dtype of the files stays memory-mapped, privately: changing it changes no file,
    but a file must not be overwritten in place meanwhile (renaming another one over it, as `save` does, is
    fine). Peak host memory is the model's and one shard. InputError when anything is missing, surplus,
    damaged or of another shape.
    """
    path = hub.local(path)
    model, weights, names = open_checkpoint(path)
    updates = {} if adapter is None else read_adapter(adapter, set(names))
    state = {}
    for name, key in names.items():
        tensor = weights[key]
        if name in updates:
            tensor = add_update(tensor, updates[name](), f"{adapter}: {name}")
        state[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def initialise_(model: Llama, seed: int = 0) -> Llama:
    """Fresh weights: normal(0, 0.02), norms one, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


# ------------------------------------------------------------------------------------------------- generation

@torch.no_grad()
def generate(model: Llama, prompts: list[list[int]], max_tokens: int, stop_ids, temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, batch_size: int = 64, progress=None) -> list[list[int]]:
    """Replies to prompts of token ids, without the stop id that ends them; at most max_tokens each.

    Greedy at temperature 0, else sampled from the smallest set of tokens holding top_p of the probability.
    Prompts of like length share a batch. `progress(n)` is called with the number of replies a batch finished.
    """
    assert all(prompts), "every prompt needs a token"
    device = model.head.device
    generator = torch.Generator(device=device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies = [[] for _ in prompts]
    for first in range(0, len(order), batch_size):
        batch = order[first:first + batch_size]
        pick = partial(pick_token, temperature=temperature, top_p=top_p, generator=generator)
        for i, reply in zip(batch, generate_batch(
                model, [prompts[i] for i in batch], max_tokens, stop_ids, pick)):
            replies[i] = reply
        if progress:
            progress(len(batch))
    return replies


def generate_batch(model: Llama, prompts: list[list[int]], max_tokens: int, stop_ids,
                   pick) -> list[list[int]]:
    """One left-padded batch: a pass over the prompts,
    then one token a step for the replies not yet finished."""
    device, width = model.head.device, max(map(len, prompts))
    start = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    positions = (torch.arange(width, device=device) - start[:, None]).clamp(min=0)
    dtype = model.compute_dtype or model.head.dtype
    cache, head = Cache(model.config, start, width + max_tokens, dtype), None
    stops = torch.tensor(sorted(stop_ids), device=device)
    replies, rows = [[] for _ in prompts], list(range(len(prompts)))    # rows: which prompt each line is
    for step in range(max_tokens):
        hidden = model(tokens, positions, cache=cache)[:, -1]
        head = model.head.to(dtype) if head is None else head     # a sharded one is whole only after forward
        chosen = pick((head @ hidden.T).T)  # (B,); with few rows twice as fast on the CPU as hidden @ head.T
        going = ~torch.isin(chosen, stops)
        for row, token, goes in zip(rows, chosen.tolist(), going.tolist()):
            if goes:
                replies[row].append(token)
        if not going.all():
            kept = going.nonzero()[:, 0]
            rows, chosen, positions = [rows[i] for i in kept.tolist()], chosen[kept], positions[kept]
            cache.keep_(kept)
        if not rows:
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
    return replies


def pick_token(logits: Tensor, temperature: float, top_p: float, generator) -> Tensor:
    """Next token (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, tokens = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)   # the first token is always kept
    return tokens.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]
