"""A recipe: the sections of one YAML file, and how they are listed."""

import textwrap
from dataclasses import dataclass, field

from training.config import ConfigError, describe
from training.data.config import DataConfig
from training.evaluation.losses import EvaluationConfig
from training.evaluation.sampling import SamplesConfig
from training.models import ModelConfig
from training.optimization import OptimizerConfig, warmup_steps
from training.train_config import TrainConfig


@dataclass
class Recipe:
    """Everything that a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)

    def __post_init__(self):
        try:
            self.data.validate()
        except ValueError as error:
            raise ConfigError(f"data: {error}") from error
        self.optimizer.warmup_steps = warmup_steps(self.optimizer, self.train.steps)
        if self.optimizer.warmup_steps > self.train.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than train.steps={self.train.steps}: the "
                "peak learning rate would not be reached; set optimizer.warmup_steps=null for a tenth of the run"
            )


def list_keys() -> str:
    """Every key of a recipe with its type, default and documentation, for `--help`."""
    lines = []
    section = ""
    for key, kind, default, doc in describe(Recipe):
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines.append(f"\n{section}:")
        lines.append(f"  {key} ({kind}; {default})")
        lines.extend(textwrap.wrap(doc, 112, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines).lstrip("\n")
