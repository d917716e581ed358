"""Towers: which tokens belong to which (`ModalityRouting`), and a module for each of them (`PerTower`).

Tokens are sorted by tower once per forward, and the residual stream stays sorted through all layers. Norms, projections
and feed-forwards are then plain products on contiguous slices; only queries, keys and values go back to the order of
the sequence, for the global attention (paper, Algorithm 1 and section 6.1).

In reading order: the routing, a module for each tower, norms of all towers in one pass, linear maps of all towers in
one product, the tests of when such a short cut may stand in for a module, and the precision of tensors.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronMLP

from .configuration_mot import MoTConfig


# B batch, L row length, T = B * L tokens, T' rows of all towers with padding, D size of a row (the hidden size, or the
# widest tower's), H heads, K towers, F outputs of a linear map


# --------------------------------------------------------------------------------------------------------- the routing


class ModalityRouting(NamedTuple):
    """Which tokens of a forward belong to which tower (Algorithm 1, lines 3 to 5).

    A collator may build it ahead, so that the forward never waits for a device.

    Attributes:
        towers: names of the towers, in the order of `counts`.
        counts: rows of each tower, Python integers that sum to T' (T without padding).
        order: (T',) positions in the flattened rows, sorted by tower; None where one tower has all tokens.
        inverse: (T,) where each token stands among the sorted rows.
        padding: how many rows at the end of each tower's slice belong to no token.
        is_token: (T',) bool of the sorted rows, False for padding of the sequence, which does not compete for experts;
            None if tokens choose, if there are no mixtures of experts, or if nothing marks padding.
        token_choice: True if tokens choose their experts, as in generation; False if experts choose their tokens.

    Examples:

        >>> import torch
        >>> from modeling_mot import ModalityRouting, MoTConfig
        >>> modality_ids = torch.tensor([[0, 1, 1, 0]])  # text, image, image, text
        >>> routing = ModalityRouting.from_modality_ids(modality_ids, MoTConfig())
        >>> routing.towers, routing.counts
        (('text', 'image'), (2, 2))
        >>> rows = torch.tensor([[[10.0], [11.0], [12.0], [13.0]]])
        >>> routing.sort(rows).flatten().tolist()
        [10.0, 13.0, 11.0, 12.0]
        >>> torch.equal(routing.restore(routing.sort(rows), batch_size=1), rows)
        True
    """

    towers: tuple[str, ...]
    counts: tuple[int, ...]
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    padding: tuple[int, ...] = ()
    is_token: torch.Tensor | None = None
    token_choice: bool = False

    @classmethod
    def from_modality_ids(cls, modality_ids: torch.Tensor, config, multiple_of: int = 1) -> "ModalityRouting":
        """Sort tokens by tower; tokens of one tower keep their order.

        Args:
            modality_ids: (B, L) indices into `config.modalities`.
            config: a `MoTConfig`.
            multiple_of: pad each tower's slice with zero rows up to a multiple of this. The sizes of products then
                repeat from batch to batch, and kernels made for a size serve again. Outputs and gradients stay the
                same. Mixtures of experts are not padded: padding would compete with tokens.

        Raises:
            ValueError: an id that is not the index of a modality.
        """
        towers = tuple(config.tower_names)
        num_modalities = len(config.modalities)
        flat = modality_ids.flatten()
        if len(towers) == 1 and torch.compiler.is_compiling():
            return cls(towers, (flat.numel(),))  # a read of the ids would break the graph

        # Count. One wait for the device: the number of tokens of each modality, and of ids that are none.
        outside = ((flat < 0) | (flat >= num_modalities)).sum().unsqueeze(0)
        histogram = torch.bincount(flat.clamp(0, num_modalities - 1), minlength=num_modalities)
        *per_modality, strays = torch.cat([histogram, outside]).tolist()
        if strays:
            raise ValueError(
                f"modality_ids has {strays} ids outside 0..{num_modalities - 1}, from {int(flat.min())} to "
                f"{int(flat.max())}; they are indices into modalities={list(config.modalities)}"
            )
        counts = [0] * len(towers)
        for tower, count in zip(config.tower_of_modality, per_modality):
            counts[tower] += count
        if max(counts) == flat.numel():  # always so where there is one tower
            return cls(towers, tuple(counts))

        # Sort: tokens of the first tower first, then its padding, then tokens of the second.
        tower_of = torch.tensor(config.tower_of_modality, device=flat.device)
        tokens = torch.argsort(tower_of[flat], stable=True)
        mixtures = towers if "shared" in config.moe_towers else config.moe_towers
        padding = [0 if tower in mixtures else -count % multiple_of for tower, count in zip(towers, counts)]
        places = torch.cat(
            [
                torch.arange(count, device=flat.device) + sum(counts[:tower]) + sum(padding[:tower])
                for tower, count in enumerate(counts)
            ]
        )
        order = tokens.new_zeros(flat.numel() + sum(padding))
        order[places] = tokens
        inverse = torch.empty_like(tokens)
        inverse[tokens] = places
        return cls(towers, tuple(map(sum, zip(counts, padding))), order, inverse, tuple(padding))

    @property
    def num_tokens(self) -> int:
        return sum(self.counts) - sum(self.padding)

    def to(self, device) -> "ModalityRouting":
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}
        return self._replace(**{name: tensor.to(device) for name, tensor in tensors.items()})

    def sort(self, rows: torch.Tensor) -> torch.Tensor:
        """Make each tower's tokens contiguous.  (B, L, ...) -> (T, ...)"""
        flat = rows.flatten(0, 1)
        return flat if self.order is None else _Sort.apply(flat, self)

    def restore(self, rows: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Back to the order of the sequence.  (T, ...) -> (B, L, ...)"""
        if self.order is not None:
            rows = _Restore.apply(rows, self)
        return rows.unflatten(0, (batch_size, -1))

    def tower_ids(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """Return the index of each token's tower in the order of the sequence.  -> (B, L)"""
        of_towers = [torch.full((count,), tower, device=device) for tower, count in enumerate(self.counts)]
        return self.restore(torch.cat(of_towers), batch_size)

    def for_experts(self, is_token: torch.Tensor | None, token_choice: bool) -> "ModalityRouting":
        """Add the mask of padding and the direction of choice, which mixtures of experts read.

        Args:
            is_token: (B, L) bool, False for padding; or None where nothing is padded.
            token_choice: True if tokens choose their experts.
        """
        is_token = None if is_token is None else self.sort(is_token)
        return self._replace(is_token=is_token, token_choice=token_choice)

    def split(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cut sorted rows into the slices of the towers.  (T, D) -> {tower: (T_tower, D)}

        While gradients are on, a tower without tokens gets a slice of no rows and runs all the same: its parameters
        then have zero, not missing, gradients, and collectives match on every rank.
        """
        if len(self.towers) == 1:
            return {self.towers[0]: rows}
        slices = zip(self.towers, self.counts, rows.split(self.counts))
        return {tower: rows for tower, count, rows in slices if torch.is_grad_enabled() or count}


class _Sort(torch.autograd.Function):
    """Sort rows by tower, with zeros where a slice is padded.  (T, ...) -> (T', ...)"""

    @staticmethod
    def forward(rows, routing):
        out = rows.index_select(0, routing.order)
        end = 0
        for count, padding in zip(routing.counts, routing.padding):
            end += count
            if padding:
                out[end - padding : end] = 0
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.routing = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return _Restore.apply(grad, ctx.routing), None


class _Restore(torch.autograd.Function):
    """Put rows back into the order of the sequence.  (T', ...) -> (T, ...)

    `_Sort` and `_Restore` are each other's gradient: the gradient of a permutation is its inverse, a copy, where
    autograd's gradient of indexing would be a sum.
    """

    @staticmethod
    def forward(rows, routing):
        return rows.index_select(0, routing.inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.routing = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return _Sort.apply(grad, ctx.routing), None


# ------------------------------------------------------------------------------------------- a module for each tower


class PerTower(nn.ModuleDict):
    """One module for each tower, run on the tokens of its tower; or one module named `shared`, run on all tokens.

    Args:
        modules: tower -> its module, or {"shared": the one module of all towers}.
        mixtures: names of the modules that are mixtures of experts, which also take `is_token` and `token_choice`.
        reads, writes: tower -> its width, if towers differ in width and these modules read, or write, hidden states. A
            narrower tower's module gets the first values of its rows, and zeros stand behind its outputs.

    Attributes:
        products: `"separate"`, or how linear maps of several towers are run together; see `run_together`.

    Examples:

        >>> import torch
        >>> from modeling_mot import ModalityRouting, MoTConfig
        >>> from modeling_mot.tower_routing import PerTower
        >>> projection = PerTower({"text": torch.nn.Linear(4, 8), "image": torch.nn.Linear(4, 8)})
        >>> routing = ModalityRouting.from_modality_ids(torch.tensor([[0, 1, 1]]), MoTConfig())
        >>> rows = routing.sort(torch.randn(1, 3, 4))
        >>> outputs = projection(rows, routing)
        >>> outputs.shape
        torch.Size([3, 8])
        >>> torch.equal(outputs[1:], projection["image"](rows[1:]))
        True
    """

    products = "separate"

    def __init__(
        self,
        modules: dict[str, nn.Module],
        mixtures: Collection[str] = (),
        reads: Mapping[str, int] | None = None,
        writes: Mapping[str, int] | None = None,
    ):
        super().__init__(modules)
        self.mixtures = frozenset(mixtures)
        self.reads = dict(reads or {})
        self.writes = dict(writes or {})

    def __str__(self) -> str:
        """Name the modules that can be adapted, for PEFT's error about a module that cannot."""
        towers = list(self)
        names = ", ".join(f"'<name>.{tower}'" for tower in towers)
        return (
            f"of towers {towers}: adapters go to the towers' own modules, as target_modules=[{names}], or to those of "
            r"all towers by a pattern, as target_modules=r'.*\.(q_proj|v_proj)\.[^.]+'; this module, "
            f"{super().__str__()},"
        )

    def forward(self, rows: torch.Tensor, routing: ModalityRouting) -> torch.Tensor:
        """Run each tower's module on the rows of that tower.  (T, ...) sorted by tower -> (T, ...)"""
        if "shared" in self:
            return self._run("shared", rows, routing.is_token, routing.token_choice)
        parts = routing.split(rows)
        if self.products != "separate" and len(parts) > 1 and not self.reads and not self.writes:
            together = run_together([self[tower] for tower in parts], parts, self.products)
            if together is not None:
                return together
        is_token = {} if routing.is_token is None else routing.split(routing.is_token)
        outputs = [self._run(tower, part, is_token.get(tower), routing.token_choice) for tower, part in parts.items()]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _run(self, name, rows, is_token, token_choice):
        if self.reads:
            rows = rows[..., : self.reads[name]]
        out = self[name](rows, is_token, token_choice) if name in self.mixtures else self[name](rows)
        if self.writes and (missing := max(self.writes.values()) - self.writes[name]):
            out = F.pad(out, (0, missing))
        return out


def feed_forward(config: MoTConfig) -> nn.Module:
    """Build the feed-forward of one tower: Llama's, or one without a gate.

    Args:
        config: of the tower, as `MoTConfig.tower_config` gives it.
    """
    return LlamaMLP(config) if config.gated_mlp else NemotronMLP(config)


# --------------------------------------------------------------------------------------------------------------- norms


class MoTHeadLayerNorm(nn.Module):
    """Chameleon's QK-norm: LayerNorm over each head with weights of that head.  (T, H, D / H) -> the same"""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(heads, heads.shape[-1:], eps=1e-5) * self.weight + self.bias


def rms_norm(config: MoTConfig, size: int | None = None) -> nn.Module:
    """Build the norm of one tower: Llama's, or Gemma's with `norm_offset`.

    Args:
        config: of the tower, as `MoTConfig.tower_config` gives it.
        size: values that are normalised together; default: the tower's hidden size.
    """
    norm = GemmaRMSNorm if config.norm_offset else LlamaRMSNorm
    return norm(size or config.hidden_size, eps=config.rms_norm_eps)


def qk_norm(config: MoTConfig, num_heads: int) -> nn.Module:
    """Build the norm of one tower's queries or keys, as the tower's `config.qk_norm` says."""
    if config.qk_norm is None:
        return nn.Identity()  # beside towers that have one
    if config.qk_norm == "layer":
        return MoTHeadLayerNorm(num_heads, config.head_dim)
    return rms_norm(config, config.head_dim * (num_heads if config.qk_norm == "rms_all_heads" else 1))


def _rms_norm(rows, counts, epsilon, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the operations of LlamaRMSNorm in their order.  -> (T, ..., D), and 1 / RMS, (T, ..., 1)"""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    out = (wide * scale).to(rows.dtype).to(torch.promote_types(rows.dtype, weights[0].dtype))
    begin = 0
    for count, weight in zip(counts, weights):
        # Not views of `split`: an exported graph could not change these in place with gradients on.
        out.narrow(0, begin, count).mul_(weight)
        begin += count
    return out, scale


class _RMSNorm(torch.autograd.Function):
    """Normalise the rows of all towers at once. The backward takes half as many operations as autograd's would."""

    @staticmethod
    def forward(rows, counts, epsilon, *weights):
        return _rms_norm(rows, counts, epsilon, weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, ctx.counts, _, *weights = inputs
        _, scale = output
        ctx.mark_non_differentiable(scale)
        ctx.save_for_backward(rows, scale, *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        rows, scale, *weights = ctx.saved_tensors
        with autocast_off(rows.device.type):
            grad = grad.to(scale.dtype, copy=True)
            normalised = rows.to(scale.dtype) * scale
            products = grad * normalised
            # Of each tower: the gradient of its weight, and its part of the mean below.
            grad_weights, inner = [], []
            for part, product, weight in zip(grad.split(ctx.counts), products.split(ctx.counts), weights):
                grad_weights.append(product.flatten(0, -2).sum(0).to(weight.dtype))
                weight = weight.to(grad.dtype)
                inner.append(product @ weight)
                part *= weight
            # With the gradient g of the normalised rows x: (g - x mean(g x)) / RMS
            inner = torch.cat(inner).unsqueeze(-1)
            grad.addcmul_(normalised, inner, value=-1 / rows.shape[-1]).mul_(scale)
        return grad.to(rows.dtype), None, None, *grad_weights


class TowerNorms(PerTower):
    """The norms of all towers, or one named `shared`, in one pass over rows sorted by tower."""

    def forward(self, rows: torch.Tensor, routing: ModalityRouting) -> torch.Tensor:
        """Apply each tower to its rows: (T, ..., D) -> the same"""
        # One pass serves plain Llama norms of one width and epsilon only. Gemma's norms, and norms with hooks or
        # sharded weights, run singly.
        shared = "shared" in self
        norms = [self["shared"]] if shared else [self[tower] for tower in routing.towers]
        if self.reads or not all(is_plain(norm, LlamaRMSNorm) and has_whole_weight(norm) for norm in norms):
            return super().forward(rows, routing)
        counts = (len(rows),) if shared else routing.counts
        epsilon, weights = norms[0].variance_epsilon, [norm.weight for norm in norms]
        if any(norm.variance_epsilon != epsilon for norm in norms):
            return super().forward(rows, routing)
        if torch.is_grad_enabled():
            return _RMSNorm.apply(rows, counts, epsilon, *weights)[0]
        return _rms_norm(rows, counts, epsilon, weights)[0]


def tower_norms(config: MoTConfig) -> TowerNorms:
    """Build the norms of all towers' hidden states, or the one named `shared`."""
    norms = {name: rms_norm(config.tower_config(name)) for name in config.part_names("norm")}
    return TowerNorms(norms, reads=config.tower_widths, writes=config.tower_widths)


# ------------------------------------------------------------------------------------ linear maps of all towers at once


TOWER_PRODUCTS = ("separate", "batched_mm", "grouped_mm")


class _Batched:
    """Rows of each tower, padded to the longest."""

    def __init__(self, parts: dict[str, torch.Tensor]):
        self.counts = [len(rows) for rows in parts.values()]
        self.rows = nn.utils.rnn.pad_sequence(list(parts.values()), batch_first=True)  # (K, longest, D)

    def linear(self, rows: torch.Tensor, modules: list[nn.Linear]) -> torch.Tensor:
        weight = torch.stack([module.weight for module in modules]).mT  # (K, D, F)
        if modules[0].bias is None:
            return torch.bmm(rows, weight)
        return torch.baddbmm(torch.stack([module.bias for module in modules])[:, None], rows, weight)

    def unpadded(self, rows: torch.Tensor) -> torch.Tensor:
        """Drop the padding: (K, longest, F) -> (T, F)"""
        return torch.cat([of_tower[:count] for of_tower, count in zip(rows.unbind(), self.counts)])


class _Grouped:
    """Rows of each tower, one after another."""

    def __init__(self, parts: dict[str, torch.Tensor]):
        self.rows = torch.cat(list(parts.values()))  # (T, D)
        self.rows = self.rows.to(_dtype_of_products(self.rows))  # autocast does not know this product
        ends = accumulate(len(rows) for rows in parts.values())
        # Filled on the device: a copy from the host would be waited for.
        self.ends = torch.stack([torch.full((), end, dtype=torch.int32, device=self.rows.device) for end in ends])

    def linear(self, rows: torch.Tensor, modules: list[nn.Linear]) -> torch.Tensor:
        weight = torch.stack([module.weight for module in modules]).to(rows.dtype).mT  # (K, D, F)
        return F.grouped_mm(rows, weight, offs=self.ends)

    def unpadded(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def _dtype_of_products(tensor: torch.Tensor) -> torch.dtype:
    return autocast_dtype(tensor.device.type) or tensor.dtype


def run_together(modules: list[nn.Module], parts: dict[str, torch.Tensor], products: str) -> torch.Tensor | None:
    """Run the linear maps, or the feed-forwards, of several towers with one product for each map.

    `"batched_mm"` pads the towers' rows to the longest and multiplies them in one batched product, for towers that are
    balanced (paper, section 6.3). `"grouped_mm"` multiplies rows without padding, in bfloat16, where a device has a
    fast kernel. Both copy the weights of all towers into one tensor in every call, so they pay where a step has many
    rows.

    Args:
        modules: one for each tower.
        parts: {tower: (T_tower, D)}, of several towers.
        products: `"batched_mm"` or `"grouped_mm"`.

    Returns:
        (T, F), sorted by tower; None where the modules are more than linear maps, or cannot be run so.
    """
    # A list for each linear map, with the map of every tower.
    first = modules[0]
    if type(first) is nn.Linear:
        layers = [modules]
    elif type(first) in (LlamaMLP, NemotronMLP):
        activation = type(first.act_fn)
        if not all(is_plain(module, type(first)) and type(module.act_fn) is activation for module in modules):
            return None
        names = [name for name in ("gate_proj", "up_proj", "down_proj") if hasattr(first, name)]
        layers = [[getattr(module, name) for module in modules] for name in names]
    else:
        return None
    if not all(_can_join(of_towers, products) for of_towers in layers):
        return None

    # A product for each map.
    joined = _Batched(parts) if products == "batched_mm" else _Grouped(parts)
    if len(layers) == 1:
        rows = joined.linear(joined.rows, modules)
    else:
        *gate, up, down = layers
        inner = joined.linear(joined.rows, up)
        inner = first.act_fn(joined.linear(joined.rows, *gate)) * inner if gate else first.act_fn(inner)
        rows = joined.linear(inner, down)
    return joined.unpadded(rows)


def _can_join(modules: list[nn.Module], products: str) -> bool:
    """True if these are plain linear maps of one shape with whole weights, of a kind that the product takes."""
    if not all(map(is_plain_linear, modules)):
        return False
    weight, bias = modules[0].weight, modules[0].bias
    if any(module.weight.shape != weight.shape for module in modules):
        return False
    if products == "batched_mm":
        return True
    # Torch's grouped product takes these everywhere, also while it is traced.
    is_aligned = all(size % 8 == 0 for size in weight.shape)
    return bias is None and is_aligned and _dtype_of_products(weight) == torch.bfloat16


# -------------------------------------------------------------------- when a module's weights can stand in for its call


def is_plain(module: nn.Module, *types: type) -> bool:
    """True if the module is of exactly one of these types, without hooks and with the forward of its class.

    The type decides: adapters, quantised maps and parametrised weights have types of their own, often of the same name.
    """
    return type(module) in types and _has_own_forward(module)


def is_of_this_package(module: nn.Module) -> bool:
    """True if the module has no hooks and the forward of this package; a derived class may change other methods."""
    return _has_own_forward(module) and keeps_methods(module, "forward")


def keeps_methods(owner: object, *names: str) -> bool:
    """True if this package or transformers defines these methods: no user's class and no object replaces them."""
    of_libraries = (f"{__package__}.", "transformers.")
    methods = [inspect.unwrap(getattr(type(owner), name)) for name in names]
    return not any(name in vars(owner) for name in names) and all(
        method.__module__.startswith(of_libraries) for method in methods
    )


def _has_own_forward(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not ("forward" in vars(module) or module._compiled_call_impl is not None or any(hooks))


def has_whole_weight(module: nn.Module) -> bool:
    """True if the weight is one tensor; sharded and quantised weights are made of several."""
    return not hasattr(module.weight, "__tensor_flatten__")


def is_plain_linear(module: nn.Module) -> bool:
    """True if the module is a linear map and no more, with a whole weight."""
    return is_plain(module, nn.Linear) and has_whole_weight(module)


# ------------------------------------------------------------------------------------------------- precision of tensors


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast gives products on a device; None where autocast is off or unknown ("meta")."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_off(device_type: str) -> AbstractContextManager:
    """Switch autocast off for such a device, if it has autocast."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def without_cast(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make a function for `nn.Module._apply` that moves tensors as `function` does, but does not cast them."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        probe = function(tensor.new_empty(0))
        return function(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

    return move
