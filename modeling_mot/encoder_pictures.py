"""Vision encoders: pictures of any size to features in a transformer's width, packed without padding.

`EncodedPicturesMixin.encode_pictures` is the step of a model's forward. Each `PictureEncoder` is SigLIP in its NaViT
form (arXiv 2303.15343, 2307.06304): a linear layer for each patch, a learned table of positions of which a picture
takes the rows and columns that it has, layers in which a picture sees itself alone, and a connector of two linear
layers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .checks_arguments import check_tensor
from .latent_images import ImagePlaces, cut_into_patches, group_by_size, sizes_of


# B batch, L row length, D hidden size of the transformer, M pictures in order of appearance, C channels,
# (H, W) pixels, p patch size, n patches of a picture, P patches of all pictures, W width of the encoder, A heads


class Patches(NamedTuple):
    """Pictures cut into patches, one picture after another.

    Attributes:
        values: (P, p * p * C), each patch in (row, column, channel) order.
        grids: rows and columns of each picture.
    """

    values: torch.Tensor
    grids: list[tuple[int, int]]

    @classmethod
    def of(cls, pixel_values: torch.Tensor, sizes: list[tuple[int, int]], patch_size: int) -> "Patches":
        """Cut pictures (M, C, H, W), padded at the bottom and the right, of the given heights and widths."""
        cut = {}
        for (height, width), members in group_by_size(sizes).items():
            cut |= zip(members, cut_into_patches(pixel_values[members, :, :height, :width], patch_size))
        grids = [(height // patch_size, width // patch_size) for height, width in sizes]
        return cls(torch.cat([cut[index] for index in range(len(sizes))]), grids)

    @property
    def lengths(self) -> list[int]:
        return [rows * columns for rows, columns in self.grids]


# --------------------------------------------------------------------------------------------------------- the encoder


class PictureAttention(nn.Module):
    """Self-attention in which the patches of each picture see each other, and none of another picture."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Attend: (P, W) of pictures of these lengths -> (P, W)"""
        projected = [project(rows) for project in (self.q_proj, self.k_proj, self.v_proj)]
        heads = [of_all.unflatten(-1, (self.num_heads, -1)) for of_all in projected]  # (P, A, W / A)
        if len(set(lengths)) == 1:
            # Pictures of one length are a batch.
            batch = [of_all.unflatten(0, (len(lengths), -1)).transpose(1, 2) for of_all in heads]  # (M, A, n, W / A)
            attended = F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1)
        else:
            alone = zip(*(of_all.transpose(0, 1).split(lengths, dim=1) for of_all in heads))
            attended = torch.cat([F.scaled_dot_product_attention(*of_one) for of_one in alone], dim=1).transpose(0, 1)
        return self.out_proj(attended.flatten(1))


class TwoLinear(nn.Module):
    """Two linear layers with an activation between: the feed-forward of an encoder, and the connector behind it."""

    def __init__(self, inputs: int, inner: int, outputs: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(inputs, inner)
        self.act_fn = ACT2FN[activation]
        self.fc2 = nn.Linear(inner, outputs)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act_fn(self.fc1(rows)))


class PictureEncoderLayer(GradientCheckpointingLayer):
    """A layer of SigLIP: pre-norm attention and feed-forward, with LayerNorms."""

    def __init__(self, fields: dict):
        super().__init__()
        width, epsilon = fields["hidden_size"], fields["layer_norm_eps"]
        self.layer_norm1 = nn.LayerNorm(width, eps=epsilon)
        self.self_attn = PictureAttention(width, fields["num_attention_heads"])
        self.layer_norm2 = nn.LayerNorm(width, eps=epsilon)
        self.mlp = TwoLinear(width, fields["intermediate_size"], width, fields["hidden_act"])

    def forward(self, rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Run the layer: (P, W) of pictures of these lengths -> (P, W)"""
        rows = rows + self.self_attn(self.layer_norm1(rows), lengths)
        return rows + self.mlp(self.layer_norm2(rows))


class PictureEncoder(nn.Module):
    """An encoder of `config.encoders` with its connector.

    Args:
        config: a `MoTTransfusionConfig`.
        name: of the encoder.

    Examples:

        >>> import torch
        >>> from modeling_mot import MoTTransfusionConfig
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> eye = dict(type="siglip_navit", patch_size=4, table_size=[8, 8], **sizes)
        >>> config = MoTTransfusionConfig(
        ...     vocab_size=64, hidden_size=32, num_attention_heads=4, boi_token_id=60, eoi_token_id=61,
        ...     image_token_id=62, modalities=["text", "vision", "image"], encoders={"eye": eye},
        ...     continuous_modalities={"vision": dict(kind="features", encoder="eye", placeholder_token_id=63)})
        >>> encoder = PictureEncoder(config, "eye")
        >>> patches = Patches.of(torch.rand(2, 3, 8, 12), sizes=[(8, 12), (4, 8)], patch_size=4)
        >>> encoder(patches).shape  # 2 x 3 and 1 x 2 patches, in the width of the transformer
        torch.Size([8, 32])
    """

    def __init__(self, config, name: str):
        super().__init__()
        fields = config.encoders[name]
        width = fields["hidden_size"]
        self.is_frozen = fields["frozen"]
        self.table_size = fields["table_size"]
        self.patch_size = fields["patch_size"]
        self.patch_embedding = nn.Linear(fields["patch_size"] ** 2 * fields["num_channels"], width)
        self.position_embedding = nn.Embedding(self.table_size[0] * self.table_size[1], width)
        depth = fields["num_hidden_layers"] - fields["drop_last_layers"]
        self.layers = nn.ModuleList(PictureEncoderLayer(fields) for _ in range(depth))
        self.post_layernorm = nn.LayerNorm(width, eps=fields["layer_norm_eps"])
        self.connector = TwoLinear(width, config.hidden_size, config.hidden_size, fields["connector"]["hidden_act"])

    def freeze(self) -> None:
        """Leave all but the connector untrained, if the configuration says so."""
        for part in self.children() if self.is_frozen else ():
            part.requires_grad_(part is self.connector)

    def encode(self, patches: Patches) -> torch.Tensor:
        """Run the encoder without the connector.  -> (P, W)"""
        rows = self.patch_embedding(patches.values.to(self.patch_embedding.bias.dtype))
        # A picture takes the first rows and columns of the table.
        places = torch.arange(self.position_embedding.num_embeddings, device=rows.device).view(self.table_size)
        places = torch.cat([places[:height, :width].flatten() for height, width in patches.grids])
        rows = rows + self.position_embedding(places)
        for layer in self.layers:
            rows = layer(rows, patches.lengths)
        return self.post_layernorm(rows)

    def forward(self, patches: Patches) -> torch.Tensor:
        """Make features of pictures.  -> (P, D)"""
        return self.connector(self.encode(patches))


# ------------------------------------------------------------------------------------------ a step of a model's forward


class EncodedPicturesMixin:
    """The way of pictures into a Transfusion model through encoders."""

    def encode_pictures(
        self, pixel_values, image_sizes, places: ImagePlaces, planned: bool = False, is_filled: bool = False
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Read and check the pictures of a forward, and encode them.

        Args:
            pixel_values: (M, C, H, W), padded at the bottom and the right where sizes differ; or None.
            image_sizes: (M, 2) height and width of each in pixels; or None.
            places: where the placeholders stand.
            planned: the routing was made ahead, so nothing may wait for the device, where one modality has encoders.
            is_filled: the forward continues a cache that holds keys.

        Returns:
            For each modality of features: where its placeholders stand, (B, L) bool, and their tokens, (P, D).

        Raises:
            ValueError: the message names field, value and way out.
        """
        modalities = self.config.continuous_modalities
        if not modalities:
            if pixel_values is not None:
                raise ValueError(
                    "encoder_pixel_values came, but this model has no encoder (config.encoders is None): pass "
                    "pixel_values or latents"
                )
            return []
        if pixel_values is None:
            sizes = []
        else:
            check_tensor("encoder_pixel_values", pixel_values)
            if pixel_values.dim() != 4 or not pixel_values.is_floating_point():
                raise ValueError(
                    f"encoder_pixel_values is {pixel_values.dtype} of shape {tuple(pixel_values.shape)}; it must be "
                    "floats in [-1, 1] of shape (M, channels, H, W)"
                )
            sizes = sizes_of(pixel_values, image_sizes, "encoder_image_sizes")
            if is_filled:
                raise ValueError("pictures came with a filled past_key_values; pass them with the prompt")
        return [
            self._encode_modality(name, members, pixel_values, sizes, places, planned)
            for name, members in self._members(sizes, places).items()
        ]

    def _members(self, sizes: list, places: ImagePlaces) -> dict[str, list[int]]:
        """Return modality -> the pictures that are of it. Where there are several, the placeholders are read."""
        names = list(self.config.continuous_modalities)
        if len(names) == 1:
            return {names[0]: list(range(len(sizes)))}
        kinds = places.kinds.masked_fill(places.is_patch, 0)
        of_pictures = kinds[places.starts(kinds != 0)].tolist()
        if len(of_pictures) != len(sizes):
            raise ValueError(
                f"{len(sizes)} pictures came in encoder_pixel_values, but placeholders of {', '.join(names)} stand in "
                f"{len(of_pictures)} places of input_ids; put each picture between its markers"
            )
        indices = {name: self.config.modalities.index(name) for name in names}
        return {name: [place for place, kind in enumerate(of_pictures) if kind == indices[name]] for name in names}

    def _encode_modality(self, name: str, members: list[int], pixel_values, sizes: list, places, planned: bool):
        """Encode the pictures of one modality.  -> (B, L) bool, (P, D)"""
        config, encoder = self.config, self.encoders[self.config.continuous_modalities[name]["encoder"]]
        is_patch = places.kinds == config.modalities.index(name)
        if not planned:
            self._check_runs(name, places.run_lengths(is_patch), members, sizes)
        if members:
            grids = [config.features_grid(name, *sizes[index]) for index in members]
            if len(members) < len(pixel_values):
                pixel_values = pixel_values[members]
            patches = Patches.of(pixel_values, [sizes[index] for index in members], encoder.patch_size)
        else:
            # One blank patch that no token sees, so that gradients are zero and not missing.
            values = torch.zeros(1, encoder.patch_embedding.in_features, device=is_patch.device)
            grids, patches = [(1, 1)], Patches(values, [(1, 1)])
        tokens = encoder(patches)
        if config.continuous_modalities[name]["position_table"] is not None:
            tokens = tokens + torch.cat([self.fixed_positions(name, *grid, tokens) for grid in grids])
        return is_patch, tokens if members else tokens[:0]

    def _check_runs(self, name: str, runs: list[int], members: list[int], sizes: list) -> None:
        """Refuse pictures without placeholders of their own, one for each patch, or the reverse."""
        token = f"placeholders of {name!r} (token {self.config.placeholder_token_ids[name]})"
        if len(runs) != len(members):
            raise ValueError(
                f"{len(members)} pictures came in encoder_pixel_values, but the {token} in input_ids stand in "
                f"{len(runs)} places; put each picture between its markers"
            )
        for found, index in zip(runs, members):
            rows, columns = self.config.features_grid(name, *sizes[index])
            if found != rows * columns:
                raise ValueError(
                    f"picture {index} of {sizes[index][0]} x {sizes[index][1]} pixels makes {rows * columns} patches, "
                    f"but input_ids holds {found} {token} for it"
                )
