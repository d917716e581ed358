"""One token for each of several sequences, from plain tensors: what `generate()` spends its time on, without modules.

Read off a model once per call, the weights of its layers are walked by a loop of some thirty operations a layer: keys
and values are written in place, rotary angles come from a table, a step whose tokens all belong to one tower is not
routed, any other is sorted once, and on a CPU weights are soon held in the order in which products read them. A
projection, norm or feed-forward that is more than its weights (adapters, hooks, quantised or sharded tensors, mixtures
of experts) is called as the module it is. Where a larger part is (hooks on layers, compiled or replaced forwards,
attention that shows its weights), the model's own forward makes the step.
"""

# R sequences, n <= R of them in a step, C columns, D hidden size, H query heads, K key heads, d head size, V vocabulary

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm, GemmaTextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .decoding_cache_mot import COLUMNS, DecodingCache
from .expert_choice import FeedForward
from .plain_modules_mot import is_of_this_package, is_plain, is_plain_linear, keeps_methods
from .precision_mot import autocast_dtype
from .rotary_mot import MoTRotaryEmbedding
from .tower_norms_mot import MoTHeadLayerNorm


FEW, LARGE = 4, 2**19  # rows and weights from which oneDNN's product is the faster one in float32
PACK_AFTER = 8  # products of a weight take as long as bringing it into oneDNN's own order, after which they take half
PACKED_BYTES = 2**30  # of weights that a decoder holds in that order beside the model's
HAS_MKLDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
ATTENTION = ("sdpa", "mot_ranges")  # what takes the same numbers from `scaled_dot_product_attention`
STEP_METHODS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")  # asked at each step
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the length of a sequence


class _Room:
    """For weights that are held twice."""

    def __init__(self, free: int):
        self.free = free

    def take(self, size: int) -> bool:
        if size > self.free:
            return False
        self.free -= size
        return True


class Linear:
    """A linear map of a few rows. On a CPU a weight that is used again and again is packed, in room that is there for it."""

    def __init__(self, module: nn.Linear, room: _Room):
        self.weight, self.bias, self.room = module.weight, module.bias, room
        self.transposed = self.weight.t()
        self.packed, self.version, self.uses = None, 0, 0
        dtype, has_mkldnn = self.weight.dtype, self.weight.device.type == "cpu" and HAS_MKLDNN
        self.few = float("inf")
        if has_mkldnn and dtype == torch.float32:
            self.few = FEW if self.weight.numel() < LARGE else 1
        can_pack = dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.may_pack = has_mkldnn and can_pack and not self.weight.is_inference()  # those have no version

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, inputs) -> (n, outputs)"""
        if self.packed is not None:
            if self.version == self.weight._version:
                return torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
            self.packed = None  # a server's model was trained on, or adapters were merged into it
        self.uses += 1
        if self.uses == PACK_AFTER and self.may_pack and self.room.take(self.weight.nbytes):
            self.packed, self.version = torch.ops.mkldnn._reorder_linear_weight(self.weight), self.weight._version
        if len(rows) >= self.few:
            # Up to twice as fast as what `F.linear` calls, which is better for one row and a small weight, or for many.
            return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        if self.bias is None:
            return torch.mm(rows, self.transposed)
        return torch.addmm(self.bias, rows, self.transposed)


class RMSNorm(NamedTuple):
    weight: torch.Tensor
    epsilon: float

    def normalised(self, rows: torch.Tensor) -> torch.Tensor:
        """Without the weight.  (..., D) -> same"""
        # Halves are rounded where LlamaRMSNorm rounds them: before they are weighted.
        return F.rms_norm(rows.float(), self.weight.shape, eps=self.epsilon).to(rows.dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.weight * self.normalised(rows)


class OffsetRMSNorm(NamedTuple):
    """Gemma's, which multiplies by 1 + weight and rounds after that."""

    weight: torch.Tensor
    epsilon: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(rows.float(), self.weight.shape, 1.0 + self.weight.float(), self.epsilon).to(rows.dtype)


class HeadNorm(NamedTuple):
    """Chameleon's QK-norm, of (n, H, d)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(heads, heads.shape[-1:], eps=1e-5) * self.weight + self.bias


class FeedForwardRows(NamedTuple):
    """SwiGLU, of (n, D)."""

    gate: Callable
    up: Callable
    down: Callable
    activation: Callable

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate(rows)) * self.up(rows))


class TowerLayer(NamedTuple):
    """What one tower has of one layer."""

    attention_norm: Callable
    query: Callable
    key: Callable
    value: Callable
    output: Callable
    query_norm: Callable | None
    key_norm: Callable | None
    feed_forward_norm: Callable
    feed_forward: Callable


class _NotPlain(Exception):
    """A module does more than its class says."""


def _ours(module: nn.Module) -> nn.Module:
    if not is_of_this_package(module):
        raise _NotPlain
    return module


class _Reader:
    """Takes weights out of modules that are plain, of one type and on one device; others are themselves what is read."""

    def __init__(self, like: torch.Tensor):
        self.kind, self.room = (like.dtype, like.device), _Room(PACKED_BYTES)

    def _takes(self, *tensors: torch.Tensor | None) -> bool:
        return all(type(x) is nn.Parameter and (x.dtype, x.device) == self.kind for x in tensors if x is not None)

    def linear(self, module: nn.Module) -> Callable:
        if is_plain_linear(module) and self._takes(module.weight, module.bias):
            return Linear(module, self.room)
        return module

    def norm(self, module: nn.Module | None) -> Callable | None:
        if module is None:
            return None
        if is_plain(module, MoTHeadLayerNorm) and self._takes(module.weight, module.bias):
            return HeadNorm(module.weight, module.bias)
        if is_plain(module, LlamaRMSNorm) and self._takes(module.weight):
            return RMSNorm(module.weight, module.variance_epsilon)
        if is_plain(module, GemmaRMSNorm) and self._takes(module.weight):
            return OffsetRMSNorm(module.weight, module.eps)
        return module

    def feed_forward(self, module: nn.Module) -> Callable:
        if not is_plain(module, FeedForward):
            return partial(module, token_choice=True)
        activation = F.silu if is_plain(module.act_fn, SiLUActivation, nn.SiLU) else module.act_fn
        return FeedForwardRows(*map(self.linear, (module.gate_proj, module.up_proj, module.down_proj)), activation)


class LeanDecoder:
    """The cached one-token step of a `MoTForCausalLM` or `MoTTransfusionModel`."""

    def __init__(self, model: nn.Module):
        config, transformer = model.config, model.model
        if not keeps_methods(_ours(model), *STEP_METHODS) or not keeps_methods(_ours(transformer), "modality_ids_of"):
            raise _NotPlain
        self.config, self.rotary = config, transformer.rotary_emb
        if not is_plain(self.rotary, MoTRotaryEmbedding):
            raise _NotPlain
        is_supported = config._attn_implementation in ATTENTION and self.rotary.rope_type in STATIC_ROPE
        if not is_supported or model.training or autocast_dtype(model.device.type) is not None:
            raise _NotPlain
        self.heads, self.key_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        table = transformer.embed_tokens
        if not is_plain(table, nn.Embedding, GemmaTextScaledWordEmbedding):
            raise _NotPlain
        embedding, self.embedding_scale = table.weight, getattr(table, "embed_scale", None)
        # Attention of one query over keys in half precision takes five times as long on a CPU.
        self.cache_dtype = torch.float32 if embedding.device.type == "cpu" else embedding.dtype
        reader, self.embedding = _Reader(embedding), embedding
        self.layers = [self._read(reader, layer) for layer in transformer.layers[: config.num_hidden_layers]]
        self.norms = [reader.norm(norm) for norm in self._of_towers(transformer.norm, "norm")]
        self.head = reader.linear(model.lm_head)
        ids = torch.arange(len(embedding), device=embedding.device)
        towers = torch.tensor(config.tower_of_modality, device=ids.device)
        # Of one tower there is nothing to look up, and such a model may have no ranges.
        self.tower_of = towers[transformer.modality_ids_of(ids)] if len(config.tower_names) > 1 else None
        self.cosines = self.sines = embedding.new_empty(0, 1, self.head_dim)

    @classmethod
    def of(cls, model: nn.Module) -> "LeanDecoder | None":
        """None where the model has to be run by its own forward."""
        try:
            return None if nn.modules.module._has_any_global_hook() else cls(model)
        except _NotPlain:
            return None

    def _of_towers(self, module: nn.Module, part: str) -> list[nn.Module]:
        _ours(module)
        return [module[tower if part in self.config.untied else "shared"] for tower in self.config.tower_names]

    def _read(self, reader: _Reader, layer: nn.Module) -> list[TowerLayer]:
        """-> one for each tower"""
        attention = _ours(_ours(layer).self_attn)

        def attending(name, read):
            module = getattr(attention, name, None)
            towers = self.config.tower_names
            return [None] * len(towers) if module is None else map(read, self._of_towers(module, "attention"))

        return [
            TowerLayer(*parts)
            for parts in zip(
                map(reader.norm, self._of_towers(layer.input_layernorm, "norm")),
                *(attending(f"{name}_proj", reader.linear) for name in "qkvo"),
                *(attending(f"{name}_norm", reader.norm) for name in "qk"),
                map(reader.norm, self._of_towers(layer.post_attention_layernorm, "norm")),
                map(reader.feed_forward, self._of_towers(layer.mlp, "feed_forward")),
            )
        ]

    # ------------------------------------------------------------------------------------------------------ a step

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, positions: list[int], cache: DecodingCache) -> torch.Tensor:
        """Run one token for each of the first n sequences of a cache.  (n,) -> logits (n, V)"""
        count = len(positions)
        routing = self._routing(tokens)
        towers, counts, order, inverse = routing
        hidden_states = F.embedding(tokens if order is None else tokens[order], self.embedding)
        if self.embedding_scale is not None:
            hidden_states = hidden_states * self.embedding_scale.to(hidden_states.dtype)
        angles, columns = self._angles(positions), cache.open(count)

        def residual(rows, norms, block):
            if self.config.norm_position == "pre":
                return rows + _joined(block(_normed(norms, rows, counts)))
            return rows + _joined(_normed(norms, _joined(block(_split(rows, counts))), counts))

        for index, layer in enumerate(self.layers):
            own = [layer[tower] for tower in towers]
            attention = partial(self._attention, index, own, routing, angles, columns)
            hidden_states = residual(hidden_states, [tower.attention_norm for tower in own], attention)
            feed_forward = partial(_feed_forward, own)
            hidden_states = residual(hidden_states, [tower.feed_forward_norm for tower in own], feed_forward)
        hidden_states = _joined(_normed([self.norms[tower] for tower in towers], hidden_states, counts))
        hidden_states = hidden_states if inverse is None else hidden_states.index_select(0, inverse)
        if isinstance(self.head, Linear):
            return self.head(hidden_states)
        return self.head(hidden_states.unsqueeze(1)).squeeze(1)  # in the shape that it knows

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

    def _attention(self, index, own, routing, angles, columns, parts) -> list[torch.Tensor]:
        _, counts, order, inverse = routing
        heads = _joined([self._projected(tower, part) for tower, part in zip(own, parts)])
        heads = heads if inverse is None else heads.index_select(0, inverse)
        heads = heads.view(len(heads), -1, self.head_dim)
        turned, value = heads[:, : self.heads + self.key_heads], heads[:, self.heads + self.key_heads :]
        cosines, sines = angles
        if index not in self.config.layers_without_rope:
            turned = turned * cosines + turned.roll(self.head_dim // 2, -1) * sines
        keys, values = columns.write(index, turned[:, self.heads :], value)
        # The queries that share a key head stand as the rows of one query.
        query = turned[:, : self.heads].unflatten(1, (self.key_heads, -1)).to(keys.dtype)
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=columns.mask)
        output = output.reshape(len(heads), -1).to(heads.dtype)
        parts = [output] if order is None else output.index_select(0, order).split(counts)
        return [tower.output(part) for tower, part in zip(own, parts)]

    def _projected(self, tower: TowerLayer, rows: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values.  (n, D) -> (n, (H + 2 K) * d)"""
        query, key = tower.query(rows), tower.key(rows)
        if self.config.qk_norm == "rms_all_heads":
            query, key = tower.query_norm(query), tower.key_norm(key)
        elif tower.query_norm is not None:
            query = tower.query_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(1)
            key = tower.key_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(1)
        return torch.cat([query, key, tower.value(rows)], dim=-1)


def _normed(norms: list[Callable], rows: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """Each tower's norm of its rows; what does not depend on the weights is computed once for all.  (n, D) -> parts"""
    if len(norms) > 1 and all(type(norm) is RMSNorm for norm in norms):
        return [norm.weight * part for norm, part in zip(norms, norms[0].normalised(rows).split(counts))]
    return [norm(part) for norm, part in zip(norms, _split(rows, counts))]


def _feed_forward(own: list[TowerLayer], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tower.feed_forward(part) for tower, part in zip(own, parts)]


def _split(rows: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    return rows.split(counts) if len(counts) > 1 else [rows]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class ForwardDecoder:
    """The same step by the model's own forward."""

    cache_dtype = None  # the model's

    def __init__(self, model: nn.Module):
        self.model = model

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, positions: list[int], cache: DecodingCache) -> torch.Tensor:
        """Run one token for each of the first n sequences of a cache.  (n,) -> logits (n, V)"""
        columns = cache.open(len(positions))
        ids = tokens[:, None]
        outputs = self.model.model(
            input_ids=ids,
            modality_ids=self.model.model.modality_ids_of(ids) if len(self.model.config.modalities) > 1 else None,
            attention_mask=columns.visible(),
            position_ids=torch.tensor(positions, device=ids.device)[:, None],
            past_key_values=columns.as_cache(),
        )
        return self.model.lm_head(outputs.last_hidden_state[:, -1])


def decoder_of(model: nn.Module) -> LeanDecoder | ForwardDecoder:
    """What makes the steps of several sequences that are not in step with each other.

    Raises:
        ValueError: a derived class, or an adapter, prepares the inputs of each step, which these steps do not ask.
    """
    for name in STEP_METHODS:
        if not keeps_methods(model, name):
            raise ValueError(
                f"{name} of this {type(model).__name__} is not the package's own, and neither pictures that are diffused "
                "nor served requests ask it at each step; leave it as it is, or use generate() of a model of tokens"
            )
    return LeanDecoder.of(model) or ForwardDecoder(model)


def is_plain_dynamic(cache: Cache | None) -> bool:
    """Whether a cache holds all keys and values of all layers, and nothing else."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
