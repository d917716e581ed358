"""Write the model card of a saved checkpoint, or of a run and its final checkpoint, from their files.

    python -m conversion.card FOLDER [--run RUN] [--repo OWNER/NAME] [--license ID] [--evaluation DIR] [--output FILE]

FOLDER is a run, or was written by save_pretrained, a run (RUN/final), python -m training.consolidate or a conversion.
The card goes to the screen or into a file. A card that somebody has changed is not replaced without --overwrite.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from conversion.key_maps import ConversionError
from model_cards.card import PICTURES, is_generated, model_card


def find_folders(folder: Path, run: Path | None = None) -> tuple[Path, Path | None]:
    """Find the folder of a checkpoint and the folder of its run, if there is one.

    Args:
        folder: a run or a checkpoint.
        run: the run, if the user names it.

    Raises:
        ConversionError: `folder` is neither a run nor a checkpoint.
    """
    if not (folder / "config.json").is_file():
        if not (folder / "final" / "config.json").is_file():
            raise ConversionError(f"{folder} has neither config.json nor final/config.json; name a checkpoint or a run")
        return folder / "final", run or folder
    # RUN/final and RUN/consolidated/step-... belong to RUN; a published recipe keeps both in one folder.
    places = (folder, *folder.resolve().parents[:2])
    return folder, run or next((place for place in places if (place / "manifest.json").is_file()), None)


def write_card(
    folder: Path, run: Path | None, output: Path, overwrite: bool = False, **options: str | Path
) -> list[Path]:
    """Write the card and, beside it, the pictures that it shows.  -> the files that were written

    Raises:
        ConversionError: `output` was written or changed by hand, and `overwrite` is False.
    """
    # A card that was generated and not changed since may be replaced.
    if output.exists() and not overwrite and not is_generated(output.read_text(encoding="utf-8")):
        raise ConversionError(
            f"{output} was written or changed by hand; name another file, or replace it with --overwrite"
        )
    card = model_card(folder, run, **options)
    card.save(output)

    # The run's pictures, unless they stand there already.
    written = [output]
    for name in PICTURES:
        picture = output.parent / name
        if f"({name})" in card.text and not (picture.exists() and picture.samefile(run / name)):
            shutil.copyfile(run / name, picture)
            written.append(picture)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m conversion.card", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a run or a checkpoint")
    parser.add_argument("--run", type=Path, help="the run of a checkpoint (default: the run whose folder holds it)")
    parser.add_argument("--repo", help="owner/name on the Hub, for the title and the example")
    parser.add_argument("--license", help="the weights' licence, in the Hub's spelling (default: the data's own)")
    parser.add_argument("--base-model", help="the model on the Hub that this one was made from")
    parser.add_argument("--evaluation", type=Path, metavar="DIR", help="results of python -m training.evaluate")
    parser.add_argument("--output", type=Path, help="file, such as FOLDER/README.md (default: the screen)")
    parser.add_argument("--overwrite", action="store_true", help="replace a card that was changed by hand")
    options = parser.parse_args(arguments)
    named = {"repo": options.repo, "license": options.license, "base_model": options.base_model}
    named |= {"evaluation": options.evaluation}
    given = {name: value for name, value in named.items() if value is not None}
    try:
        folder, run = find_folders(options.folder, options.run)
        if options.output is None:
            print(model_card(folder, run, **given))
        else:
            print(*write_card(folder, run, options.output, options.overwrite, **given), sep="\n")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
