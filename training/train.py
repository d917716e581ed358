"""Train a Mixture-of-Transformers, or one of its baselines.

    python training/train.py [CONFIG.yaml] [key=value ...]                in one process
    accelerate launch training/train.py [CONFIG.yaml] [key=value ...]     in as many as Accelerate is set up for
    ... --help            this text and every key
    ... --print-config    the resolved configuration as YAML, without running it

Without CONFIG.yaml the default recipe is used: training/configs/emoji.yaml, on the data that the project carries.
`key` is a dotted path and `value` is YAML: model.variant=dense optimizer.lr=1e-3 data.sources.0.limit=64

Ctrl-C (or SIGTERM) finishes the step, writes a checkpoint and ends; train.resume=auto goes on from it. A second Ctrl-C
ends at once. SIGUSR1 traces the next three steps of a process into profile/; locks/rank-00000.json has its PID.

Exit code of each process (a launcher of several processes ends with 1 if one of them does not end with 0):
    0 done    1 an error    2 what was asked for cannot be met, and nothing was written
    3 the last checkpoint or the final folder could not be written
    4 losses or gradients were not finite for too many steps in a row
    130, 143 interrupted by SIGINT, SIGTERM, with a checkpoint
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path


if __package__ in (None, ""):
    # Run as a file: the project is the folder above. This folder leaves the path, or its `tokenizers` and `data` would
    # hide the packages of these names.
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if p and Path(p).resolve() != _here)]

from training.config import ConfigError, dump, load, one_line, override, read_yaml
from training.run_files.folder import RunLock


DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "emoji.yaml"

_METRICS_HELP = """metrics.jsonl, one object a step: step, loss, loss_<modality>, tokens_<modality> (targets), where
images are diffused loss_image_diffusion and elements_image_diffusion (of latents), grad_norm (before clipping), lr,
tokens_per_second (positions that are not padding, over the whole step), mfu, step_seconds, data_seconds. mfu is 3 x
forward FLOPs over the peak of the device: its data sheet's where it is known, else, and on every CPU, the fastest of a
few square matrix products timed at the start. Held-out losses are rows of their own: eval/loss_<modality>,
eval/<source>/<direction>/loss, and eval/<direction>/loss over the sources."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: see above."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # Help, and what needs no torch: its import takes seconds.
        path, keys, options = split_words(words)
        if "--help" in options:
            from training.recipe import list_keys

            listed = f"Keys (type; default of the key, which a recipe may change):\n\n{list_keys()}"
            print(f"{__doc__.strip()}\n\n{listed}\n\n{_METRICS_HELP}")
            return 0
        if "--print-config" not in options:
            refuse_held_folder(path, keys)

        # The recipe, shown or run.
        recipe = load_recipe(words)
        if "--print-config" in options:
            print(dump(recipe), end="")
            return 0
        from training.run import run

        return run(recipe)
    except ConfigError as error:
        rank = os.environ.get("RANK", "0")
        where = "error" if rank == "0" else f"error on rank {rank}"
        print(f"{where}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there is a run, or the second one
        print("ended by SIGINT", file=sys.stderr)
        return 130


def load_recipe(words: Sequence[str]):
    """Make the Recipe that the words of a command line ask for."""
    # Imported here, after words and folder have been looked at: torch and its kin take seconds to load.
    from training.recipe import Recipe

    path, keys, _ = split_words(words)
    return load(Recipe, path, keys)


def split_words(words: Sequence[str]) -> tuple[str | Path, list[str], set[str]]:
    """Return (the configuration file, the `key=value` words, the options) of a command line."""
    names = {"--help": "--help", "-h": "--help", "--print-config": "--print-config"}
    options = {names[word] for word in words if word in names}
    keys = [word for word in words if "=" in word]
    paths = [word for word in words if "=" not in word and word not in names]
    for word in paths:
        if word.startswith("-"):
            raise ConfigError(f"unknown option {word}; the options are --help and --print-config, keys are key=value")
        if Path(word).suffix not in (".yaml", ".yml") and not Path(word).is_file():
            raise ConfigError(f"{word!r} is neither a configuration file (.yaml) nor key=value")
    if len(paths) > 1:
        raise ConfigError(f"more than one configuration file: {', '.join(paths)}; give one, then key=value")
    return paths[0] if paths else DEFAULT_CONFIG, keys, options


def refuse_held_folder(path: str | Path, keys: Sequence[str]) -> None:
    """Refuse a folder that another trainer writes to, before anything is loaded; the run takes the lock later."""
    train = override(read_yaml(path), keys).get("train")
    folder = train.get("output_dir") if isinstance(train, dict) else None
    if isinstance(folder, str) and os.environ.get("RANK", "0") == "0":
        RunLock(Path(folder)).refuse_held()


if __name__ == "__main__":
    sys.exit(main())
