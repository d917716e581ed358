"""`python -m conversion.push`: what is refused before it leaves, what arrives, what happens to what is there."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conversion.hub import redacted
from conversion.repository_files import repository_files
from tests.conversion.hub_client import ROOT
from tests.conversion.hub_server import TOKENS, Blob


def here(folder) -> dict[str, bytes]:
    return {path: file.read_bytes() for path, file in repository_files(folder).items()}


def there(hub, repo, revision="main") -> dict[str, bytes]:
    """What a repository holds, but for the file it began with."""
    return {path: content for path, content in hub.files(repo, revision=revision).items() if path != ".gitattributes"}


# ------------------------------------------------------------------------------------------------ what is published


def test_everything_arrives_in_one_commit_after_a_trial(client, hub, saved_tokens):
    result = client.push(saved_tokens, "ada/everything")
    assert result.code == 0, result.errors
    assert "model MoTForCausalLM" in result.output
    arrived = there(hub, "ada/everything")
    assert b"custom_code" in arrived.pop("README.md") and arrived == here(saved_tokens)
    assert {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "generation_config.json"} <= set(
        arrived
    )
    repository = hub.repositories["models", "ada/everything"]
    assert len(repository.commits) == 2 and not repository.is_private  # the empty one, and this
    assert result.output.strip().endswith(f"{hub.endpoint}/ada/everything/tree/{repository.branches['main']}")


def test_a_transfusion_model_is_tried_with_a_picture(client, hub, saved_pictures):
    result = client.push(saved_pictures, "pictures", "--private")
    assert result.code == 0, result.errors
    assert "model MoTTransfusionModel" in result.output and "picture [3, 8, 8]" in result.output
    assert hub.repositories["models", "ada/pictures"].is_private
    assert here(saved_pictures).items() <= there(hub, "ada/pictures").items()


def test_a_dry_run_asks_no_hub(client, hub, saved_tokens):
    before = len(hub.requests)
    result = client.push(saved_tokens, "ada/dry", "--dry-run", "--skip-validation", account=None)
    assert result.code == 0 and len(hub.requests) == before
    assert "model-00001-of-00002.safetensors" in result.output


def test_a_model_that_cannot_be_used_is_not_published(client, hub, saved_pictures, tmp_path):
    folder = shutil.copytree(saved_pictures, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = client.push(folder, "ada/broken")
    assert result.code == 2 and "the logits of a text are not finite" in result.errors
    assert ("models", "ada/broken") not in hub.repositories


def test_the_card_is_made_from_the_run(client, hub, saved_tokens, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved_tokens, run / "final")
    (run / "manifest.json").write_text(json.dumps({"step": 7, "config": {}}))
    (run / "summary.json").write_text(json.dumps({"step": 7, "training": {"loss_text": 1.25}}))
    Image.new("RGB", (2, 2)).save(run / "losses.png")
    (run / "metrics.jsonl").write_text("")
    result = client.push(run / "final", "ada/of-a-run", "--skip-validation")
    assert result.code == 0, result.errors
    arrived = there(hub, "ada/of-a-run")
    card = arrived["README.md"].decode()
    assert "1.25" in card and "losses.png" in card and arrived["losses.png"] == (run / "losses.png").read_bytes()
    assert "metrics.jsonl" not in arrived


def test_a_card_that_somebody_wrote_is_kept(client, hub, tokens):
    def pushed(*options):
        settings = {"max_new_tokens": len(hub.requests)}  # so that there is something to commit
        (tokens / "generation_config.json").write_text(json.dumps(settings))
        result = client.push(tokens, "ada/own-card", "--skip-validation", "--exist-ok", *options)
        assert result.code == 0, result.errors
        return result.output, hub.files("ada/own-card")["README.md"]

    (tokens / "README.md").write_text("mine")
    output, card = pushed()
    assert card == b"mine" and "the card of the folder, which somebody wrote, is kept" in output
    (tokens / "README.md").unlink()
    output, card = pushed()
    assert card == b"mine" and "the card on the Hub, which somebody wrote, is kept" in output
    output, generated = pushed("--new-card")
    assert generated.startswith(b"---\n")
    # Neither does one that was generated here replace one that somebody wrote there.
    repository = hub.repositories["models", "ada/own-card"]
    head = repository.commits[repository.branches["main"]]
    repository.commit("main", head | {"README.md": Blob(generated + b"and mine", is_large=False)})
    (tokens / "README.md").write_bytes(generated)
    assert pushed()[1] == generated + b"and mine"


def test_a_run_that_is_none_is_refused(client, tokens, tmp_path):
    assert "has no manifest.json" in client.push(tokens, "ada/no-run", "--run", tmp_path).errors


# -------------------------------------------------------------------------------------------------- what is there


def test_what_is_there_is_not_overwritten_silently(client, hub, saved_tokens, saved_pictures):
    assert client.push(saved_tokens, "ada/taken", "--skip-validation").code == 0
    first = hub.repositories["models", "ada/taken"].branches["main"]
    again = client.push(saved_tokens, "ada/taken")
    assert again.code == 0 and "holds these files already" in again.output and first in again.output
    other = client.push(saved_pictures, "ada/taken")
    assert other.code == 2 and "exists and holds another model" in other.errors and "--exist-ok" in other.errors
    assert hub.repositories["models", "ada/taken"].branches["main"] == first

    result = client.push(saved_pictures, "ada/taken", "--exist-ok", "--skip-validation")
    assert result.code == 0, result.errors
    arrived = there(hub, "ada/taken")
    arrived.pop("README.md")
    # Shards of the first would lie beside the weights of the second.
    assert arrived == here(saved_pictures) and "deleted model-00001-of-00002.safetensors" in result.output
    assert "model-00001-of-00002.safetensors" in hub.files("ada/taken", revision=first)


def test_a_branch_is_made_and_main_stays(client, hub, saved_tokens, saved_pictures):
    assert client.push(saved_tokens, "ada/branches", "--skip-validation").code == 0
    main = hub.repositories["models", "ada/branches"].branches["main"]
    result = client.push(saved_pictures, "ada/branches", "--revision", "diffused", "--skip-validation")
    assert result.code == 0, result.errors
    branches = hub.repositories["models", "ada/branches"].branches
    assert branches["main"] == main and here(saved_pictures).items() <= there(hub, "ada/branches", "diffused").items()
    assert "model.safetensors.index.json" not in there(hub, "ada/branches", "diffused")
    refused = client.push(saved_pictures, "ada/branches", "--revision", main)
    assert refused.code == 2 and "is a commit" in refused.errors


def test_a_public_repository_does_not_pass_as_private(client, hub, saved_tokens):
    assert client.push(saved_tokens, "ada/public", "--skip-validation").code == 0
    result = client.push(saved_tokens, "ada/public", "--private", "--exist-ok", "--skip-validation")
    assert result.code == 2 and "exists and is public" in result.errors


@pytest.mark.parametrize(
    ("account", "repo", "message"),
    [
        (None, "ada/new", "there is no token for the Hub: hf auth login, or set HF_TOKEN"),
        ("nobody", "ada/new", "does not accept the token"),
        ("grace", "grace/new", "the token of grace may only read"),
        ("linus", "ada/everything", "ada/everything is a name of ada, where linus, whose token this is, may not write"),
        ("linus", "museum/new", "take one of linus, linux"),
        ("eve", "eve/new", "the token may not write to eve/new"),
        ("ada", "a name/with spaces", "is no name of a repository"),
        ("ada", "ada/too/deep", "is no name of a repository"),
    ],
)
def test_who_may_not_write_is_told_why(client, hub, saved_tokens, account, repo, message):
    variables = {"HF_TOKEN": "hf_" + "n" * 30} if account == "nobody" else {}
    before = {name: dict(repository.branches) for name, repository in hub.repositories.items()}
    result = client.push(saved_tokens, repo, "--skip-validation", account=account, **variables)
    assert result.code == 2 and message in result.errors and result.errors.startswith("error: ")
    assert {name: dict(repository.branches) for name, repository in hub.repositories.items()} == before
    assert not any(token in result.errors + result.output for token in (*TOKENS, "hf_" + "n" * 30))


def test_an_organization_may_be_written_to(client, hub, saved_tokens):
    result = client.push(saved_tokens, "linux/ours", "--skip-validation", account="linus")
    assert result.code == 0 and ("models", "linux/ours") in hub.repositories


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 could not be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_without_a_network(client, saved_tokens, variables, message):
    command = [sys.executable, "-m", "conversion.push", str(saved_tokens), "ada/new"]
    environment = client.environment() | variables
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr


# ---------------------------------------------------------------------------------------------- what must not leave


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.pt", "may hold pickled objects"),
        ("pytorch_model.bin", "may hold pickled objects"),
        ("image_tokenizer/weights.pkl", "may hold pickled objects"),
        (".env", "no part of a checkpoint"),
        ("train.log", "no part of a checkpoint"),
        ("try.ipynb", "no part of a checkpoint"),
        ("optimizer.safetensors", "no part of a checkpoint"),
        ("events.out.tfevents.1", "no part of a checkpoint"),
        ("deep/er/config.json", "no part of a checkpoint"),
        ("model.safetensors", "left from another save"),
        ("model-00003-of-00003.safetensors", "left from another save"),
        ("helpers.py", "not the code of the modeling_mot that is installed here"),
    ],
)
def test_what_is_no_part_of_a_checkpoint_is_refused_by_name(client, hub, tokens, name, message):
    (tokens / name).parent.mkdir(parents=True, exist_ok=True)
    (tokens / name).write_bytes(b"x")
    before = len(hub.requests)
    result = client.push(tokens, "ada/refused")
    assert result.code == 2 and f"{name}: " in result.errors and message in result.errors
    assert len(hub.requests) == before


def test_everything_that_must_not_leave_is_named_at_once(client, tokens):
    for name in ("a.bin", "b.log"):
        (tokens / name).write_bytes(b"x")
    errors = client.push(tokens, "ada/refused").errors
    assert "a.bin: " in errors and "b.log: " in errors


def test_links_out_of_the_folder_are_refused(client, tokens, tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "key").write_text("secret")
    (tokens / "LICENSE").symlink_to(tmp_path / "key")
    (tokens / "speech_tokenizer2").symlink_to(tmp_path / "secrets")
    errors = client.push(tokens, "ada/refused").errors
    assert (
        f"LICENSE: a link to {tmp_path / 'key'}, outside the folder" in errors and "speech_tokenizer2: a link" in errors
    )


def test_a_token_in_a_file_is_found_and_not_shown(client, tokens):
    token = "hf_" + "q" * 34
    (tokens / "README.md").write_text(f"token={token}")
    errors = client.push(tokens, "ada/refused").errors
    assert "README.md: holds what looks like a token" in errors and token not in errors


def test_missing_and_cut_files_are_named(client, tokens):
    first, second = (tokens / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    (tokens / "processor_config.json").unlink()
    errors = client.push(tokens, "ada/refused").errors
    assert f"{first.name}: is no whole file" in errors and f"{second.name}: is missing" in errors
    assert "processor_config.json: is missing" in errors


def test_code_of_another_version_goes_only_when_meant(client, hub, tokens):
    code = tokens / "modeling_mot.py"
    code.write_text(code.read_text() + "\nMINE = True\n")
    errors = client.push(tokens, "ada/own-code", "--skip-validation").errors
    assert "modeling_mot.py: not the code" in errors and "--keep-code" in errors
    (tokens / "stray.py").write_text("")
    errors = client.push(tokens, "ada/own-code", "--skip-validation", "--keep-code").errors
    assert "stray.py: is code that the model does not load" in errors
    (tokens / "stray.py").unlink()
    result = client.push(tokens, "ada/own-code", "--skip-validation", "--keep-code")
    assert result.code == 0, result.errors
    assert b"MINE = True" in hub.files("ada/own-code")["modeling_mot.py"]


def test_code_of_another_repository_is_refused(client, tokens):
    config = json.loads((tokens / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "eve/elsewhere--modeling_mot.MoTModel"
    (tokens / "config.json").write_text(json.dumps(config))
    assert "eve/elsewhere--modeling_mot.MoTModel is code of another repository" in client.push(tokens, "ada/x").errors


def test_bookkeeping_of_git_and_downloads_stays_behind(tokens):
    before = repository_files(tokens)
    for name in (".git/HEAD", ".cache/huggingface/download/config.json.lock", "train.yaml"):
        (tokens / name).parent.mkdir(parents=True, exist_ok=True)
        (tokens / name).write_text("x")
    assert repository_files(tokens) == before


def test_tokens_and_signatures_are_left_out_of_messages(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert redacted("PUT https://store/x?signature=abc failed: hf_secret") == "PUT https://store/x?... failed: (token)"
    assert os.environ["HF_TOKEN"] == "hf_secret"
