"""The decoder: one class for Llama / SmolLM, Qwen2, Qwen3, Gemma and Gemma 3 (text), and its checkpoints.

    model = Decoder.from_pretrained("path/of/a/checkpoint")  # a Hugging Face folder: config.json + model.safetensors
    logits = model(tokens)                                   # (B, T) token ids -> (B, T, V)
    model.save_pretrained("path/of/another")                 # transformers loads it and computes the same logits

The families differ in a handful of details, each a flag of `Config` that says which family needs it.
Rows of a batch are padded on the right: padding stands behind all real tokens, where the causal mask hides it.

Dimension letters, used in every shape comment:
    B rows of the batch          H     query heads                          C width of the hidden states (hidden_size)
    T tokens fed per row         H_kv  key and value heads, a divisor of H  D width of one head (head_dim)
    S keys seen: cached + T      V     vocabulary size

The last of the four files, and the only one that needs none of the others. Read it from `Decoder.hidden` inwards.
Sources: Llama (arXiv 2302.13971), Qwen2 (2407.10671), Qwen3 (2505.09388), Gemma (2403.08295), Gemma 3 (2503.19786);
where a paper leaves a detail open, modeling_<model_type>.py of transformers 5.23 decides.
"""
import dataclasses
import json
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "gemma": "GemmaForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}  # model_type: transformers' class
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256}
DEFAULTS = {  # of fields that a family's config.json may leave out, where they are not those of Config
    "qwen3": {"head_dim": 128},
    "gemma": GEMMA,
    "gemma3_text": GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 256,
                            "sliding_window": 4096, "sliding_window_pattern": 6},
}
ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
# Fields that turn on what we do not implement; refused: a wrong model must not load quietly. Config, these and the RoPE
# variants (read_rope) are all that transformers' code of these families reads, apart from dropout.
REFUSED = ("attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention", "attn_logit_softcapping",
           "final_logit_softcapping", "num_experts", "num_local_experts", "quantization_config")


@dataclass
class Config:
    """The fields of config.json that the code reads, under their own names. None stands for the family's default."""
    model_type: str                             # a key of ARCHITECTURES
    vocab_size: int                             # V
    hidden_size: int                            # C
    intermediate_size: int                      # width of the MLP between up and down
    num_hidden_layers: int
    num_attention_heads: int                    # H
    num_key_value_heads: int | None = None      # H_kv; default H: no two query heads share
    head_dim: int | None = None                 # D; default C / H (Gemma, Gemma 3: 256, Qwen3: 128)
    hidden_act: str | None = None               # a key of ACTIVATIONS
    max_position_embeddings: int = 2048         # tokens; not enforced here: the sampler refuses what would go beyond
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None             # RoPE base (in Gemma 3: of the full-attention layers)
    tie_word_embeddings: bool | None = None     # the output layer is the embedding matrix
    initializer_range: float = 0.02             # standard deviation of fresh weights
    rope_scaling: dict | None = None            # Llama 3.1 and later: see rope_frequencies; refused elsewhere
    rope_local_base_freq: float | None = None   # Gemma 3: RoPE base of the sliding layers
    query_pre_attn_scalar: float | None = None  # Gemma 3: scores are divided by its root; elsewhere by sqrt(D)
    sliding_window: int | None = None           # Gemma 3: keys seen by a query of a sliding layer, its own included
    sliding_window_pattern: int | None = None   # Gemma 3: where layer_types is left out, every so-many-th layer is full
    layer_types: list[str] | None = None        # Gemma 3: "full_attention" or "sliding_attention" for each layer
    extra: dict = field(default_factory=dict, repr=False)  # config.json's other fields (token ids ...), to write back

    def __post_init__(self):
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type = {self.model_type!r} is not implemented, only {', '.join(ARCHITECTURES)}")
        # How the families differ. Llama has none of these.
        gemma, gemma3 = self.model_type in ("gemma", "gemma3_text"), self.model_type == "gemma3_text"
        self.qkv_bias = self.model_type == "qwen2"  # Qwen2: biases on q, k and v, not on o
        self.qk_norm = self.model_type == "qwen3" or gemma3  # Qwen3, Gemma 3: an RMSNorm over D on each q and k head
        self.norm_adds_one = gemma     # Gemma, Gemma 3: norms multiply by 1 + weight, so a weight of 0 is the identity
        self.scale_embedding = gemma   # Gemma, Gemma 3: embeddings are multiplied by sqrt(C)
        self.sandwich_norms = gemma3   # Gemma 3: a norm also behind attention and behind the MLP
        self.sliding_layers = gemma3   # Gemma 3: some layers see only sliding_window keys and have their own RoPE base

        defaults = {"hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 1e4,
                    "num_key_value_heads": self.num_attention_heads,
                    "head_dim": self.hidden_size // self.num_attention_heads} | DEFAULTS.get(self.model_type, {})
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.sliding_layers and self.layer_types is None:
            self.layer_types = ["sliding_attention" if (i + 1) % self.sliding_window_pattern else "full_attention"
                                for i in range(self.num_hidden_layers)]
        known = ["full_attention", "sliding_attention"] if self.sliding_layers else ["full_attention"]
        if self.layer_types and (len(self.layer_types) != self.num_hidden_layers or set(self.layer_types) - set(known)):
            raise ValueError(f"layer_types = {self.layer_types} must be {self.num_hidden_layers} of {known}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act = {self.hidden_act!r} is not implemented, only {', '.join(ACTIVATIONS)}")

    @classmethod
    def from_json(cls, path: Path) -> "Config":
        """Reads a config.json. ValueError names the file, the field and the value that we cannot compute with."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            for name in REFUSED:
                if fields.get(name) not in (None, False):
                    raise ValueError(f"{name} = {fields[name]!r} is not implemented")
            names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
            known = {name: fields[name] for name in names if fields.get(name) is not None} | read_rope(fields)
            if known.get("model_type") == "gemma3_text":  # there the activation has another name
                known["hidden_act"] = fields.get("hidden_activation")
            if known.get("model_type") == "gemma" and known.get("hidden_act") == "gelu":
                known["hidden_act"] = "gelu_pytorch_tanh"  # the first Gemma release wrote the one and meant the other
            spent = names | {"rope_parameters"}  # a null of theirs is written back as it was
            return cls(**known, extra={k: v for k, v in fields.items() if k not in spent or v is None})
        except (ValueError, TypeError, AttributeError) as error:  # no JSON, a field missing, text in place of a number
            raise ValueError(f"{path}: {error}") from error


LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_rope(fields: dict) -> dict:
    """The RoPE settings of a config.json in either spelling, under the names of transformers 4, which are Config's.

    4: {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": null or {"rope_type": "llama3", "factor": ...}}
    5: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, or in Gemma 3 one such dict per layer type:
       {"rope_parameters": {"full_attention": {...}, "sliding_attention": {...}}}
    """
    settings = {"rope_scaling": None}
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.get(name) or {}
        per_layer_type = value if "full_attention" in value else {"full_attention": value}
        for layer_type, rope in per_layer_type.items():
            kind, rest = rope.get("rope_type", rope.get("type", "default")), rope.keys() - {"rope_type", "type", "rope_theta"}
            if kind == "llama3" and fields.get("model_type") == "llama" and rest == set(LLAMA3_ROPE):
                settings["rope_scaling"] = {"rope_type": kind} | {key: rope[key] for key in LLAMA3_ROPE}
            elif kind != "default" or rest:
                raise ValueError(f"{name} = {value!r} is not implemented, only rope_type 'default' and Llama's 'llama3'")
            if "rope_theta" in rope:
                settings["rope_theta" if layer_type == "full_attention" else "rope_local_base_freq"] = rope["rope_theta"]
    return settings


class RMSNorm(nn.Module):
    """x / root-mean-square(x) * weight over the last dimension (arXiv 1910.07467); Gemma: * (1 + weight)."""
    def __init__(self, size: int, config: Config):
        super().__init__()
        self.adds_one, self.eps = config.norm_adds_one, config.rms_norm_eps
        self.weight = nn.Parameter(torch.zeros(size) if self.adds_one else torch.ones(size))

    def forward(self, x):
        # In float32 for every dtype: a sum of squares loses too much in bfloat16. A float32 x is not copied.
        weight = self.weight.float() + 1 if self.adds_one else self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


def rope_frequencies(base: float, D: int, scaling: dict | None, device=None):
    """Radians per position that each pair of a head turns by, (D/2,).

    scaling: Llama 3.1 and later (arXiv 2407.21783) stretch what was trained on `original_max_position_embeddings`
    positions. Pairs that turn slowly, less than low_freq_factor times over those, turn `factor` times slower; those that
    turn more than high_freq_factor times stay; in between the two are blended.
    """
    frequencies = 1 / base ** (torch.arange(0, D, 2, device=device).float() / D)
    if scaling is None:
        return frequencies
    factor, low, high, positions = (scaling[name] for name in LLAMA3_ROPE)
    turns = positions * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: as it was
    return frequencies * (kept + (1 - kept) / factor)


def rope_cos_sin(positions, frequencies, dtype):
    """Positions (B, T) and frequencies (D/2,) -> cos and sin of the angles that `rotate` turns by, each (B, 1, T, D). In
    training all rows have the same positions, (1, T).

    Computed in float32 for every dtype: bfloat16 cannot tell position 257 from 256.
    """
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, D/2)
    angles = torch.cat([angles, angles], dim=-1)                # (B, 1, T, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864) of queries or keys x (B, heads, T, D).

    Pair i, read as a point (a, b), turns by position * base^(-2i/D). Which two numbers are a pair is a convention:
        half-split, Hugging Face checkpoints (here)   a0 a1 a2 a3 b0 b1 b2 b3   pair i = x[i], x[i + D/2]
        interleaved, the paper and Llama's own files  a0 b0 a1 b1 a2 b2 a3 b3   pair i = x[2i], x[2i + 1]
    The wrong one runs without an error and gives another model.
    """
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, D/2) each
    return x * cos + torch.cat([-b, a], dim=-1) * sin  # a cos - b sin | b cos + a sin


class Linear(nn.Linear):
    """y = x W^T + b; with LoRA (arXiv 2106.09685) a trained low-rank term is added to a frozen W: (W + scale B A)."""
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A = self.lora_B = None  # (rank, in), (out, rank): set by Decoder.add_lora

    def forward(self, x):
        y = super().forward(x)
        # Scaled where there are only `rank` numbers per token.
        return y if self.lora_A is None else y + F.linear(self.lora_scale * F.linear(x, self.lora_A), self.lora_B)


class Attention(nn.Module):
    """Causal self-attention; H / H_kv neighbouring query heads share a key and value head (arXiv 2305.13245)."""
    def __init__(self, config: Config, index: int):
        super().__init__()
        C, D, H, H_kv = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.index, self.head_dim, self.shared_keys = index, D, H_kv < H  # index: our layer of the cache
        self.scale = (config.query_pre_attn_scalar or D) ** -0.5
        self.q_proj = Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, H_kv * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, H_kv * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config) if config.qk_norm else nn.Identity()

    def forward(self, x, mask, cos, sin, cache):
        B, T, _ = x.shape  # (B, T, C)
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)               # (B, H_kv, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.index, k, v)  # (B, H_kv, S, D): what was cached, and ours
        if T == 1:  # the query heads that share a key head become so many queries of it: several times as fast
            q = q.view(B, k.shape[1], -1, self.head_dim)  # (B, H_kv, H / H_kv, D), which are no sequence: never causal
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, scale=self.scale,
                                           enable_gqa=T > 1 and self.shared_keys)
        y = y.reshape(B, -1, T, self.head_dim)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H * D) -> (B, T, C)


class MLP(nn.Module):
    """Gated MLP (arXiv 2002.05202)."""
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))  # (B, T, C)


class Layer(nn.Module):
    """Attention, then the MLP: each reads a normed copy of the residual stream x and adds its result to x."""
    def __init__(self, config: Config, index: int):
        super().__init__()
        self.layer_type = config.layer_types[index] if config.layer_types else "full_attention"
        self.sandwich_norms = config.sandwich_norms
        self.self_attn, self.mlp = Attention(config, index), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        # One name for two places: before the MLP, but with sandwich norms (Gemma 3) behind attention.
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        if self.sandwich_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config)

    def forward(self, x, mask, cos, sin, cache):
        y = self.self_attn(self.input_layernorm(x), mask, cos, sin, cache)  # (B, T, C)
        if self.sandwich_norms:
            x = x + self.post_attention_layernorm(y)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


def visible_keys(positions, S: int, window: int | None = None):
    """Which of the keys 0 .. S - 1 do queries at positions (B, T) see? bool (B, 1, T, S), True = visible.

    Key j is visible to a query at position p iff j <= p and, in sliding layers, j > p - window.
    """
    p, j = positions[:, None, :, None], torch.arange(S, device=positions.device)  # (B, 1, T, 1) and (S,)
    return j <= p if window is None else (j <= p) & (j > p - window)


def project(hidden, weight, out):
    """States (N, C) and the output layer's weight (V, C) -> out (N, V), filled and returned; without gradients.

    In float32 on a CPU, BLAS takes half the time over the transposed product, in pieces of the vocabulary that stay in its
    cache, as over hidden @ weight.T (Gemma 3 270M, 96 states, 2 cores of an AMD EPYC: 320 against 660 ms).
    """
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
        for part, logits in zip(weight.split(1024), out.split(1024, dim=1)):
            logits.copy_((part @ hidden.T).T)  # (N, 1024)
        return out
    return torch.mm(hidden, weight.T, out=out) if out.dtype == hidden.dtype else out.copy_(hidden @ weight.T)


class Decoder(nn.Module):
    """A decoder-only language model. Its parameters have the names of the checkpoint, so that loading can be strict.

    `Decoder(config)` has fresh weights: normal with standard deviation initializer_range, biases 0, norms the identity.
    They come from torch's global generator, so call torch.manual_seed(seed) first.
    """
    checkpointing = False  # True: the backward pass computes each layer anew instead of remembering its inside

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config),
        })
        # Tied: there is no second matrix, so there are no two that could come apart when loaded, moved or saved.
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, cache=None):
        """Tokens (B, T) -> logits (B, T, V)."""
        return self.output(self.hidden(tokens, cache))

    def output(self, hidden):
        """States (..., C) -> logits (..., V). Most of the work where V is 262,144: pass only the states you need."""
        if hidden.dim() == 2 and not torch.is_grad_enabled():
            return project(hidden, self.output_weight(), hidden.new_empty(len(hidden), self.config.vocab_size))
        return F.linear(hidden, self.output_weight())

    def output_weight(self):
        """The matrix (V, C) of `output`."""
        return (self.lm_head or self.model.embed_tokens).weight

    def hidden(self, tokens, cache=None):
        """Tokens (B, T) -> states after the final norm (B, T, C).

        cache.lengths (B,) says how many tokens each row has cached; cache.update(layer, k, v) stores new keys and values
        behind those and returns all, (B, H_kv, S, D) each, S = cache.keys_seen(T). The caller then advances lengths.
        """
        config, T = self.config, tokens.shape[1]
        positions, S = torch.arange(T, device=tokens.device)[None], T  # (1, T)
        if cache is not None:
            positions, S = cache.lengths[:, None] + positions, cache.keys_seen(T)  # (B, T)
        # The masks, built here once for all layers.
        # Nothing cached (S = T), in training and when a prompt begins: query t sees keys 0 .. t in every row, a (T, T)
        #   triangle that needs no tensor: None stands for is_causal=True, the fast path.
        # Cached (S > T): (B, 1, T, S), most often T = 1. Query t of a row with p cached tokens sees keys 0 .. p + t. Behind
        #   them, up to the S of the longest row, lie leftovers that must stay hidden.
        # Sliding layers get a mask of their own, (1 or B, 1, T, S), only when S exceeds the window.
        mask = None if S == T else visible_keys(positions, S)
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        frequencies = rope_frequencies(config.rope_theta, config.head_dim, config.rope_scaling, x.device)  # (D/2,)
        inputs = {"full_attention": (mask, *rope_cos_sin(positions, frequencies, x.dtype))}
        if config.sliding_layers:
            mask = mask if S <= config.sliding_window else visible_keys(positions, S, config.sliding_window)
            frequencies = rope_frequencies(config.rope_local_base_freq, config.head_dim, None, x.device)
            inputs["sliding_attention"] = (mask, *rope_cos_sin(positions, frequencies, x.dtype))
        if config.scale_embedding:  # by a factor rounded to the dtype, as in the reference
            x = x * torch.tensor(math.sqrt(config.hidden_size), dtype=x.dtype)
        for layer in self.model.layers:  # x: (B, T, C)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, *inputs[layer.layer_type], cache, use_reentrant=False)
            else:
                x = layer(x, *inputs[layer.layer_type], cache)
        return self.model.norm(x)

    def cast(self, dtype) -> "Decoder":
        """A copy in another dtype, to sample with; the model itself if it is in that dtype."""
        if dtype == self.model.norm.weight.dtype:
            return self
        with torch.device("meta"):
            copy = Decoder(self.config)
        copy.load_state_dict({name: tensor.to(dtype) for name, tensor in self.state_dict().items()}, assign=True)
        return copy

    def add_lora(self, rank: int = 16, alpha: float = 32, seed: int = 0) -> None:
        """Freezes all parameters and adds trained ones, lora_A and lora_B, to the seven projections of every layer.

        B starts at 0, so that at first nothing changes; A is uniform within 1 / sqrt(in), as in peft.
        """
        generator = torch.Generator().manual_seed(seed)
        self.requires_grad_(False)
        for linear in (module for module in self.modules() if isinstance(module, Linear)):
            bound, weight = linear.in_features ** -0.5, linear.weight
            A = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
            linear.lora_A, linear.lora_B = nn.Parameter(A.to(weight)), nn.Parameter(weight.new_zeros(len(weight), rank))
            linear.lora_scale = alpha / rank

    @torch.no_grad()
    def merge_lora(self) -> None:
        """Adds what LoRA has learned to the weights, removes it, and makes all parameters trainable again."""
        for linear in (module for module in self.modules() if isinstance(module, Linear) and module.lora_A is not None):
            linear.weight += linear.lora_scale * linear.lora_B @ linear.lora_A
            linear.lora_A = linear.lora_B = None
        self.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu") -> "Decoder":
        """Loads a Hugging Face folder. FileNotFoundError or ValueError names the file and what is wrong with it."""
        folder = Path(folder)
        for path in (folder, folder / "config.json"):
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist")
        with torch.device("meta"):  # shapes without memory; then the tensors that were read become the parameters
            model = cls(Config.from_json(folder / "config.json"))
        model.load_state_dict(read_tensors(folder, model.state_dict(), dtype, device), assign=True)
        return model

    def save_pretrained(self, folder) -> None:
        """Writes config.json and model.safetensors. OSError names the file that cannot be written."""
        folder, fields = Path(folder), dataclasses.asdict(self.config)
        config = {"architectures": [ARCHITECTURES[self.config.model_type]]} | fields.pop("extra")
        config |= {name: value for name, value in fields.items() if value is not None}
        config.pop("torch_dtype", None)  # the former name of dtype
        config["dtype"] = str(self.model.norm.weight.dtype).removeprefix("torch.")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        write_beside(folder / "model.safetensors", lambda path: save_file(
            tensors, path, metadata={"format": "pt"}))  # transformers asks for the format
        write_beside(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n", "utf-8"))
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # of a sharded checkpoint that was here


def write_beside(path: Path, write) -> None:
    """Calls write(a path beside this one) and renames that file: a kill or a full disk leaves the old file or the new one,
    never half of one. OSError names the file."""
    beside = path.with_name(path.name + ".part")
    try:
        write(beside)
        os.replace(beside, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # of Python, torch.save, safetensors
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def find_shards(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a checkpoint and the tensors in each: one (None: all it has), or those of an index file.

    FileNotFoundError or ValueError, before any weight is read, if one is missing or one more lies there.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        shards = {folder / "model.safetensors": None}
    else:
        try:
            weight_map, shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"], {}
            for name, file in weight_map.items():
                shards.setdefault(folder / file, []).append(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not the index of a sharded checkpoint: {type(error).__name__}: {error}") from error
        for extra in sorted(set(folder.glob("model-*-of-*.safetensors")) - shards.keys()):
            raise ValueError(f"{extra}: this shard is not in {index}")
    for path in shards:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist" + (f", but {index} names it" if index.exists() else ""))
    return shards


def read_tensors(folder: Path, expected: dict, dtype, device) -> dict:
    """Reads the tensors named in `expected`. ValueError unless the files hold these, in their shapes, and no others."""
    head, embedding, found = "lm_head.weight", "model.embed_tokens.weight", {}  # found: tensor -> (path, open file)
    with ExitStack() as stack:
        for path, names in find_shards(folder).items():
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path}: not a complete safetensors file: {error}") from error
            for name in sorted(set(file.keys()) ^ set(file.keys() if names is None else names)):
                raise ValueError(f"{path}: tensor {name} is {'missing' if name in names else 'not in the index'}")
            # The first Llama files also hold RoPE's frequencies, which are computed here.
            found |= {name: (path, file) for name in file.keys() if not name.endswith(".rotary_emb.inv_freq")}
        if head not in expected and {head, embedding} <= found.keys():  # tied, but some files store the matrix twice
            if not torch.equal(*(found[name][1].get_tensor(name) for name in (head, embedding))):
                raise ValueError(f"{found[head][0]}: tensor {head} differs from {embedding}, but tie_word_embeddings is true")
            del found[head]
        for name in sorted(found.keys() ^ expected.keys()):
            where, what = (found[name][0], "not expected") if name in found else (folder, "missing")
            raise ValueError(f"{where}: tensor {name} is {what}")
        for name, tensor in expected.items():
            path, file = found[name]
            shape, stored = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
            if shape != list(tensor.shape) or stored not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{path}: tensor {name} is {stored} {shape}, must be float {list(tensor.shape)}")
        # One by one: memory for one copy. What needs no conversion stays a private view of the file, which may be
        # replaced, as save_pretrained does, but not overwritten in place while the model lives.
        tensors = {name: found[name][1].get_tensor(name).to(device, dtype) for name in expected}
    for name, tensor in tensors.items():
        if not tensor.sum().isfinite():
            raise ValueError(f"{found[name][0]}: tensor {name} holds nan or infinity")
    return tensors
