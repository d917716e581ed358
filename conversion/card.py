"""Write the model card of a saved checkpoint, or of a run and its final checkpoint, from their files.

    python -m conversion.card FOLDER [--run RUN] [--repo OWNER/NAME] [--license ID] [--output FILE] [--overwrite]

FOLDER is a run, or what save_pretrained, a run (RUN/final), python -m training.consolidate or a conversion wrote. The
card goes to the screen, or into a file; a card that somebody has changed is not replaced without --overwrite.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from conversion.key_maps import ConversionError
from model_cards.card import PICTURES, is_generated, model_card


def find_folders(folder: Path, run: Path | None = None) -> tuple[Path, Path | None]:
    """(folder of the checkpoint, folder of its run if there is one) for a run or a checkpoint.

    Raises:
        ConversionError: neither.
    """
    if not (folder / "config.json").is_file():
        if not (folder / "final" / "config.json").is_file():
            raise ConversionError(f"{folder} has neither config.json nor final/config.json; name a checkpoint or a run")
        return folder / "final", run or folder
    # RUN/final and RUN/consolidated/step-... are of RUN; a published recipe keeps both in one folder.
    places = (folder, *folder.resolve().parents[:2])
    return folder, run or next((place for place in places if (place / "manifest.json").is_file()), None)


def write_card(folder: Path, run: Path | None, output: Path, overwrite: bool = False, **options: str) -> list[Path]:
    """Write the card and, beside it, the pictures that it shows.  -> what was written

    Raises:
        ConversionError: `output` is not a card as it was generated, and not to be overwritten.
    """
    if output.exists() and not overwrite and not is_generated(output.read_text(encoding="utf-8")):
        raise ConversionError(
            f"{output} was written or changed by hand; name another file, or replace it with --overwrite"
        )
    card = model_card(folder, run, **options)
    card.save(output)
    written = [output]
    for name in PICTURES:
        picture = output.parent / name
        if f"({name})" in card.text and not (picture.exists() and picture.samefile(run / name)):
            shutil.copyfile(run / name, picture)
            written.append(picture)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m conversion.card", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a run or a checkpoint")
    parser.add_argument(
        "--run", type=Path, help="the run of a checkpoint (default: that whose folder holds it, if any)"
    )
    parser.add_argument("--repo", help="owner/name on the Hub, for the title and the example")
    parser.add_argument(
        "--license", help="of the weights, as the Hub writes it (default: what the data's cards declare)"
    )
    parser.add_argument("--base-model", help="on the Hub, of which this one is made")
    parser.add_argument("--output", type=Path, help="file, such as FOLDER/README.md (default: the screen)")
    parser.add_argument("--overwrite", action="store_true", help="replace a card that was changed by hand")
    options = parser.parse_args(arguments)
    named = {"repo": options.repo, "license": options.license, "base_model": options.base_model}
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
