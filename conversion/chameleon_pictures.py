"""Turn Chameleon's VQ-VAE into the image tokenizer of a MoT, with its decoder if somebody has the weights.

Transformers' `ChameleonVQVAE` encodes only. Checkpoints that draw (Anole's, in transformers' layout) hold the decoder
beside it, and Meta's own release has it in `vqgan.ckpt`; with it the tokenizer is diffusers' `VQModel`, which is the
same network.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from transformers import ChameleonImageProcessorPil, ChameleonVQVAE, ChameleonVQVAEConfig

from conversion.chameleon_vocabulary import ImageVocabulary
from conversion.checkpoints import CheckpointReader
from conversion.commands import reading
from conversion.key_maps import ConversionError, KeyMap, Rule
from conversion.sizes import DIFFUSERS_WEIGHTS
from modeling_mot.image_tokenizer import ImageTokenizerConfig, MoTImageTokenizer


CODEBOOK = "quantize.embedding.weight"
# Fields of a preprocessor's file that decide the pixels.
PICTURE_SETTINGS = (
    "do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip


def vqgan_rules(levels: int) -> list[Rule]:
    """Pair the names of a VQGAN's authors, which transformers uses too, with the names of diffusers' `VQModel`.

    The authors number the decoder's blocks from the finest scale, diffusers from the coarsest.
    """
    rules = [Rule(f"{name}.{{kind}}", f"{name}.{{kind}}") for name in ("quant_conv", "post_quant_conv")]
    rules.append(Rule(CODEBOOK, CODEBOOK))
    # The ends and the middle of encoder and decoder.
    for half in ("encoder", "decoder"):
        rules += [Rule(f"{half}.{name}.{{kind}}", f"{half}.{name}.{{kind}}") for name in ("conv_in", "conv_out")]
        rules.append(Rule(f"{half}.norm_out.{{kind}}", f"{half}.conv_norm_out.{{kind}}"))
        for number in (1, 2):
            rules += _resnet(f"{half}.mid.block_{number}", f"{half}.mid_block.resnets.{number - 1}")
        ours, theirs = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
        for name, other in (
            ("norm", "group_norm"),
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("proj_out", "to_out.0"),
        ):
            rules.append(Rule(f"{theirs}.{name}.{{kind}}", f"{ours}.{other}.{{kind}}"))
    # The scales.
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        rules += _resnet(f"encoder.down.{level}.block.{{block}}", f"{down}.resnets.{{block}}")
        rules += _resnet(f"decoder.up.{level}.block.{{block}}", f"{up}.resnets.{{block}}")
        rules.append(Rule(f"encoder.down.{level}.downsample.{{rest*}}", f"{down}.downsamplers.0.{{rest*}}"))
        rules.append(Rule(f"decoder.up.{level}.upsample.{{rest*}}", f"{up}.upsamplers.0.{{rest*}}"))
    return rules


def _resnet(source: str, target: str) -> list[Rule]:
    names = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    return [Rule(f"{source}.{theirs}.{{kind}}", f"{target}.{ours}.{{kind}}") for theirs, ours in names.items()]


def picture_settings(folder: Path, vq_config: ChameleonVQVAEConfig) -> dict[str, Any]:
    """Read the settings of the source's image processor; without one, transformers' defaults in the VQ-VAE's size.

    Raises:
        ConversionError: pictures do not all come out in one size.
    """
    if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        with reading(f"the image processor of {folder} cannot be read"):
            processor = ChameleonImageProcessorPil.from_pretrained(folder)
    else:
        side = vq_config.resolution
        processor = ChameleonImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    settings = {name: value for name, value in processor.to_dict().items() if name in PICTURE_SETTINGS}
    if not settings.get("do_center_crop"):
        raise ConversionError("the source's image processor has do_center_crop=False: pictures must all be of one size")
    return settings


def image_tokenizer(
    folder: Path,
    read: Callable[[str], torch.Tensor],
    names: Iterable[str],
    vq_config: ChameleonVQVAEConfig,
    vocabulary: ImageVocabulary,
    decoder: Path | None = None,
) -> MoTImageTokenizer:
    """Build the tokenizer whose code i is the source's token `vocabulary.first + i`.

    Args:
        folder: the source's folder, for the settings of its image processor.
        read: reads a tensor of the VQ-VAE by its name.
        names: the names of all its tensors; with `decoder.*` among them the tokenizer draws.
        vq_config: the source's.
        decoder: see `read_decoder`; for a source without a decoder.

    Raises:
        ConversionError: tensors are left over or missing, or the decoder is of another VQ-VAE.
    """
    tensors = {name: read(name) for name in names}
    if CODEBOOK not in tensors:
        raise ConversionError(
            f"{folder} holds no VQ-VAE ({CODEBOOK}); take the whole ChameleonForConditionalGeneration"
        )
    has_own = any(name.startswith("decoder.") for name in tensors)
    if has_own and decoder is not None:
        raise ConversionError(f"the source holds a decoder of its own; leave --image-decoder {decoder} out")

    # The settings decide the size of every picture.
    settings = picture_settings(folder, vq_config)
    size = settings.get("crop_size")
    if not isinstance(size, dict) or not all(isinstance(size.get(side), int) for side in ("height", "width")):
        raise ConversionError(f"the source's image processor has crop_size={size!r:.80}; it must have height and width")
    config = {
        "image_size": [size["height"], size["width"]],
        "resample": "lanczos",
        "storage_dtype": str(tensors[CODEBOOK].dtype).removeprefix("torch."),
        "image_processor": settings,
    }

    # With a decoder the tokenizer is diffusers' VQModel, without one transformers' encoder.
    if has_own or decoder is not None:
        config |= {"backend": "diffusers", "model": vq_model_arguments(vq_config)}
        model = _vq_model(ImageTokenizerConfig.from_dict(config), tensors, len(vq_config.channel_multiplier), decoder)
    else:
        config |= {"backend": "chameleon"}
        with torch.device("meta"), reading("no VQ-VAE can be built of the source's vq_config"):
            model = ChameleonVQVAE(vq_config)
        _load(model, tensors)
    # Code i is the code of the i-th image token.
    model.float().quantize.embedding.weight.data = model.quantize.embedding.weight.data[list(vocabulary.codes)].clone()
    return MoTImageTokenizer(ImageTokenizerConfig.from_dict(config), model)


def vq_model_arguments(vq_config: ChameleonVQVAEConfig) -> dict[str, Any]:
    """Return the arguments of diffusers' `VQModel` that make the same network."""
    return {
        "block_out_channels": [vq_config.base_channels * factor for factor in vq_config.channel_multiplier],
        "layers_per_block": vq_config.num_res_blocks,
        "latent_channels": vq_config.latent_channels,
        "vq_embed_dim": vq_config.embed_dim,
        "num_vq_embeddings": vq_config.num_embeddings,
        "norm_num_groups": 32,  # fixed in transformers' code
        "mid_block_add_attention": vq_config.attn_type == "vanilla",
    }


def _vq_model(
    config: ImageTokenizerConfig, tensors: Mapping[str, torch.Tensor], levels: int, decoder: Path | None
) -> VQModel:
    with reading("no VQModel can be built of the source's vq_config"):
        model = VQModel(**config.model_arguments())
    key_map = KeyMap(vqgan_rules(levels))
    given = {} if decoder is None else read_decoder(decoder, tensors[CODEBOOK], key_map)
    origins = key_map.origins(tensors, [name for name in model.state_dict() if name not in given])
    _load(model, {name: tensors[origin.name] for name, origin in origins.items()} | given)
    return model


def read_decoder(path: Path, codebook: torch.Tensor, key_map: KeyMap) -> dict[str, torch.Tensor]:
    """Read the tensors of a decoder, under diffusers' names.

    Args:
        path: a folder or a file of safetensors with a whole VQGAN (or a model that holds one), in the names of its
            authors or of diffusers' `VQModel`.
        codebook: the source's codebook; the decoder is of no use with another one.

    Raises:
        ConversionError: there is no decoder, or it belongs to another codebook.
    """
    if path.is_file():
        path = path.resolve()  # a link that the user names may lead anywhere
        reader = CheckpointReader(path.parent, path.name)
    else:
        is_diffusers = any(path.glob("diffusion_pytorch_model*"))
        reader = CheckpointReader(path, DIFFUSERS_WEIGHTS) if is_diffusers else CheckpointReader(path)
    stem = next((name for name in reader.names if name.endswith("decoder.conv_in.weight")), None)
    prefix = "" if stem is None else stem.removesuffix("decoder.conv_in.weight")
    if stem is None or prefix + CODEBOOK not in reader:
        raise ConversionError(
            f"{path} holds no {'decoder.conv_in.weight' if stem is None else prefix + CODEBOOK}: --image-decoder takes "
            "the safetensors of a whole VQGAN, in its authors' names or diffusers'"
        )

    # A decoder reads the codes of its own codebook alone.
    theirs, ours = reader.read(prefix + CODEBOOK).float(), codebook.float()
    # One of the two may have been rounded to half precision.
    if theirs.shape != ours.shape or (theirs - ours).norm() > 0.01 * ours.norm():
        raise ConversionError(
            f"the codebook of {path} is not that of the source, so its decoder cannot read these codes"
        )

    # The authors' names become diffusers' names.
    named = {name.removeprefix(prefix): name for name in reader.names if name.startswith(f"{prefix}decoder.")}
    if "decoder.mid_block.resnets.0.norm1.weight" not in named:
        named = {target: name for source, name in named.items() for target in key_map.forward(source) or [source]}
    return {target: reader.read(name) for target, name in named.items()}


def _load(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load tensors into `model`; a projection that is stored as a 1 x 1 convolution becomes a matrix."""
    wanted = model.state_dict()
    shaped = {
        name: tensor.reshape(wanted[name].shape)
        if name in wanted and tensor.numel() == wanted[name].numel()
        else tensor
        for name, tensor in tensors.items()
    }
    try:
        model.load_state_dict(shaped, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"the source's VQ-VAE is not what its vq_config says: {error}") from None
