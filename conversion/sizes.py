"""Hold the sizes in a config.json against the stored tensors, before anything of these sizes is built."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversion.checkpoints import WEIGHTS, CheckpointReader, fetch
from conversion.commands import read_json
from conversion.key_maps import ConversionError


DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Fields that are a side of a tensor, or a part of a side, in language models, VAEs and VQ-VAEs.
SIDES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "latent_channels", "block_out_channels", "norm_num_groups", "vq_embed_dim", "num_vq_embeddings", "embed_dim",
    "num_embeddings", "base_channels", "channel_multiplier", "in_channels", "out_channels",
    "encoder_block_out_channels", "decoder_block_out_channels",
}  # fmt: skip
# Fields that count modules with a tensor of their own.
COUNTS = {
    "num_hidden_layers", "num_experts", "num_res_blocks", "layers_per_block", "num_encoder_blocks",
    "num_decoder_blocks",
}  # fmt: skip
# A size that is a little wrong is named later, with the tensor that it does not fit.
_NEAR = 4


def check_sizes(stored: dict[str, Any], reader: CheckpointReader, where: Path) -> None:
    """Refuse sizes that are no positive whole numbers, or larger than the checkpoint's tensors.

    A later check compares every tensor with its exact shape. Before it, lists and modules of these sizes are made, so
    sizes far beyond the tensors must be refused here.

    Args:
        stored: the content of the file `where`, or a part of it.

    Raises:
        ConversionError: names the field, its value and the size in the tensors.
    """
    longest = max((max(reader.shape(name), default=1) for name in reader.names if reader.has_values(name)), default=0)
    for name, value in _sizes(stored):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConversionError(f"{where} has {name}={value!r:.80}, which must be a whole number of at least 1")
        if name in SIDES and value > _NEAR * longest:
            raise ConversionError(
                f"{where} has {name}={value}, but no tensor has a side longer than {longest}; are both of one "
                "checkpoint?"
            )
        if name in COUNTS and value > len(reader.names):
            raise ConversionError(
                f"{where} has {name}={value}, but there are {len(reader.names)} tensors in all; are both of one "
                "checkpoint?"
            )


def check_part(folder: str | Path) -> None:
    """Check the sizes of a VAE or an image tokenizer in a folder. A name on the Hub is left to its library.

    Raises:
        ConversionError: see `check_sizes`; also for a link that leads out of the folder.
    """
    if (config := Path(folder) / "config.json").is_file():
        fetch(str(folder))
        has_own_name = (Path(folder) / WEIGHTS).is_file()  # as transformers' ChameleonVQVAE has it
        check_sizes(read_json(config), CheckpointReader(folder, WEIGHTS if has_own_name else DIFFUSERS_WEIGHTS), config)


def _sizes(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if name in SIDES | COUNTS and value is not None:
            yield from ((name, one) for one in (value if isinstance(value, list) else [value]))
