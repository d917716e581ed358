"""Publish a checkpoint's folder on the Hub, so that one line loads it: checked, tried by a stranger's process, one commit.

    python -m conversion.push FOLDER REPO [--private] [--revision BRANCH] [--run RUN] [--dry-run]

FOLDER is what save_pretrained, a run (RUN/final), python -m training.consolidate or a conversion wrote. The token is that
of `hf auth login` or of HF_TOKEN. What must be so is checked before anything takes time, and nothing is on the branch
before everything is uploaded. An upload that was interrupted is run again with the same command.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id

from conversion.hub import Branch, check_account, commit, differing, in_words, read_branch
from conversion.key_maps import ConversionError
from conversion.repository_files import CARD, repository_files
from conversion.validation import validate


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
) -> str | None:
    """Publish a folder; what is done is printed.

    Args:
        repo: owner/name, or a name of the token's owner.
        private: of a new repository.
        revision: the branch, which is made where there is none; None: main.
        run: the run that the card is written from; None: that whose folder holds `folder`, where there is one.
        exist_ok: add a commit to a branch that has files.
        new_card: write a new card in the place of one that somebody wrote.
        keep_code: see `repository_files`.
        skip_validation: for a folder that was tried before, by a dry run or an upload that was interrupted.
        dry_run: check and try the folder and say what would be uploaded; the Hub is not asked.

    Returns:
        The commit, or None with `dry_run`.

    Raises:
        ConversionError: the folder or the Hub does not allow it; the message says what to do.
    """
    api, branch = HfApi(), Branch()
    with in_words(api, repo):
        validate_repo_id(repo)
    files = repository_files(folder, keep_code)
    run = run or _run_of(folder)
    if not dry_run:
        repo = check_account(api, repo)
        branch = read_branch(api, repo, revision)
        if private and branch.is_private is False:
            raise ConversionError(
                f"{repo} exists and is public; --private is of new repositories: make it private there first"
            )
        if "config.json" in branch.files and not exist_ok:
            if not differing(_additions(files, but=CARD), branch.files):
                print(f"{repo} holds these files already")
                return _say_link(api, repo, branch.head)
            raise ConversionError(
                f"{repo} exists and holds another model at {branch.head[:12]}; add a commit to it with --exist-ok (what is "
                "there stays in its history), or to another branch with --revision, or take another name"
            )
    if not skip_validation:
        print(f"trying {folder} in a process without this package", flush=True)
        print("  " + ", ".join(f"{name} {value}" for name, value in validate(folder).items()), flush=True)
    with tempfile.TemporaryDirectory() as workspace:
        files |= _card_files(api, repo, branch, folder, files, run, new_card, Path(workspace))
        _say_plan(files, repo, revision)
        if dry_run:
            return None
        title = f"{folder.resolve().name} of {run.resolve().name}" if run else folder.resolve().name
        commit_hash, stale = commit(api, repo, _additions(files), branch, revision, private, f"Upload {title}")
    for path in stale:
        print(f"  deleted {path}, which is not of this model")
    return _say_link(api, repo, commit_hash)


def _run_of(folder: Path) -> Path | None:
    """RUN/final and RUN/consolidated/step-... are of RUN."""
    return next((parent for parent in folder.resolve().parents[:2] if (parent / "manifest.json").is_file()), None)


def _additions(files: dict[str, Path], but: str | None = None) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, file) for path, file in files.items() if path != but]


def _card_files(
    api: HfApi,
    repo: str,
    branch: Branch,
    folder: Path,
    files: dict[str, Path],
    run: Path | None,
    new_card: bool,
    workspace: Path,
) -> dict[str, Path]:
    """The card and its pictures; a card that somebody wrote, here or on the Hub, is kept unless `new_card`."""
    from modeling_mot.model_card_mot import PICTURES, is_generated, model_card  # takes seconds: after the checks

    written = files.get(CARD)
    if written is None and CARD in branch.files and not new_card:
        with in_words(api, repo):
            written = Path(api.hf_hub_download(repo, CARD, revision=branch.head))
    if written is not None and not new_card and not is_generated(written.read_text(encoding="utf-8")):
        return {}
    card = model_card(folder, run=run, repo=repo)
    card.save(workspace / CARD)
    shown = [name for name in PICTURES if name not in files and f"({name})" in card.text]
    return {CARD: workspace / CARD} | {name: run / name for name in shown}


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
    """Exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m conversion.push", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a checkpoint, such as runs/emoji/final")
    parser.add_argument("repo", metavar="REPO", help="owner/name, or a name of your own")
    parser.add_argument("--private", action="store_true", help="of a new repository (default: public)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made where there is none (default: main)")
    parser.add_argument("--run", type=Path, help="folder of the run that the card tells of (default: FOLDER's, if any)")
    parser.add_argument("--exist-ok", action="store_true", help="add a commit to a repository that holds a model")
    parser.add_argument("--new-card", action="store_true", help="replace a README.md that somebody wrote")
    parser.add_argument("--keep-code", action="store_true", help="publish FOLDER's own code, not this version's")
    parser.add_argument("--skip-validation", action="store_true", help="of a folder that was tried before")
    parser.add_argument("--dry-run", action="store_true", help="check, try and list; the Hub is not asked")
    options = parser.parse_args(arguments)
    try:
        push(**vars(options))
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
