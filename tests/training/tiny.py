"""A model, rows and a processor small enough for tests of the trainer; rows are made up, not read."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.state import AcceleratorState

from modeling_mot import MoTConfig, MoTForCausalLM
from training.data import collate
from training.data.stream import StepBatches
from training.optimization import OptimizerConfig, freeze_towers
from training.recipe import TrainConfig
from training.run_files.checkpoints import Checkpointer
from training.run_files.folder import RunFolder
from training.run_files.metrics import Metrics
from training.trainer import Trainer
from training.world import build_accelerator, is_sharding, shard_model, spread_weights


RANGES = {"text": [0, 40], "image": [40, 60], "speech": [60, 70]}


def tiny_config(variant: str = "mot", **fields) -> MoTConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 70, "modality_token_ranges": RANGES}
    markers = dict(
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        boi_token_id=3,
        eoi_token_id=4,
        begin_of_speech_token_id=5,
        end_of_speech_token_id=6,
    )
    values = sizes | tokens | markers | {"max_position_embeddings": 64, "image_grid": [2, 2]} | fields
    return MoTConfig.from_variant(variant, modalities=["text", "image", "speech"], **values)


def tiny_model(variant: str = "mot", seed: int = 0, **fields) -> MoTForCausalLM:
    torch.manual_seed(seed)
    return MoTForCausalLM(tiny_config(variant, **fields)).train()


class MadeUpStream:
    """Endless rows, each a function of (seed, index): two documents of one or more modalities, and a padded tail."""

    def __init__(self, row_length: int = 24, seed: int = 0, modalities: tuple[str, ...] = ("text", "image", "speech")):
        self.row_length, self.seed, self.modalities = row_length, seed, modalities

    def rows(self, start: int = 0):
        while True:
            yield self.row(start)
            start += 1

    def position(self, index: int) -> dict:
        return {"row": index}

    def restore(self, position: dict) -> None:
        self.restored = position

    def row(self, index: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng([self.seed, index])
        length, cut = self.row_length - int(random.integers(0, 6)), int(random.integers(4, 12))
        ids = np.zeros(self.row_length, dtype=np.int64)
        names = random.choice(self.modalities, length)
        # Six different tokens of a modality, so that there is something to learn.
        ids[:length] = [max(7, RANGES[name][0]) + random.integers(6) for name in names]
        places = np.arange(self.row_length)
        documents = np.where(places < length, (places >= cut).astype(np.int64), -1)
        labels = np.where((places < length) & (places != 0) & (places != cut), ids, -100)
        modality_ids = np.searchsorted([40, 60], ids, side="right")
        positions = np.where(places < cut, places, places - cut) * (documents >= 0)
        return {
            "input_ids": ids,
            "modality_ids": modality_ids,
            "position_ids": positions,
            "document_ids": documents,
            "labels": labels,
        }


def sharded(model: MoTForCausalLM, accelerator: Accelerator) -> MoTForCausalLM:
    with init_empty_weights(include_buffers=False):
        empty = type(model)._from_config(model.config, dtype=torch.float32).train()
    if model.is_gradient_checkpointing:
        empty.gradient_checkpointing_enable()
    for name, parameter in model.named_parameters():
        empty.get_parameter(name).requires_grad_(parameter.requires_grad)
    empty = shard_model(accelerator, empty)
    spread_weights(empty, model if accelerator.is_main_process else None)
    return empty


class NoProcessor:
    """What the trainer asks of a processor: to be saved beside the model."""

    def save_pretrained(self, folder) -> None:
        (Path(folder) / "processor_config.json").write_text("{}", encoding="utf-8")


def tiny_trainer(folder, model=None, stream=None, precision="float32", optimizer=None, **train) -> Trainer:
    """A trainer on the CPU, of one process or of those in the environment; `train` are fields of TrainConfig.

    If it is sharded, a model without weights gets the weights of the main process.
    """
    config = TrainConfig(**({"steps": 4, "rows": 2, "progress_bar": False, "output_dir": str(folder)} | train))
    optimizer_config = optimizer or OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = build_accelerator(precision, cpu=True)
    model = model or tiny_model()
    freeze_towers(model, config.frozen_towers)
    if is_sharding(accelerator):
        model = sharded(model, accelerator)
    run = RunFolder(folder)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            run.claim(config.resume, config.overwrite)

    batch = partial(collate, config=model.config, noise_seed=config.seed)
    shares = accelerator.process_index, accelerator.num_processes
    batches = StepBatches(stream or MadeUpStream(), batch, config.rows, config.accumulation, *shares)
    return Trainer(
        accelerator,
        model,
        batches,
        config,
        optimizer_config,
        Checkpointer(run, accelerator, NoProcessor(), {}, config.keep_checkpoints, config.save_asynchronously),
        Metrics(run.metrics, accelerator, model.config, peak_flops=1e9),
    )
