"""The Hub broken on purpose, while something is uploaded and while it is fetched: nothing is half there, and once more
is enough."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conversion.hub_client import ROOT
from tests.conversion.test_push import here, there


def is_empty(hub, repo) -> bool:
    return ("models", repo) not in hub.repositories or not there(hub, repo)


@pytest.fixture
def fresh(hub, tokens):
    """A checkpoint whose weights nobody has uploaded."""
    for shard in tokens.rglob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-2] + os.urandom(2))
    yield tokens
    hub.faults = []


def push(client, folder, repo):
    return client.push(folder, repo, "--skip-validation")


# ----------------------------------------------------------------------------------------------------------- uploads


def test_an_error_in_the_midst_is_tried_again(client, hub, fresh):
    hub.break_next("PUT", "/lfs/", "error")
    assert push(client, fresh, "ada/retried").code == 0
    assert here(fresh).items() <= there(hub, "ada/retried").items()


def test_a_slow_answer_is_waited_for(client, hub, fresh):
    hub.break_next("PUT", "/lfs/", "slow", seconds=1.5)
    assert push(client, fresh, "ada/slow").code == 0
    assert here(fresh).items() <= there(hub, "ada/slow").items()


def test_an_error_at_the_commit_leaves_nothing_and_large_files_are_not_sent_twice(client, hub, fresh):
    hub.break_next("POST", "/commit/", "error")
    result = push(client, fresh, "ada/uncommitted")
    assert (
        result.code == 2 and "the Hub answered 500" in result.errors and "run the same command again" in result.errors
    )
    assert is_empty(hub, "ada/uncommitted")
    sent = hub.count("PUT /lfs/")
    assert push(client, fresh, "ada/uncommitted").code == 0 and hub.count("PUT /lfs/") == sent
    assert here(fresh).items() <= there(hub, "ada/uncommitted").items()


def test_a_file_damaged_on_its_way_is_not_committed(client, hub, fresh):
    hub.break_next("PUT", "/lfs/", "damage")
    result = push(client, fresh, "ada/damaged")
    assert (
        result.code == 2
        and "Error while uploading" in result.errors
        and "SHA-256 of the upload is not" in result.errors
    )
    assert "signature" not in result.errors and is_empty(hub, "ada/damaged")
    assert push(client, fresh, "ada/damaged").code == 0
    assert here(fresh).items() <= there(hub, "ada/damaged").items()


def test_a_commit_whose_answer_is_lost_is_found_by_the_next_attempt(client, hub, fresh):
    hub.break_next("POST", "/commit/", "lose answer")
    result = push(client, fresh, "ada/lost")
    assert result.code == 2 and "could not be reached" in result.errors
    commits = len(hub.repositories["models", "ada/lost"].commits)
    again = push(client, fresh, "ada/lost")
    assert again.code == 0 and "holds these files already" in again.output
    assert len(hub.repositories["models", "ada/lost"].commits) == commits


def test_a_commit_that_differs_from_what_was_sent_is_noticed(client, hub, fresh, monkeypatch):
    class Forgetful(dict):
        def __getitem__(self, oid):
            return super().__getitem__(oid) + b"?"

    monkeypatch.setattr(hub, "large", Forgetful())  # what is committed is not what was verified
    result = push(client, fresh, "ada/forged")
    assert result.code == 2 and "holds other content than was sent" in result.errors


def test_somebody_elses_commit_in_the_meantime_is_not_overwritten(client, hub, fresh):
    assert push(client, fresh, "ada/shared").code == 0
    repository = hub.repositories["models", "ada/shared"]
    shard = fresh / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2] + os.urandom(2))
    hub.break_next("PUT", "/lfs/", "slow", seconds=2)
    command = [sys.executable, "-m", "conversion.push", str(fresh), "ada/shared", "--skip-validation", "--exist-ok"]
    process = subprocess.Popen(command, cwd=ROOT, env=client.environment(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: not hub.faults[0].times)
    theirs = repository.commit("main", repository.commits[repository.branches["main"]])
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "somebody else has changed ada/shared meanwhile" in errors
    assert repository.branches["main"] == theirs


def test_a_killed_upload_leaves_nothing_and_goes_on_where_it_was(client, hub, fresh):
    large = len(list(fresh.rglob("*.safetensors")))
    before = hub.count("PUT /lfs/")
    hub.break_next("PUT", "/lfs/", "slow", times=1, seconds=30)
    command = [sys.executable, "-m", "conversion.push", str(fresh), "ada/killed", "--skip-validation"]
    process = subprocess.Popen(command, cwd=ROOT, env=client.environment(), stdout=subprocess.DEVNULL)
    wait_for(lambda: hub.count("/verify") and hub.count("PUT /lfs/") == before + large)
    process.kill()
    process.wait()
    assert is_empty(hub, "ada/killed")
    assert push(client, fresh, "ada/killed").code == 0
    assert hub.count("PUT /lfs/") <= before + large + 1  # only that which hung is sent again
    assert here(fresh).items() <= there(hub, "ada/killed").items()


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


# --------------------------------------------------------------------------------------------------------- downloads

FETCH = """
import sys
from huggingface_hub import HfApi, snapshot_download
folder = snapshot_download(sys.argv[1])
print(folder)
print(HfApi().verify_repo_checksums(sys.argv[1]).mismatches)
"""


@pytest.fixture(scope="module")
def published(client, hub, saved_tokens):
    assert client.push(saved_tokens, "ada/fetched", "--skip-validation").code == 0
    return "ada/fetched"


def fetch(client, published, home, **variables):
    environment = client.environment() | {"HF_HOME": str(home)} | variables
    command = [sys.executable, "-c", FETCH, published]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(("kind", "seconds"), [("truncate", 0.0), ("slow", 2.5)])
def test_a_download_goes_on_after_a_cut_and_a_silence(client, hub, published, saved_tokens, tmp_path, kind, seconds):
    hub.break_next("GET", "/lfs/", kind, seconds=seconds)
    result = fetch(client, published, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert not hub.faults[0].times
    folder, mismatches = result.stdout.splitlines()
    assert mismatches == "[]" and all(
        Path(folder, path).read_bytes() == content for path, content in here(saved_tokens).items()
    )


def test_a_download_that_fails_leaves_no_file_that_looks_whole(client, hub, published, saved_tokens, tmp_path):
    hub.break_next("GET", "/lfs/", "error")
    result = fetch(client, published, tmp_path)
    assert result.returncode == 1 and "500" in result.stderr
    weights = {path: content for path, content in here(saved_tokens).items() if path.endswith(".safetensors")}
    found = {path: file for path in weights for file in tmp_path.rglob(f"snapshots/*/{path}")}
    assert len(found) < len(weights) and all(file.read_bytes() == weights[path] for path, file in found.items())
    assert fetch(client, published, tmp_path).stdout.splitlines()[1] == "[]"


def test_a_wrong_byte_is_found_by_the_hubs_hashes(client, hub, published, tmp_path):
    """The client compares sizes alone when it fetches without Xet; `hf cache verify` is there for the rest."""
    hub.break_next("GET", "/lfs/", "damage")
    assert ".safetensors" in fetch(client, published, tmp_path).stdout.splitlines()[1]
