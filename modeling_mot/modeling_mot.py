"""Mixture-of-Transformers (arXiv 2411.04996): one transformer whose weights depend on the modality of a token.

Text, images and speech stand in one sequence. Every modality has a *tower*: attention projections, feed-forward and
norms of its own, all parameters but the embeddings and the head (paper, section 2.2). Each token passes through the
weights of its tower alone, so a token costs as many FLOPs as in a dense transformer of one tower's size. One
self-attention over the whole sequence joins the towers. With m_i the modality of token i, a layer is (equation 2)

    a        = GlobalAttn(x, {theta_attn of every modality})
    h_i      = x_i + Norm_attn of m_i (a_i)
    output_i = h_i + Norm_ffn of m_i (FFN of m_i (h_i))

The code is Llama's with one argument more, `routing`. Two classes of tower_routing.py carry the modality:

- `ModalityRouting` knows which tokens belong to which tower. `routing.sort` makes the tokens of each tower contiguous,
  (B, L, D) -> (T, D), and `routing.restore` puts tokens back into the order of the sequence.
- `PerTower` holds a module for each tower and runs each on the tokens of its tower: `(rows, routing) -> rows`, where
  rows are sorted by tower. `TowerNorms` is the `PerTower` of norms.

The file is read from top to bottom, from the smallest part to the whole model:

1. `Rotary`: positions, as in Llama.
2. `MoTAttention`: equation 3, lines 6 to 11 of Algorithm 1.
3. `MoTDecoderLayer`: equation 2, lines 12 to 14 of Algorithm 1.
4. `MoTModel`: embeddings, grouping by modality (lines 3 to 5), all layers, the final norm.
5. `MoTForCausalLM`: every modality as tokens of one vocabulary (the Chameleon setting, sections 3.2 and 3.3).

Images that are diffused (the Transfusion setting, section 3.4) are in modeling_mot_transfusion.py. Which modalities
share a tower, which parts are untied and which towers are mixtures of experts is said by `MoTConfig`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm, GemmaTextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, eager_attention_forward, rotate_half
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_masks import (
    RANGES,
    AttentionPlan,
    ImageBlocks,
    TowerSight,
    attention_mask_for,
    flash_documents,
    plan_attention,
    positions_of,
    takes_plan,
    tokens_of,
)
from .checks_arguments import (
    CACHE,
    CacheNamesMixin,
    behind_virtual_tokens,
    check_forward,
    check_ids,
    check_items,
    check_keywords,
    check_labels,
    check_logits_to_keep,
    check_plans,
    check_tokens,
    own_modalities,
    takes_both_names,
)
from .configuration_mot import MoTConfig
from .generation_mot import MoTGenerationMixin
from .hub_push import CheckpointMixin
from .loss_tokens import token_losses, token_losses_without_logits
from .tower_experts import ExpertChoiceFeedForward
from .tower_routing import (
    TOWER_PRODUCTS,
    ModalityRouting,
    MoTHeadLayerNorm,
    PerTower,
    TowerNorms,
    feed_forward,
    qk_norm,
    rms_norm,
    tower_norms,
    without_cast,
)


# B batch, L row length, T = B * L tokens, D hidden size (of the widest tower), H heads of size d, V vocabulary


# ------------------------------------------------------------------------------------------------- 1. positions (RoPE)


class MoTRotaryEmbedding(LlamaRotaryEmbedding):
    """Compute RoPE's angles as Llama does. A cast of the model leaves the frequencies in float32.

    In bfloat16 far positions would turn by wrong angles.

    Example:

        >>> import torch
        >>> from modeling_mot import MoTConfig
        >>> config = MoTConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        >>> rotary = MoTRotaryEmbedding(config).to(torch.bfloat16)
        >>> rotary.inv_freq.dtype
        torch.float32
        >>> cosines, sines = rotary(torch.zeros(1, 5, 32), position_ids=torch.arange(5)[None])
        >>> cosines.shape
        torch.Size([1, 5, 8])
    """

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute cosines and sines: (B, L), or (3, B, L) of time, row and column -> (B, L, d) twice"""
        if position_ids.dim() == 2:  # on three axes, all three are the same
            return super().forward(x, position_ids)
        frequencies = self.inv_freq.to(x.device, torch.float32)
        time, *others = position_ids.float().unsqueeze(-1)
        # Rows and columns take two of three frequencies, as far as their sections go; time has all others (Qwen3-VL).
        angles = time * frequencies
        for axis, (positions, count) in enumerate(zip(others, self.config.rope_parameters["mrope_section"][1:]), 1):
            taken = slice(axis, 3 * count, 3)
            angles[..., taken] = positions * frequencies[taken]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def _apply(self, function, recurse=True):
        return super()._apply(without_cast(function), recurse)


class Rotary(torch.autograd.Function):
    """RoPE as transformers' Llama computes it. The backward turns the other way, in as many operations.

    Example:

        >>> import torch
        >>> heads, angles = torch.randn(1, 4, 5, 8), torch.rand(1, 1, 5, 4).repeat(1, 1, 1, 2)
        >>> turned = Rotary.apply(heads, angles.cos(), angles.sin())
        >>> torch.allclose(turned.norm(dim=-1), heads.norm(dim=-1), atol=1e-5)  # a turn keeps lengths
        True
    """

    @staticmethod
    def forward(heads, cosines, sines):
        return heads * cosines + rotate_half(heads) * sines

    @staticmethod
    def setup_context(ctx, inputs, output):
        heads, cosines, sines = inputs
        ctx.save_for_backward(cosines, sines)
        ctx.dtype = heads.dtype

    @staticmethod
    def backward(ctx, grad):
        cosines, sines = ctx.saved_tensors
        return (grad * cosines - rotate_half(grad * sines)).to(ctx.dtype), None, None


# -------------------------------------------------------------------------------------------------------- 2. attention


class MoTAttention(nn.Module):
    """Each tower projects its own tokens; one attention runs over the tokens of all towers (equation 3).

    Example:

        >>> import torch
        >>> from modeling_mot import ModalityRouting, MoTConfig
        >>> config = MoTConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        ...                    modalities=["text", "image"], attn_implementation="sdpa")
        >>> routing = ModalityRouting.from_modality_ids(torch.tensor([[0, 1, 1, 0, 1]]), config)
        >>> attention = MoTAttention(config, layer_idx=0)
        >>> sorted(attention.q_proj)
        ['image', 'text']
        >>> angles = MoTRotaryEmbedding(config)(torch.zeros(1, 5, 32), position_ids=torch.arange(5)[None])
        >>> rows = routing.sort(torch.randn(1, 5, 32))
        >>> attention(rows, routing, angles)[0].shape
        torch.Size([5, 32])
    """

    def __init__(self, config: MoTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.has_rope = layer_idx not in config.layers_without_rope

        # Every projection and QK-norm is one module for each tower, or one named `shared`.
        own_qkv, own_output = config.part_names("query_key_value"), config.part_names("attention")
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        widths, tower = config.tower_widths, config.tower_config

        def project(heads):
            outputs, bias = heads * self.head_dim, config.attention_bias
            modules = {name: nn.Linear(tower(name).hidden_size, outputs, bias=bias) for name in own_qkv}
            return PerTower(modules, reads=widths)

        def project_back(heads):
            inputs, bias = heads * self.head_dim, config.attention_output_bias
            modules = {name: nn.Linear(inputs, tower(name).hidden_size, bias=bias) for name in own_output}
            return PerTower(modules, writes=widths)

        self.q_proj = project(heads)
        self.k_proj = project(key_heads)
        self.v_proj = project(key_heads)
        self.o_proj = project_back(heads)
        self.norms_each_head = "rms_all_heads" not in config.qk_norm_kinds
        if config.qk_norm_kinds:
            self.q_norm = TowerNorms({name: qk_norm(tower(name), heads) for name in own_output})
            self.k_norm = TowerNorms({name: qk_norm(tower(name), key_heads) for name in own_output})
        if config.cross_key_norm:
            own = {name: rms_norm(tower(name), self.head_dim) for name in config.cross_key_norm}
            self.k_norm_cross = PerTower({name: nn.Identity() for name in own_output} | own)

    def forward(
        self,
        hidden_states: torch.Tensor,
        routing: ModalityRouting,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend: (T, D) sorted by tower -> (T, D) and the weights (B, H, L, past + L) if they exist."""
        # Each tower projects its own tokens (Algorithm 1, line 6); the heads then stand in the order of the sequence
        # (line 8).
        batch_size = position_embeddings[0].shape[0]
        query = self._heads(self.q_proj(hidden_states, routing), getattr(self, "q_norm", None), routing, batch_size)
        key = self._heads(self.k_proj(hidden_states, routing), getattr(self, "k_norm", None), routing, batch_size)
        value = self._heads(self.v_proj(hidden_states, routing), None, routing, batch_size)
        crossing = self._crossing(key, routing) if self.config.cross_key_norm else None
        if self.has_rope:
            angles = [of_head.unsqueeze(1) for of_head in position_embeddings]
            query, key = Rotary.apply(query, *angles), Rotary.apply(key, *angles)
            crossing = None if crossing is None else Rotary.apply(crossing, *angles)
        if crossing is not None:
            key = self._of_readers(key, crossing, routing)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        # One attention over the tokens of all towers (line 9).
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        kwargs |= {"dropout": self.config.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        if crossing is None:
            output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        else:
            output, weights = self._read(attend, query, key, value, attention_mask, routing, **kwargs)

        # Sorted by tower again, each tower projects its own tokens (line 11).
        # Engines that keep the keys themselves, as vLLM does, give the rows back without the batch.
        output = output.reshape(batch_size, query.shape[2], -1)
        return self.o_proj(routing.sort(output), routing), weights

    def _heads(self, projected, norm, routing, batch_size):
        """Cut rows sorted by tower into heads in the order of the sequence.  (T, H * d) -> (B, H, L, d)"""
        if norm is not None:
            heads = projected.unflatten(-1, (-1, self.head_dim)) if self.norms_each_head else projected
            projected = norm(heads, routing).flatten(1)
        return routing.restore(projected, batch_size).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    # With `cross_key_norm` each tower reads keys of its own: those of its tokens as they are, the others normed again.

    def _crossing(self, key, routing):
        """Norm keys for the tokens of other towers.  (B, H, L, d) -> the same"""
        normed = self.k_norm_cross(routing.sort(key.transpose(1, 2)), routing)
        return routing.restore(normed, len(key)).transpose(1, 2)

    def _of_readers(self, key, crossing, routing):
        """Join the keys that each tower reads, as a cache keeps them.  (B, H, L, d) twice -> (B, H, L, towers * d)"""
        towers = routing.tower_ids(len(key), key.device)[:, None, :, None]
        return torch.cat([torch.where(towers == tower, key, crossing) for tower in range(len(routing.towers))], dim=-1)

    def _read(self, attend, query, key, value, attention_mask, routing, **kwargs):
        """Attend once for each tower, with the keys that it reads.  -> (B, L, H, d), and the weights if they exist"""
        output = weights = None
        towers = routing.tower_ids(len(query), query.device)
        for tower, (count, keys) in enumerate(zip(routing.counts, key.chunk(len(routing.towers), dim=-1))):
            if count or torch.is_grad_enabled():
                outputs, of_keys = attend(self, query, keys.contiguous(), value, attention_mask, **kwargs)
                mine = towers == tower
                output = outputs if output is None else torch.where(mine[:, :, None, None], outputs, output)
                weights = of_keys if weights is None else torch.where(mine[:, None, :, None], of_keys, weights)
        return output, weights


# ------------------------------------------------------------------------------------------------------------ 3. layer


class MoTDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward with residuals: equation 2, or Llama's order of the same parts.

    `norm_position="post"` is equation 2, with each norm after its block; `"pre"`, the default, is Llama's.

    Example:

        >>> import torch
        >>> from modeling_mot import ModalityRouting, MoTConfig
        >>> config = MoTConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        ...                    modalities=["text", "image"], attn_implementation="sdpa")
        >>> routing = ModalityRouting.from_modality_ids(torch.tensor([[0, 1, 1, 0, 1]]), config)
        >>> layer = MoTDecoderLayer(config, layer_idx=0).eval()
        >>> angles = MoTRotaryEmbedding(config)(torch.zeros(1, 5, 32), position_ids=torch.arange(5)[None])
        >>> rows = torch.randn(1, 5, 32)
        >>> by_tower = layer(routing.sort(rows), routing, angles)  # (T, D), as inside of a model
        >>> in_sequence = layer(rows, routing, angles)  # (B, L, D)
        >>> torch.equal(routing.restore(by_tower, 1), in_sequence)
        True
    """

    def __init__(self, config: MoTConfig, layer_idx: int):
        super().__init__()
        self.config = config

        feed_forwards = {}
        for name in config.part_names("feed_forward"):
            build = ExpertChoiceFeedForward if name in config.moe_towers else feed_forward
            feed_forwards[name] = build(config.tower_config(name))
        self.self_attn = MoTAttention(config, layer_idx)
        self.mlp = PerTower(feed_forwards, config.moe_towers, reads=config.tower_widths, writes=config.tower_widths)
        self.input_layernorm = tower_norms(config)
        self.post_attention_layernorm = tower_norms(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    @takes_both_names
    def forward(
        self,
        hidden_states: torch.Tensor,
        routing: ModalityRouting,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Run the layer: (T, D) sorted by tower -> the same; or (B, L, D) in the order of the sequence -> the same."""
        # Checkpointing, offloading and hooks expect one tensor in and one tensor out. It is in the order of the
        # sequence, (B, L, D), if the model records the hidden states of its layers.
        in_sequence_order = hidden_states.dim() == 3
        rows = routing.sort(hidden_states) if in_sequence_order else hidden_states

        def attend(rows):
            return self.self_attn(rows, routing, position_embeddings, attention_mask, past_key_values, **kwargs)[0]

        def feed_forward(rows):
            return self.mlp(rows, routing)

        rows = rows + self.dropout(self._normed(attend, self.input_layernorm, rows, routing))
        rows = rows + self.dropout(self._normed(feed_forward, self.post_attention_layernorm, rows, routing))
        return routing.restore(rows, hidden_states.shape[0]) if in_sequence_order else rows

    def _normed(self, block, norm, rows, routing):
        # The paper normalises after the block. Before it is the default, because a dense Llama then becomes a MoT
        # with identical logits.
        if self.config.norm_position == "pre":
            return block(norm(rows, routing))
        return norm(block(rows), routing)


# ------------------------------------------------------------------------------------------------------------ 4. model


class MoTPreTrainedModel(CacheNamesMixin, CheckpointMixin, PreTrainedModel):
    """The base class of all MoT models: flags for transformers, initial weights, and the choice of tower products.

    Loading and saving is in `CheckpointMixin` (hub_push.py). `CacheNamesMixin` (checks_arguments.py) lets forwards take
    `past_key_values` by the name `cache` too, as transformers has called it since 5.24.

    Examples:

        >>> from modeling_mot import MoTConfig, MoTModel, MoTPreTrainedModel
        >>> model = MoTModel(MoTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
        >>> isinstance(model, MoTPreTrainedModel)
        True
        >>> model.set_tower_products("batched_mm")  # the towers' products of each part as one
    """

    config_class = MoTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MoTDecoderLayer, "attentions": MoTAttention}

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MoTHeadLayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, GemmaRMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, GemmaTextScaledWordEmbedding):
            init.constant_(module.embed_scale, module.scalar_embed_scale)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Choose the attention as transformers does, but default to "mot_ranges", which runs from a plan if it can."""
        return super().get_correct_attn_implementation(requested_attention or RANGES, is_init_check)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Resize as transformers does. Rows that only pad the `new_num_tokens` tokens are never sampled."""
        tokens = self.config.tokenizer_vocab_size or self.config.vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        tokens = tokens if new_num_tokens is None else int(new_num_tokens)
        self.config.tokenizer_vocab_size = tokens if tokens < self.config.vocab_size else None
        return embeddings

    def set_tower_products(self, products: str) -> None:
        """Choose how the linear maps of several towers are run; the numbers are the same but for rounding.

        Args:
            products: `"separate"`, a product for each tower, the default; `"batched_mm"`, one padded and batched
                product, for balanced towers (paper, section 6.3); `"grouped_mm"`, in bfloat16, for devices with a fast
                kernel. Maps that are more than linear (adapters, hooks, quantised or sharded weights, mixtures) run
                one by one.

        Raises:
            ValueError: another word.
        """
        if products not in TOWER_PRODUCTS:
            raise ValueError(f"tower products {products!r} are unknown; there are {', '.join(TOWER_PRODUCTS)}")
        for module in self.modules():
            if isinstance(module, PerTower):
                module.products = products


class MoTModel(MoTPreTrainedModel):
    """The transformer without a head.

    Examples:

        >>> import torch
        >>> from modeling_mot import MoTConfig, MoTModel
        >>> config = MoTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> model = MoTModel(config)
        >>> input_ids = torch.tensor([[5, 9, 40, 41, 42, 7]])
        >>> modality_ids = torch.tensor([[0, 0, 1, 1, 1, 0]])  # indices into config.modalities: text, image
        >>> model(input_ids, modality_ids=modality_ids).last_hidden_state.shape
        torch.Size([1, 6, 32])
    """

    def __init__(self, config: MoTConfig):
        super().__init__(config)
        self.width = config.widest_hidden_size
        embedding = (config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.embedding_multiplier == 1:
            self.embed_tokens = nn.Embedding(*embedding)
        else:
            self.embed_tokens = GemmaTextScaledWordEmbedding(*embedding, embed_scale=config.embedding_multiplier)
        self.layers = nn.ModuleList(MoTDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = tower_norms(config)
        self.rotary_emb = MoTRotaryEmbedding(config)
        self.gradient_checkpointing = False
        offer_adapter_targets(config.model_type)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        modality_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        routing: ModalityRouting | None = None,
        attention_plan: AttentionPlan | None = None,
        image_blocks: ImageBlocks | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run all layers. The parameters up to `use_cache` are Llama's, in its order.

        Args:
            input_ids: (B, L); or `inputs_embeds`: (B, L, D).
            attention_mask: (B, past + L) 1 for tokens, 0 for padding; or a 4-D mask.
            position_ids: (B, L); consecutive by default, from 0 in each document when `document_ids` are given. With
                RoPE of three axes also (3, B, L), which may be floats: time, row and column of each token.
            modality_ids: (B, L) indices into `config.modalities`; derived from `config.modality_token_ranges` when
                absent. Beside `inputs_embeds` they may be those of the last embeddings: the embeddings before these are
                virtual tokens, as prompt tuning makes them, and count as text. With `config.unseen_towers` and a
                filled cache they are needed for its keys as well: (B, past + L).
            document_ids: (B, L); tokens whose ids differ never see each other. Negative ids mark padding.
            routing: a `ModalityRouting` made ahead of the forward; `modality_ids` are then not read.
            attention_plan: an `AttentionPlan` of the same documents and images. If it is None, this forward makes it.
                If `routing` is given, this forward must not wait for the device, and plans causal rows only.
            image_blocks: `ImageBlocks` of all keys, (B, past + L): the tokens of an image see each other both ways.
            token_choice: route mixtures of experts by each token's choice, as generation does.
                Default: True if a cache is passed.
            kwargs: keywords that attention functions and libraries pass on; `checks_arguments.KEYWORDS` lists them.

        Returns:
            `last_hidden_state` is (B, L, D).

        Raises:
            ValueError: shapes or ids that do not fit, or embeddings whose tower is not known; the message names them.
            TypeError: an unknown keyword.
        """
        shape = batch_size, length = check_forward(
            self, kwargs, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, document_ids
        )
        check_plans(routing, attention_plan, image_blocks)
        continues_cache = past_key_values is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # Group the tokens by modality (Algorithm 1, lines 3 to 5). This waits for the device, so a plan may wait too.
        may_wait = routing is None and not torch.compiler.is_compiling()
        if routing is None:
            own = own_modalities(self.config, modality_ids, length, past_key_values)
            routing = self._routing(own, input_ids, shape)
        if routing.num_tokens != batch_size * length:
            raise ValueError(f"routing was made for {routing.num_tokens} tokens, the rows hold {batch_size * length}")

        # Between the layers the rows stay sorted by tower, or in the order of the sequence where they are recorded.
        record = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        hidden_states = inputs_embeds if record else routing.sort(inputs_embeds)

        # Make the attention mask, or the plan that stands for it. `rows` carries shape, dtype and device only.
        rows = hidden_states.new_empty(0).expand(batch_size, length, 0)
        # A jump of positions may begin a document; positions of three axes jump where an image begins.
        steps = position_ids if position_ids is not None and position_ids.dim() == 2 else None
        may_wait = may_wait and rows.device.type != "meta"  # where nothing can be read
        sight = None
        if self.config.unseen_towers and attention_plan is None:
            sight = self._sight(routing, modality_ids, shape, attention_mask, past_key_values)
        if attention_plan is None and may_wait and takes_plan(self.config, attention_mask, past_key_values):
            attention_plan = plan_attention(shape, steps, document_ids, image_blocks, sight)
        mask = attention_mask_for(
            self.config,
            rows,
            attention_mask,
            past_key_values,
            steps,
            document_ids,
            image_blocks,
            attention_plan,
            sight,
        )
        if document_ids is not None and self.config._attn_implementation.startswith("flash"):
            kwargs |= flash_documents(document_ids)

        # Compute the cosines and sines of RoPE for the position of each token.
        position_ids = positions_of(rows, position_ids, document_ids, past_key_values)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)

        # Mixtures of experts: in training the experts choose tokens, never padding. In decoding tokens choose experts.
        token_choice = kwargs.pop("token_choice", continues_cache)
        if self.config.moe_towers:
            is_token = None if token_choice else tokens_of(attention_mask, document_ids, length)
            routing = routing.for_experts(is_token, token_choice)

        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer in drafts with an early exit
            hidden_states = layer(
                hidden_states,
                routing,
                position_embeddings,
                attention_mask=mask,
                position_ids=position_ids if position_ids.dim() == 2 else None,  # attention that packs rows reads them
                **{CACHE: past_key_values},  # by this name gradient checkpointing leaves the cache out
                **kwargs,
            )

        # The final norm of each tower, then the order of the sequence.
        if record:
            hidden_states = routing.sort(hidden_states)
        hidden_states = routing.restore(self.norm(hidden_states, routing), batch_size)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: past_key_values})

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed tokens; all towers share the table, which is as wide as the tower of text.  (B, L) -> (B, L, D)

        Raises:
            ValueError: an id outside of the vocabulary.
        """
        try:
            return self.widen(self.embed_tokens(input_ids))
        except IndexError as error:
            raise ValueError(
                f"input_ids holds ids from {int(input_ids.min())} to {int(input_ids.max())}, outside the vocabulary of "
                f"vocab_size={self.config.vocab_size}; was the text tokenised for another model?"
            ) from error

    def widen(self, rows: torch.Tensor) -> torch.Tensor:
        """Put zeros behind rows that are narrower than the widest tower.  (..., width) -> (..., D)"""
        missing = self.width - rows.shape[-1]
        return F.pad(rows, (0, missing)) if missing else rows

    def modality_ids_of(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Find the modality of each token by the ranges of the vocabulary.  (B, L) -> (B, L)

        Raises:
            ValueError: the configuration has no ranges.
        """
        ranges = self.config.modality_token_ranges
        placeholders = self.config.placeholder_token_ids  # of a Transfusion model
        if ranges is None and (not placeholders or len(self.config.token_modalities) > 1):
            raise ValueError(
                "modality_ids were not passed and config.modality_token_ranges is None: pass modality_ids beside "
                "input_ids, or set modality_token_ranges to derive them"
            )
        modality_ids = torch.zeros_like(input_ids)
        for index, modality in enumerate(self.config.modalities[1:], start=1):
            if modality in placeholders:
                modality_ids = modality_ids.masked_fill(input_ids == placeholders[modality], index)
            else:
                first, end = ranges[modality]
                modality_ids = modality_ids.masked_fill((input_ids >= first) & (input_ids < end), index)
        return modality_ids

    def _routing(self, modality_ids, input_ids, shape):
        """Make the routing from the modalities that were passed, or from the vocabulary."""
        if modality_ids is None and len(self.config.tower_names) == 1:
            return ModalityRouting(tuple(self.config.tower_names), (shape[0] * shape[1],))
        if modality_ids is None and input_ids is None:
            raise ValueError(
                f"inputs_embeds came without modality_ids, and embeddings do not say which of the towers "
                f"{self.config.tower_names} they are for: pass modality_ids, (batch, length), beside them"
            )
        if modality_ids is None:
            modality_ids = self.modality_ids_of(input_ids)
        elif input_ids is None:
            modality_ids = behind_virtual_tokens(modality_ids, length=shape[1])
        check_ids("modality_ids", modality_ids, shape)
        return ModalityRouting.from_modality_ids(modality_ids, self.config)

    def _sight(self, routing, modality_ids, shape, attention_mask, past_key_values) -> TowerSight | None:
        """Find which towers see which, for the keys of the cache and of this forward; None if a 4-D mask says it."""
        if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2):
            return None
        towers = routing.tower_ids(shape[0], self.embed_tokens.weight.device)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past:
            if modality_ids is None or modality_ids.shape[1] != past + shape[1]:
                raise ValueError(
                    f"past_key_values holds {past} keys whose towers are not known, and unseen_towers="
                    f"{self.config.unseen_towers} hides some: pass modality_ids of all keys, "
                    f"{(shape[0], past + shape[1])}"
                )
            of_modality = torch.tensor(self.config.tower_of_modality, device=towers.device)
            towers = torch.cat([of_modality[modality_ids[:, :past].to(towers.device)], towers], dim=1)
        return TowerSight.of(self.config, towers)


# ------------------------------------------------------------------------------------- 5. head of the Chameleon setting


@dataclass
class MoTCausalLMOutputWithPast(CausalLMOutputWithPast):
    """The output of a causal language model, with the parts of its loss.

    Attributes:
        loss_sums: modality of the target -> sum of its cross-entropies, in nats.
        loss_counts: modality of the target -> number of its targets.
        z_loss_sum: sum over all targets of `z_loss_coefficient` * log(Z)^2.
            `loss` is (sum of `loss_sums` + `z_loss_sum`) / sum of `loss_counts`.

    Example:

        >>> import torch
        >>> from modeling_mot import MoTConfig, MoTForCausalLM
        >>> config = MoTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        ...                    modality_token_ranges={"text": [0, 48], "image": [48, 64]})
        >>> input_ids = torch.tensor([[5, 9, 50, 51, 7]])
        >>> output = MoTForCausalLM(config)(input_ids, labels=input_ids)
        >>> parts, counts = output.loss_sums.values(), output.loss_counts.values()
        >>> torch.allclose(output.loss, (sum(parts) + output.z_loss_sum) / sum(counts))
        True
    """

    loss_sums: dict[str, torch.Tensor] | None = None
    loss_counts: dict[str, torch.Tensor] | None = None
    z_loss_sum: torch.Tensor | None = None


class MoTForCausalLM(MoTPreTrainedModel, MoTGenerationMixin):
    """Every modality as tokens of one vocabulary, each predicted from the tokens before it (the Chameleon setting).

    Examples:

        >>> import torch
        >>> from modeling_mot import MoTConfig, MoTForCausalLM
        >>> ranges = {"text": [0, 48], "image": [48, 64]}  # 16 codes of an image tokenizer
        >>> config = MoTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...                    modality_token_ranges=ranges)
        >>> model = MoTForCausalLM(config)

        A training step on a row of text, four image codes and text; the loss has a part for each modality.

        >>> input_ids = torch.tensor([[5, 9, 50, 51, 60, 61, 7, 8]])
        >>> output = model(input_ids, labels=input_ids)
        >>> output.loss.backward()
        >>> output.logits.shape
        torch.Size([1, 8, 64])
        >>> {modality: int(count) for modality, count in output.loss_counts.items()}
        {'text': 3, 'image': 4}
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MoTConfig):
        super().__init__(config)
        self.model = MoTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        modality_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        routing: ModalityRouting | None = None,
        skip_logits: bool = False,
        **kwargs,
    ) -> MoTCausalLMOutputWithPast:
        """Predict the next token of every position.

        The arguments are those of `MoTModel.forward`; the ones up to `logits_to_keep` are Llama's, in its order. Added:

        Args:
            labels: (B, L) token ids, shifted inside by one; -100 is not a target, and any other label that is no token
                is refused.
            logits_to_keep: compute logits for the last so many positions only; 0 for all.
            skip_logits: return the losses alone. Logits then exist for a part of the tokens at a time, and only for
                tokens with a target.
            num_items_in_batch: divide the loss by this instead of by the number of targets here.
            shift_labels: (B, L) targets aligned with the logits already, instead of `labels`, as sequence parallelism
                passes them; their modalities follow from `config.modality_token_ranges`.

        Returns:
            `MoTCausalLMOutputWithPast`; `logits` are (B, L, V), or None.

        Raises:
            ValueError: labels that are no tokens, or logits that are neither wanted nor needed for a loss; the message
                names the arguments.
            TypeError: an unknown keyword.
        """
        # Labels move by one, so that the target of each position stands beside its logits.
        check_keywords(self, kwargs)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        shape = check_tokens(self.config, input_ids, inputs_embeds)
        own = own_modalities(self.config, modality_ids, shape[1], past_key_values)
        targets = targets_of(self, shape, labels, kwargs.pop("shift_labels", None), own)

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            modality_ids=modality_ids,
            document_ids=document_ids,
            routing=routing,
            **kwargs,
        )

        # One head for all modalities; the losses are summed by the modality of the target.
        logits, losses = logits_and_losses(
            self, outputs.last_hidden_state, targets, num_items_in_batch, logits_to_keep, skip_logits
        )
        return MoTCausalLMOutputWithPast(
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
            **losses,
        )


def targets_of(model, shape, labels, shift_labels, modality_ids) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Align targets with the logits, and find their modalities.  -> (B, L) both; None twice if there are no labels

    Args:
        shape: (B, L) of the tokens.
        labels: (B, L), to be shifted by one; or `shift_labels`, which are aligned already.
        modality_ids: (B, L) of the tokens; if None, modalities follow from the vocabulary.

    Raises:
        ValueError: labels of another shape, or that are neither tokens nor -100.
    """
    # Check.
    given = labels if shift_labels is None else shift_labels
    if given is None:
        return None, None
    check_ids("labels" if shift_labels is None else "shift_labels", given, shape)
    check_labels(given, model.config.vocab_size)
    given = given.long()

    # The modality of a target is that of its own token.
    if shift_labels is not None:
        return given, _modalities(model, given)
    of_labels = (
        _modalities(model, given) if modality_ids is None else behind_virtual_tokens(modality_ids, given.shape[1])
    )
    # The labels move, not the logits: the last position of a row has no target.
    return tuple(F.pad(ids[:, 1:], (0, 1), value=-100) for ids in (given, of_labels))


def _modalities(model, labels):
    """Find the modalities of labels by the vocabulary.  (B, L) -> (B, L)"""
    if model.config.modality_token_ranges is None and len(model.config.tower_names) == 1:
        return torch.zeros_like(labels)  # one tower and no ranges: all tokens count as text
    return model.model.modality_ids_of(labels)


def logits_and_losses(
    model, hidden_states, targets, num_items_in_batch, logits_to_keep, skip_logits
) -> tuple[torch.Tensor | None, dict]:
    """Compute logits unless they are skipped, and the losses of tokens if there are targets.

    Args:
        hidden_states: (B, L, D), of which the head reads as much as the tower of text is wide.
        targets: the pair of `targets_of`.
        num_items_in_batch, logits_to_keep, skip_logits: as in `MoTForCausalLM.forward`.

    Returns:
        (B, L or fewer, V) or None; and the losses of `token_losses`, or {}.

    Raises:
        ValueError: logits are skipped without targets or together with `logits_to_keep`, `logits_to_keep` holds no
            positions, or no loss can be divided by `num_items_in_batch`.
    """
    check_logits_to_keep(logits_to_keep, tuple(hidden_states.shape[:2]))
    logits_to_keep = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else int(logits_to_keep)
    check_items(num_items_in_batch)
    hidden_states = hidden_states[..., : model.config.hidden_size]
    targets, modality_ids = targets
    args = (targets, modality_ids, num_items_in_batch)
    if not skip_logits:
        logits = model.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        return logits, {} if targets is None else token_losses(model.config, logits, *args)
    if targets is None or torch.is_tensor(logits_to_keep) or logits_to_keep != 0:
        raise ValueError(
            "skip_logits=True leaves the losses alone: it needs labels, one per token, and logits_to_keep=0; "
            f"labels are {'absent' if targets is None else 'given'}, logits_to_keep={logits_to_keep}"
        )
    return None, token_losses_without_logits(model.config, hidden_states, model.lm_head, *args)


# ---------------------------------------------------------------------------------------------------- not architecture


_PROJECTIONS = frozenset(("q_proj", "k_proj", "v_proj", "o_proj"))


def offer_adapter_targets(model_type: str) -> None:
    """Give PEFT, where it is loaded, its default `target_modules` for this type of model.

    PEFT's defaults for Llama end in "q_proj", which here is a `PerTower`: a pattern names the towers' own modules.
    """
    if "peft" not in sys.modules:
        return
    for defaults in vars(import_module("peft.utils.constants")).values():
        if isinstance(defaults, dict) and _PROJECTIONS.issuperset(names := defaults.get("llama", ("",))):
            defaults.setdefault(model_type, rf".*\.self_attn\.({'|'.join(names)})\.[^.]+")


MoTModel.register_for_auto_class("AutoModel")
MoTForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MoTCausalLMOutputWithPast", "MoTForCausalLM", "MoTModel", "MoTPreTrainedModel"]
