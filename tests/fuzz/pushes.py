"""Bad pushes: folders with something that must not leave the machine, and requests that cannot be met."""

import json
import shutil
from pathlib import Path
from random import Random

from conversion import push as command

from . import files, values
from .case import Case, Place, WrongResult
from .saved import bad_config, bad_index, bad_tensors, damage_folder, saved, words_of


TOKENS = ("hf_" + "Q7w" * 11 + "x", "hf_" + "a1B2" * 9)
KEYS = (
    "AKIAIOSFODNN7EXAMPLE",
    "sk-proj-" + "aB3" * 16,
    "ghp_" + "aB3" * 12,
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\n-----END RSA PRIVATE KEY-----\n",
    "github_pat_" + "aB3" * 20,
)


def good(folder: Path) -> None:
    for name in ("mot", "transfusion"):
        if code := command.main([str(saved() / name), "ada/model", "--skip-validation", "--dry-run"]):
            raise WrongResult(f"a good folder ends with {code}")


def push(rng: Random, place: Place) -> Case:
    """Make a folder with something that must not leave the machine, or a request that cannot be met."""
    way = rng.choice(["stays", "stays", "stays", "damaged", "request"])
    if way == "request":
        return _bad_request(rng)
    folder = place.inside / "model"
    says, must_stay = (_what_must_stay if way == "stays" else _damaged)(rng, place, folder)
    options = rng.sample(["--new-card", "--exist-ok", "--private"], rng.randint(0, 2))
    arguments = [str(folder), "ada/model", "--skip-validation", "--dry-run", *options]

    def call() -> int:
        code = command.main(arguments)
        if not code and must_stay:
            raise WrongResult("what must not be published is published")
        return code

    names = (*words_of(says), "ready to be published", "config.json", "card")
    return Case(f"{says} {options or ''}", call, names, is_command=True)


_FILES = (
    "samples.png", "losses.png", "a.jpg", "a.webp", "README.md", "LICENSE", "NOTICE", "conversion.json",
    "x.bin", "x.pkl",
    "generation_config.json", "chat_template.jinja", "LICENSE.png", "image_tokenizer/x.json", "vocab.json",
    "merges.txt",
    "tokenizer.model", ".gitattributes", "USE_POLICY.md",
)  # fmt: skip
_NEVER_TEXT = (".png", ".jpg", ".webp", ".bin", ".pkl")


def _what_must_stay(rng: Random, place: Place, folder: Path) -> tuple[str, bool]:
    """Put something into a copy of a good folder.  -> description, and whether it must not be published"""
    shutil.copytree(saved() / rng.choice(["mot", "transfusion"]), folder)
    name = rng.choice(_FILES)
    way, file = rng.choice(["pickle", "token", "key", "link", "folder", "code", "zip", "executable"]), folder / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if way == "pickle":
        before = files.picture(rng) if name.endswith(".png") and rng.random() < 0.5 else b""
        file.write_bytes(before + files.pickled(place.ran))
        return f"a pickle in {name}", True
    if way in ("token", "key"):
        secret = rng.choice(TOKENS if way == "token" else KEYS).encode()
        before = files.picture(rng) if name.endswith(_NEVER_TEXT) else b"some text "
        file.write_bytes(before + rng.choice([b"", b"token=", b"\n"]) + secret + b"\n")
        return f"{secret[:20]!r} in {name}", True
    if way == "link":
        file.symlink_to(rng.choice([place.outside / "secret.txt", Path("../../outside/secret.txt")]))
        return f"{name} is a link out of the folder", True
    if way == "folder":
        (folder / "extra").symlink_to(place.outside)
        return "a link extra/ to a folder outside", True
    if way == "code":
        (folder / "evil.py").write_text(files.code(place.ran))
        for config in ("config.json", "processor_config.json"):
            if rng.random() < 0.7:
                tree = json.loads((folder / config).read_text())
                tree["auto_map"] = {"AutoModel": rng.choice(["evil.Evil", "attacker/repo--evil.Evil"])}
                (folder / config).write_text(json.dumps(tree))
        return "evil.py and an auto_map", True
    file.write_bytes((b"PK\3\4" if way == "zip" else b"\x7fELF") + bytes(100))
    return f"{way} as {name}", name.endswith(_NEVER_TEXT)


def _damaged(rng: Random, place: Place, folder: Path) -> tuple[str, bool]:
    source = saved() / rng.choice(["mot", "transfusion"])
    return rng.choice([damage_folder, bad_index, bad_tensors, bad_config])(rng, place, source, folder), False


_REPOSITORIES = ("a/b/c", "", "\0", "../x", "a b/c", "x" * 300, "--dry-run", "é/é")
_OPTIONS = (["--revision", "\0"], ["--revision", "a b"], ["--run", "/etc"], ["--run", "\0"], ["--nope"])
_FOLDERS = ("/etc", "no-such", "\0", "/dev/null", "/proc/self", "x" * 5000)


def _bad_request(rng: Random) -> Case:
    folder, repository, options = str(saved() / "mot"), "ada/model", []
    way = rng.choice(["folder", "repository", "options"])
    if way == "folder":
        folder = rng.choice(_FOLDERS)
    elif way == "repository":
        repository = rng.choice(_REPOSITORIES)
    else:
        options = rng.choice(_OPTIONS)
    words = [folder, repository, *options, "--skip-validation"]
    names = (*words, "REPO", "name of a repository", "HF_HUB_OFFLINE", "Repo id", "HF_TOKEN")
    return Case(f"push {values.shown(words)}", lambda: command.main(words), names, is_command=True)
