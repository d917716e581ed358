"""Decode one token for each of several sequences, from a model's weights and not through its modules.

This is a second transformer, and that is its cost: a change of the architecture has to be made here a second time, or
generation no longer equals the model's own forward. An option of a layer is written under "reading a model":
`LeanDecoder._read` names the modules of a layer, and `_Reader` says which function each module becomes. The constructor
reads the embeddings with their multiplier and the kinds of RoPE that it knows, and `_block` orders norm and block by
`norm_position`.
`tests/modeling_mot/test_lean_decoding.py` compares the two transformers.

It pays in speed. The model's own forward is made for rows of any length, and for one token spends most of its time
outside of products. `LeanDecoder` takes 0.61 to 0.67 of the time of transformers' Llama on a CPU.

A module that is more than its weights (hooks, adapters, quantised weights, a forward of its own) is called as it is. If
the layers or the model are more than that, `LeanDecoder.of` gives None, and `ForwardDecoder` runs the model's forward.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm, GemmaTextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.nemotron.modeling_nemotron import NemotronMLP

from .attention_masks import RANGES
from .tower_routing import (
    MoTHeadLayerNorm,
    autocast_dtype,
    is_of_this_package,
    is_plain,
    is_plain_linear,
    keeps_methods,
)


# R sequences, n <= R of them in a step, C columns, L tokens of a sequence, D hidden size, H query heads, K key heads,
# d head size, V vocabulary

COLUMNS = 256  # a cache grows by at least so many columns
FEW, LARGE = 4, 2**19  # rows and weights from which oneDNN's product is the faster one in float32
# Packing a weight into oneDNN's order costs as much as 8 products, and halves the time of each later product.
PACK_AFTER = 8
PACKED_BYTES = 2**30  # the most memory for packed copies of weights, beside the model's own weights
HAS_MKLDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
ATTENTION = ("sdpa", RANGES)  # with a cache, both are `scaled_dot_product_attention`
STEP_METHODS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")  # asked at each step
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the length of a sequence


# ----------------------------------------------------------------------------------------------------------- the cache


class Prefix(NamedTuple):
    """The keys and values of one sequence, as views of a cache.

    Attributes:
        keys, values: of each layer, (K, L, d).
        position: the position of the next token.
        hidden: (L,) bool, the columns of images where text does not see them (`config.unseen_towers`); None where it
            sees all columns.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    position: int
    hidden: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]


class DecodingCache:
    """Keys and values of R sequences that grow token by token, each in a row with room behind it.

    Args:
        keys, values: of each layer, (R, K, L, d).
        mask: (R, L) 1 for tokens, 0 for padding, and for images that text does not see; None for no such columns.
        dtype: to keep them in; default: their own.

    Attributes:
        keys, values: of each layer, (R, K, C, d).
        capacity: C, the columns that there is room for.
        lengths: filled columns of each sequence, from the left.
        mask: (R, 1, 1, C) a summand of attention scores: 0 for tokens, minus infinity elsewhere. None while all
            sequences are of one length, without padding.
    """

    def __init__(
        self,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        mask: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.keys = [tensor.to(dtype or tensor.dtype) for tensor in keys]
        self.values = [tensor.to(dtype or tensor.dtype) for tensor in values]
        count, _, self.capacity, _ = keys[0].shape
        self.lengths = [self.capacity] * count
        self.mask: torch.Tensor | None = None
        if mask is not None and not mask.all():
            self.mask = self._hidden(count, self.capacity).masked_fill_(mask[:, None, None] != 0, 0)

    @classmethod
    def of(cls, cache: DynamicCache, mask: torch.Tensor | None, dtype: torch.dtype | None) -> "DecodingCache":
        """Copy the cache that a forward over prompts filled; `mask` and `dtype` as above."""
        return cls([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], mask, dtype)

    @classmethod
    def empty(cls, config, count: int, dtype: torch.dtype, device) -> "DecodingCache":
        """Make room for so many sequences without tokens."""

        def room(width):
            shape = (count, config.num_key_value_heads, 0, width)
            return [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

        readers = len(config.tower_names) if config.cross_key_norm else 1  # each tower reads keys of its own
        cache = cls(room(config.head_dim * readers), room(config.head_dim))
        cache.mask = cache._hidden(count, 0)
        return cache

    def _hidden(self, count: int, columns: int) -> torch.Tensor:
        return self.keys[0].new_full((count, 1, 1, columns), -float("inf"))

    def write_back(self, cache: DynamicCache) -> None:
        """Copy sequences of one length into a cache, as the model's own forward would have left it."""
        stop = self.lengths[0]
        for layer, keys, values in zip(cache.layers, self.keys, self.values):
            dtype = layer.keys.dtype
            layer.keys = keys[:, :, :stop].to(dtype, copy=True)
            layer.values = values[:, :, :stop].to(dtype, copy=True)

    def reserve(self, columns: int) -> None:
        """Make room for so many columns."""
        if columns <= self.capacity:
            return
        more = max(columns - self.capacity, COLUMNS, self.capacity // 2)
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):  # one at a time, so that the old one is freed
                wider = tensor.new_zeros(*tensor.shape[:2], self.capacity + more, tensor.shape[3])
                # The old one is wider already if memory ran out midway and this is the next try.
                wider[:, :, : self.capacity] = tensor[:, :, : self.capacity]
                tensors[layer] = wider
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, more), value=-float("inf"))
        self.capacity += more

    def open(self, count: int) -> "Columns":
        """Take the next column of the first `count` sequences, for one step."""
        lengths = self.lengths[:count]
        self.reserve(max(lengths) + 1)
        self.lengths[:count] = [length + 1 for length in lengths]
        return Columns(self, lengths)

    # ------------------------------------------------------------------------------------------------------ whole rows

    def prefix(self, row: int, position: int, drop_last: int = 0) -> Prefix:
        """Return one sequence without its padding on the left, and without its last columns.

        Args:
            position: the position of its next token, before columns are dropped.
        """
        first, stop = 0, self.lengths[row] - drop_last
        if self.mask is not None:
            is_token = self.mask[row, 0, 0, :stop] == 0
            first = int(is_token.long().argmax()) if is_token.any() else stop  # nothing but padding may be left
        keys = [tensor[row, :, first:stop] for tensor in self.keys]
        values = [tensor[row, :, first:stop] for tensor in self.values]
        hidden = None if self.mask is None else self.mask[row, 0, 0, first:stop] != 0
        return Prefix(keys, values, position - drop_last, hidden)

    def extend(
        self,
        row: int,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        hidden: torch.Tensor | None = None,
    ) -> None:
        """Append columns to one sequence: of each layer, (K, m, d)

        Args:
            hidden: (m,) bool, columns that text does not see; None if it sees all.

        Raises:
            ValueError: the columns are of another shape; the cache stays as it was.
        """
        start = self.lengths[row]
        stop = start + keys[0].shape[1]
        for mine, others in ((self.keys, keys), (self.values, values)):
            _, heads, _, head_dim = mine[0].shape
            shapes = {tuple(tensor.shape) for tensor in others}
            if shapes != {(heads, stop - start, head_dim)} or len(others) != len(mine):
                raise ValueError(
                    f"{len(others)} layers of keys or values of shape {sorted(shapes)} do not fit into a cache of "
                    f"{len(mine)} layers of {heads} heads of {head_dim}"
                )

        # Copy them, and show them.
        self._tell_lengths_apart()
        self.reserve(stop)
        for mine, others in ((self.keys, keys), (self.values, values)):
            for tensor, other in zip(mine, others):
                tensor[row, :, start:stop] = other
        self.mask[row, 0, 0, start:stop] = 0
        if hidden is not None:
            self.mask[row, 0, 0, start:stop].masked_fill_(hidden, -float("inf"))
        self.lengths[row] = stop

    def cut(self, row: int, length: int) -> None:
        """Cut one sequence to so many columns.

        The others become zeros. Attention multiplies hidden values by 0, so that a NaN would reach the next sequence.
        """
        self._tell_lengths_apart()
        for tensor in (*self.keys, *self.values):
            tensor[row, :, length : self.lengths[row]] = 0
        self.mask[row, 0, 0, length:] = -float("inf")
        self.lengths[row] = length

    def swap(self, row: int, other: int) -> None:
        """Let two sequences change places."""
        stop = max(self.lengths[row], self.lengths[other])
        for tensor in (*self.keys, *self.values):
            tensor[[row, other], :, :stop] = tensor[[other, row], :, :stop]
        self.mask[[row, other]] = self.mask[[other, row]]
        self.lengths[row], self.lengths[other] = self.lengths[other], self.lengths[row]

    def _tell_lengths_apart(self) -> None:
        """Make the mask that sequences of different lengths need."""
        if self.mask is None:
            self.mask = self._hidden(len(self.lengths), self.capacity)
            self.mask[..., : self.lengths[0]] = 0


class Columns:
    """The columns that one step writes, and the columns that it then sees.

    Attributes:
        count, stop: n sequences, and the columns of the longest one.
        mask: (n, 1, 1, stop) as of `DecodingCache`, or None.
    """

    def __init__(self, cache: DecodingCache, lengths: list[int]):
        self.cache = cache
        self.count = len(lengths)
        self.stop = max(lengths) + 1
        self.mask: torch.Tensor | None = None

        # Sequences of one length write one column, others a column each.
        self.is_ragged = min(lengths) != max(lengths)
        if self.is_ragged:
            self.rows = torch.arange(self.count, device=cache.mask.device)
            self.columns = torch.tensor(lengths, device=cache.mask.device)

        # The written columns are shown.
        if cache.mask is not None:
            if self.is_ragged:
                cache.mask[self.rows, 0, 0, self.columns] = 0
            else:
                cache.mask[: self.count, 0, 0, self.stop - 1] = 0
            self.mask = cache.mask[: self.count, :, :, : self.stop]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values of a layer, and return all that it sees.  (n, K, d) -> (n, K, stop, d), twice"""
        return self._write(self.cache.keys[layer], key), self._write(self.cache.values[layer], value)

    def _write(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if len(kept) != self.count:
            kept = kept[: self.count]
        if self.is_ragged:
            kept[self.rows, :, self.columns] = new.to(kept.dtype)
        else:
            kept.select(2, self.stop - 1).copy_(new)
        return kept.narrow(2, 0, self.stop)

    def visible(self) -> torch.Tensor | None:
        """Return the mask in the form of `attention_mask`.  -> (n, stop) 1 for tokens; None if all are"""
        return None if self.mask is None else (self.mask[:, 0, 0] == 0).long()

    def whole_mask(self) -> torch.Tensor:
        """Return the mask as attention functions take it.  -> (n, 1, 1, stop)"""
        keys = self.cache.keys[0]
        return keys.new_zeros(self.count, 1, 1, self.stop) if self.mask is None else self.mask

    def as_cache(self) -> Cache:
        """Return a cache for the model's own forward of one token."""
        return Cache(layers=[ColumnsLayer(self, layer) for layer in range(len(self.cache.keys))])


class ColumnsLayer(DynamicLayer):
    """One layer of a `DecodingCache`, for the model's own forward of one step."""

    def __init__(self, columns: Columns, layer: int):
        super().__init__()
        self.columns = columns
        self.layer = layer
        self.lazy_initialization(columns.cache.keys[layer], columns.cache.values[layer])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write one column and return all: (n, K, 1, d) -> (n, K, stop, d), twice."""
        return self.columns.write(self.layer, key_states.squeeze(2), value_states.squeeze(2))

    def get_seq_length(self) -> int:
        return self.columns.stop - 1


# ------------------------------------------------------------------------------------------------ weights as functions


class _Room:
    """The bytes that are left for weights that are held twice."""

    def __init__(self, free: int):
        self.free = free

    def take(self, size: int) -> bool:
        if size > self.free:
            return False
        self.free -= size
        return True


class LeanLinear:
    """A linear map of a few rows. On a CPU, a weight that is used again and again is packed, as far as `room` goes."""

    def __init__(self, module: nn.Linear, room: _Room):
        self.weight = module.weight
        self.bias = module.bias
        self.transposed = self.weight.t()
        self.room = room
        self.packed: torch.Tensor | None = None
        self.version = 0  # of the weight, when it was packed
        self.uses = 0

        # Both depend on the processor, and are decided once.
        dtype, has_mkldnn = self.weight.dtype, self.weight.device.type == "cpu" and HAS_MKLDNN
        self.few = float("inf")
        if has_mkldnn and dtype == torch.float32:
            self.few = FEW if self.weight.numel() < LARGE else 1
        can_pack = dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.may_pack = has_mkldnn and can_pack and not self.weight.is_inference()  # inference tensors have no version

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows by the weight: (n, inputs) -> (n, outputs)."""
        # A packed weight serves as long as the weight itself does not change.
        if self.packed is not None:
            if self.version == self.weight._version:
                return torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
            self.packed = None  # a server's model was trained on, or adapters were merged into it

        # Pack a weight that has been used for a while.
        self.uses += 1
        if self.uses == PACK_AFTER and self.may_pack and self.room.take(self.weight.nbytes):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.version = self.weight._version

        # Until then, take the kernel that is fastest for so many rows.
        if len(rows) >= self.few:
            # Up to twice as fast as `F.linear`, which is better for one row of a small weight, or for many rows.
            return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        if self.bias is None:
            return torch.mm(rows, self.transposed)
        return torch.addmm(self.bias, rows, self.transposed)


class LeanRMSNorm(NamedTuple):
    """Llama's, of (n, D)."""

    weight: torch.Tensor
    epsilon: float

    def normalised(self, rows: torch.Tensor) -> torch.Tensor:
        """Normalise without the weight.  (..., D) -> same"""
        # Half precision is rounded where LlamaRMSNorm rounds it: before the weight.
        return F.rms_norm(rows.float(), self.weight.shape, eps=self.epsilon).to(rows.dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.weight * self.normalised(rows)


class LeanOffsetRMSNorm(NamedTuple):
    """Gemma's, of (n, D), which multiplies by 1 + weight and rounds after that."""

    weight: torch.Tensor
    epsilon: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(rows.float(), self.weight.shape, 1.0 + self.weight.float(), self.epsilon).to(rows.dtype)


class LeanHeadNorm(NamedTuple):
    """Chameleon's QK-norm, of (n, H, d)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(heads, heads.shape[-1:], eps=1e-5) * self.weight + self.bias


class LeanFeedForward(NamedTuple):
    """SwiGLU, or a feed-forward without a gate, of (n, D)."""

    gate: Callable | None
    up: Callable
    down: Callable
    activation: Callable

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(rows)))
        return self.down(self.activation(self.gate(rows)) * self.up(rows))


class LeanTower(NamedTuple):
    """One tower's part of one layer, each a function of the tower's rows."""

    attention_norm: Callable
    query: Callable
    key: Callable
    value: Callable
    query_norm: Callable | None  # of (n, H * d)
    key_norm: Callable | None
    output: Callable
    feed_forward_norm: Callable
    feed_forward: Callable


class LeanLayer(NamedTuple):
    """One layer of all towers."""

    towers: list[LeanTower]
    has_rope: bool
    has_pre_norm: bool


# ----------------------------------------------------------------------------------------------------- reading a model


class _NotPlain(Exception):
    """A module does more than its weights and its class say, so that the model's own forward must run."""


def _ours(module: nn.Module) -> nn.Module:
    """Return a module that has no hooks and a forward of this package; others are not plain."""
    if not is_of_this_package(module):
        raise _NotPlain
    return module


class _Reader:
    """Makes functions from modules: from the weights of plain ones; any other module is returned as it is.

    Args:
        like: weights are of this tensor's dtype and on its device, or their module is not plain.
    """

    def __init__(self, like: torch.Tensor):
        self.kind = (like.dtype, like.device)
        self.room = _Room(PACKED_BYTES)

    def _takes(self, *tensors: torch.Tensor | None) -> bool:
        return all(type(x) is nn.Parameter and (x.dtype, x.device) == self.kind for x in tensors if x is not None)

    def linear(self, module: nn.Module) -> Callable:
        if is_plain_linear(module) and self._takes(module.weight, module.bias):
            return LeanLinear(module, self.room)
        return module

    def norm(self, module: nn.Module | None) -> Callable | None:
        if module is None or is_plain(module, nn.Identity):
            return None
        if is_plain(module, MoTHeadLayerNorm) and self._takes(module.weight, module.bias):
            return LeanHeadNorm(module.weight, module.bias)
        if is_plain(module, LlamaRMSNorm) and self._takes(module.weight):
            return LeanRMSNorm(module.weight, module.variance_epsilon)
        if is_plain(module, GemmaRMSNorm) and self._takes(module.weight):
            return LeanOffsetRMSNorm(module.weight, module.eps)
        return module

    def head_norm(self, module: nn.Module | None, config) -> Callable | None:
        """Read a norm of queries or keys, as a function of (n, H * d)."""
        norm = self.norm(module)
        if norm is None or "rms_all_heads" in config.qk_norm_kinds:
            return norm
        return lambda rows: norm(rows.unflatten(-1, (-1, config.head_dim))).flatten(1)

    def feed_forward(self, module: nn.Module, is_mixture: bool) -> Callable:
        if is_mixture:
            return partial(module, token_choice=True)
        if not is_plain(module, LlamaMLP, NemotronMLP):
            return module
        activation = F.silu if is_plain(module.act_fn, SiLUActivation, nn.SiLU) else module.act_fn
        gate = self.linear(module.gate_proj) if isinstance(module, LlamaMLP) else None
        return LeanFeedForward(gate, self.linear(module.up_proj), self.linear(module.down_proj), activation)


class LeanDecoder:
    """The cached one-token step of a `MoTForCausalLM` or `MoTTransfusionModel`."""

    def __init__(self, model: nn.Module):
        # Refuse a model that does more than its weights say.
        config, transformer = model.config, model.model
        if not keeps_methods(_ours(model), *STEP_METHODS) or not keeps_methods(_ours(transformer), "modality_ids_of"):
            raise _NotPlain
        self.config = config
        if config.cross_key_norm or config.hides_tokens:
            raise _NotPlain
        self.rotary = _ours(transformer.rotary_emb)
        if not isinstance(self.rotary, LlamaRotaryEmbedding):
            raise _NotPlain
        is_supported = config._attn_implementation in ATTENTION and self.rotary.rope_type in STATIC_ROPE
        if not is_supported or model.training or autocast_dtype(model.device.type) is not None:
            raise _NotPlain
        table = transformer.embed_tokens
        if not is_plain(table, nn.Embedding, GemmaTextScaledWordEmbedding):
            raise _NotPlain
        epsilons = {config.tower_config(name).rms_norm_eps for name in config.tower_names}
        if config.tower_widths or len(epsilons) > 1:
            raise _NotPlain  # a step joins the rows of all towers, and divides them by their RMS, at once

        # Read the weights.
        self.heads = config.num_attention_heads
        self.key_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.embedding = embedding = table.weight
        self.embedding_scale = getattr(table, "embed_scale", None)
        # Attention of one query over keys in half precision takes five times as long on a CPU.
        self.cache_dtype = torch.float32 if embedding.device.type == "cpu" else embedding.dtype
        reader = _Reader(embedding)
        self.layers = [self._read(reader, layer) for layer in transformer.layers[: config.num_hidden_layers]]
        self.norms = [reader.norm(norm) for norm in self._of_towers(transformer.norm, "norm")]
        self.head = reader.linear(model.lm_head)

        # Tabulate the tower of each token. The table of angles is empty here, and `_angles` fills it.
        ids = torch.arange(len(embedding), device=embedding.device)
        towers = torch.tensor(config.tower_of_modality, device=ids.device)
        # With one tower there is nothing to look up, and such a model may have no ranges.
        self.tower_of = towers[transformer.modality_ids_of(ids)] if len(config.tower_names) > 1 else None
        self.cosines = self.sines = embedding.new_empty(0, 1, self.head_dim)

    @classmethod
    def of(cls, model: nn.Module) -> "LeanDecoder | None":
        """Read a model.  -> None if the model has to be run by its own forward"""
        try:
            return None if nn.modules.module._has_any_global_hook() else cls(model)
        except _NotPlain:
            return None

    def _of_towers(self, module: nn.Module | None, part: str) -> list[nn.Module | None]:
        """Return the module of each tower, or the shared one for each."""
        if module is None:
            return [None] * len(self.config.tower_names)
        _ours(module)
        names = self.config.part_names(part)
        return [module[name] for name in names * (len(self.config.tower_names) // len(names))]

    def _read(self, reader: _Reader, layer: nn.Module) -> LeanLayer:
        """Read a layer: each tower's modules by name, and the function of each."""
        config, attention = self.config, _ours(_ours(layer).self_attn)
        # The modules of each part, in the order of the towers.
        modules = {
            "attention_norm": self._of_towers(layer.input_layernorm, "norm"),
            "query": self._of_towers(attention.q_proj, "query_key_value"),
            "key": self._of_towers(attention.k_proj, "query_key_value"),
            "value": self._of_towers(attention.v_proj, "query_key_value"),
            "query_norm": self._of_towers(getattr(attention, "q_norm", None), "attention"),
            "key_norm": self._of_towers(getattr(attention, "k_norm", None), "attention"),
            "output": self._of_towers(attention.o_proj, "attention"),
            "feed_forward_norm": self._of_towers(layer.post_attention_layernorm, "norm"),
            "feed_forward": self._of_towers(layer.mlp, "feed_forward"),
        }

        # The function of each module.
        towers = []
        for index, name in enumerate(config.tower_names):
            of_tower = {part: of_towers[index] for part, of_towers in modules.items()}
            is_mixture = (name if "feed_forward" in config.untied else "shared") in config.moe_towers
            towers.append(
                LeanTower(
                    attention_norm=reader.norm(of_tower["attention_norm"]),
                    query=reader.linear(of_tower["query"]),
                    key=reader.linear(of_tower["key"]),
                    value=reader.linear(of_tower["value"]),
                    query_norm=reader.head_norm(of_tower["query_norm"], config),
                    key_norm=reader.head_norm(of_tower["key_norm"], config),
                    output=reader.linear(of_tower["output"]),
                    feed_forward_norm=reader.norm(of_tower["feed_forward_norm"]),
                    feed_forward=reader.feed_forward(of_tower["feed_forward"], is_mixture),
                )
            )
        return LeanLayer(towers, attention.has_rope, config.norm_position == "pre")

    # ---------------------------------------------------------------------------------------------------------- a step

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, positions: list[int], cache: DecodingCache) -> torch.Tensor:
        """Run one token for each of the first n sequences of a cache.  (n,) -> logits (n, V)

        Args:
            positions: n positions of the tokens.
        """
        # The rows of hidden states are sorted by tower, as in the model.
        routing = self._routing(tokens)
        towers, counts, order, inverse = routing
        hidden_states = F.embedding(tokens if order is None else tokens[order], self.embedding)
        if self.embedding_scale is not None:
            hidden_states = hidden_states * self.embedding_scale.to(hidden_states.dtype)
        angles, columns = self._angles(positions), cache.open(len(positions))

        # Each layer adds attention and feed-forward to the residual stream, each with the norms of the towers present.
        for index, layer in enumerate(self.layers):
            own = [layer.towers[tower] for tower in towers]
            turns = angles if layer.has_rope else None
            attention = partial(self._attention, index, own, routing, turns, columns)
            norms = [tower.attention_norm for tower in own]
            hidden_states = hidden_states + _block(attention, norms, hidden_states, counts, layer.has_pre_norm)
            feed_forward = partial(_feed_forward, own)
            norms = [tower.feed_forward_norm for tower in own]
            hidden_states = hidden_states + _block(feed_forward, norms, hidden_states, counts, layer.has_pre_norm)

        # The logits are in the order of the sequences.
        hidden_states = _joined(_normed([self.norms[tower] for tower in towers], hidden_states, counts))
        hidden_states = hidden_states if inverse is None else hidden_states.index_select(0, inverse)
        if isinstance(self.head, LeanLinear):
            return self.head(hidden_states)
        return self.head(hidden_states.unsqueeze(1)).squeeze(1)  # a module expects (batch, length, D)

    def _routing(self, tokens: torch.Tensor) -> tuple:
        """Return the towers that have tokens, their counts, the order that sorts tokens by tower, and its inverse.

        The last two are None if all tokens are of one tower.
        """
        towers = [0] * len(tokens) if self.tower_of is None else self.tower_of[tokens].tolist()
        present = sorted(set(towers))
        if len(present) == 1:
            return present, [len(towers)], None, None
        order = torch.tensor(sorted(range(len(towers)), key=towers.__getitem__), device=tokens.device)
        return present, [towers.count(tower) for tower in present], order, order.argsort()

    def _angles(self, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and signed sines.  -> (n, 1, d) twice, or (1, d) if all positions are the same"""
        if max(positions) >= len(self.cosines):
            steps = torch.arange((max(positions) // COLUMNS + 2) * COLUMNS, device=self.embedding.device)
            self.cosines, sines = self.rotary(self.embedding, position_ids=steps[:, None])
            # `_attention` rolls a head by half without a change of sign: the sign of the first half is in the table.
            self.sines = torch.cat([-sines[..., : self.head_dim // 2], sines[..., self.head_dim // 2 :]], dim=-1)
        if min(positions) == max(positions):
            return self.cosines[positions[0]], self.sines[positions[0]]
        index = torch.tensor(positions, device=self.embedding.device)
        return self.cosines[index], self.sines[index]

    def _attention(self, index, own, routing, angles, columns, parts) -> list[torch.Tensor]:
        """Attend in layer `index`.  parts (n_tower, D) of the `own` towers -> the same"""
        # Each tower projects its own tokens; the heads then stand in the order of the sequences.
        _, counts, order, inverse = routing
        heads = _joined([self._projected(tower, part) for tower, part in zip(own, parts)])
        heads = heads if inverse is None else heads.index_select(0, inverse)
        heads = heads.view(len(heads), -1, self.head_dim)
        turned, value = heads[:, : self.heads + self.key_heads], heads[:, self.heads + self.key_heads :]
        if angles is not None:
            cosines, sines = angles
            turned = turned * cosines + turned.roll(self.head_dim // 2, -1) * sines

        # One attention over the tokens of all towers. The queries that share a key head stand as the rows of one query.
        keys, values = columns.write(index, turned[:, self.heads :], value)
        query = turned[:, : self.heads].unflatten(1, (self.key_heads, -1)).to(keys.dtype)
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=columns.mask)

        # Sorted by tower again, each tower projects its own tokens.
        output = output.reshape(len(heads), -1).to(heads.dtype)
        parts = [output] if order is None else output.index_select(0, order).split(counts)
        return [tower.output(part) for tower, part in zip(own, parts)]

    def _projected(self, tower: LeanTower, rows: torch.Tensor) -> torch.Tensor:
        """Project to queries, keys and values.  (n, D) -> (n, (H + 2 K) * d)"""
        query, key = tower.query(rows), tower.key(rows)
        if tower.query_norm is not None:
            query, key = tower.query_norm(query), tower.key_norm(key)
        return torch.cat([query, key, tower.value(rows)], dim=-1)


def _block(
    block: Callable, norms: list[Callable], rows: torch.Tensor, counts: list[int], has_pre_norm: bool
) -> torch.Tensor:
    """Run attention or feed-forward with its norm, before or behind it.  (n, D) -> (n, D)"""
    if has_pre_norm:
        return _joined(block(_normed(norms, rows, counts)))
    return _joined(_normed(norms, _joined(block(_split(rows, counts))), counts))


def _normed(norms: list[Callable], rows: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """Let each tower normalise its rows.  (n, D) -> parts"""
    # RMSNorms differ in their weights only: divide all rows by their RMS once, then multiply by each tower's weight.
    if len(norms) > 1 and all(type(norm) is LeanRMSNorm for norm in norms):
        return [norm.weight * part for norm, part in zip(norms, norms[0].normalised(rows).split(counts))]
    return [norm(part) for norm, part in zip(norms, _split(rows, counts))]


def _feed_forward(own: list[LeanTower], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tower.feed_forward(part) for tower, part in zip(own, parts)]


def _split(rows: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    return rows.split(counts) if len(counts) > 1 else [rows]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# ---------------------------------------------------------------------------------------------- either of two decoders


class ForwardDecoder:
    """The step of `LeanDecoder`, by the model's own forward."""

    cache_dtype = None  # the model's

    def __init__(self, model: nn.Module):
        self.model = model

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, positions: list[int], cache: DecodingCache) -> torch.Tensor:
        """Run one token for each of the first n sequences of a cache.  (n,) -> logits (n, V)"""
        columns, config = cache.open(len(positions)), self.model.config
        ids = tokens[:, None]
        # The columns know what text sees, and not which tower each key is of: the mask is taken as it is.
        mask = columns.whole_mask() if config.unseen_towers else columns.visible()
        outputs = self.model.model(
            input_ids=ids,
            modality_ids=self.model.model.modality_ids_of(ids) if len(config.modalities) > 1 else None,
            attention_mask=mask,
            position_ids=torch.tensor(positions, device=ids.device)[:, None],
            past_key_values=columns.as_cache(),
        )
        return self.model.lm_head(outputs.last_hidden_state[:, -1, : self.model.config.hidden_size])


def decoder_of(model: nn.Module) -> LeanDecoder | ForwardDecoder:
    """Return the decoder for steps of several sequences that may differ in length: a lean one if the model allows it.

    Raises:
        ValueError: a derived class, or an adapter, prepares the inputs of each step, and these steps do not call it; or
            tokens of the vocabulary do not see each other.
    """
    for name in STEP_METHODS:
        if not keeps_methods(model, name):
            raise ValueError(
                f"{name} of this {type(model).__name__} is not the package's own, and neither pictures that are "
                "diffused nor served requests ask it at each step; leave it as it is, or use generate() of a model of "
                "tokens"
            )
    if model.config.hides_tokens:
        raise ValueError(
            f"unseen_towers={model.config.unseen_towers} hides tokens of the vocabulary from others, which these steps "
            "do not know; use generate() of a model of tokens"
        )
    return LeanDecoder.of(model) or ForwardDecoder(model)


def is_plain_dynamic(cache: Cache | None) -> bool:
    """True if a cache holds all keys and values of all layers, and nothing else."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
