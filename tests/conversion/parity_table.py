"""The table of conversions: `python -m tests.conversion.parity_table [NAME ...]` prints a row for each source.

A random checkpoint of about 400 MiB is saved by transformers in shards, converted by a process of its own, loaded, and
its logits are compared with the source's, in float32 with torch's attention on both sides. Memory is what that process
held at its peak beyond what it held after its imports (Linux).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_mot import MoTForCausalLM

from .chameleon_sources import LAYOUTS, chameleon_model
from .chameleon_sources import save_source as save_chameleon
from .sources import SOURCES, save_source


LENGTH = 64  # tokens of the row that is compared
LAYERS, WIDTH, VOCAB = 8, 1024, 8000
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH * 11 // 4,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH // 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
}
# In the place of what tiny models have.
OWN = {"smollm3": {"no_rope_layers": [1, 1, 1, 0] * (LAYERS // 4)}, "ministral": {"sliding_window": 512}}
_MEASURED = """
import importlib, re, sys, time
def kilobytes(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
main = importlib.import_module(sys.argv[1]).main
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before, begin = kilobytes("VmRSS"), time.perf_counter()
code = main(sys.argv[2:])
print(code, before, kilobytes("VmHWM"), time.perf_counter() - begin)
"""


def dense_source(name: str, folder: Path) -> PreTrainedModel:
    sizes = SIZES | {"vocab_size": VOCAB, "num_key_value_heads": WIDTH // 128, "head_dim": 64}
    return save_source(folder, name, shard_size="100MB", **sizes | OWN.get(name, {}))


def chameleon_source(layout: str, folder: Path) -> PreTrainedModel:
    heads = {"num_key_value_heads": WIDTH // 64 // (4 if layout == "34b" else 1)}
    model = chameleon_model(**LAYOUTS[layout] | SIZES | heads)
    save_chameleon(model, folder, max_shard_size="100MB")
    return model


def num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@torch.no_grad()
def row(name: str, folder: Path) -> str:
    torch.manual_seed(0)
    source, out = folder / "source", folder / "out"
    if name.startswith("chameleon-"):
        theirs = chameleon_source(name.removeprefix("chameleon-"), source)
        command, options = "conversion.import_chameleon", ()
    else:
        theirs = dense_source(name, source)
        command, options = "conversion.upcycle", ("--image-codes", "1024", "--image-grid", "16", "16")
    ids = torch.randint(4, theirs.config.vocab_size, (1, LENGTH))
    # The head of the transformer: Chameleon's own forward hides the logits of its image tokens.
    expected = theirs.lm_head(theirs.model(input_ids=ids).last_hidden_state)
    del theirs
    words = [sys.executable, "-c", _MEASURED, command, str(source), str(out), *options]
    done = subprocess.run(words, capture_output=True, text=True)
    code, before, peak, seconds = done.stdout.split()[-4:]
    if code != "0":
        raise SystemExit(done.stderr)
    mot = MoTForCausalLM.from_pretrained(out, attn_implementation="sdpa").eval()
    difference = (mot(ids).logits[..., : expected.shape[-1]] - expected).abs().max().item()
    size, share = num_bytes(source), (int(peak) - int(before)) * 1024 / num_bytes(source)
    weights = f"{size >> 20} MiB -> {num_bytes(out) >> 20} MiB"
    return f"| {name} | {difference:g} | {weights} | {share:.2f} | {float(seconds):.1f} |"


if __name__ == "__main__":
    print(
        "| source | largest difference of logits | weights | peak memory / source's size | seconds |\n"
        "|---|---|---|---|---|"
    )
    for name in sys.argv[1:] or [*SOURCES, *(f"chameleon-{layout}" for layout in LAYOUTS)]:
        with tempfile.TemporaryDirectory() as folder:
            print(row(name, Path(folder)), flush=True)
