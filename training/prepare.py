"""Tokenise the data of a recipe ahead of a run, which then finds the tokens.

    python -m training.prepare [CONFIG.yaml] [key=value ...] [--workers N]
    ... --verify      also hash every file of what is prepared
    ... --help        this text

Keys are those of training/train.py. The tokens of training and held-out sources are kept under data.cache_dir. The
command may be interrupted at any moment: finished parts are kept, and the same command goes on from there. --workers
(default: one for each core) are processes that each tokenise one shard, or one range of records, at a time.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from training.config import ConfigError, one_line
from training.recipe import Recipe
from training.train import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 a storage or process failed, 2 unusable request or data, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=argparse.SUPPRESS)
    parser.add_argument("--verify", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.workers < 1:
            raise ConfigError(f"--workers {options.workers} must be at least 1")
        prepare_recipe(load_recipe(options.words), options.workers, options.verify)
    except ConfigError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"error: {error}; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def prepare_recipe(recipe: Recipe, workers: int = 1, verify: bool = False) -> None:
    """Tokenise all sources of a recipe, or find their tokens, and print the result.

    Args:
        workers: number of processes that tokenise.
        verify: hash every file.

    Raises:
        ConfigError: as `training.data.rows.prepare_rows`, or a file that is not as it was written.
    """
    # Imported here, after the words have been looked at: torch and its kin take seconds to load.
    from training.data import RowStream
    from training.data.rows import prepare_sources
    from training.model.building import check_image_codes, load_initial, plan_model

    # The processor and the towers decide how the data are tokenised.
    begin = time.perf_counter()
    planned = plan_model(recipe.model, recipe.data, load_initial(recipe.model))
    check_image_codes(recipe.model, planned.processor)
    data = planned.data

    # All sources, found or tokenised, and what each of them holds.
    try:
        training, held_out = (
            prepare_sources(data, planned.processor, workers, validation, planned.vae, progress=True)
            for validation in (False, True)
        )
        for kind, sources in (("training", training), ("held out", held_out)):
            for source in sources:
                if verify:
                    source.verify()
                print(
                    f"{kind:8}  {source.config.name:20} {len(source):>12,} records {source.tokens:>16,} tokens  "
                    f"fingerprint {source.fingerprint[:16]}{'  verified' if verify else ''}"
                )
                for line in source.left_out.lines():
                    print(f"{'':10}left out: {line}")

        # How well the documents fill rows.
        report = RowStream(data, training).report()
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    except OSError as error:
        raise ConfigError(f"data: {error}; what is prepared is kept in data.cache_dir={data.cache_path}") from error
    shares = ", ".join(f"{name} {share:.1%}" for name, share in report["shares_of_modalities"].items())
    print(
        f"a row holds {report['row_length']} tokens and is filled to {report['fill_rate']:.2%} on average, the rest is "
        f"padding; {report['block_documents']:,} drawn documents make about {report['rows_per_block']:,.0f} rows\n"
        f"of their tokens: {shares}\n"
        f"ready after {time.perf_counter() - begin:.1f} s in {data.cache_path}"
    )


if __name__ == "__main__":
    sys.exit(main())
