"""The decoders of llama, mistral, qwen, gemma, phi and granite checkpoints: one file, driven by its configuration.

It knows weights and layers, not requests: `ModelRunner` calls `embed`, `block` for each layer, and `logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import backend, native
from ...kernels.huge_pages import collapse, prefer
from ...kernels.linear import Linear
from ...kernels.lora import ActiveAdapters
from ...kernels.operations import Operations
from ...kernels.quantized import Kind
from ...kernels.rms_norm import rms_norm
from ...kernels.rope import rope_, rope_angles
from ...kernels.swiglu import geglu, swiglu
from ..errors import UnknownArchitecture
from .bundles import default_cache
from .eight_bits import check_sizes
from .fused import FusedLayers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite")
# The language models inside vision-language models that are one of these, and how their rotary frequencies are dealt
# to time, height and width: in three blocks, or in turn.
MROPE = {"qwen2_5_vl_text": ("qwen2", "blocks"), "qwen3_vl_text": ("qwen3", "in turn")}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ATTEND = Callable[[int, Tensor], Tensor]
"""(layer, rotated qkv [tokens, heads + 2 kv_heads, head_dim]) -> [tokens, heads * head_dim]."""


@dataclass(frozen=True)
class DecoderConfig:
    """What the decoder must know of a checkpoint.

    windows: one entry a layer, None = full attention. rotary: which of the model's rotary tables each layer uses.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    context: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rotary: tuple[int, ...]
    rope_axes: tuple[int, ...] | None  # of an M-RoPE, the axis of each frequency: 0 time, 1 height, 2 width
    rope: Any  # the transformers configuration, which knows its rotary parameters
    attention_scale: float
    attention_cap: float | None = None  # of the scores, c tanh(score / c), before the mask
    logit_cap: float | None = None
    logit_divisor: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    gelu: bool = False  # tanh-approximated, instead of silu
    unit_norms: bool = False  # a stored norm weight w stands for 1 + w, and meets the row before that is rounded
    output_norms: bool = False  # attention and MLP are normed after their maps, too
    fused_maps: bool = False  # checkpoints hold queries, keys and values as one map, gate and up as one
    images_scaled: bool = False  # embedding_scale is of what images become, too

    @property
    def like_llama(self) -> bool:
        """Whether a layer is one of Llama's, but for biases, windows and norms of queries and keys."""
        plain = not (self.gelu or self.unit_norms or self.output_norms) and self.attention_cap is None
        scales = (self.attention_scale, self.residual_scale) == (self.head_dim**-0.5, 1.0)
        return plain and scales and not any(self.rotary)

    @classmethod
    def from_pretrained(cls, config: Any, tied: bool | None = None) -> DecoderConfig:
        """Read a `transformers` text configuration. tied: whether the output matrix is the embedding, where the
        configuration does not say.

        Raises `UnknownArchitecture` for families, activations or rotary scalings this decoder does not have.
        """
        family = getattr(config, "model_type", None)
        family, dealt = MROPE.get(str(family), (family, None))
        if family not in FAMILIES:
            raise UnknownArchitecture(f"unknown decoder family {family!r}; known: {', '.join(FAMILIES)}")
        gemma = family in ("gemma2", "gemma3_text")
        activation = config.hidden_activation if gemma else config.hidden_act
        known = ("gelu_pytorch_tanh",) if gemma else ("silu", "swish")
        if activation not in known:
            raise UnknownArchitecture(f"unknown activation {activation!r}; known: {known[0]}")
        if getattr(config, "use_bidirectional_attention", None):
            raise UnknownArchitecture("attention in both directions makes an encoder; known: causal attention")
        _check_rotary(config)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        bias = bool(getattr(config, "attention_bias", False))
        own = _gemma(config, family) if gemma else {"attention_scale": head_dim**-0.5}
        if family == "granite":
            own = {
                "attention_scale": float(config.attention_multiplier),
                "logit_divisor": float(config.logits_scaling),
                "embedding_scale": float(config.embedding_multiplier),
                "residual_scale": float(config.residual_multiplier),
                "images_scaled": config.embedding_multiplier != 1,
            }
        return cls(
            family=family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            ffn_size=config.intermediate_size,
            context=config.max_position_embeddings,
            norm_eps=config.rms_norm_eps,
            tied=bool(getattr(config, "tie_word_embeddings", False)) if tied is None else tied,
            qkv_bias=bias or family == "qwen2",
            o_bias=bias and family in ("llama", "qwen3", "gemma2", "gemma3_text", "granite"),
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=family in ("qwen3", "gemma3_text"),
            windows=_windows(config, family),
            rotary=_rotary(config),
            rope_axes=_rope_axes(config, dealt, head_dim // 2) if dealt else None,
            rope=config,
            fused_maps=family == "phi3",
            **own,
        )


class DecoderLayer:
    """The weights of one block; queries, keys and values are one map.

    Gate and up stay apart on the CPU: as one map of 3072 x 576 in bf16 oneDNN takes 310 us for them on two cores, as
    two of 1536 x 576 it takes 2 x 110. fused: they are one map, `wide`, of which `gate` and `up` are views.
    """

    def __init__(self, config: DecoderConfig, device: torch.device, dtype: torch.dtype, fused: bool) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        def linear(rows: int, columns: int, bias: bool) -> Linear:
            return Linear(empty(rows, columns), empty(rows) if bias else None)

        hidden, dim = config.hidden_size, config.head_dim
        self.input_norm = empty(hidden)
        self.qkv = linear((config.heads + 2 * config.kv_heads) * dim, hidden, config.qkv_bias)
        self.q_norm = empty(dim) if config.qk_norm else None
        self.k_norm = empty(dim) if config.qk_norm else None
        self.o = linear(hidden, config.heads * dim, config.o_bias)
        self.post_norm = empty(hidden)
        self.attention_norm = empty(hidden) if config.output_norms else None  # of what attention adds
        self.ffn_norm = empty(hidden) if config.output_norms else None  # of what the MLP adds
        # as checkpoints hold them, until they are packed
        self.gate_up = empty(2 * config.ffn_size, hidden) if config.fused_maps else None
        self.wide: Linear | None = None
        if fused:
            both = self.gate_up if self.gate_up is not None else empty(2 * config.ffn_size, hidden)
            self.wide = Linear(both, empty(2 * config.ffn_size) if config.mlp_bias else None)
            self.gate, self.up = self.wide.halves()
        elif self.gate_up is not None:
            self.gate, self.up = (Linear(half) for half in self.gate_up.chunk(2))
        else:
            self.gate = linear(config.ffn_size, hidden, config.mlp_bias)
            self.up = linear(config.ffn_size, hidden, config.mlp_bias)
        self.down = linear(hidden, config.ffn_size, config.mlp_bias)

    def widen_norms(self) -> None:
        """From stored weights w to 1 + w in fp32."""
        self.input_norm, self.post_norm = self.input_norm.float() + 1, self.post_norm.float() + 1
        for name in ("q_norm", "k_norm", "attention_norm", "ffn_norm"):
            if (weight := getattr(self, name)) is not None:
                setattr(self, name, weight.float() + 1)

    def quantize(self, kind: Kind) -> None:
        """Its maps become ones of 8 bits. Raises `kernels.quantized.CannotQuantize`."""
        for linear in self.linears:
            linear.quantize(kind)
        if self.wide is not None:
            self.gate, self.up = self.wide.halves()

    @property
    def linears(self) -> tuple[Linear, ...]:
        if self.wide is not None:
            return (self.qkv, self.o, self.wide, self.down)
        return (self.qkv, self.o, self.gate, self.up, self.down)

    def packed(self, window: int | None) -> native.LayerWeights:
        """What the native kernels need of a layer whose maps are packed for them."""
        qkv, o, gate, up, down = (linear.matrix for linear in self.linears)
        assert qkv and o and gate and up and down
        norms = self.input_norm, self.post_norm, self.q_norm, self.k_norm
        return native.LayerWeights(qkv, o, gate, up, down, *norms, window)


class Decoder:
    """All weights of a decoder, empty until its `slots` are filled, and the steps of its forward pass.

    depth: how many layers exist (a detector needs only those below its head). with_head: whether there is an
    output matrix over the vocabulary. dtype: fp32 or bf16 (fp16 works where the device multiplies it). weights: what
    the maps of the layers become when they are frozen, None for what they are. The output matrix stays: its rows
    decide between tokens a rounding error apart, and where it is the embedding, that would be kept beside it.
    """

    def __init__(
        self,
        config: DecoderConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        depth: int | None = None,
        with_head: bool = True,
        weights: Kind | None = None,
    ) -> None:
        if weights is not None:
            check_sizes(config)
        self.config = config
        self.device = device
        self.dtype = dtype
        self.weights = weights
        self.depth = config.layers if depth is None else depth
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        kernels = backend.fused(device)
        self.layers = [DecoderLayer(config, device, dtype, kernels is not None) for _ in range(self.depth)]
        full = self.depth == config.layers
        self.norm = torch.empty(config.hidden_size, device=device, dtype=dtype) if full else None
        self.head: Linear | None = None
        if with_head and full:
            weight = self.embedding if config.tied else torch.empty_like(self.embedding)
            self.head = Linear(weight)
        self.native: native.NativeLayers | None = None
        self.kv_scales: Tensor | None = None
        self.fused: FusedLayers | None = None
        if kernels is not None:
            self.fused = FusedLayers(config, self.layers, Operations.of(kernels))
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))  # rounded as in training
        self._rotary = _rotary_tables(config, device)
        self._rope_axes = torch.tensor(config.rope_axes or (), dtype=torch.long, device=device)

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its checkpoint name, as a view to copy into; valid until `freeze`."""
        yield "model.embed_tokens.weight", self.embedding
        sizes = [n * self.config.head_dim for n in (self.config.heads, self.config.kv_heads, self.config.kv_heads)]
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            yield prefix + "input_layernorm.weight", layer.input_norm
            if layer.attention_norm is None or layer.ffn_norm is None:
                yield prefix + "post_attention_layernorm.weight", layer.post_norm
            else:
                yield prefix + "post_attention_layernorm.weight", layer.attention_norm
                yield prefix + "pre_feedforward_layernorm.weight", layer.post_norm
                yield prefix + "post_feedforward_layernorm.weight", layer.ffn_norm
            if layer.gate_up is not None:
                yield prefix + "self_attn.qkv_proj.weight", layer.qkv.weight
                yield prefix + "mlp.gate_up_proj.weight", layer.gate_up
            else:
                yield from _split(layer.qkv, prefix + "self_attn.", ("q_proj", "k_proj", "v_proj"), sizes)
                yield from _split(layer.gate, prefix + "mlp.", ("gate_proj",), [self.config.ffn_size])
                yield from _split(layer.up, prefix + "mlp.", ("up_proj",), [self.config.ffn_size])
            yield from _split(layer.o, prefix + "self_attn.", ("o_proj",), [self.config.hidden_size])
            yield from _split(layer.down, prefix + "mlp.", ("down_proj",), [self.config.hidden_size])
            if layer.q_norm is not None and layer.k_norm is not None:
                yield prefix + "self_attn.q_norm.weight", layer.q_norm
                yield prefix + "self_attn.k_norm.weight", layer.k_norm
        if self.norm is not None:
            yield "model.norm.weight", self.norm
        if self.head is not None and not self.config.tied:
            yield "lm_head.weight", self.head.weight

    def freeze(self) -> None:
        """Call once, when the slots are filled: packs the weights, one matrix at a time, into huge pages.

        Where the native kernels work and layers are not fused, `native` runs whole layers from then on; `block` goes
        on working.
        """
        if self.config.unit_norms:
            for layer in self.layers:
                layer.widen_norms()
            self.norm = None if self.norm is None else self.norm.float() + 1
        for layer in self.layers:
            layer.gate_up = None
            if self.weights is not None:
                layer.quantize(self.weights)
        linears = [linear for layer in self.layers for linear in layer.linears]
        linears += [] if self.head is None else [self.head]
        fits = self.fused is None and self.dtype is torch.bfloat16
        fits = fits and all(native.can_pack(linear.weight) for linear in linears)
        library = native.load(default_cache()) if fits else None
        if not isinstance(library, native.Native):
            for linear in linears:
                linear.pack()
            collapse(linear.weight for linear in linears)
            return
        sizes = [native.packed_elements(*linear.weight.shape) * linear.weight.itemsize for linear in linears]
        arena = torch.empty(sum(sizes), device=self.device, dtype=torch.uint8)
        prefer(arena)
        for linear, part in zip(linears, arena.split(sizes), strict=True):
            linear.pack(library, part.view(linear.weight.dtype))
        config = self.config
        fits = config.head_dim % native.INPUTS == 0 and config.head_dim <= native.MAX_HEAD_DIM
        if fits and config.like_llama and self.layers:
            weights = [layer.packed(window) for layer, window in zip(self.layers, config.windows, strict=False)]
            self.native = native.NativeLayers(
                library, weights, config.heads, config.kv_heads, config.head_dim, config.norm_eps
            )

    def narrow_pages(self, scales: Tensor) -> None:
        """From now on its keys and values are fp8 in pages. scales: [layers, 2 * kv_heads] fp32. Native layers, which
        know bf16 pages only, run no longer; their maps do."""
        self.kv_scales, self.native = scales, None
        if self.fused is not None:
            self.fused.kv_scales = scales

    @property
    def way_of_running(self) -> str:
        """All that keys and values depend on beside the weights: rotary scaling, windows, scales of their pages …"""
        rotary = sorted(rope_parameters(self.config.rope).items())
        # measured over what its tokenizer makes of a text, so that equal weights may have others
        scales = None if self.kv_scales is None else self.kv_scales.tolist()
        return f"{replace(self.config, rope=None)} {rotary} {self.weights} {scales}"

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [n] -> [n, hidden]."""
        x = self.embedding[tokens]
        return x if self._embedding_scale == 1.0 else x.mul_(self._embedding_scale)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [n], or [3, n] for an M-RoPE with rows of images -> (cos, sin) [n, tables, head_dim], one of each
        for every rotary table."""
        if positions.dim() == 2:
            positions = positions[self._rope_axes].t()  # [n, head_dim / 2]
        tables = [rope_angles(positions, table, scaling, self.dtype) for table, scaling in self._rotary]
        if len(tables) == 1:
            return tables[0]
        cos, sin = zip(*tables, strict=True)
        return torch.cat(cos, 1), torch.cat(sin, 1)

    def block(
        self,
        index: int,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        attend: ATTEND,
        adapters: ActiveAdapters | None = None,
    ) -> Tensor:
        """Run one layer over x [n, hidden], in place. `attend` stores the new keys and values and attends.

        adapters: the rows with an adapter; it knows the layer's maps as "qkv", "o", "gate", "up" and "down".
        """
        layer, config = self.layers[index], self.config
        heads, kv_heads = config.heads, config.kv_heads
        h = rms_norm(x, layer.input_norm, config.norm_eps)
        qkv = layer.qkv(h)
        if adapters is not None:
            adapters.add_(index, "qkv", qkv, h)
        qkv = qkv.view(-1, heads + 2 * kv_heads, config.head_dim)
        rotated = qkv[:, : heads + kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            rotated[:, :heads] = rms_norm(rotated[:, :heads], layer.q_norm, config.norm_eps)
            rotated[:, heads:] = rms_norm(rotated[:, heads:], layer.k_norm, config.norm_eps)
        cos, sin = angles
        if cos.shape[1] > 1:
            cos, sin = (side[:, config.rotary[index]].unsqueeze(1) for side in angles)
        rope_(rotated, cos, sin)
        attended = attend(index, qkv)
        o = layer.o(attended)
        if adapters is not None:
            adapters.add_(index, "o", o, attended)
        if layer.attention_norm is not None:
            o = rms_norm(o, layer.attention_norm, config.norm_eps)
        x.add_(o, alpha=config.residual_scale)
        h = rms_norm(x, layer.post_norm, config.norm_eps)
        gate, up = layer.gate(h), layer.up(h)
        if adapters is not None:
            adapters.add_(index, "gate", gate, h)
            adapters.add_(index, "up", up, h)
        wide = geglu(gate, up) if config.gelu else swiglu(gate, up)
        down = layer.down(wide)
        if adapters is not None:
            adapters.add_(index, "down", down, wide)
        if layer.ffn_norm is not None:
            down = rms_norm(down, layer.ffn_norm, config.norm_eps)
        x.add_(down, alpha=config.residual_scale)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """x [n, hidden], the output of the last layer -> [n, vocab] in the model's dtype."""
        assert self.head is not None and self.norm is not None, "this decoder has no output matrix"
        config = self.config
        if self.fused is not None:
            logits = self.head(self.fused.operations.add_rms_norm(x, None, self.norm, config.norm_eps))
        else:
            logits = self.head.after_norm(x, self.norm, config.norm_eps)
        if config.logit_divisor != 1.0:
            logits = logits / config.logit_divisor
        if config.logit_cap is not None:
            logits = torch.tanh(logits / config.logit_cap) * config.logit_cap
        return logits


def rope_parameters(config: Any) -> dict[str, Any]:
    """As `transformers` has them: of all layers, or by the kind of layer where these differ."""
    return getattr(config, "rope_parameters", None) or {}


def _by_kind(config: Any) -> Mapping[str | None, dict[str, Any]]:
    """Rotary parameters by the kind of layer; under None where they are those of all layers."""
    parameters = rope_parameters(config)
    if "full_attention" not in parameters:
        return {None: parameters}
    return {kind: parameters[kind] for kind in sorted(set(config.layer_types))}


def _check_rotary(config: Any) -> None:
    for parameters in _by_kind(config).values():
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise UnknownArchitecture(
                f"rotary scaling {rope_type!r} depends on the length of the text, so its keys cannot be shared; "
                f"known: {', '.join(ROPE_TYPES)}"
            )
        if (part := parameters.get("partial_rotary_factor", 1.0)) != 1.0:
            raise UnknownArchitecture(f"rotary embedding on {part} of each head; known: on whole heads")


def _rotary(config: Any) -> tuple[int, ...]:
    kinds = list(_by_kind(config))
    if kinds == [None]:
        return (0,) * config.num_hidden_layers
    return tuple(kinds.index(kind) for kind in config.layer_types)


def _rotary_tables(config: DecoderConfig, device: torch.device) -> list[tuple[Tensor, float]]:
    """For each table its inverse frequencies, fp32 [head_dim / 2], and the factor on cos and sin, as `transformers`
    computes them for this scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tables = []
    for kind, parameters in _by_kind(config.rope).items():
        rope_type = parameters.get("rope_type", "default")
        if rope_type == "default":
            exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
            tables.append((1.0 / parameters["rope_theta"] ** exponents, 1.0))
        else:
            layers = {} if kind is None else {"layer_type": kind}
            tables.append(ROPE_INIT_FUNCTIONS[rope_type](config.rope, device, **layers))
    return tables


def _gemma(config: Any, family: str) -> dict[str, Any]:
    """What sets Gemma 2 (arXiv 2408.00118) and Gemma 3 (arXiv 2503.19786) apart from Llama."""
    return {
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        # Gemma 3 has norms of queries and keys in its place; `transformers` does not read it there either
        "attention_cap": config.attn_logit_softcapping if family == "gemma2" else None,
        "logit_cap": config.final_logit_softcapping,
        "embedding_scale": config.hidden_size**0.5,
        "gelu": True,
        "unit_norms": True,
        "output_norms": True,
    }


def _windows(config: Any, family: str) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if family in ("qwen2", "qwen3") and not getattr(config, "use_sliding_window", False):
        window = None
    if family in ("llama", "granite"):
        window = None
    types = getattr(config, "layer_types", None) if family not in ("mistral", "phi3") else None
    if window is not None and types:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    return (window,) * config.num_hidden_layers


def _rope_axes(config: Any, dealt: str, frequencies: int) -> tuple[int, ...]:
    """The axis that each rotary frequency turns with (M-RoPE, Wang et al. 2024; in turn: Qwen3-VL)."""
    sections = rope_parameters(config).get("mrope_section") or ()
    if len(sections) != 3 or sum(sections) != frequencies:
        raise UnknownArchitecture(
            f"mrope_section {list(sections)} has to deal {frequencies} rotary frequencies to time, height and width"
        )
    if dealt == "blocks":
        return tuple(axis for axis, count in enumerate(sections) for _ in range(count))
    return tuple(at % 3 if at < 3 * sections[at % 3] else 0 for at in range(frequencies))


def _split(linear: Linear, prefix: str, names: tuple[str, ...], sizes: list[int]) -> Iterator[tuple[str, Tensor]]:
    parts = linear.weight.split(sizes)
    biases = linear.bias.split(sizes) if linear.bias is not None else [None] * len(sizes)
    for name, weight, bias in zip(names, parts, biases, strict=True):
        yield f"{prefix}{name}.weight", weight
        if bias is not None:
            yield f"{prefix}{name}.bias", bias
