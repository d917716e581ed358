"""Which tower each token belongs to, decided once per forward, and the modules that towers have.

The residual stream stays sorted by tower through all layers, so norms, projections and
feed-forwards are plain products on contiguous slices; only queries, keys and values go back to the
order of the sequence for the global attention (paper, Algorithm 1 and section 6.1).
"""

import inspect
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .configuration_mot import MoTConfig


# B batch, L row length, T = B * L tokens, D hidden size


class _Sort(torch.autograd.Function):
    """Rows sorted by tower, zero where a slice is padded.  (T, ...) -> (T', ...), the adjoint of `_Restore`"""

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
    """Rows in the order of the sequence.  (T', ...) -> (T, ...)

    The gradient of a permutation is its inverse, a copy and not the sum that indexing would make of it.
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


class ModalityRouting(NamedTuple):
    """The plan of one forward; a collator may build it ahead so that the forward never waits for a device.

    Attributes:
        towers: names of the towers, in the order of `counts`.
        counts: rows of each tower, Python integers that sum to T' (T without padding).
        order: (T',) positions in the flattened rows, sorted by tower; None where one tower has all tokens.
        inverse: (T,) where each token stands among the sorted rows.
        padding: how many rows at the end of each tower's slice belong to no token.
        is_token: (T',) bool of the sorted rows, False for padding of the sequence, which does not compete for experts;
            None where nothing competes or everything does.
        token_choice: whether tokens choose their experts, as in generation, and not experts their tokens.
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
        """Sort tokens by tower, in a stable way.

        Args:
            modality_ids: (B, L) indices into `config.modalities`.
            config: a `MoTConfig`.
            multiple_of: pad each tower's slice with zero rows up to a multiple of this, so that the sizes of
                products repeat from batch to batch, and kernels made for a size serve again. Outputs and gradients
                stay as they are. Mixtures of experts are not padded: padding would compete with tokens.

        Raises:
            ValueError: an id that is not the index of a modality.
        """
        towers = tuple(config.tower_names)
        num_modalities = len(config.modalities)
        flat = modality_ids.flatten()
        if len(towers) == 1 and torch.compiler.is_compiling():
            return cls(towers, (flat.numel(),))  # a read of the ids would break the graph
        # One wait for the device: the number of tokens of each modality, and of ids that are none.
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

    def for_experts(self, is_token: torch.Tensor | None, token_choice: bool) -> "ModalityRouting":
        """The same routing, with what mixtures of experts need to know.

        Args:
            is_token: (B, L) bool, False for padding; or None where nothing is padded.
            token_choice: whether tokens choose their experts.
        """
        is_token = None if is_token is None else self.sort(is_token)
        return self._replace(is_token=is_token, token_choice=token_choice)

    def split(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each tower's slice.  (T, D) -> {tower: (T_tower, D)}

        While gradients are on, a tower without tokens gets zero rows, so that it runs all the same:
        its parameters then have zero, not missing, gradients, and collectives match on every rank.
        """
        if len(self.towers) == 1:
            return {self.towers[0]: rows}
        slices = zip(self.towers, self.counts, rows.split(self.counts))
        return {tower: rows for tower, count, rows in slices if torch.is_grad_enabled() or count}


class PerTower(nn.ModuleDict):
    """One module per tower, each run on its own tokens; or one module named `shared`, run on all.

    Args:
        modules: tower -> its module, or {"shared": the one module of all}.
        mixtures: the names of those that are mixtures of experts, which also take `is_token` and `token_choice`.

    Attributes:
        products: `"separate"`, or how linear maps of several towers are run together, see `run_together`.
    """

    products = "separate"

    def __init__(self, modules: dict[str, nn.Module], mixtures: Collection[str] = ()):
        super().__init__(modules)
        self.mixtures = frozenset(mixtures)

    def __str__(self) -> str:
        """What an adapter is to be given to instead, for PEFT's error that names a module it cannot adapt."""
        towers = list(self)
        names = ", ".join(f"'<name>.{tower}'" for tower in towers)
        return (
            f"of towers {towers}: adapters go to the towers' own modules, as target_modules=[{names}], or to those of all "
            r"towers by a pattern, as target_modules=r'.*\.(q_proj|v_proj)\.[^.]+'; this module, "
            f"{super().__str__()},"
        )

    def forward(self, rows: torch.Tensor, routing: ModalityRouting) -> torch.Tensor:
        """Run each tower's module on the rows of that tower.  (T, ...) sorted by tower -> (T, ...)"""
        if "shared" in self:
            return self._run("shared", rows, routing.is_token, routing.token_choice)
        parts = routing.split(rows)
        if self.products != "separate" and len(parts) > 1:
            together = run_together([self[tower] for tower in parts], parts, self.products)
            if together is not None:
                return together
        is_token = {} if routing.is_token is None else routing.split(routing.is_token)
        outputs = [self._run(tower, part, is_token.get(tower), routing.token_choice) for tower, part in parts.items()]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _run(self, name, rows, is_token, token_choice):
        if name in self.mixtures:
            return self[name](rows, is_token, token_choice)
        return self[name](rows)


# K towers, T rows of all towers, D size of what is normalised


class MoTHeadLayerNorm(nn.Module):
    """Chameleon's QK-norm: LayerNorm over each head with weights of that head.  (T, H, D/H) -> same"""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(heads, heads.shape[-1:], eps=1e-5) * self.weight + self.bias


def rms_norm(config: MoTConfig, size: int) -> nn.Module:
    norm = GemmaRMSNorm if config.norm_offset else LlamaRMSNorm
    return norm(size, eps=config.rms_norm_eps)


def qk_norm(config: MoTConfig, num_heads: int) -> nn.Module:
    if config.qk_norm == "layer":
        return MoTHeadLayerNorm(num_heads, config.head_dim)
    return rms_norm(config, config.head_dim * (num_heads if config.qk_norm == "rms_all_heads" else 1))


def _forward(rows, counts, epsilon, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The operations of LlamaRMSNorm in their order.  -> (T, ..., D), and 1 / RMS, (T, ..., 1)"""
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
    """With a backward of half the operations that autograd would make of the forward."""

    @staticmethod
    def forward(rows, counts, epsilon, *weights):
        return _forward(rows, counts, epsilon, weights)

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
        with without_autocast(rows.device.type):
            grad = grad.to(scale.dtype, copy=True)
            normalised = rows.to(scale.dtype) * scale
            products = grad * normalised
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
    """The norms of all towers, or one named `shared`, on rows sorted by tower."""

    def forward(self, rows: torch.Tensor, routing: ModalityRouting) -> torch.Tensor:
        """(T, ..., D) -> the same"""
        shared = "shared" in self
        norms = [self["shared"]] if shared else [self[tower] for tower in routing.towers]
        if not all(is_plain(norm, LlamaRMSNorm) and has_whole_weight(norm) for norm in norms):
            return super().forward(rows, routing)
        counts = (len(rows),) if shared else routing.counts
        epsilon, weights = norms[0].variance_epsilon, [norm.weight for norm in norms]
        if torch.is_grad_enabled():
            return _RMSNorm.apply(rows, counts, epsilon, *weights)[0]
        return _forward(rows, counts, epsilon, weights)[0]


# K towers, n rows of all towers, D inputs, F outputs


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
        """(K, longest, F) -> (n, F)"""
        return torch.cat([of_tower[:count] for of_tower, count in zip(rows.unbind(), self.counts)])


class _Grouped:
    """Rows of each tower, one after another."""

    def __init__(self, parts: dict[str, torch.Tensor]):
        self.rows = torch.cat(list(parts.values()))  # (n, D)
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
    """Run one module for each tower, linear maps or feed-forwards of them, in one product each.

    `"batched_mm"` pads the towers' rows to the longest and multiplies them in one batched product (paper, section 6.3):
    for towers that are balanced. `"grouped_mm"` multiplies rows without padding, in bfloat16, where a device has a fast
    kernel. Both copy the weights of all towers into one tensor in every call, so they pay where a step has many rows.

    Args:
        parts: {tower: (n_tower, D)}, of several towers.
        products: `"batched_mm"` or `"grouped_mm"`.

    Returns:
        (n, F), sorted by tower; None where the modules are more than such maps, or cannot be run so.
    """
    first = modules[0]
    if type(first) is nn.Linear:
        layers = [modules]
    elif hasattr(first, "gate_proj"):
        if not all(is_plain(module, LlamaMLP) for module in modules):
            return None
        layers = [[getattr(module, name) for module in modules] for name in ("gate_proj", "up_proj", "down_proj")]
    else:
        return None
    if not all(_can_join(of_towers, products) for of_towers in layers):
        return None
    joined = _Batched(parts) if products == "batched_mm" else _Grouped(parts)
    if len(layers) == 1:
        rows = joined.linear(joined.rows, modules)
    else:
        gate, up, down = layers
        rows = joined.linear(first.act_fn(joined.linear(joined.rows, gate)) * joined.linear(joined.rows, up), down)
    return joined.unpadded(rows)


def _can_join(modules: list[nn.Module], products: str) -> bool:
    """Whether these are linear maps and no more, with whole weights."""
    if not all(map(is_plain_linear, modules)):
        return False
    weight, bias = modules[0].weight, modules[0].bias
    if products == "batched_mm":
        return True
    # What torch's grouped product takes everywhere, also while it is traced.
    is_aligned = all(size % 8 == 0 for size in weight.shape)
    return bias is None and is_aligned and _dtype_of_products(weight) == torch.bfloat16


def is_plain(module: nn.Module, *types: type) -> bool:
    """True if the module is of exactly one of these types, without hooks and with the forward of its class.

    The type decides, since adapters, quantised maps and parametrised weights have types of their own, often of the same
    name.
    """
    return type(module) in types and _has_own_forward(module)


def is_of_this_package(module: nn.Module) -> bool:
    """True if the module has no hooks and the forward of this package; a derived class may change other methods."""
    return _has_own_forward(module) and keeps_methods(module, "forward")


def keeps_methods(owner: object, *names: str) -> bool:
    """True if these methods are those of this package or of transformers: no class of a user, and no object, has its own."""
    of_libraries = (f"{__package__}.", "transformers.")
    methods = [inspect.unwrap(getattr(type(owner), name)) for name in names]
    return not any(name in vars(owner) for name in names) and all(
        method.__module__.startswith(of_libraries) for method in methods
    )


def _has_own_forward(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not ("forward" in vars(module) or module._compiled_call_impl is not None or any(hooks))


def has_whole_weight(module: nn.Module) -> bool:
    """True if the weight is one tensor, and not made of others, as sharded and quantised ones are."""
    return not hasattr(module.weight, "__tensor_flatten__")


def is_plain_linear(module: nn.Module) -> bool:
    """True if the module is a linear map and no more, with a whole weight."""
    return is_plain(module, nn.Linear) and has_whole_weight(module)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives products on such a device; None where it is off, or unknown as on "meta"."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast switched off for such a device, where it has any."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def without_cast(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `nn.Module._apply` does to tensors, but for their dtype: they are moved, and not cast."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        probe = function(tensor.new_empty(0))
        return function(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

    return move
