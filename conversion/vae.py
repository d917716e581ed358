"""Take the VAE out of a Transfusion model as a folder of diffusers, or put such a folder in its place.

    python -m conversion.vae export FOLDER OUT
    python -m conversion.vae import FOLDER VAE OUT

FOLDER is a saved `MoTTransfusionModel`. The transformer's tensors are copied one at a time, bit for bit.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from transformers.dynamic_module_utils import custom_object_save

from conversion.checkpoints import WEIGHTS, CheckpointReader, Entry, check_output, fetch, new_folder, write_tensors
from conversion.commands import exit_code, read_json, reading
from conversion.key_maps import ConversionError
from conversion.sizes import check_part, check_sizes
from modeling_mot import MoTProcessor, MoTTransfusionConfig, MoTTransfusionModel
from modeling_mot.hub_trust import code_in, without_code
from modeling_mot.image_processing import IMAGE_PROCESSOR_CONFIG_NAME
from modeling_mot.latent_vae import build_vae, downsampling, vae_class, vae_config_of, vae_fingerprint


PREFIX = "vae."
# Fields that scale latents. A model knows only latents of the scale that it was trained on.
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def export_vae(folder: Path, out: Path, overwrite: bool = False, dry_run: bool = False) -> str:
    """Write the VAE of a Transfusion model as `AutoencoderKL` or `AutoencoderTiny.from_pretrained` reads it.

    Args:
        folder: the model's folder.
        out: a new folder; it appears whole or not at all.
        overwrite: replace a model at `out`.
        dry_run: check and plan, write nothing.

    Returns:
        One line that says what is written.

    Raises:
        ConversionError: the model holds no VAE, or its tensors do not fit its `vae_config`.
    """
    check_output(out, overwrite)
    config = _config(folder)
    if config.vae_config is None:
        raise ConversionError(f"{folder} holds no VAE (vae_config is null): its model is fed latents")
    reader = CheckpointReader(folder)
    check_sizes(config.vae_config, reader, folder / "config.json")
    tensors = {name.removeprefix(PREFIX): reader.read(name) for name in reader.names if name.startswith(PREFIX)}
    with torch.device("meta"), reading(f"vae_config of {folder} cannot be read"):
        vae = build_vae(config.vae_config)
    try:
        vae.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"the VAE of {folder} is not what its vae_config says: {error}") from None
    if not dry_run:
        with new_folder(out, overwrite) as made:
            vae.save_pretrained(made)
    return f"{type(vae).__name__}: {len(tensors)} tensors, {_num_bytes(tensors):,} bytes -> {out}"


def import_vae(
    folder: Path,
    vae_folder: str,
    out: Path,
    other_latents: bool = False,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
) -> str:
    """Write a copy of a Transfusion model with another VAE, kept in float32.

    Args:
        folder: the model's folder; the model may lack a VAE.
        vae_folder: folder or Hub name of a diffusers `AutoencoderKL` or `AutoencoderTiny`, with weights in safetensors.
        out: a new folder; it appears whole or not at all.
        other_latents: take a VAE that scales its latents otherwise than the one before.
        max_shard_size: size of a file of weights.
        overwrite: replace a model at `out`.
        dry_run: check and plan, write nothing.

    Returns:
        One line that says what is written.

    Raises:
        ConversionError: the VAE is of another class, or its latents do not fit the model in their channels, in the
            pixels of a latent, or in their scale.
    """
    check_output(out, overwrite)
    config = _config(folder)
    vae = read_vae(vae_folder)
    _check_fits(config, folder, vae, vae_folder, other_latents)

    # The transformer's tensors as they are, and the new VAE's.
    reader = CheckpointReader(folder)
    kept = [name for name in reader.names if not name.startswith(PREFIX)]
    entries = [Entry(name, reader.shape(name), reader.dtype(name), partial(reader.read, name)) for name in kept]
    for name, tensor in vae.state_dict().items():
        entries.append(Entry(PREFIX + name, tuple(tensor.shape), tensor.dtype, tensor.contiguous))

    # Every other file is copied; the configuration, the record and the code are written anew.
    if not dry_run:
        stored = read_json(folder / "config.json") | {"vae_config": vae_config_of(vae)}
        record = {
            "command": "vae import",
            "source": folder.resolve().name,
            "sha256": reader.fingerprints(),
            "vae": Path(vae_folder).resolve().name if Path(vae_folder).is_dir() else vae_folder,
            "vae_fingerprint": vae_fingerprint(vae),
        }
        if (folder / "conversion.json").is_file():
            record["earlier"] = read_json(folder / "conversion.json")
        with new_folder(out, overwrite) as made:
            shutil.copytree(folder, made, ignore=partial(_written_anew, folder), dirs_exist_ok=True)
            for name, content in (("config.json", stored), ("conversion.json", record)):
                (made / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            _write_own_code(made)
            write_tensors(made, entries, max_shard_size)
    added = vae.state_dict()
    sums = f"{len(added)} tensors, {_num_bytes(added):,} bytes"
    return f"{type(vae).__name__}: {sums}, beside {len(kept)} tensors of the transformer -> {out}"


def read_vae(folder: str | Path) -> AutoencoderKL | AutoencoderTiny:
    """Read a VAE in a folder of diffusers, or of that name on the Hub, in float32, frozen; nothing is unpickled.

    Raises:
        ConversionError: there is none, it is not whole, or its class is none that a Transfusion model can hold.
    """
    if Path(folder).is_dir() and (Path(folder) / "model_index.json").is_file():
        raise ConversionError(f"{folder} is a whole pipeline; give its folder vae")
    check_part(folder)
    with reading(f"no VAE could be read from {folder}"):
        # Diffusers' own reader knows the older names that many published VAEs have.
        vae, info = vae_class(AutoencoderKL.load_config(folder)).from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        missing, unexpected = (", ".join(sorted(info[f"{kind}_keys"])) or "none" for kind in ("missing", "unexpected"))
        raise ConversionError(
            f"{folder} is not what its config.json says; tensors missing: {missing}; too many: {unexpected}"
        )
    return vae.eval().requires_grad_(False)


def _config(folder: Path) -> MoTTransfusionConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder} holds no config.json; give the folder of a saved MoTTransfusionModel")
    fetch(str(folder))
    stored = read_json(path)
    if stored.get("model_type") != MoTTransfusionConfig.model_type:
        raise ConversionError(
            f"{folder} has model_type={stored.get('model_type')!r}; only {MoTTransfusionConfig.model_type!r} holds a "
            "VAE"
        )
    with reading(f"{path} cannot be read"):
        return MoTTransfusionConfig.from_dict(stored)


def _check_fits(
    config: MoTTransfusionConfig,
    folder: Path,
    vae: AutoencoderKL | AutoencoderTiny,
    vae_folder: str,
    other_latents: bool,
) -> None:
    """Refuse a VAE whose latents the model cannot read."""
    # The channels and the size of a latent decide the shape of pictures in the model.
    given = vae_config_of(vae)
    if given["latent_channels"] != config.latent_channels:
        raise ConversionError(
            f"latent_channels={given['latent_channels']} of {vae_folder}, but {config.latent_channels} of the model, "
            "whose patchifier reads as many; take a VAE with the same"
        )
    pixels = downsampling(given)
    if config.vae_config is not None and pixels != config.vae_downsampling:
        raise ConversionError(
            f"a latent of {vae_folder} is {pixels} x {pixels} pixels, one of the model's own VAE "
            f"{config.vae_downsampling} x {config.vae_downsampling}: pictures would have other lengths; take one with "
            "the same"
        )
    processor = folder / "image_processor" / IMAGE_PROCESSOR_CONFIG_NAME
    if processor.is_file():
        expected = read_json(processor).get("downsampling")
        if expected != pixels * config.patch_size:
            raise ConversionError(
                f"the model's processor counts a token for {expected} pixels a side (image_processor.downsampling); "
                f"with {vae_folder} one stands for {pixels * config.patch_size} (its {pixels} times "
                f"patch_size={config.patch_size})"
            )

    # A model has learnt one scale of latents.
    if config.vae_config is None or other_latents:
        return
    before, after = _scaling(config.vae_config), _scaling(given)
    if differing := [name for name in SCALING if before[name] != after[name]]:
        listed = ", ".join(f"{name}={after[name]} (the model's own: {before[name]})" for name in differing)
        raise ConversionError(
            f"{vae_folder} scales its latents otherwise: {listed}. The model has learnt to denoise the others; if it "
            "is to be trained on these, say --other-latents"
        )


def _scaling(vae_config: dict[str, Any]) -> dict[str, Any]:
    """Return the scaling fields, with diffusers' defaults for absent ones; a shift of 0 counts as none."""
    with torch.device("meta"):
        complete = build_vae(vae_config).config
    return {name: complete.get(name) or None for name in SCALING}


def _written_anew(root: Path, folder: str, names: list[str]) -> set[str]:
    """Return the names that are not copied: code, and the model's own weights, which stand in the root alone."""
    stem, code = WEIGHTS.removesuffix(".safetensors"), {name for name in names if name.endswith(".py")}
    if Path(folder) != root:
        return code
    weights = {name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))}
    return code | {name for name in weights if name.startswith(stem)}


def _write_own_code(folder: Path) -> None:
    """Write the code of this package, and remove every other name of code from the copied files."""
    for part in (MoTTransfusionConfig, MoTTransfusionModel, MoTProcessor):
        custom_object_save(part, folder)
    own = MoTTransfusionConfig.auto_classes
    processor = {"auto_map": {"AutoProcessor": own["AutoProcessor"]}}
    named = {"config.json": {"auto_map": own}} | dict.fromkeys(
        ("processor_config.json", "tokenizer_config.json"), processor
    )
    for file in folder.rglob("*config.json"):
        tree = read_json(file)
        if not set(code_in(tree)) <= set(own.values()):
            tree = without_code(tree) | named.get(file.relative_to(folder).as_posix(), {})
            file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m conversion.vae", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    exported = commands.add_parser("export", help="write the VAE of a model as a folder of diffusers")
    imported = commands.add_parser("import", help="replace a model's VAE by a folder of diffusers")
    for command in (exported, imported):
        command.add_argument("folder", type=Path, help="folder of a saved MoTTransfusionModel")
        if command is imported:
            command.add_argument("vae_folder", metavar="vae", help="folder or Hub name of a diffusers VAE")
        command.add_argument("out", type=Path, help="new folder")
        command.add_argument("--overwrite", action="store_true", help="replace a model that is there")
        command.add_argument("--dry-run", action="store_true", help="check, print what would be written, write nothing")
    imported.add_argument("--other-latents", action="store_true", help="take a VAE that scales its latents otherwise")
    imported.add_argument("--max-shard-size", default="5GB", help="of a file of weights (default: %(default)s)")
    options = vars(parser.parse_args(arguments))
    run = {"export": export_vae, "import": import_vae}[options.pop("command")]
    return exit_code(lambda: print(run(**options)))


if __name__ == "__main__":
    sys.exit(main())
