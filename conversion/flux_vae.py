"""The autoencoder of FLUX, as its authors store it, and the same as an `AutoencoderKL` of diffusers.

Both hold the same numbers. Names differ, the decoder's blocks are counted from the other end, and the attention in the
middle has 1 x 1 convolutions there and linear layers here. The checkpoint says all sizes but the scale of the latents.
"""

import re

import torch

from conversion.checkpoints import CheckpointReader
from conversion.commands import reading
from conversion.key_maps import ConversionError, KeyMap, Rule
from modeling_mot.latent_vae import build_vae, vae_config_of


WEIGHTS = "ae.safetensors"
SCALING, SHIFT = 0.3611, 0.1159  # of all published copies; no file holds them
_NORM_GROUPS = 32
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def flux_vae_config(reader: CheckpointReader) -> dict:
    """Read the sizes of the autoencoder from its tensors.  -> the fields of diffusers' AutoencoderKL

    Raises:
        ConversionError: the tensors are of another autoencoder.
    """

    def sides(name: str) -> tuple[int, ...]:
        if name not in reader or len(reader.shape(name)) != 4 or not reader.has_values(name):
            raise ConversionError(
                f"{reader.folder / WEIGHTS} holds no convolution {name}: it is not the autoencoder of FLUX; give "
                "another one, a folder of diffusers, with --vae"
            )
        return reader.shape(name)

    blocks = {match[1] for name in reader.names if (match := re.match(r"encoder\.down\.(\d+)\.", name))}
    widths = [sides(f"encoder.down.{depth}.block.0.conv2.weight")[0] for depth in range(max(len(blocks), 1))]
    fields = {
        "_class_name": "AutoencoderKL",
        "in_channels": sides("encoder.conv_in.weight")[1],
        "out_channels": sides("decoder.conv_out.weight")[0],
        "latent_channels": sides("decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": len(
            {name.split(".")[4] for name in reader.names if name.startswith("encoder.down.0.block.")}
        ),
        "norm_num_groups": _NORM_GROUPS,
        "scaling_factor": SCALING,
        "shift_factor": SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    with torch.device("meta"), reading(f"no autoencoder has the sizes of {reader.folder / WEIGHTS}"):
        return vae_config_of(build_vae(fields))


def flux_vae_map(depth: int, prefix: str = "") -> KeyMap:
    """Pair FLUX's names with those of diffusers.

    Args:
        depth: number of blocks of the encoder, and of the decoder.
        prefix: of the names of diffusers.
    """
    rules = []
    for coder, side, counted in (("encoder", "down", range(depth)), ("decoder", "up", reversed(range(depth)))):
        ours = f"{prefix}{coder}"
        rules += [Rule(f"{coder}.{name}.{{kind}}", f"{ours}.{name}.{{kind}}") for name in ("conv_in", "conv_out")]
        rules.append(Rule(f"{coder}.norm_out.{{kind}}", f"{ours}.conv_norm_out.{{kind}}"))
        # The blocks: diffusers counts those of the decoder in the order in which they run.
        blocks = [(f"{coder}.{side}.{there}.", f"{ours}.{side}_blocks.{here}.") for here, there in enumerate(counted)]
        for there, here in blocks:
            rules += _resnet(f"{there}block.{{block}}.", f"{here}resnets.{{block}}.")
            sampler = "downsample" if side == "down" else "upsample"
            rules.append(Rule(f"{there}{sampler}.conv.{{kind}}", f"{here}{sampler}rs.0.conv.{{kind}}"))
        # The middle.
        for index in range(2):
            rules += _resnet(f"{coder}.mid.block_{index + 1}.", f"{ours}.mid_block.resnets.{index}.")
        for there, here in _ATTENTION.items():
            rules.append(Rule(f"{coder}.mid.attn_1.{there}.{{kind}}", f"{ours}.mid_block.attentions.0.{here}.{{kind}}"))
    return KeyMap(rules)


def _resnet(there: str, here: str) -> list[Rule]:
    names = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    return [Rule(f"{there}{name}.{{kind}}", f"{here}{ours}.{{kind}}") for name, ours in names.items()]


def is_pointwise(name: str) -> bool:
    """True for a tensor of FLUX that is a 1 x 1 convolution there, (out, in, 1, 1), and a matrix here, (out, in)."""
    return re.fullmatch(r"(en|de)coder\.mid\.attn_1\.(q|k|v|proj_out)\.weight", name) is not None
