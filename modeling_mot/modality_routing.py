"""Which tower each token belongs to, decided once per forward, and the modules that towers have.

The residual stream stays sorted by tower through all layers, so norms, projections and
feed-forwards are plain products on contiguous slices; only queries, keys and values go back to the
order of the sequence for the global attention (paper, Algorithm 1 and section 6.1).
"""

# B batch, L row length, T = B * L tokens, D hidden size

from typing import NamedTuple

import torch
from torch import nn

from .tower_products_mot import run_together


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
    """

    towers: tuple[str, ...]
    counts: tuple[int, ...]
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    padding: tuple[int, ...] = ()
    is_token: torch.Tensor | None = None

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

    def marking(self, is_token: torch.Tensor | None) -> "ModalityRouting":
        """The same with a mark on what is no padding.

        Args:
            is_token: (B, L) bool, or None where nothing is padded.
        """
        return self._replace(is_token=None if is_token is None else self.sort(is_token))

    def split(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each tower's slice.  (T, D) -> {tower: (T_tower, D)}

        While gradients are on, a tower without tokens gets zero rows, so that it runs all the same:
        its parameters then have zero, not missing, gradients, and collectives match on every rank.
        """
        if len(self.towers) == 1:
            return {self.towers[0]: rows}
        slices = zip(self.towers, self.counts, rows.split(self.counts))
        return {tower: rows for tower, count, rows in slices if torch.is_grad_enabled() or count}


def join(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The slices of all towers, one after another.  {tower: (T_tower, D)} -> (T, D)"""
    return torch.cat(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))


class PerTower(nn.ModuleDict):
    """One module per tower, each run on its own tokens; or one module named `shared`, run on all.

    Attributes:
        products: `"separate"`, or how linear maps of several towers are run together (tower_products_mot.py).
    """

    products = "separate"

    def __str__(self) -> str:
        """What an adapter is to be given to instead, for PEFT's error that names a module it cannot adapt."""
        towers = list(self)
        names = ", ".join(f"'<name>.{tower}'" for tower in towers)
        return (
            f"of towers {towers}: adapters go to the towers' own modules, as target_modules=[{names}], or to those of all "
            r"towers by a pattern, as target_modules=r'.*\.(q_proj|v_proj)\.[^.]+'; this module, "
            f"{super().__str__()},"
        )

    def forward(self, parts: dict[str, torch.Tensor], *beside, **kwargs) -> dict[str, torch.Tensor]:
        """{tower: (n_tower, D)} -> the same

        Args:
            beside: more of what each tower's rows have, as `parts` or None; keywords go to all towers as they are.
        """
        if "shared" not in self:
            if self.products != "separate" and len(parts) > 1:
                together = run_together([self[tower] for tower in parts], parts, self.products)
                if together is not None:
                    return together
            return {
                tower: self[tower](part, *(more and more[tower] for more in beside), **kwargs)
                for tower, part in parts.items()
            }
        rows = self["shared"](join(parts), *(more and join(more) for more in beside), **kwargs)
        return dict(zip(parts, rows.split([part.shape[0] for part in parts.values()])))
