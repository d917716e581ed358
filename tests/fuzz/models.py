"""Bad arguments of `forward` and `generate()`, on models of a few kilobytes.

B sequences, L tokens, N pictures.
"""

import functools
from pathlib import Path
from random import Random
from typing import Any

import torch

from modeling_mot import MoTConfig, MoTForCausalLM, MoTTransfusionConfig, MoTTransfusionModel
from tests.conftest import MODALITIES, TINY
from tests.modeling_mot import naive_transfusion as transfusion

from . import values
from .case import Case, Place, WrongResult
from .configurations import IMAGE_GRIDS, SPEECH_LENGTHS
from .values import INF, NAN


@functools.cache
def token_model() -> MoTForCausalLM:
    torch.manual_seed(0)
    return MoTForCausalLM(MoTConfig.from_variant("mot", MODALITIES, **TINY, initializer_range=0.3)).eval()


@functools.cache
def picture_model() -> MoTTransfusionModel:
    torch.manual_seed(0)
    fields = {"vae_config": transfusion.VAE, "noise_schedule": "linear", "caption_dropout": 0.1}
    return MoTTransfusionModel(MoTTransfusionConfig(**transfusion.TINY | fields)).eval()


def warm() -> None:
    token_model()
    picture_model()


# ------------------------------------------------------------------------------------------------------------- forward


def token_batch() -> dict[str, Any]:
    """Make good arguments of `forward`: two rows, each with a code of a picture."""
    ids = torch.tensor([[7, 8, 9, 31, 10, 11]] * 2)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "modality_ids": (ids >= 30).long(),
        "skip_logits": False,
    }


def picture_batch() -> dict[str, Any]:
    """Make good arguments of `forward`: a row with a picture of four patches."""
    ids = torch.tensor([[1, 8, 3, 5, 5, 5, 5, 4, 9, 2]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "latents": torch.zeros(1, 2, 4, 4),
        "timesteps": torch.tensor([5]),
    }


_ROWS = (
    "input_ids", "modality_ids", "attention_mask", "position_ids", "document_ids", "labels", "shift_labels",
)  # fmt: skip


def _bad_arguments(rng: Random, good: dict[str, Any]) -> dict[str, tuple]:
    ids = good["input_ids"]
    rows, length = ids.shape
    common = (
        torch.ones(rows + 1, length, dtype=torch.long),
        torch.ones(rows, length - 2, dtype=torch.long),
        [[1, 2]],
        3,
    )
    bad = {name: (*common, *(values.tensor(rng, (rows, length)) for _ in range(4))) for name in _ROWS}
    bad["labels"] += (torch.where(ids > 9, ids, -1), ids + 10**6, ids.float(), ids - 1000, ids.flatten())
    bad["input_ids"] += (ids + 10**6, -ids, ids.float(), ids.bool(), ids[:0], ids[:, :0], ids[None])
    bad["attention_mask"] += (torch.full(ids.shape, NAN), torch.zeros_like(ids), ids.bool(), torch.ones(rows, 1, 3, 3))
    bad |= {
        "skip_logits": (True, "yes", NAN, 3),
        "logits_to_keep": (-1, 10**9, NAN, 2.5, "3", torch.tensor([99]), torch.tensor([0.5])),
        "num_items_in_batch": (0, -1, NAN, "3"),
        "past_key_values": (3, "cache", [], ((1, 2),)),
        "use_cache": ("yes", NAN, 3),
        "routing": (3, "r", {}),
        "attention_plan": (3, "p"),
        "inputs_embeds": (torch.zeros(rows, length, 32), torch.zeros(2, 6, 5), torch.zeros(2, 6)),
        "attention_masks": (torch.ones_like(ids),),
        "output_attentions": (NAN, "yes"),
    }
    if "latents" not in good:
        return bad
    return bad | {
        "latents": (
            torch.zeros(2, 2, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 0, 4), [[1.0]],
            torch.zeros(2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.long),
            torch.zeros(1, 2, 4, 4, dtype=torch.cfloat),
        ),
        "pixel_values": (
            torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 7, 8), torch.zeros(0, 3, 8, 8), 3,
        ),
        "image_sizes": (
            [[4, 4], [4, 4]], [[0, 4]], [[-4, 4]], [[NAN, 4]], [[10**9, 4]], [4, 4], [[2, 2]], "44", torch.zeros(1, 2),
        ),
        "timesteps": (
            torch.tensor([-1]), torch.tensor([1000]), torch.tensor([10**12]), torch.tensor([NAN]), torch.tensor([1, 2]),
            torch.tensor(5), [5], 5, torch.tensor([0.5]), torch.zeros(0),
        ),
        "noise": (torch.zeros(1, 2, 4, 5), torch.zeros(1), "noise", 3),
        "clean_images": (torch.tensor([True, False]), torch.tensor([2]), [True], True, torch.tensor([NAN])),
        "image_first": (torch.tensor([True, False]), torch.tensor([NAN]), 3),
        "generator": (3, "g", [torch.Generator()]),
    }  # fmt: skip


def forward(rng: Random, place: Place) -> Case:
    """Make bad arguments of `forward`. If they are accepted, losses and logits are finite."""
    with_pictures = rng.random() < 0.5
    model, good = (picture_model(), picture_batch()) if with_pictures else (token_model(), token_batch())
    bad, names = values.mutated(rng, good, _bad_arguments(rng, good))
    if rng.random() < 0.2 and "labels" in bad:
        bad["skip_logits"] = True

    return Case(f"{type(model).__name__}: {values.described(bad, names)}", lambda: _run(model, bad), names)


def good_forward(folder: Path) -> None:
    _run(token_model(), token_batch())
    _run(token_model(), token_batch() | {"skip_logits": True})
    _run(picture_model(), picture_batch())


def _run(model: Any, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        outputs = model(**batch)
    for name in ("loss", "logits"):
        value = getattr(outputs, name, None)
        if value is not None and not torch.isfinite(value).all():
            raise WrongResult(f"{name} is not finite")


# ------------------------------------------------------------------------------------------------------------ generate

_MASK = torch.ones(1, 4, dtype=torch.long)
# Arguments that our models read themselves.
OURS: dict[str, tuple] = {
    "guidance_scale": (NAN, INF, -1, "3", True, [1.0], 0, 1e308),
    "image_grid": IMAGE_GRIDS,
    "max_speech_tokens": SPEECH_LENGTHS,
    "generation_mode": ("nope", "audio", 3, "image", "video", ""),
    "generator": (3, "g", [], [torch.Generator()] * 5, torch.Generator),
    "modality_ids": (_MASK[:, :2], _MASK * 9, _MASK * -1, _MASK.float(), [[0]], "m", _MASK.expand(3, -1)),
    "attention_mask": (
        _MASK.expand(3, -1), _MASK[:, :2].float(), _MASK * 0, _MASK * NAN, [[1]], torch.ones(4), _MASK * 7,
    ),
    "attention_masks": (_MASK,),
    "document_ids": (_MASK,),
    "input_ids": (
        _MASK[:, :0], _MASK[:0], _MASK * 10**6, _MASK * -1, _MASK.float(), _MASK[0], [[1, 7]], "ids", None,
        torch.tensor([[1, 5, 5, 5]]),
    ),
    "constrain_spans": (NAN, "no", 3),
}  # fmt: skip
OF_PICTURES: dict[str, tuple] = {
    "latent_bound": (NAN, 0, -1, "6", INF, None),
    "num_inference_steps": (0, -1, NAN, 2.5, 10**12, "3", True),
    "image_guidance_scale": (-1, NAN, INF, "2", True, [2.0], 0, 3.0),
    "guidance_form": ("nope", 3, "sum"),
    "guidance_renorm": ("nope", 3, True, "text_channel"),
    "guidance_renorm_min": (-1, 1.5, NAN, "0", True),
    "guidance_interval": ([], [0.5], [1, 0], [NAN, 1], [0, 2], "01", 0.5, [True, False]),
    "time_spacing": ("nope", 3, "steps", "points"),
    "timestep_shift": (0, -1, NAN, INF, "3", True, 3.0),
    "scheduler": ("nope", "", 3, "AutoencoderKL", "os.system", "DDPMScheduler", "__class__", "SchedulerMixin"),
    "scheduler_kwargs": (
        {"nope": 1}, {"num_train_timesteps": 0}, {"beta_start": NAN}, 3, {"trained_betas": []},
        {"num_train_timesteps": -5},
    ),
    "image_size": (0, [0, 8], [-8, 8], [7, 8], [NAN, 8], [8], [8, 8, 8], "88", [10**9, 10**9], 8.0, [True, True]),
    "negative_prompt_ids": (
        [10_000], [], "abc", [[1], [1], [1]], torch.tensor([[1, 5, 5]]), [NAN], [-1], [[1, 2], [3]], torch.zeros(1, 0),
    ),
    "negative_prompt_attention_mask": ([1], torch.ones(1, 9), [NAN], "mask"),
    "callback_on_step_end": (
        3, "call", lambda *_: 3, lambda *_: {"latents": 3}, lambda *_: {"latents": torch.zeros(1, 9, 1, 1)},
        lambda *_: {"latents": torch.full((1, 2, 4, 4), NAN)}, lambda *_: {"latents": torch.zeros(3, 2, 4, 4)},
        lambda: None,
    ),
    "intermediate_every": (0, -1, NAN, "2", 2.5),
    "output_type": ("nope", None, 3, "np"),
    "latents": (torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), NAN), 3),
    "pixel_values": (torch.zeros(1, 3, 8, 8), 3, torch.zeros(1, 3, 7, 7)),
    "documents": ([], [{}], [{"type": "text", "text": "a"}], 3),
    "processor": (3, None),
    "past_key_values": (3, "cache", []),
}  # fmt: skip
# Arguments that transformers reads before our models decode.
THEIRS: dict[str, tuple] = {
    "max_new_tokens": (0, -1, NAN, 2.5, "3", True, [3]),
    "min_new_tokens": (10**9, -1, NAN, "3"),
    "max_length": (0, -1, NAN, "3", 2),
    "temperature": (0.0, -1.0, NAN, INF, "1", 1e-320),
    "top_k": (0, -1, NAN, 10**9, "3"),
    "top_p": (0.0, -0.1, 1.5, NAN, "1"),
    "num_beams": (0, -1, NAN, "2"),
    "num_return_sequences": (0, -1, NAN, "2"),
    "repetition_penalty": (0.0, -1.0, NAN, INF),
    "eos_token_id": (-1, 10**9, NAN, "2", []),
    "pad_token_id": (-1, 10**9, NAN, "0"),
    "bad_words_ids": ([], [[]], [[10**9]], [["a"]], [[-1]]),
    "suppress_tokens": ([10**9], [-1], list(range(60))),
    "cache_implementation": ("static", "nope", 3),
    "stopping_criteria": (3, [3], "stop"),
    "logits_processor": (
        3, [lambda ids, scores: scores[:, :3]], [lambda ids, scores: scores * NAN], [lambda ids, scores: None],
    ),
    "streamer": (3, object()),
    "generation_config": (3, "nope", {}),
}  # fmt: skip


def prompt(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 8, 9, 3]])
    good = {"input_ids": ids, "max_new_tokens": 8, "do_sample": True, "generator": generator}
    return good | ({"num_inference_steps": 2} if isinstance(model, MoTTransfusionModel) else {})


def bad_settings(rng: Random, model: Any) -> dict[str, tuple]:
    """Return bad values of arguments that our code reads, or now and then of arguments that transformers reads."""
    if rng.random() < 0.15:
        return THEIRS
    return OURS | (OF_PICTURES if isinstance(model, MoTTransfusionModel) else {})


def generate(rng: Random, place: Place) -> Case:
    """Make bad arguments of `generate()`. If they are accepted, tokens are in the vocabulary and pictures finite."""
    model = rng.choice([token_model, picture_model])()
    bad, names = values.mutated(rng, prompt(model), bad_settings(rng, model))
    if isinstance(model, MoTTransfusionModel) and rng.random() < 0.3:
        bad.setdefault("output_type", "latent")
    says = f"{type(model).__name__}: {values.described(bad, names)}"
    return Case(says, lambda: check_made(model.generate(**bad), model), names)


def good_generate(folder: Path) -> None:
    for model in (token_model(), picture_model()):
        check_made(model.generate(**prompt(model)), model)


def check_made(made: Any, model: Any) -> None:
    """Raise WrongResult if a token is not in the vocabulary, or if a picture or latent is not finite."""
    ids, size = getattr(made, "sequences", made), model.config.vocab_size
    if isinstance(ids, torch.Tensor) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise WrongResult(f"token {int(ids.max())} is outside of the vocabulary")
    for name in ("latents", "images"):
        for row in getattr(made, name, None) or ():
            for picture in row if isinstance(row, (list, tuple)) else [row]:
                if isinstance(picture, torch.Tensor) and not torch.isfinite(picture).all():
                    raise WrongResult(f"{name} are not finite")
