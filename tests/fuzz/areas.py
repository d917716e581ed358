"""The entry points, by name; in this order they are run."""

from . import checkpoints, commands, conversions, data_files, media, models, recipes, serving
from .case import Area


AREAS: dict[str, Area] = {
    "configurations": Area(models.configuration),
    "forward": Area(models.forward, models.warm),
    "generate": Area(models.generate, models.warm),
    "serving": Area(serving.serve, serving.warm),
    "processor": Area(media.process, media.warm),
    "recipes": Area(recipes.recipe, recipes.warm),
    "data": Area(data_files.read),
    "tokenizers": Area(commands.tokenize, commands.warm),
    "conversion": Area(conversions.convert, conversions.warm),
    "push": Area(conversions.push, conversions.warm),
    "checkpoints": Area(checkpoints.load, checkpoints.warm),
}
