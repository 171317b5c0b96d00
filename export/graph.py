"""The detector's graph: embedding, the layers below the head, pooling, norm, head and sigmoid, as ONNX nodes.

It knows shapes and names; the weights are described as external data and come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ..engine.models.decoder import DecoderConfig
from ..engine.models.heads import HeadSpec
from .precision import BLOCK, FLOATS, LEVELS, Part, Precision, embedding_parts, matrix_parts

CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
OPSETS = (23, 24)  # from RMSNormalization on, up to what ONNX Runtime 1.24 and later run
HEAD_ALIGNMENT = 16  # GroupQueryAttention rotates heads whose size is a multiple of it
IR_VERSION = 11
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
}


@dataclass(frozen=True)
class GraphSpec:
    """What is built. head_bias, norm_eps: of the head. with_past: past keys and values, running sum and count are
    inputs and outputs. computes: the type of activations; None is fp32, whatever the weights are."""

    config: DecoderConfig
    head: HeadSpec
    head_bias: bool
    norm_eps: float
    precision: Precision
    with_past: bool
    opset: int
    computes: torch.dtype | None = None

    @property
    def head_dim(self) -> int:
        """Of a head's queries, keys and values in the graph, zeros included."""
        return -(-self.config.head_dim // HEAD_ALIGNMENT) * HEAD_ALIGNMENT

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        config = self.config
        return config.heads * self.head_dim, config.kv_heads * self.head_dim, config.kv_heads * self.head_dim


@dataclass(frozen=True)
class External:
    """A tensor that lies in the data file. kind: what its contents are made of."""

    name: str
    kind: Literal["matrix", "embedding", "vector", "rotary"]
    part: Part


def external_tensors(spec: GraphSpec) -> list[External]:
    """All weights, in the order in which they lie in the data file; the same for any `computes`."""
    config, hidden = spec.config, spec.config.hidden_size
    found: list[External] = []

    def add(kind: Literal["matrix", "embedding", "vector", "rotary"], name: str, parts: list[Part]) -> None:
        found.extend(External(name + part.suffix, kind, part) for part in parts)

    vectors = FLOATS.get(spec.precision, torch.float32)

    def vector(name: str, size: int, dtype: torch.dtype = vectors) -> None:
        add("vector", name, [Part("", dtype, (size,))])

    add("embedding", "embedding", embedding_parts(spec.precision, config.vocab_size, hidden))
    for dtype in dict.fromkeys((torch.float32, vectors)):
        for name in ("cos", "sin"):
            table = Part("", dtype, (config.context, spec.head_dim // 2))
            add("rotary", f"{name}.{str(dtype).removeprefix('torch.')}", [table])
    for layer in range(spec.head.layer):
        prefix = f"layers.{layer}."
        vector(prefix + "input_norm", hidden)
        vector(prefix + "post_norm", hidden)
        if config.qk_norm:
            vector(prefix + "q_norm", spec.head_dim)
            vector(prefix + "k_norm", spec.head_dim)
        for name, outputs, inputs, bias in _maps(spec):
            add("matrix", prefix + name, matrix_parts(spec.precision, outputs, inputs))
            if bias:
                vector(f"{prefix}{name}.bias", outputs)
    vector("head.weight", hidden, torch.float32)
    if spec.head_bias:
        vector("head.bias", 1, torch.float32)
    if spec.head.norm:
        vector("head.norm", hidden, torch.float32)
    return found


def build_graph(spec: GraphSpec, location: str, offsets: dict[str, int]) -> onnx.ModelProto:
    """The model, its weights at `offsets` (bytes, by name) in the file `location` beside it.

    Inputs: input_ids, attention_mask [batch, length] int64 (a 0 anywhere: no token); for a mean head pool_mask, which
    without past may be left out: then all tokens are pooled. With past also past_length [batch] int64 and, a layer,
    past_key_values.{i}.key and .value [batch, kv_heads, capacity, head_dim], and for a mean head pooled_sum
    [batch, hidden] and pooled_count [batch]. capacity may be more than is filled; where it is at least past_length +
    length, keys and values may be written in place. Where past_length + length is more than `context`, or where
    texts of a batch have a past and more than one new token, the graph fails.
    Outputs: logit, score [batch] fp32, NaN where nothing is pooled; with past also present.{i}.key and .value,
    and for a mean head present_sum and present_count.
    """
    return _Builder(spec, location, offsets).build()


def _maps(spec: GraphSpec) -> Iterator[tuple[str, int, int, bool]]:
    """(name, outputs, inputs, whether it has a bias) of the linear maps of a layer."""
    config, hidden = spec.config, spec.config.hidden_size
    yield "qkv", sum(spec.qkv_sizes), hidden, config.qkv_bias
    yield "o", hidden, spec.qkv_sizes[0], config.o_bias
    yield "gate", config.ffn_size, hidden, config.mlp_bias
    yield "up", config.ffn_size, hidden, config.mlp_bias
    yield "down", hidden, config.ffn_size, config.mlp_bias


class _Builder:
    """Nodes in order, and what they need. A method that adds nodes returns the name of their result."""

    def __init__(self, spec: GraphSpec, location: str, offsets: dict[str, int]) -> None:
        self.spec = spec
        self.config = spec.config
        self.type = spec.computes or torch.float32
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.weights: dict[str, onnx.TensorProto] = {}
        self.tensors = {tensor.name: tensor for tensor in external_tensors(spec)}
        self.location, self.offsets = location, offsets
        self.biases = {name for name, _, _, bias in _maps(spec) if bias}
        self.names = 0

    def build(self) -> onnx.ModelProto:
        spec = self.spec
        ids, pooled = self.compact()
        lengths = self.attention_lengths(ids)
        x = self.embed(ids)
        skip: str | None = None
        for layer in range(spec.head.layer):
            x, skip = self.layer(layer, x, skip, lengths)
        assert skip is not None
        hidden = self.to_fp32(self.op("Add", x, skip))
        row = self.pool_mean(hidden, pooled) if spec.head.pooling == "mean" else self.pool_last(hidden)
        self.head(row)
        graph = helper.make_graph(
            self.nodes, "detector", self.inputs(), self.outputs(), [*self.constants.values(), *self.weights.values()]
        )
        opsets = [helper.make_opsetid("", spec.opset), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="stockade")

    # Inputs and outputs.

    def inputs(self) -> list[onnx.ValueInfoProto]:
        text: list[Any] = ["batch", "length"]
        found = [self.value(name, TensorProto.INT64, text) for name in ("input_ids", "attention_mask")]
        mean = self.spec.head.pooling == "mean"
        if mean:
            found.append(self.value("pool_mask", TensorProto.INT64, ["pool_batch", "pool_length"]))
        if not self.spec.with_past:
            return found
        found.append(self.value("past_length", TensorProto.INT64, ["batch"]))
        found += self.keys_and_values("past_key_values", "capacity")
        if mean:
            found.append(self.value("pooled_sum", TensorProto.FLOAT, ["batch", self.config.hidden_size]))
            found.append(self.value("pooled_count", TensorProto.FLOAT, ["batch"]))
        return found

    def outputs(self) -> list[onnx.ValueInfoProto]:
        found = [self.value(name, TensorProto.FLOAT, ["batch"]) for name in ("logit", "score")]
        if not self.spec.with_past:
            return found
        found += self.keys_and_values("present", "present_capacity")
        if self.spec.head.pooling == "mean":
            found.append(self.value("present_sum", TensorProto.FLOAT, ["batch", self.config.hidden_size]))
            found.append(self.value("present_count", TensorProto.FLOAT, ["batch"]))
        return found

    def keys_and_values(self, name: str, capacity: str) -> list[onnx.ValueInfoProto]:
        shape: list[Any] = ["batch", self.config.kv_heads, capacity, self.spec.head_dim]
        return [
            self.value(f"{name}.{layer}.{which}", ONNX_TYPES[self.type], shape)
            for layer in range(self.spec.head.layer)
            for which in ("key", "value")
        ]

    def value(self, name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    # The parts of the detector.

    def compact(self) -> tuple[str, str]:
        """Real tokens to the front of their rows, in order: causal attention then never sees a padding token.

        Returns (ids, what each token counts in the mean), both [batch, length]; row ends are filled with zeros.
        """
        mask = self.op("Cast", self.op("Cast", "attention_mask", to=TensorProto.BOOL), to=TensorProto.INT64)
        length = self.op("Shape", "attention_mask", start=1, end=2)
        place = self.op("Sub", self.op("CumSum", mask, self.ints(1)), self.ints(1))
        place = self.op("Where", self.op("Cast", mask, to=TensorProto.BOOL), place, length)
        wide = self.op("Add", self.op("Shape", "attention_mask"), self.ints([0, 1]))

        def move(values: str, kind: int) -> str:
            zero = helper.make_tensor("value", kind, [1], [0])
            moved = self.op("ScatterElements", self.op("ConstantOfShape", wide, value=zero), place, values, axis=1)
            return self.op("Slice", moved, self.ints([0]), length, self.ints([1]))

        self.count = self.op("ReduceSum", mask, self.ints([1]), keepdims=0)
        ids = move("input_ids", TensorProto.INT64)
        if self.spec.head.pooling == "last":
            return ids, ""
        if not self.spec.with_past:  # bound inputs (`IOBinding`) cannot replace a default
            self.constant("pool_mask", np.ones((1, 1), np.int64))
        pooled = self.op("Mul", mask, self.op("Cast", "pool_mask", to=TensorProto.BOOL, then=TensorProto.INT64))
        return ids, move(self.op("Cast", pooled, to=TensorProto.FLOAT), TensorProto.FLOAT)

    def attention_lengths(self, ids: str) -> tuple[str, str]:
        """What GroupQueryAttention wants to know: each row's last position [batch], and the number of positions.

        Padding counts as tokens at the end of their rows: what they write there is never read.
        """
        length = self.op("Shape", ids, start=1, end=2)
        if self.spec.with_past:
            total = self.op("Add", "past_length", length)
            longest = self.op("Add", self.op("ReduceMax", "past_length", keepdims=0), self.op("Squeeze", length))
        else:
            total = self.op("Expand", length, self.op("Shape", ids, start=0, end=1))
            longest = self.op("Squeeze", length)
        last = self.op("Sub", total, self.ints(1))
        return self.op("Cast", last, to=TensorProto.INT32), self.op("Cast", longest, to=TensorProto.INT32)

    def embed(self, ids: str) -> str:
        """[batch, length] -> [batch, length, hidden]."""
        rows = self.op("Gather", self.stored("embedding"), ids)
        if "embedding.scale" in self.tensors:
            scale = self.op("Gather", self.stored("embedding.scale"), ids)
            return self.op("Mul", self.op("Cast", rows, to=TensorProto.FLOAT), scale)
        return self.cast(rows, FLOATS[self.spec.precision])

    def layer(self, layer: int, x: str, skip: str | None, lengths: tuple[str, str]) -> tuple[str, str]:
        """x, skip: what the layer before left to be added up. Returns the same."""
        prefix = f"layers.{layer}."
        if skip is None:
            h, residual = self.norm(x, prefix + "input_norm", self.config.norm_eps), x
        else:
            h, residual = self.add_and_norm(x, skip, prefix + "input_norm")
        qkv = self.linears(h, [prefix + "qkv"])[0]
        if self.config.qk_norm:
            qkv = self.norm_heads(qkv, prefix)
        attended = self.attend(layer, qkv, lengths)
        o = self.linears(attended, [prefix + "o"])[0]
        h, residual = self.add_and_norm(o, residual, prefix + "post_norm")
        gate, up = self.linears(h, [prefix + "gate", prefix + "up"])
        wide = self.op("Mul", self.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)  # alpha 1: SiLU
        return self.linears(wide, [prefix + "down"])[0], residual

    def attend(self, layer: int, qkv: str, lengths: tuple[str, str]) -> str:
        config, spec = self.config, self.spec
        past = [f"past_key_values.{layer}.{which}" if spec.with_past else "" for which in ("key", "value")]
        present = (f"present.{layer}.key", f"present.{layer}.value")
        attended = self.name()
        table = str(self.type).removeprefix("torch.")
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [qkv, "", "", *past, *lengths, self.stored(f"cos.{table}"), self.stored(f"sin.{table}")],
                [attended, *present],
                domain=CONTRIB,
                num_heads=config.heads,
                kv_num_heads=config.kv_heads,
                scale=config.head_dim**-0.5,
                do_rotary=1,
                rotary_interleaved=0,
                local_window_size=config.windows[layer] or -1,
            )
        )
        return attended

    def norm_heads(self, qkv: str, prefix: str) -> str:
        """Queries and keys normed a head (qwen3). Heads are padded with zeros: the mean of squares is over all of
        them, so the weight, where it is stored, and the epsilon make up for it."""
        config, spec = self.config, self.spec
        queries, keys, _ = spec.qkv_sizes
        eps = config.norm_eps * config.head_dim / spec.head_dim
        q, k, v = self.op("Split", qkv, self.ints(list(spec.qkv_sizes)), axis=2, outputs=3)
        parts = []
        for part, width, name in ((q, queries, "q_norm"), (k, keys, "k_norm")):
            heads = self.op("Reshape", part, self.ints([0, 0, width // spec.head_dim, spec.head_dim]))
            parts.append(self.op("Reshape", self.norm(heads, prefix + name, eps), self.ints([0, 0, width])))
        return self.op("Concat", *parts, v, axis=2)

    def pool_mean(self, hidden: str, pooled: str) -> str:
        """The mean of the pooled rows, those of the past included: [batch, hidden]."""
        row = self.op("Unsqueeze", pooled, self.ints([1]))
        total = self.op("Squeeze", self.op("MatMul", row, hidden), self.ints([1]))
        count = self.op("ReduceSum", pooled, self.ints([1]), keepdims=0)
        if self.spec.with_past:
            total = self.op("Add", total, "pooled_sum", output="present_sum")
            count = self.op("Add", count, "pooled_count", output="present_count")
        return self.op("Div", total, self.op("Unsqueeze", count, self.ints([1])))

    def pool_last(self, hidden: str) -> str:
        """The last token's row: [batch, hidden]; NaN for a text without tokens."""
        last = self.op("Max", self.op("Sub", self.count, self.ints(1)), self.ints(0))
        row = self.op("GatherND", hidden, self.op("Unsqueeze", last, self.ints([1])), batch_dims=1)
        some = self.op("Cast", self.op("Greater", self.count, self.ints(0)), to=TensorProto.BOOL)
        return self.op("Where", self.op("Unsqueeze", some, self.ints([1])), row, self.floats(float("nan")))

    def head(self, row: str) -> None:
        """[batch, hidden] in fp32 -> the outputs logit and score."""
        if self.spec.head.norm:
            row = self.op("RMSNormalization", row, self.stored("head.norm"), epsilon=self.spec.norm_eps)
        product = self.op("Mul", row, self.stored("head.weight"))
        if self.spec.head_bias:
            product = self.op("ReduceSum", product, self.ints([1]), keepdims=0)
            self.op("Add", product, self.stored("head.bias"), output="logit")
        else:
            self.op("ReduceSum", product, self.ints([1]), keepdims=0, output="logit")
        self.op("Sigmoid", "logit", output="score")

    def norm(self, x: str, weight: str, eps: float) -> str:
        return self.op("RMSNormalization", x, self.weight(weight), epsilon=eps)

    def add_and_norm(self, x: str, skip: str, weight: str) -> tuple[str, str]:
        """(the norm of the sum, the sum)."""
        normed, total = self.name(), self.name()
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [x, skip, self.weight(weight)],
                [normed, "", "", total],
                domain=CONTRIB,
                epsilon=self.config.norm_eps,
            )
        )
        return normed, total

    def linears(self, x: str, names: list[str]) -> list[str]:
        """Linear maps of the same rows."""
        match self.spec.precision:
            case "int8":
                found = self.int8(x, names)
            case "int4":
                found = [self.int4(x, name) for name in names]
            case _:
                found = [self.op("MatMul", x, self.weight(name)) for name in names]
        return [
            self.op("Add", y, self.weight(f"{name}.bias")) if name.rpartition(".")[2] in self.biases else y
            for name, y in zip(names, found, strict=True)
        ]

    def int8(self, x: str, names: list[str]) -> list[str]:
        """Each row is quantized by its own largest number: no text changes the score of another in its batch."""
        largest = self.op("ReduceMax", self.op("Abs", x), self.ints([-1]), keepdims=1)
        largest = self.op("Max", largest, self.floats(1e-20))
        levels = self.op("Mul", x, self.op("Div", self.floats(float(LEVELS)), largest))
        middle = self.constant("middle", np.uint8(128))
        rows = self.op("QuantizeLinear", levels, self.floats(1.0), middle)
        return [
            self.op(
                "Mul",
                self.op(
                    "MatMulIntegerToFloat",
                    *(rows, self.stored(name), self.floats(1.0), self.stored(f"{name}.scale"), middle),
                    domain=CONTRIB,
                ),
                largest,
            )
            for name in names
        ]

    def int4(self, x: str, name: str) -> str:
        outputs, blocks, _ = self.tensors[name].part.shape
        inputs = next(inputs for short, _, inputs, _ in _maps(self.spec) if short == name.rpartition(".")[2])
        assert blocks == -(-inputs // BLOCK)
        return self.op(
            "MatMulNBits",
            *(x, self.stored(name), self.stored(f"{name}.scale")),
            domain=CONTRIB,
            K=inputs,
            N=outputs,
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,  # inputs as int8, block by block
        )

    # Names and values.

    def op(self, kind: str, *inputs: str, domain: str = "", output: str | None = None, **attributes: Any) -> Any:
        """Add a node; returns the name of its output, or of several where `outputs` says how many there are.

        then: a type that a further Cast leads to.
        """
        count, then = attributes.pop("outputs", 1), attributes.pop("then", None)
        names = [output or self.name() for _ in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        if then is not None:
            return self.op("Cast", names[0], to=then)
        return names if count > 1 else names[0]

    def name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    def constant(self, name: str, value: Any) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(value), name))
        return name

    def ints(self, value: int | list[int]) -> str:
        return self.constant(f"int {value}", np.asarray(value, np.int64))

    def floats(self, value: float) -> str:
        return self.constant(f"float {value}", np.float32(value))

    def stored(self, name: str) -> str:
        """A tensor of the data file, as it is stored."""
        if name not in self.weights:
            part = self.tensors[name].part
            proto = onnx.TensorProto(name=name, data_type=ONNX_TYPES[part.dtype], dims=part.shape)
            proto.data_location = TensorProto.EXTERNAL
            size = part.dtype.itemsize * int(np.prod(part.shape))
            for key, value in (("location", self.location), ("offset", self.offsets[name]), ("length", size)):
                proto.external_data.add(key=key, value=str(value))
            self.weights[name] = proto
        return name

    def weight(self, name: str) -> str:
        """A tensor of the data file in the type that is computed with."""
        return self.cast(self.stored(name), self.tensors[name].part.dtype)

    def cast(self, x: str, dtype: torch.dtype) -> str:
        return x if dtype == self.type else self.op("Cast", x, to=ONNX_TYPES[self.type])

    def to_fp32(self, x: str) -> str:
        return x if self.type == torch.float32 else self.op("Cast", x, to=TensorProto.FLOAT)
