"""Load a folder as a stranger does, and use it once. `conversion.validation` starts this script in isolated mode.

    python -I clean_process.py FOLDER

In this process the packages of this repository cannot be imported, so that the folder's own code is what runs, and
nothing can be unpickled. The last line of its output is an object in JSON.
"""

import importlib.abc
import json
import sys


class Absent(importlib.abc.MetaPathFinder):
    """Hide the packages of this repository, even if they are installed; stands before all other finders."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_mot", "training", "conversion"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def refuse_pickles(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError(f"something that was to be loaded is pickled, and asks for {'.'.join(arguments[1:])}")


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402  (after the finder)
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer  # noqa: E402


def refuse_load(*arguments, **kwargs):
    raise RuntimeError("torch.load was called: weights are loaded from safetensors alone")


def load(folder: str) -> tuple:
    """Load configuration, model and processor with the auto classes."""
    # The model, with all its weights and no others.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", use_safetensors=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found.get(kind) or ())):
            raise ValueError(f"the weights have {kind.replace('_', ' ')}: {', '.join(names[:4])} ({len(names)} in all)")

    # The processor, which must be this model's.
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError("AutoTokenizer and AutoProcessor load tokenizers of different vocabularies")
    expected = processor.config_kwargs()
    if expected["vocab_size"] > config.vocab_size or expected["modalities"] != config.modalities:
        raise ValueError(
            f"the processor is another model's: it has {expected['vocab_size']} tokens of {expected['modalities']}, "
            f"the model has {config.vocab_size} of {config.modalities}"
        )
    return config, model.eval(), processor


def use(config, model, processor) -> dict:
    """Generate a token and, if the model diffuses pictures, a picture of two steps."""
    prompt = processor([{"type": "text", "text": "a"}], continue_with="text", return_tensors="pt")
    with torch.no_grad():
        if not torch.isfinite(model(**prompt).logits).all():
            raise ValueError("the logits of a text are not finite")
    output = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    ids = getattr(output, "sequences", output)[0]
    report = {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "token": repr(processor.tokenizer.decode(ids[-1:])),
    }
    if getattr(config, "latent_channels", None) is not None:
        prompt = processor([{"type": "text", "text": "a"}], continue_with="image", return_tensors="pt")
        kind = "latent" if model.vae is None else "pt"
        drawn = model.generate(**prompt, generation_mode="image", num_inference_steps=2, output_type=kind)
        picture = (drawn.images or drawn.latents)[0][0]
        if not torch.isfinite(picture).all():
            raise ValueError("a picture of two steps is not finite")
        report["picture"] = list(picture.shape)
    return report


if __name__ == "__main__":
    sys.addaudithook(refuse_pickles)
    torch.load = refuse_load
    print(json.dumps(use(*load(sys.argv[1]))))
