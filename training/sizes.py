"""What a recipe leaves open: the size of a model, which follows from the machine and the data, and its modalities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modeling_mot import MoTConfig, MoTProcessor
from modeling_mot.configuration_presets import PRESETS
from modeling_mot.processing_vocabulary import extend_tokenizer, without_codes
from training.config import ConfigError
from training.data.config import MODALITY_OF_TYPE, DataConfig


if TYPE_CHECKING:
    from training.recipe import Recipe


# What makes a size, and those to choose from: the rows of the paper's Table 1.
SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES = {name: {field: PRESETS[name][field] for field in SIZE_FIELDS} for name in (
    "chameleon-37m", "chameleon-94m", "chameleon-443m", "chameleon-1.5b", "chameleon-7b",
)}  # fmt: skip
_STATE_BYTES = 16  # of a parameter in float32: itself, its gradient and AdamW's two moments
_ACTIVATION_BYTES = 80  # of a value of the residual stream in one layer, about
_BATCH_BYTES = 40  # of a token: five integers
_STEP_SECONDS = 10.0


@dataclass(frozen=True)
class Budget:
    """What there is to train with.

    Attributes:
        memory: bytes of a process, of its accelerator where it has one; None: not known.
        flops: FLOP/s that a process may be expected to reach.
        shards: processes that share the state of a model.
        tokens_of_forward, tokens_of_step: of a process.
        tokens_of_run: of all processes, in all steps.
        state_bytes: of a parameter.
    """

    memory: float | None
    flops: float
    shards: int
    tokens_of_forward: int
    tokens_of_step: int
    tokens_of_run: int
    state_bytes: int

    @classmethod
    def of(
        cls, recipe: "Recipe", memory: float | None, peak: float, processes: int, shards: int, utilisation: float = 0.4
    ) -> "Budget":
        """What a recipe has on `processes` devices of a peak in FLOP/s, of which `utilisation` may be expected."""
        train = recipe.train
        tokens = train.rows * recipe.data.row_length
        return cls(
            memory=memory,
            flops=utilisation * peak,
            shards=shards,
            tokens_of_forward=tokens,
            tokens_of_step=tokens * train.accumulation,
            tokens_of_run=tokens * train.accumulation * processes * train.steps,
            state_bytes=_STATE_BYTES // 4 if train.frozen_towers else _STATE_BYTES,
        )

    def is_enough_for(self, config: MoTConfig) -> bool:
        """Whether a model fits well: 7 tenths of the memory, steps of at most 10 s, and a token for each active parameter
        (the paper's runs have more; a small set is seen many times)."""
        active = config.num_parameters(active=True)
        values = config.num_hidden_layers * config.hidden_size * _ACTIVATION_BYTES + 8 * config.vocab_size
        needed = self.state_bytes * config.num_parameters() / self.shards + self.tokens_of_forward * values
        return (
            (self.memory is None or needed <= 0.7 * self.memory)
            and 6 * active * self.tokens_of_step <= _STEP_SECONDS * self.flops
            and active <= self.tokens_of_run
        )

    def refuse_impossible(self, config: MoTConfig) -> None:
        """Refuse what no memory holds, before any of it is made: the state of the model, the input of a layer, the batches
        of a step.

        Raises:
            ConfigError: naming how much is needed, and of what.
        """
        parameters = config.num_parameters()
        needs = {
            f"{parameters:,} parameters with what the optimizer keeps": self.state_bytes * parameters / self.shards,
            f"train.rows x data.row_length = {self.tokens_of_forward:,} tokens of {config.hidden_size} values": (
                4 * self.tokens_of_forward * config.hidden_size
            ),
            f"train.rows x train.accumulation x data.row_length = {self.tokens_of_step:,} tokens": (
                _BATCH_BYTES * self.tokens_of_step
            ),
        }
        what, most = max(needs.items(), key=lambda need: need[1])
        if self.memory is not None and most > self.memory:
            raise ConfigError(
                f"{what} take {most / 1e9:,.1f} GB of a process that has {self.memory / 1e9:,.1f} GB; make them fewer, or "
                "share the model among more processes (python -m training.plan says how many)"
            )


def describe_choice(config: MoTConfig, budget: Budget) -> str:
    """What was chosen, and how to choose otherwise."""
    return (
        f"no size is named: {config.hidden_size} wide, {config.num_hidden_layers} layers, {config.num_attention_heads} "
        f"heads, modalities {', '.join(config.modalities)}, which fits this machine and the "
        f"{budget.tokens_of_run:,} tokens of the run; for another set model.preset ({', '.join(SIZES)}) or "
        "model.hidden_size, model.num_hidden_layers and model.num_attention_heads"
    )


def leaves_size_open(model: Any) -> bool:
    """Whether a `ModelConfig` names no size and nothing that has one."""
    return all(getattr(model, name) is None for name in ("preset", "init_from", "intermediate_size", *SIZE_FIELDS))


def fill_from_checkpoint(model: Any, stored: Mapping[str, Any]) -> None:
    """Give a `ModelConfig` the size and the modalities that its run began with, in place."""
    for name in (*SIZE_FIELDS, "modalities"):
        setattr(model, name, stored.get(name))


def modalities_of(data: DataConfig) -> list[str] | None:
    """Modalities that the templates have, text first; None where documents say it themselves, record by record."""
    sources = (*data.sources, *data.validation_sources)
    kinds = {segment.type for source in sources for segment in source.segments}
    if "document" in kinds:
        return None
    found = {MODALITY_OF_TYPE[kind] for kind in kinds}
    return ["text", *(name for name in ("image", "speech") if name in found)]


def restricted(processor: MoTProcessor, modalities: Sequence[str]) -> MoTProcessor:
    """A processor of discrete codes with some of its modalities alone; its text keeps its ids.

    Raises:
        ConfigError: modalities that it does not have, or text is not the first.
    """
    has = processor.modalities
    if list(modalities) != [name for name in has if name in modalities] or "text" not in modalities:
        raise ConfigError(
            f"model.modalities={list(modalities)} must be text and others of the processor's, in its order: {has}"
        )
    if list(modalities) == list(has):
        return processor
    image = processor.image_tokenizer if "image" in modalities else None
    speech = processor.speech_tokenizer if "speech" in modalities else None
    tokenizer = extend_tokenizer(
        without_codes(processor.tokenizer), image.num_codes if image else 0, speech.num_units if speech else 0
    )
    return MoTProcessor(tokenizer, image, speech, chat_template=processor.chat_template)
