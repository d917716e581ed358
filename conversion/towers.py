"""Plan the towers of a MoT from a dense checkpoint: decide the origin of every tensor before any tensor is made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from conversion.architectures import Architecture, architecture_of, fit_length
from conversion.checkpoints import CheckpointReader, Entry
from conversion.commands import (
    check_range,
    merge_layers,
    read_config,
    read_generation_config,
    read_json,
    reading,
    stored_dtype,
)
from conversion.initial_values import Start, extended, fresh, generator_of, perturbed
from conversion.key_maps import ConversionError, Origin
from conversion.sizes import check_sizes
from conversion.vocabulary import Media, Vocabulary, extend_vocabulary
from modeling_mot import MoTConfig, MoTForCausalLM, MoTProcessor, MoTTransfusionConfig, MoTTransfusionModel
from modeling_mot.configuration_mot import UNTIED_PARTS
from modeling_mot.latent_vae import downsampling, vae_config_of
from modeling_mot.modeling_mot_transfusion import build_patchifier


# Several times the sizes of any known model.
MOST_EXPERTS = MOST_LAYERS = 1024
MOST_SIDE = 1 << 20
MOST_PATCHIFIER = 1 << 30  # parameters, which are drawn all at once
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class Wishes:
    """The options of making a MoT from a dense model.

    Attributes:
        media: the tokens of pictures and sound in the vocabulary.
        share: parts of a layer that the towers have in common.
        starts: tower -> how it begins; a tower that is not named is a copy.
        text_experts: number of experts in the text tower's feed-forward; None: it stays one feed-forward.
        vae: a diffusers autoencoder; with it the model diffuses pictures, as `MoTTransfusionModel` does.
        settings: fields of the configuration that neither the source nor another option decides.
        max_length: see `fit_length`.
        dtype: dtype of the weights; None: the source's.
        seed: seed of everything that is drawn.
        ignored_fields: fields of the source's configuration that the user vouches for.
        use_tokenizer: take the source's tokenizer along.
    """

    media: Media
    share: list[str] = field(default_factory=list)
    starts: dict[str, Start] = field(default_factory=dict)
    text_experts: int | None = None
    vae: nn.Module | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    dtype: torch.dtype | None = None
    seed: int = 0
    ignored_fields: list[str] = field(default_factory=list)
    use_tokenizer: bool = True


@dataclass
class Plan:
    """A conversion that has been checked, and not yet done.

    Attributes:
        reader: reads the source.
        architecture: the source's architecture.
        model: a model of the new configuration, without values.
        processor: None if the source has no tokenizer.
        entries: the tensors to write, in order.
        origins: name of a tensor to write -> its origin in the source; a tensor that is made here has none.
        source_vocabulary: number of rows in the source's embeddings; they are the first rows of the new ones.
    """

    reader: CheckpointReader
    architecture: Architecture
    model: PreTrainedModel
    processor: MoTProcessor | None
    entries: list[Entry]
    origins: dict[str, Origin]
    source_vocabulary: int

    def describe(self) -> str:
        """List every tensor of the source with its targets, every new tensor, and the sums.

        Layers that become the same are one line, `layers.{0..31}`.
        """
        # The source's tensors and the new ones.
        targets: dict[str, list[str]] = {}
        for name, origin in self.origins.items():
            targets.setdefault(origin.name, []).append(name)
        lines = []
        for name in self.reader.names:
            what = f"{name} {list(self.reader.shape(name))} {_short(self.reader.dtype(name))}"
            lines.append(f"{what} -> {', '.join(targets.get(name, ['nothing']))}")
        for entry in self.entries:
            if entry.name not in self.origins:
                lines.append(f"new: {entry.name} {list(entry.shape)} {_short(entry.dtype)}")

        # The sums.
        config, size = self.model.config, sum(entry.num_bytes for entry in self.entries)
        new_rows = config.vocab_size - self.source_vocabulary
        active = config.num_parameters(active=True)
        towers = ", ".join(config.tower_names)
        sums = [
            f"{self.architecture.model_type} -> {type(self.model).__name__} with towers {towers}",
            f"{config.vocab_size:,} rows of the vocabulary: {self.source_vocabulary:,} of the source, {new_rows:,} new",
            f"{self.reader.num_bytes():,} bytes become {size:,}",
            f"{config.num_parameters():,} parameters, {active:,} of them active for a token",
        ]
        return "\n".join([*merge_layers(lines), *sums])


def plan_upcycle(folder: Path, wishes: Wishes) -> Plan:
    """Decide everything about a conversion. Of the weights only the headers are read.

    Args:
        folder: the source's folder.

    Raises:
        ConversionError: the conversion cannot be done; the message names the reason and the way out.
    """
    # The source must be an architecture that a MoT expresses.
    stored = read_json(folder / "config.json")
    architecture = architecture_of(stored.get("model_type"))
    reader = CheckpointReader(folder)
    check_sizes(stored, reader, folder / "config.json")
    source = read_config(stored)
    architecture.check(source, stored, wishes.ignored_fields)

    # The new configuration, and a model of it that takes no memory.
    length = fit_length(source, wishes.max_length)
    vocabulary = extend_vocabulary(folder, source, wishes.media, wishes.use_tokenizer)
    config = _mot_config(architecture, source, vocabulary, wishes, length)
    config.dtype = wishes.dtype or stored_dtype(stored, reader.dtype(reader.names[0]))
    with torch.device("meta"):
        model = (MoTForCausalLM if wishes.vae is None else MoTTransfusionModel)(config)
    _take_generation_config(folder, model)

    # Every tensor of the new model is made here or comes from one tensor of the source.
    targets = model.state_dict()
    if config.tie_word_embeddings:
        del targets[HEAD]
        _refuse_untied(reader)
    made_here = _made_here(config, targets, wishes)
    wanted = [name for name in targets if name not in made_here]
    origins = architecture.key_map(config).origins(reader.names, wanted)

    # The order of writing, with shapes checked before anything is written.
    entries = []
    for name, target in targets.items():
        make = made_here.get(name) or partial(_value, reader, origins[name], name, config, wishes)
        dtype = torch.float32 if name.startswith("vae.") else config.dtype
        entries.append(Entry(name, tuple(target.shape), dtype, partial(_cast, make, dtype)))
    for entry in entries:
        if entry.name in origins:
            _check_shape(reader, origins[entry.name].name, entry, source.vocab_size)
    return Plan(reader, architecture, model, vocabulary.processor, entries, origins, source.vocab_size)


# -------------------------------------------------------------------------------------------------------- configuration


def _mot_config(
    architecture: Architecture, source: PreTrainedConfig, vocabulary: Vocabulary, wishes: Wishes, length: int
) -> MoTConfig:
    # The source's fields, the vocabulary's over them, then the options.
    values = architecture.mot_fields(source) | vocabulary.fields | {"max_position_embeddings": length}
    values["untied"] = [part for part in UNTIED_PARTS if part not in wishes.share]
    check_range("--moe-text", wishes.text_experts, 2, MOST_EXPERTS)
    if wishes.text_experts is not None:
        if "feed_forward" in wishes.share:
            raise ConversionError(
                "--moe-text is of the text tower's feed-forward, which --share feed_forward leaves none"
            )
        values |= {"moe_towers": ["text"], "num_experts": wishes.text_experts}

    # Pictures that are diffused need the sizes of the VAE's latents.
    config_class = MoTConfig
    if wishes.vae is not None:
        config_class, factor = MoTTransfusionConfig, downsampling(vae_config_of(wishes.vae))
        values["latent_size"] = [side // factor for side in wishes.media.image_processor.image_size]
        values["latent_channels"] = wishes.vae.config.latent_channels
        values["vae_config"] = vae_config_of(wishes.vae)
    _check_settings(wishes.settings)
    with reading("these options contradict each other"):
        config = config_class(**values | wishes.settings)

    # Only now the towers have names.
    if unknown := [tower for tower in wishes.starts if tower not in config.tower_names]:
        raise ConversionError(f"--init names {unknown[0]!r}; the towers are {', '.join(config.tower_names)}")
    for tower, own in (config.tower_configs or {}).items():
        if own and wishes.starts.get(tower, Start()).kind != "fresh":
            raise ConversionError(
                f"--set tower_configs gives tower {tower!r} fields of its own, {own}, so it is no copy of the source; "
                f"--init {tower}=fresh draws it as in a new model"
            )
    if wishes.starts and not config.untied:
        raise ConversionError("--init is of what a tower has for itself, but --share leaves nothing; name fewer parts")
    return config


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse sizes beyond any known model, since modules of such sizes would be built before anything else fails."""
    for name, value in settings.items():
        most = MOST_LAYERS if name == "unet_layers" else MOST_SIDE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > most:
                raise ConversionError(f"--set {name} {number} must be at most {most}")


def _take_generation_config(folder: Path, model: PreTrainedModel) -> None:
    """Give the model the source's settings of generation; special tokens that they leave open are the model's."""
    own, taken = model.generation_config, read_generation_config(folder)
    if taken is None:
        return
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(taken, name) is None:
            setattr(taken, name, getattr(own, name))
    model.generation_config = taken


# --------------------------------------------------------------------------------------------------------------- values


def _made_here(config: MoTConfig, targets: dict[str, torch.Tensor], wishes: Wishes) -> dict[str, Callable]:
    """Name -> maker of each tensor that no dense model has: those of other sizes, of routers, patchifier and VAE."""
    own = [tower for tower, fields in (config.tower_configs or {}).items() if fields]
    made = {}
    for name, target in targets.items():
        if (tower := next((part for part in name.split(".") if part in own), None)) is not None:
            made[name] = partial(_fresh, name, tuple(target.shape), config.tower_config(tower), wishes.seed)
        if name.endswith(".router.weight"):
            made[name] = partial(_router, name, tuple(target.shape), config, wishes.seed)
    if wishes.vae is not None:
        if (count := config.patchifier_parameters()) > MOST_PATCHIFIER:
            raise ConversionError(
                f"unet_channels={config.unet_channels} and unet_layers={config.unet_layers} make a patchifier of "
                f"{count:,} parameters; at most {MOST_PATCHIFIER:,} are drawn"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_of(wishes.seed, "patchifier").initial_seed())
            patchifier = build_patchifier(config)
        for prefix, module in (("patchifier", patchifier), ("vae", wishes.vae)):
            made |= {f"{prefix}.{name}": partial(_same, value) for name, value in module.state_dict().items()}
    return made


def _fresh(name: str, shape: tuple[int, ...], config: MoTConfig, seed: int) -> torch.Tensor:
    return fresh(name, shape, config, generator_of(seed, name))


def _router(name: str, shape: tuple[int, ...], config: MoTConfig, seed: int) -> torch.Tensor:
    # D inputs add up. With values this small all experts begin with about the same weight.
    return _fresh(name, shape, config, seed) / shape[1] ** 0.5


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _cast(make: Callable[[], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return make().to(dtype)


def _value(reader: CheckpointReader, origin: Origin, name: str, config: MoTConfig, wishes: Wishes) -> torch.Tensor:
    # The vocabulary's tables get more rows; every other tensor begins as its tower does.
    generator = generator_of(wishes.seed, name)
    if name in (EMBEDDINGS, HEAD):
        return extended(reader.read(origin.name), config.vocab_size, generator)
    tower = next((value for part, value in origin.fan_out.items() if part != "expert"), None)
    start = wishes.starts.get(tower, Start())
    if start.kind == "fresh":
        value = fresh(name, reader.shape(origin.name), config, generator)
    elif start.kind == "perturbed":
        value = perturbed(reader.read(origin.name), start.std, generator)
    else:
        value = reader.read(origin.name)
    if "expert" in origin.fan_out and ".down_proj." in name and start.kind != "fresh":
        # A token's expert counts with a weight of about 1 / num_experts. Multiplied by num_experts, it gives the output
        # of the source's feed-forward.
        value = value * config.num_experts
    return value


# --------------------------------------------------------------------------------------------------------------- checks


def _check_shape(reader: CheckpointReader, source: str, entry: Entry, source_vocabulary: int) -> None:
    expected = entry.shape
    if entry.name in (EMBEDDINGS, HEAD):
        expected = (source_vocabulary, *expected[1:])
    reader.check(source, expected)


def _refuse_untied(reader: CheckpointReader) -> None:
    """Refuse an output layer that is tied to the embeddings and stored with other values."""
    if HEAD in reader and not torch.equal(reader.read(HEAD), reader.read(EMBEDDINGS)):
        raise ConversionError(
            f"config.json has tie_word_embeddings=true, but {HEAD} is stored and is not {EMBEDDINGS}; which is meant? "
            "Set tie_word_embeddings to false there, or leave the tensor out"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
