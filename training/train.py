"""Train a Mixture-of-Transformers, or one of its baselines.

    accelerate launch training/train.py [CONFIG.yaml] [key=value ...]
    python training/train.py [CONFIG.yaml] [key=value ...]     the same, in one process
    ... --help            this text and every key
    ... --print-config    the resolved configuration as YAML, without running it

Without CONFIG.yaml the default recipe is used: training/configs/emoji.yaml, on the data that the project carries.
`key` is a dotted path and `value` is YAML: model.variant=dense optimizer.lr=1e-3 data.sources.0.limit=64

Ctrl-C (or SIGTERM) finishes the step, writes a checkpoint and ends with exit code 130 (143); train.resume=true goes on
from it. A second Ctrl-C ends at once. Errors in what was asked for end with exit code 2 before anything is written.
"""

import sys
from collections.abc import Sequence
from pathlib import Path


if __package__ in (None, ""):
    # Run as a file: the project is the folder above, and this folder, whose `tokenizers` and `data` would stand before
    # the packages of those names, leaves the path.
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if p and Path(p).resolve() != _here)]

from training.config import ConfigError, dump, load
from training.recipe import Recipe, list_keys


DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "emoji.yaml"

_METRICS_HELP = """metrics.jsonl, one object a step: step, loss, loss_<modality>, tokens_<modality> (targets), where images
are diffused loss_image_diffusion and elements_image_diffusion (of latents), grad_norm (before clipping), lr,
tokens_per_second (positions that are not padding, over the whole step), mfu, step_seconds, data_seconds. mfu is 3 x
forward FLOPs over the peak of the device: its data sheet's where it is known, else, and on every CPU, the fastest of a
few square matrix products timed at the start. Held-out losses are rows of eval/... keys."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 a request that cannot be met, 130 or 143 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in words or "-h" in words:
        keys = f"Keys (type; default of the key, which a recipe may change):\n\n{list_keys()}"
        print(f"{__doc__.strip()}\n\n{keys}\n\n{_METRICS_HELP}")
        return 0
    try:
        print_config = "--print-config" in words
        recipe = load_recipe([word for word in words if word != "--print-config"])
        if print_config:
            print(dump(recipe), end="")
            return 0
        # Later than the checks above, so that a mistyped key is answered at once.
        from training.run import run

        return run(recipe)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def load_recipe(words: Sequence[str]) -> Recipe:
    """A recipe from the words of a command line: at most one YAML file, then `key=value`."""
    paths = [word for word in words if "=" not in word]
    for word in paths:
        if word.startswith("-"):
            raise ConfigError(f"unknown option {word}; the options are --help and --print-config, keys are key=value")
    if len(paths) > 1:
        raise ConfigError(f"more than one configuration file: {', '.join(paths)}; give one, then key=value")
    return load(Recipe, paths[0] if paths else DEFAULT_CONFIG, [word for word in words if "=" in word])


if __name__ == "__main__":
    sys.exit(main())
