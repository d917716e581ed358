"""The areas of the fuzz by name, in the order in which they are run."""

from . import (
    checkpoints,
    commands,
    configurations,
    conversions,
    data_files,
    media,
    models,
    pushes,
    recipes,
    saved,
    serving,
)
from .case import Area


AREAS: dict[str, Area] = {
    "configurations": Area(configurations.configure, configurations.good),
    "forward": Area(models.forward, models.good_forward, models.warm),
    "generate": Area(models.generate, models.good_generate, models.warm),
    "serving": Area(serving.serve, serving.good, serving.warm),
    "processor": Area(media.process, media.good, media.warm),
    "recipes": Area(recipes.recipe, recipes.good, recipes.warm),
    "data": Area(data_files.read, data_files.good, media.warm),
    "tokenizers": Area(commands.tokenize, commands.good, commands.warm),
    "conversion": Area(conversions.convert, conversions.good, saved.saved),
    "push": Area(pushes.push, pushes.good, saved.saved),
    "checkpoints": Area(checkpoints.load, checkpoints.good, saved.saved),
}
