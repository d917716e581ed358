"""Talk to the Hub: check the account, read a branch, make one commit, and put every refusal into plain words."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, get_token
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client's HTTP library, whichever it uses
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from conversion.key_maps import ConversionError
from conversion.repository_files import SAVED, matches


_AGAIN = "run the same command again: what has been uploaded is not sent twice"


@dataclass(frozen=True)
class Branch:
    """The files of a branch of a repository.

    Attributes:
        head: its commit; None where the branch, or the repository, is new.
        files: path -> the Hub's record of the file.
        is_private: None where there is no repository.
    """

    head: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)
    is_private: bool | None = None


# ---------------------------------------------------------------------------------------------------- before any work


def check_account(api: HfApi, repo: str) -> str:
    """Find the full name, owner/name, of a repository that the token may write to.

    Raises:
        ConversionError: there is no token, it is not accepted or may only read, or the name is somebody else's.
    """
    with in_words(api, repo):
        account = api.whoami()
    me = account["name"]
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConversionError(
            f"the token of {me} may only read; make one that may write at {api.endpoint}/settings/tokens, then: "
            "hf auth login"
        )
    owner = repo.split("/")[0] if "/" in repo else me
    roles = {me.lower(): "admin"} | {o["name"].lower(): o.get("roleInOrg") for o in account.get("orgs", [])}
    if owner.lower() not in roles or roles[owner.lower()] == "read":
        writable = sorted(name for name, role in roles.items() if role != "read")
        raise ConversionError(
            f"{repo} is a name of {owner}, where {me}, whose token this is, may not write; take one of "
            f"{', '.join(writable)}"
        )
    return repo if "/" in repo else f"{me}/{repo}"


def read_branch(api: HfApi, repo: str, revision: str | None) -> Branch:
    """Read head and files of a branch; both are empty if there is no such repository or branch."""
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ConversionError(f"--revision {revision} is a commit, and nothing can be added to one; name a branch")
    with in_words(api, repo):
        try:
            info = api.model_info(repo, revision=revision)
        except RevisionNotFoundError:
            return Branch(is_private=api.model_info(repo).private)
        except RepositoryNotFoundError:
            return Branch()
        return Branch(info.sha, _files(api, repo, info.sha), info.private)


def _files(api: HfApi, repo: str, commit_hash: str) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo, recursive=True, revision=commit_hash)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def differing(additions: Iterable[CommitOperationAdd], files: Mapping[str, RepoFile]) -> list[str]:
    """List the paths whose content differs from the Hub's `files`, by SHA-256 of large files, else by git's hash."""
    return [one.path_in_repo for one in additions if not _is_there(one, files.get(one.path_in_repo))]


def _is_there(addition: CommitOperationAdd, entry: RepoFile | None) -> bool:
    if entry is None or entry.size != addition.upload_info.size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as file:
        content = file.read()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# -------------------------------------------------------------------------------------------------------- the commit


def commit(
    api: HfApi,
    repo: str,
    additions: list[CommitOperationAdd],
    seen: Branch,
    revision: str | None,
    private: bool,
    message: str,
) -> tuple[str, list[str]]:
    """Make the repository and the branch if they are new, upload the files, and commit all of them at once.

    Files of an earlier save that this one does not have are deleted in the same commit: a stale model.safetensors would
    be loaded in the place of new shards. (`HfApi.upload_folder` may make several commits, so it is not used.)

    Args:
        seen: the branch as it was when the caller decided to publish; if it has moved since, nothing is committed.

    Returns:
        The commit, and the paths that were deleted.

    Raises:
        ConversionError: the upload failed, and the branch is as it was; or the Hub holds other content than was sent.
    """
    with in_words(api, repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision not in (None, DEFAULT_REVISION) and not revision.startswith("refs/pr/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        # Files of an earlier save leave in the commit that brings the new ones.
        before = read_branch(api, repo, revision) if seen.head is None else seen
        added = {addition.path_in_repo for addition in additions}
        stale = sorted(path for path in before.files if path not in added and matches(path, SAVED))
        operations = [*additions, *(CommitOperationDelete(path) for path in stale)]
        info = api.create_commit(repo, operations, commit_message=message, revision=revision, parent_commit=before.head)
        if wrong := differing(additions, _files(api, repo, info.oid)):
            raise ConversionError(
                f"the Hub's commit {info.oid} holds other content than was sent of {', '.join(wrong)}; {_AGAIN}"
            )
    return info.oid, stale


# ------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def in_words(api: HfApi, repo: str) -> Iterator[None]:
    """Turn the client's errors into a ConversionError that says what to do, without tokens and signed addresses."""
    try:
        yield
    except ConversionError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise ConversionError(redacted(_explain(error, api, repo))) from None


def _explain(error: Exception, api: HfApi, repo: str) -> str:
    if isinstance(error, HFValidationError):
        return f"{repo!r} is no name of a repository: {error}"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token for the Hub: hf auth login, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be published; unset it"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading ...", from the reason
        return f"{str(error).rstrip('.')}: {_explain(error.__cause__, api, repo)}"
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, api, repo)
    if isinstance(error, HTTPError):
        return f"{api.endpoint} could not be reached ({type(error).__name__}: {error}); check the network, and {_AGAIN}"
    return f"publishing to {repo} failed ({type(error).__name__}: {error})"


def _explain_status(error: HfHubHTTPError, api: HfApi, repo: str) -> str:
    status, said = error.response.status_code, error.server_message or str(error).strip().splitlines()[0]
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no {repo}, or this token may not see it ({said})"
    if status == 401:
        return (
            f"the Hub does not accept the token ({said}); make a new one at {api.endpoint}/settings/tokens, then: "
            "hf auth login"
        )
    if status == 403:
        return (
            f"the token may not write to {repo} ({said}); it needs the permission to write to its owner's repositories"
        )
    if status == 412:
        return f"somebody else has changed {repo} meanwhile ({said}); nothing was committed: look at it, and {_AGAIN}"
    return f"the Hub answered {status} ({said}); {_AGAIN}"


def redacted(text: str) -> str:
    """Remove the token from a text, and the queries of addresses, since they may hold a signature."""
    if token := get_token():
        text = text.replace(token, "(token)")
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?...", text)
