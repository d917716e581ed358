"""One token for each of several sequences, from plain tensors: what `generate()` spends its time on, without modules.

Read off a model once per call, the weights of its layers are walked by a loop of some thirty operations a layer: keys
and values are written in place, rotary angles come from a table, a step whose tokens all belong to one tower is not
routed, any other is sorted once. A model with anything between its modules and their weights (hooks, adapters,
quantised or sharded tensors, compiled or replaced forwards, mixtures of experts) has no such reading, and is decoded by
its own forward.
"""

# R sequences, n <= R of them in a step, C columns, D hidden size, H query heads, K key heads, d head size, V vocabulary

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


COLUMNS = 256  # by at least so many a cache grows
FEW, LARGE = 4, 2**19  # rows and weights from which mkldnn's own product is the faster one
HAS_MKLDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
ATTENTION = ("sdpa", "mot_ranges")  # what takes the same numbers from `scaled_dot_product_attention`
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the length of a sequence


class Linear(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, inputs) -> (n, outputs)"""
        is_large = len(rows) >= FEW or self.weight.numel() >= LARGE
        if is_large and rows.dtype == torch.float32 and rows.device.type == "cpu" and HAS_MKLDNN:
            # Up to twice as fast as what `F.linear` calls, which is better for one row and a small weight, or for many.
            return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return F.linear(rows, self.weight, self.bias)


class RMSNorm(NamedTuple):
    weight: torch.Tensor
    epsilon: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The operations of LlamaRMSNorm in their order, so that not a bit differs."""
        wide = rows.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(rows.dtype)


class HeadNorm(NamedTuple):
    """Chameleon's QK-norm, of (n, H, d)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(heads, heads.shape[-1:], eps=1e-5) * self.weight + self.bias


class TowerLayer(NamedTuple):
    """What one tower has of one layer."""

    attention_norm: RMSNorm
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: RMSNorm | HeadNorm | None
    key_norm: RMSNorm | HeadNorm | None
    feed_forward_norm: RMSNorm
    gate: Linear
    up: Linear
    down: Linear
    activation: nn.Module


class _NotPlain(Exception):
    """A module does more than its class says."""


def _plain(module: nn.Module, *forwards: str) -> nn.Module:
    """The module, if calling it is no more than a forward of these names.

    Raises:
        _NotPlain: it has hooks, or another forward.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    replaced = "forward" in vars(module) or module._compiled_call_impl is not None
    if replaced or any(hooks) or type(module).forward.__qualname__ not in forwards:
        raise _NotPlain
    return module


class _Reader:
    """Takes weights out of modules that are plain, all of one type and on one device."""

    def __init__(self, like: torch.Tensor):
        self.kind = (like.dtype, like.device)

    def tensor(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is not None and (type(tensor) is not nn.Parameter or (tensor.dtype, tensor.device) != self.kind):
            raise _NotPlain
        return tensor

    def linear(self, module: nn.Module) -> Linear:
        if type(module) is not nn.Linear:  # adapters have forwards of this name, too
            raise _NotPlain
        _plain(module, "Linear.forward")
        return Linear(self.tensor(module.weight), self.tensor(module.bias))

    def norm(self, module: nn.Module | None) -> RMSNorm | HeadNorm | None:
        if module is None:
            return None
        if type(module).__name__ == "MoTHeadLayerNorm":
            _plain(module, "MoTHeadLayerNorm.forward")
            return HeadNorm(self.tensor(module.weight), self.tensor(module.bias))
        _plain(module, "LlamaRMSNorm.forward")
        return RMSNorm(self.tensor(module.weight), module.variance_epsilon)


class DecodingCache:
    """Keys and values of R sequences with room behind them, each (R, K, C, d).

    On a CPU they are kept in float32, also those of a model in half precision: attention of one query over bfloat16 keys
    takes five times as long there.

    Attributes:
        lengths: filled columns of each sequence.
        mask: (R, 1, 1, C) what is added to attention scores: 0 for tokens, minus infinity elsewhere; None where all
            sequences are of one length, without padding.
    """

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], mask: torch.Tensor | None = None):
        """
        Args:
            keys, values: of each layer, (R, K, L, d).
            mask: (R, L) 1 for tokens, 0 for padding.
        """
        count, _, length, _ = keys[0].shape
        kind = torch.float32 if keys[0].device.type == "cpu" else keys[0].dtype
        self.keys, self.values = ([tensor.to(kind) for tensor in tensors] for tensors in (keys, values))
        self.capacity = length
        self.lengths = [length] * count
        self.mask = None
        if mask is not None and not mask.all():
            self.mask = (
                self.keys[0].new_zeros(count, 1, 1, length).masked_fill_(mask[:, None, None] == 0, -float("inf"))
            )

    @classmethod
    def of(cls, cache: DynamicCache, mask: torch.Tensor | None = None) -> "DecodingCache":
        return cls([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], mask)

    def write_back(self, cache: DynamicCache) -> None:
        """Into the cache of sequences of one length, as an ordinary forward would have left it."""
        stop = self.lengths[0]
        for layer, keys, values in zip(cache.layers, self.keys, self.values):
            kind = layer.keys.dtype
            layer.keys, layer.values = keys[:, :, :stop].to(kind, copy=True), values[:, :, :stop].to(kind, copy=True)

    def reserve(self, columns: int) -> None:
        """Room for so many columns."""
        if columns <= self.capacity:
            return
        more = max(columns - self.capacity, COLUMNS, self.capacity // 2)
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):  # one at a time, so that the old one is freed
                wider = tensor.new_zeros(*tensor.shape[:2], self.capacity + more, tensor.shape[3])
                wider[:, :, : self.capacity] = tensor
                tensors[layer] = wider
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, more), value=-float("inf"))
        self.capacity += more

    def open(self, count: int) -> "Columns":
        """The next column of the first `count` sequences."""
        lengths = self.lengths[:count]
        self.reserve(max(lengths) + 1)
        self.lengths[:count] = [length + 1 for length in lengths]
        return Columns(self, lengths)


class Columns:
    """Where a step writes, and what it then sees."""

    def __init__(self, cache: DecodingCache, lengths: list[int]):
        self.cache, self.count, self.stop, self.mask = cache, len(lengths), max(lengths) + 1, None
        self.place = (slice(self.count), slice(None), lengths[0])
        if min(lengths) != max(lengths):
            rows, columns = torch.arange(self.count), torch.tensor(lengths)
            self.place = (rows.to(cache.mask.device), slice(None), columns.to(cache.mask.device))
        if cache.mask is not None:
            cache.mask[self.place[0], 0, 0, self.place[2]] = 0
            self.mask = cache.mask[: self.count, :, :, : self.stop]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, K, d) twice -> all keys and values, (n, K, stop, d)"""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.place], values[self.place] = key, value
        return keys[: self.count, :, : self.stop], values[: self.count, :, : self.stop]


class LeanDecoder:
    """The cached one-token step of a `MoTForCausalLM` or `MoTTransfusionModel`."""

    def __init__(self, model: nn.Module):
        config, transformer = model.config, model.model
        _plain(model, "MoTForCausalLM.forward", "MoTTransfusionModel.forward")
        _plain(transformer, "MoTModel.forward")
        self.config, self.rotary = config, _plain(transformer.rotary_emb, "LlamaRotaryEmbedding.forward")
        is_supported = config._attn_implementation in ATTENTION and self.rotary.rope_type in STATIC_ROPE
        if not is_supported or model.training or torch.is_autocast_enabled(model.device.type):
            raise _NotPlain
        self.heads, self.key_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        reader = _Reader(transformer.embed_tokens.weight)
        self.embedding = reader.tensor(_plain(transformer.embed_tokens, "Embedding.forward").weight)
        self.layers = [self._read(reader, layer) for layer in transformer.layers[: config.num_hidden_layers]]
        self.norms = [reader.norm(norm) for norm in self._of_towers(transformer.norm, "norm")]
        self.head = reader.linear(model.lm_head)
        ids = torch.arange(len(self.embedding), device=self.embedding.device)
        towers = torch.tensor(config.tower_of_modality, device=ids.device)
        # Of one tower there is nothing to look up, and such a model may have no ranges.
        self.tower_of = towers[transformer.modality_ids_of(ids)] if len(config.tower_names) > 1 else None
        self.cosines = self.sines = self.embedding.new_empty(0, 1, self.head_dim)

    @classmethod
    def of(cls, model: nn.Module) -> "LeanDecoder | None":
        """None where the model has to be run by its own forward."""
        try:
            if nn.modules.module._has_any_global_hook():
                return None
            return cls(model)
        except _NotPlain:
            return None

    def _of_towers(self, module: nn.Module, part: str) -> list[nn.Module]:
        _plain(module, "PerTower.forward")
        towers = self.config.tower_names
        return [module[tower if part in self.config.untied else "shared"] for tower in towers]

    def _read(self, reader: _Reader, layer: nn.Module) -> list[TowerLayer]:
        """-> one for each tower"""
        attention = _plain(_plain(layer, "MoTDecoderLayer.forward").self_attn, "MoTAttention.forward")

        def attending(name):
            module = getattr(attention, name, None)
            return [None] * len(self.config.tower_names) if module is None else self._of_towers(module, "attention")

        read = []
        for before, query, key, value, output, query_norm, key_norm, after, feed_forward in zip(
            self._of_towers(layer.input_layernorm, "norm"),
            *map(attending, ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            self._of_towers(layer.post_attention_layernorm, "norm"),
            self._of_towers(layer.mlp, "feed_forward"),
        ):
            _plain(feed_forward, "FeedForward.forward")
            names = ("gate_proj", "up_proj", "down_proj")
            read.append(
                TowerLayer(
                    reader.norm(before),
                    *map(reader.linear, (query, key, value, output)),
                    reader.norm(query_norm),
                    reader.norm(key_norm),
                    reader.norm(after),
                    *(reader.linear(getattr(feed_forward, name)) for name in names),
                    feed_forward.act_fn,
                )
            )
        return read

    # ------------------------------------------------------------------------------------------------------ a step

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, positions: list[int], cache: DecodingCache) -> torch.Tensor:
        """Run one token for each of the first n sequences of a cache.  (n,) -> logits (n, V)"""
        count = len(positions)
        routing = self._routing(tokens)
        towers, counts, order, inverse = routing
        hidden_states = F.embedding(tokens if order is None else tokens[order], self.embedding)
        parts = list(hidden_states.split(counts)) if order is not None else [hidden_states]
        angles, columns = self._angles(positions), cache.open(count)
        pre = self.config.norm_position == "pre"
        for index, layer in enumerate(self.layers):
            own = [layer[tower] for tower in towers]
            inputs = [tower.attention_norm(part) for tower, part in zip(own, parts)] if pre else parts
            attended = self._attention(index, own, inputs, routing, angles, columns)
            if not pre:
                attended = [tower.attention_norm(part) for tower, part in zip(own, attended)]
            parts = [part + update for part, update in zip(parts, attended)]
            inputs = [tower.feed_forward_norm(part) for tower, part in zip(own, parts)] if pre else parts
            updates = [
                tower.down(tower.activation(tower.gate(part)) * tower.up(part)) for tower, part in zip(own, inputs)
            ]
            if not pre:
                updates = [tower.feed_forward_norm(part) for tower, part in zip(own, updates)]
            parts = [part + update for part, update in zip(parts, updates)]
        hidden_states = _joined([self.norms[tower](part) for tower, part in zip(towers, parts)])
        return self.head(hidden_states if inverse is None else hidden_states[inverse])

    def _routing(self, tokens: torch.Tensor) -> tuple:
        """Towers that have tokens, their counts, and the sorting of the tokens by tower and its inverse, if any."""
        towers = [0] * len(tokens) if self.tower_of is None else self.tower_of[tokens].tolist()
        present = sorted(set(towers))
        if len(present) == 1:
            return present, [len(towers)], None, None
        order = torch.tensor(sorted(range(len(towers)), key=towers.__getitem__), device=tokens.device)
        return present, [towers.count(tower) for tower in present], order, order.argsort()

    def _angles(self, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines, (n, 1, d), or (1, d) where all stand at one position."""
        if max(positions) >= len(self.cosines):
            steps = torch.arange((max(positions) // COLUMNS + 2) * COLUMNS, device=self.embedding.device)
            self.cosines, sines = self.rotary(self.embedding, position_ids=steps[:, None])
            # Halves of a head will change places and not turn: the sign of the first moves into the table.
            self.sines = torch.cat([-sines[..., : self.head_dim // 2], sines[..., self.head_dim // 2 :]], dim=-1)
        if min(positions) == max(positions):
            return self.cosines[positions[0]], self.sines[positions[0]]
        index = torch.tensor(positions, device=self.embedding.device)
        return self.cosines[index], self.sines[index]

    def _attention(self, index, own, inputs, routing, angles, columns) -> list[torch.Tensor]:
        _, counts, order, inverse = routing
        turned = [self._queries_and_keys(tower, part) for tower, part in zip(own, inputs)]
        heads, value = _joined(turned), _joined([tower.value(part) for tower, part in zip(own, inputs)])
        if inverse is not None:
            heads, value = heads[inverse], value[inverse]
        heads = heads.view(len(heads), -1, self.head_dim)
        cosines, sines = angles
        heads = heads * cosines + heads.roll(self.head_dim // 2, -1) * sines
        keys, values = columns.write(index, heads[:, self.heads :], value.view(len(value), -1, self.head_dim))
        # The queries that share a key head stand as the rows of one query.
        query = heads[:, : self.heads].unflatten(1, (self.key_heads, -1)).to(keys.dtype)
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=columns.mask)
        output = output.reshape(len(heads), -1).to(heads.dtype)
        parts = [output] if order is None else output[order].split(counts)
        return [tower.output(part) for tower, part in zip(own, parts)]

    def _queries_and_keys(self, tower: TowerLayer, rows: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (n, (H + K) * d)"""
        query, key = tower.query(rows), tower.key(rows)
        if tower.query_norm is not None:
            query = tower.query_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(1)
            key = tower.key_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(1)
        return torch.cat([query, key], dim=-1)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def is_plain_dynamic(cache: Cache | None) -> bool:
    """Whether a cache holds all keys and values of all layers, and nothing else."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
