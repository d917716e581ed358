"""Publish a checkpoint's folder on the Hub: check it, try it in a stranger's process, upload it in one commit.

    python -m conversion.push FOLDER REPO [--private] [--revision BRANCH] [--run RUN] [--dry-run]

FOLDER was written by save_pretrained, a run (RUN/final), python -m training.consolidate or a conversion. The token is
that of `hf auth login` or of HF_TOKEN. All checks come before anything that takes time, and nothing is on the branch
before everything is uploaded. After an interruption, run the same command again.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id

from conversion.commands import exit_code, reading
from conversion.contents import problem_of
from conversion.hub import Branch, check_account, commit, differing, in_words, read_branch
from conversion.key_maps import ConversionError
from conversion.repository_files import CARD, repository_files
from conversion.validation import validate


_HERE = "of the folder"


def push(
    folder: Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    run: Path | None = None,
    exist_ok: bool = False,
    new_card: bool = False,
    keep_code: bool = False,
    skip_validation: bool = False,
    dry_run: bool = False,
    evaluation: Path | None = None,
) -> str | None:
    """Publish a folder, and print each step.

    Args:
        folder: the folder of a checkpoint.
        repo: owner/name, or a name without an owner for the token's owner.
        private: make a new repository private.
        revision: the branch; it is made if it does not exist; None: main.
        run: the run that the card is written from; None: the run whose folder holds `folder`, if there is one.
        exist_ok: add a commit to a branch that has files.
        new_card: replace a card that somebody wrote by a new one.
        keep_code: see `repository_files`.
        skip_validation: do not try the folder; for a folder that a dry run or an interrupted upload has tried.
        dry_run: check and try the folder, and print the files of the upload; the Hub is not asked.
        evaluation: the folder of results that the card takes up, see `model_card`.

    Returns:
        The commit, or None with `dry_run`.

    Raises:
        ConversionError: the folder or the Hub does not allow it; the message says what to do.
    """
    # The checks, first those that need no network.
    api, branch = HfApi(), Branch()
    with in_words(api, repo):
        validate_repo_id(repo)
    files = repository_files(folder, keep_code)
    if run is not None and not (run / "manifest.json").is_file():
        raise ConversionError(f"--run {run} has no manifest.json; give the folder of a run")
    run = run or _run_of(folder)
    if not dry_run:
        repo = check_account(api, repo)
        branch = read_branch(api, repo, revision)
        if _is_published(repo, branch, files, private, exist_ok):
            print(f"{repo} holds these files already")
            return _say_link(api, repo, branch.head)

    # The trial, by a process in which this package does not exist.
    if not skip_validation:
        _try(folder)

    # The card, then one commit with everything.
    with tempfile.TemporaryDirectory() as workspace:
        if new_card or not (keeper := _keeper_of_card(api, repo, branch, files)):
            files |= _card_files(folder, repo, run, files, Path(workspace), evaluation)
        else:
            print(f"the card {keeper}, which somebody wrote, is kept (--new-card writes another)")
            files = files if keeper == _HERE else {path: file for path, file in files.items() if path != CARD}
        _say_plan(files, repo, revision)
        if dry_run:
            return None
        title = f"{folder.resolve().name} of {run.resolve().name}" if run else folder.resolve().name
        commit_hash, stale = commit(api, repo, _additions(files), branch, revision, private, f"Upload {title}")
    for path in stale:
        print(f"  deleted {path}, which is not of this model")
    return _say_link(api, repo, commit_hash)


def _try(folder: Path) -> None:
    print(f"trying {folder} in a process without this package", flush=True)
    print("  " + ", ".join(f"{name} {value}" for name, value in validate(folder).items()), flush=True)


def _is_published(repo: str, branch: Branch, files: dict[str, Path], private: bool, exist_ok: bool) -> bool:
    """True if the branch holds the files already, as after a commit whose answer was lost. Refuse another model."""
    if private and branch.is_private is False:
        raise ConversionError(
            f"{repo} exists and is public; --private is of new repositories: make it private there first"
        )
    if exist_ok or "config.json" not in branch.files:
        return False
    if differing(_additions(files, but=CARD), branch.files):
        raise ConversionError(
            f"{repo} exists and holds another model at {branch.head[:12]}; add a commit to it with --exist-ok (what is "
            "there stays in its history), or to another branch with --revision, or take another name"
        )
    return True


def _run_of(folder: Path) -> Path | None:
    """Return the run whose folder holds `folder`: RUN of RUN/final and of RUN/consolidated/step-..."""
    return next((parent for parent in folder.resolve().parents[:2] if (parent / "manifest.json").is_file()), None)


def _additions(files: dict[str, Path], but: str | None = None) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, file) for path, file in files.items() if path != but]


def _keeper_of_card(api: HfApi, repo: str, branch: Branch, files: dict[str, Path]) -> str | None:
    """Return the place of a card that somebody wrote: the folder, else the Hub; None if there is no such card."""
    from model_cards.card import is_generated  # takes seconds, so it waits for the checks

    if CARD in files and not is_generated(files[CARD].read_text(encoding="utf-8")):
        return _HERE
    if CARD in branch.files:
        with in_words(api, repo):
            theirs = Path(api.hf_hub_download(repo, CARD, revision=branch.head))
        if not is_generated(theirs.read_text(encoding="utf-8")):
            return "on the Hub"
    return None


def _card_files(
    folder: Path, repo: str, run: Path | None, files: dict[str, Path], workspace: Path, evaluation: Path | None
) -> dict[str, Path]:
    """Write a new card, and add the run's pictures that it shows."""
    from model_cards.card import PICTURES, model_card

    with reading("the card could not be written"):
        card = model_card(folder, run=run, repo=repo, evaluation=evaluation)
    card.save(workspace / CARD)
    shown = [name for name in PICTURES if name not in files and f"({name})" in card.text]
    added = {CARD: workspace / CARD} | {name: run / name for name in shown}
    if problems := [f"{file}: {reason}" for file in added.values() if (reason := problem_of(file))]:
        raise ConversionError("\n  ".join(["the card is not ready to be published:", *problems]))
    return added


def _say_plan(files: dict[str, Path], repo: str, revision: str | None) -> None:
    sizes = {path: file.stat().st_size for path, file in files.items()}
    print(f"{len(files)} files, {sum(sizes.values()) / 1e6:,.1f} MB, for {repo}, branch {revision or 'main'}:")
    code = [path for path in files if path.endswith(".py")]
    print(f"  {sum(sizes[path] for path in code):>14,}  code, {len(code)} files")
    for path in sorted(files.keys() - code):
        print(f"  {sizes[path]:>14,}  {path}")
    sys.stdout.flush()


def _say_link(api: HfApi, repo: str, commit_hash: str) -> str:
    print(f'AutoModelForCausalLM.from_pretrained("{repo}", revision="{commit_hash}", trust_remote_code=True)')
    print(f"{api.endpoint}/{repo}/tree/{commit_hash}")
    return commit_hash


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m conversion.push", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a checkpoint, such as runs/emoji/final")
    parser.add_argument("repo", metavar="REPO", help="owner/name, or a name of your own")
    parser.add_argument("--private", action="store_true", help="make a new repository private (default: public)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made where there is none (default: main)")
    parser.add_argument("--run", type=Path, help="the run that the card describes (default: the run that holds FOLDER)")
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="DIR",
        help="results of python -m training.evaluate (default: RUN/evaluation)",
    )
    parser.add_argument("--exist-ok", action="store_true", help="add a commit to a repository that holds a model")
    parser.add_argument("--new-card", action="store_true", help="replace a README.md that somebody wrote")
    parser.add_argument("--keep-code", action="store_true", help="publish FOLDER's own code, not this version's")
    parser.add_argument(
        "--skip-validation", action="store_true", help="do not try the folder; for one that was tried before"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, try and list; the Hub is not asked")
    options = parser.parse_args(arguments)
    return exit_code(lambda: push(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
