"""Publishing: a folder with something that must not leave the machine, and requests that cannot be met."""

import json
import shutil
from pathlib import Path
from random import Random

from conversion import push as command

from . import files, values
from .case import Case, Place, WrongResult
from .commands import damage_folder
from .conversions import bad_config, bad_index, bad_tensors, saved, words_of


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
    """A folder with something that must not leave the machine, or a request that cannot be met."""
    folder = place.inside / "model"
    make = rng.choice([_must_stay, _must_stay, _must_stay, _damaged, _bad_request])
    if make is _bad_request:
        return make(rng, place)
    says, refused = make(rng, place, folder)
    options = rng.sample(["--dry-run", "--new-card", "--exist-ok", "--private"], rng.randint(0, 2))
    arguments = [str(folder), "ada/model", "--skip-validation", *dict.fromkeys(["--dry-run", *options])]

    def call() -> int:
        code = command.main(arguments)
        if not code and refused:
            raise WrongResult("what must not be published is published")
        return code

    return Case(
        f"{says} {options or ''}",
        call,
        (*words_of(says), "ready to be published", "config.json", "card"),
        is_command=True,
    )


def _copied(rng: Random, folder: Path) -> Path:
    return Path(shutil.copytree(saved() / rng.choice(["mot", "transfusion"]), folder))


def _must_stay(rng: Random, place: Place, folder: Path) -> tuple[str, bool]:
    _copied(rng, folder)
    name = rng.choice(["samples.png", "losses.png", "a.jpg", "a.webp", "README.md", "LICENSE", "NOTICE", "conversion.json", "generation_config.json", "chat_template.jinja", "x.bin", "x.pkl", "LICENSE.png",
                       "image_tokenizer/x.json", "vocab.json", "merges.txt", "tokenizer.model", ".gitattributes", "USE_POLICY.md"])  # fmt: skip
    way, file = (
        rng.choice(["pickle", "token", "key", "link", "link folder", "code", "zip", "executable"]),
        folder / name,
    )
    file.parent.mkdir(exist_ok=True)
    secret = rng.choice(TOKENS if way == "token" else KEYS).encode()
    file.unlink(missing_ok=True)
    if way == "pickle":
        file.write_bytes(
            rng.choice([b"", files.picture(rng)]) * (not name.endswith((".bin", ".pkl"))) + files.pickled(place.ran)
        )
        return f"a pickle in {name}", True
    if way in ("token", "key"):
        before = files.picture(rng) if name.endswith((".png", ".jpg", ".webp")) else b"some text "
        file.write_bytes(before + rng.choice([b"", b"token=", b"\n"]) + secret + b"\n")
        return f"{secret[:20]!r} in {name}", True
    if way == "link":
        file.symlink_to(rng.choice([place.outside / "secret.txt", Path("../../outside/secret.txt")]))
        return f"{name} is a link out of the folder", True
    if way == "link folder":
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
    return f"{way} as {name}", name.endswith((".png", ".jpg", ".webp", ".bin", ".pkl"))


def _damaged(rng: Random, place: Place, folder: Path) -> tuple[str, bool]:
    source = saved() / rng.choice(["mot", "transfusion"])
    return rng.choice([damage_folder, bad_index, bad_tensors, bad_config])(rng, place, source, folder), False


def _bad_request(rng: Random, place: Place) -> Case:
    good = ["ada/model", "--skip-validation"]
    folder, words = str(saved() / "mot"), rng.choice([
        ["a/b/c"], [""], ["\0"], ["../x"], ["a b/c"], ["x" * 300], ["ada/model", "--revision", "\0"], ["ada/model", "--run", "/etc"], ["ada/model", "--nope"], ["ada/model", "--revision", "a b"], ["--dry-run"], ["é/é"],
        ["ada/model", "--run", "\0"],
    ])  # fmt: skip
    if rng.random() < 0.4:
        folder, words = rng.choice(["/etc", "no-such", "", "\0", "/dev/null", "/proc/self", "x" * 5000]), good
    words = [*words, "--skip-validation"] if words != good else words
    names = (*words, folder, "REPO", "name of a repository", "HF_HUB_OFFLINE", "repo_id", "Repo id", "HF_TOKEN")
    return Case(
        f"push {values.shown([folder, *words])}", lambda: command.main([folder, *words]), names, is_command=True
    )
