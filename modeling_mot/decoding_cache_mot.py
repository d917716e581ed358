"""Keys and values of sequences that grow token by token, each in its own row, with room behind them."""

# R sequences, n <= R of them in a step, C columns, L tokens of a sequence, K key heads, d head size

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


COLUMNS = 256  # by at least so many a cache grows


class Prefix(NamedTuple):
    """What is cached of one sequence, views into where it is kept.

    Attributes:
        keys, values: of each layer, (K, L, d).
        position: of the next token.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    position: int

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]


class DecodingCache:
    """Keys and values of R sequences, each (R, K, C, d).

    Attributes:
        lengths: filled columns of each sequence, from the left.
        mask: (R, 1, 1, C) what is added to attention scores: 0 for tokens, minus infinity elsewhere; None where all
            sequences are of one length, without padding.
    """

    def __init__(
        self,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        mask: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        """
        Args:
            keys, values: of each layer, (R, K, L, d).
            mask: (R, L) 1 for tokens, 0 for padding.
            dtype: to keep them in; default: their own.
        """
        self.keys, self.values = ([tensor.to(dtype or tensor.dtype) for tensor in x] for x in (keys, values))
        count, _, self.capacity, _ = keys[0].shape
        self.lengths, self.mask = [self.capacity] * count, None
        if mask is not None and not mask.all():
            self.mask = self._hidden(count, self.capacity).masked_fill_(mask[:, None, None] != 0, 0)

    @classmethod
    def of(cls, cache: DynamicCache, mask: torch.Tensor | None, dtype: torch.dtype | None) -> "DecodingCache":
        return cls([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], mask, dtype)

    @classmethod
    def empty(cls, config, count: int, dtype: torch.dtype, device) -> "DecodingCache":
        """Room for so many sequences."""
        shape = (count, config.num_key_value_heads, 0, config.head_dim)
        tensors = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        cache = cls(tensors, tensors)
        cache.mask = cache._hidden(count, 0)
        return cache

    def _hidden(self, count: int, columns: int) -> torch.Tensor:
        return self.keys[0].new_full((count, 1, 1, columns), -float("inf"))

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
                wider[:, :, : self.capacity] = tensor[:, :, : self.capacity]  # which may be wide: memory ran out midway
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

    # ------------------------------------------------------------------------------------------------- whole rows

    def prefix(self, row: int, position: int, drop_last: int = 0) -> Prefix:
        """One sequence without its padding on the left, and without its last columns.

        Args:
            position: of its next token, the columns that are dropped included.
        """
        first, stop = 0, self.lengths[row] - drop_last
        if self.mask is not None:
            first = int((self.mask[row, 0, 0, :stop] == 0).long().argmax())
        keys, values = ([tensor[row, :, first:stop] for tensor in x] for x in (self.keys, self.values))
        return Prefix(keys, values, position - drop_last)

    def extend(self, row: int, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        """Columns behind those of one sequence: of each layer, (K, m, d)"""
        start = self.lengths[row]
        stop = start + keys[0].shape[1]
        (_, heads, _, head_dim), shapes = self.keys[0].shape, {tuple(tensor.shape) for tensor in (*keys, *values)}
        if shapes != {(heads, stop - start, head_dim)} or not len(keys) == len(values) == len(self.keys):
            raise ValueError(
                f"{len(keys)} layers of keys and values of shape {sorted(shapes)} do not fit into a cache of "
                f"{len(self.keys)} layers of {heads} heads of {head_dim}"
            )
        self._tell_lengths_apart()
        self.reserve(stop)
        for mine, others in ((self.keys, keys), (self.values, values)):
            for tensor, other in zip(mine, others):
                tensor[row, :, start:stop] = other
        self.mask[row, 0, 0, start:stop] = 0
        self.lengths[row] = stop

    def cut(self, row: int, length: int) -> None:
        """Forget what one sequence has beyond so many columns.

        They become zeros: a NaN that is hidden still reaches whoever uses the row next, since attention multiplies it by 0.
        """
        self._tell_lengths_apart()
        for tensor in (*self.keys, *self.values):
            tensor[row, :, length : self.lengths[row]] = 0
        self.mask[row, 0, 0, length:] = -float("inf")
        self.lengths[row] = length

    def swap(self, row: int, other: int) -> None:
        """Two sequences change places."""
        stop = max(self.lengths[row], self.lengths[other])
        for tensor in (*self.keys, *self.values):
            tensor[[row, other], :, :stop] = tensor[[other, row], :, :stop]
        self.mask[[row, other]] = self.mask[[other, row]]
        self.lengths[row], self.lengths[other] = self.lengths[other], self.lengths[row]

    def _tell_lengths_apart(self) -> None:
        if self.mask is None:
            self.mask = self._hidden(len(self.lengths), self.capacity)
            self.mask[..., : self.lengths[0]] = 0


class Columns:
    """Where a step writes, and what it then sees."""

    def __init__(self, cache: DecodingCache, lengths: list[int]):
        self.cache, self.count, self.stop, self.mask = cache, len(lengths), max(lengths) + 1, None
        self.is_ragged = min(lengths) != max(lengths)
        if self.is_ragged:
            device = cache.mask.device
            self.rows, self.columns = torch.arange(self.count, device=device), torch.tensor(lengths, device=device)
        if cache.mask is not None:
            if self.is_ragged:
                cache.mask[self.rows, 0, 0, self.columns] = 0
            else:
                cache.mask[: self.count, 0, 0, self.stop - 1] = 0
            self.mask = cache.mask[: self.count, :, :, : self.stop]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, K, d) twice -> all keys and values, (n, K, stop, d)"""
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
        """(n, stop) 1 for tokens; None where all are."""
        return None if self.mask is None else (self.mask[:, 0, 0] == 0).long()

    def as_cache(self) -> Cache:
        """What an ordinary forward of one token may be given."""
        return Cache(layers=[ColumnsLayer(self, layer) for layer in range(len(self.cache.keys))])


class ColumnsLayer(DynamicLayer):
    """One layer of a `DecodingCache`, for the forward of one step."""

    def __init__(self, columns: Columns, layer: int):
        super().__init__()
        self.columns, self.layer = columns, layer
        self.lazy_initialization(columns.cache.keys[layer], columns.cache.values[layer])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """(n, K, 1, d) twice -> (n, K, stop, d) twice"""
        return self.columns.write(self.layer, key_states.squeeze(2), value_states.squeeze(2))

    def get_seq_length(self) -> int:
        return self.columns.stop - 1
