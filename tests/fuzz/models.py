"""Configurations, `forward` and `generate()`."""

# B sequences, L tokens, N pictures

import functools
import json
from collections.abc import Callable
from random import Random
from typing import Any

import torch

from modeling_mot import MoTConfig, MoTForCausalLM, MoTTransfusionConfig, MoTTransfusionModel
from modeling_mot.image_processor_mot import MoTImageProcessor
from modeling_mot.image_tokenizer_mot import ImageTokenizerConfig, MoTImageTokenizer
from modeling_mot.speech_tokenizer_mot import MoTSpeechTokenizer, SpeechTokenizerConfig
from tests.conftest import MODALITIES
from tests.conftest import TINY as TOKENS
from tests.modeling_mot.naive_transfusion import TINY as PICTURES
from tests.modeling_mot.naive_transfusion import VAE
from tests.modeling_mot.test_image_tokenizer import TINY as VQ

from . import files, values
from .case import Case, Place, WrongResult
from .values import INF, NAN


SMALL = 2_000_000  # parameters of a model that is built to try a configuration that was accepted


# ------------------------------------------------------------------------------------------------------ configurations

_SIZES = (0, -1, NAN, 2.5, True, 10**9, 10**30, "8", None, [8])
_SHARES = (-0.1, 1.0, 1.5, NAN, INF, -INF, "0.1", True)
FIELDS = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
         "num_key_value_heads", "max_position_embeddings", "num_experts"), _SIZES
    ),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "z_loss_coefficient", "caption_dropout"), _SHARES),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "embedding_multiplier", "timestep_shift", "diffusion_loss_weight"),
                    (0, -1.0, NAN, INF, -INF, "1e-5", None, 1e308)),
    **dict.fromkeys(("boi_token_id", "eoi_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "image_token_id",
                     "begin_of_speech_token_id", "end_of_speech_token_id"), (-1, 3, 4, 5, 59, 60, 10**12, NAN, "3", True, [3], [[3]])),
    "hidden_act": ("nope", "", None, 3, "gelu\0", "__class__"),
    "rope_parameters": ({"a": 1}, {}, {"rope_type": "nope"}, {"rope_type": "default", "rope_theta": NAN}, {"rope_theta": 0},
                        {"rope_type": "linear", "factor": -1}, {"rope_type": "yarn"}, {"rope_theta": "x"}, [1], 3),
    "modalities": ([], ["text"], ["image", "text"], ["text", "text"], ["text", 3], ["text", ""], "text", None, ["text", "a.b"],
                   ["text", "\ud800"], ["text", "__class__"], ["text", "image", "speech", "x" * 10_000]),
    "towers": ({}, {"text": "a"}, {"text": "a.b", "image": "b", "speech": "c"}, {"text": "shared", "image": "b", "speech": "c"},
               {"text": "", "image": "", "speech": ""}, {"text": "weight", "image": "bias", "speech": "forward"}, {"text": None},
               {"text": "a/b", "image": "\0", "speech": "*"}, {"text": "keys", "image": "items", "speech": "training"}, [1], 3),
    "untied": (["nope"], ["norm", "norm"], "norm", [3], [None], {}),
    "moe_towers": (["nope"], ["text", "text"], "text", [3], [None]),
    "norm_position": ("middle", None, 3, "PRE"),
    "qk_norm": ("nope", 3, True, ""),
    "modality_token_ranges": ({}, {"text": [0, 30]}, {"text": [0, 30], "image": [29, 45], "speech": [45, 60]},
                              {"text": [0, 30], "image": [45, 30], "speech": [45, 60]}, {"text": [0, NAN], "image": [30, 45], "speech": [45, 60]},
                              {"text": [0], "image": [30, 45], "speech": [45, 60]}, {"text": 3}, {"text": [0, 30, 40], "image": [30, 45], "speech": [45, 60]},
                              {"text": [-5, 30], "image": [30, 45], "speech": [45, 61]}, [[0, 30]], {"text": ["0", "30"], "image": [30, 45], "speech": [45, 60]}),
    "image_grid": ([NAN, 2], [2.5, 2], [True, True], [0, 2], [-1, -1], [2], [2, 3, 4], 4, "23", [10**9, 10**9], [INF, 1], [None, None], []),
    "max_speech_tokens": (0, -1, NAN, 2.5, "4", True, INF),
    "layers_without_rope": ([-1], [2], [0.5], ["0"], [True], 3, [NAN], [10**12]),
    "latent_size": ([], [4], [4, 4, 4], [0, 4], [-4, 4], [3, 3], [NAN, 4], [4.0, 4], "44", [10**9, 10**9], [True, True]),
    "patch_size": (0, -1, 3, 16, NAN, 2.0, "2", 10**9),
    "latent_channels": (0, -1, NAN, 2.5, 10**9, "2"),
    "unet_channels": ([], [8], [8, 16, 32], [0, 0], [-8, 16], [8.5, 16], ["8", 16], [10**9, 10**9], 8, [7, 13]),
    "unet_layers": (0, -1, 10**9, NAN, "1"),
    "unet_norm_groups": (0, -1, 3, 10**9, NAN, "4"),
    "num_train_timesteps": (0, -1, NAN, 10**12, 2.5, "1000"),
    "prediction_type": ("nope", None, 3),
    "patchifier": ("nope", None, ""),
    "noise_schedule": ("nope", None, ""),
    "image_first_max_timestep": (-1, 10**9, NAN, "5", 0),
    "vae_config": ({}, {"_class_name": "nope"}, {"_class_name": "os.system"}, VAE | {"latent_channels": 3}, VAE | {"norm_num_groups": 0},
                   VAE | {"block_out_channels": []}, VAE | {"scaling_factor": NAN}, VAE | {"scaling_factor": 0}, VAE | {"down_block_types": ["nope"] * 2},
                   VAE | {"layers_per_block": 10**9}, VAE | {"a": 1}, [1]),
    "auto_map": ({"AutoModel": "attacker/repo--evil.Evil"}, {"AutoConfig": "evil.Evil"}, 3, [1]),
    "dtype": ("nope", "float7", 3), "quantization_config": ({"quant_method": "nope"}, 3), "attn_implementation": ("nope", 3),
}  # fmt: skip
_PARTS = {
    ImageTokenizerConfig: (
        {"image_size": [16, 16], "patch_size": 2, "model": VQ},
        {"image_size": (0, -16, [16], [16, 16, 16], [NAN, 16], "16", [10**9, 10**9], [16.5, 16]), "fit": ("nope", 3, None),
         "max_pixels": (0, -1, NAN, INF, "9"), "patch_size": (0, -1, 3, NAN, "2", 10**9), "batch_size": (0, -1, NAN, 2.5, "3"),
         "background": ([], [255], [300, 0, 0], [NAN] * 3, "white", 3), "resample": ("nope", None), "backend": ("nope", "os"),
         "model": ({}, {"a": 1}, VQ | {"num_vq_embeddings": 0}, VQ | {"norm_num_groups": 0}, VQ | {"block_out_channels": []}, 3, None),
         "storage_dtype": ("int8", None), "image_processor": ({"size": 0}, 3, {"a": 1})},
    ),
    SpeechTokenizerConfig: (
        {"num_units": 8},
        {"num_units": (0, -1, NAN, 2.5, "8", 10**12), "units_per_second": (0, -1, 3, NAN, "25", 10**9, 101),
         "sampling_rate": (0, -1, 1, 100, 11_127, 192_001, 10**9, NAN, "16000"), "features": ("nope", None, "encoder"),
         "num_mel_bands": (0, -1, NAN, 10**7), "num_coefficients": (0, -1, 41, NAN), "loudness": (NAN, -1, INF, "x"),
         "encoder": ("nope", "/etc", 3), "encoder_layer": (10**9, NAN), "griffin_lim_iterations": (-1, NAN, 10**12)},
    ),
    MoTImageProcessor: (
        {"image_size": [16, 16], "downsampling": 4},
        {"image_size": (0, -16, [16], [16, 16, 16], [NAN, 16], "16", [10**9, 10**9], [17, 16]), "downsampling": (0, -1, 3, NAN, 2.5, "4", 10**9),
         "fit": ("nope", 3, None), "resample": ("nope", None), "background": ([], [255], [300, 0, 0], [NAN] * 3, "white", 3),
         "max_pixels": (0, -1, NAN, INF, "9")},
    ),
}  # fmt: skip


def configuration(rng: Random, place: Place) -> Case:
    """A configuration by its class, a variant, a preset or a file; one that is accepted is saved, read and built."""
    if rng.random() < 0.3:
        return _part(rng)
    kind, good = rng.choice([(MoTConfig, {"modalities": MODALITIES} | TOKENS), (MoTTransfusionConfig, PICTURES)])
    choices = {name: bad for name, bad in FIELDS.items() if hasattr(kind, name) or name in ("auto_map", "dtype")}
    bad, names = values.mutated(rng, good, choices)
    says, way = values.described(bad, names), rng.choice(["class", "class", "variant", "preset", "file", "dict"])
    make: Callable[[], Any] = lambda: kind(**bad)
    if way == "variant":
        bad.pop("modalities", None)
        variant = rng.choice(["mot", "moe-4x", "hybrid", "loo-text", "nope", "", 3, None, "loo-nope"])
        modalities = rng.choice([MODALITIES, ["text", "image"], ["text"], [], None, "text"])
        names = (*names, "variant", "modalities")
        make = lambda: kind.from_variant(variant, modalities, **bad)
        says = f"variant {variant!r} of {modalities!r}, {says}"
    elif way == "preset":
        name = rng.choice(["chameleon-7b", "nope", "", 3, None, "../../x"])
        changed = {name: bad[name] for name in names if name in bad}
        make, says, names = (lambda: kind.from_preset(name, **changed)), f"preset {name!r}, {says}", (*names, "preset")
    elif way == "file":
        data = json.dumps(bad, default=str).encode()
        if rng.random() < 0.4:
            (data, says), names = files.bad_json(rng, bad), ("config.json", str(place.inside))
        (place.inside / "config.json").write_bytes(data)
        make = lambda: kind.from_pretrained(place.inside)
    elif way == "dict":
        make = lambda: kind.from_dict(bad)
    return Case(f"{kind.__name__} by {way}: {says}", lambda: _try(make(), place), (*names, "config"))


def _try(config: Any, place: Place) -> None:
    """What is accepted is saved and read as it was and, where it is small, makes a model whose logits are finite."""
    config.save_pretrained(place.inside / "saved")
    again = type(config).from_pretrained(place.inside / "saved")
    if again.to_dict() != config.to_dict() and "nan" not in str(config.to_dict()):
        raise WrongResult("a configuration is read otherwise than it was saved")
    if "--" in json.dumps(json.loads((place.inside / "saved" / "config.json").read_text()).get("auto_map")):
        raise WrongResult("the saved auto_map names code of another repository")
    if config.num_hidden_layers > 4 or config.num_parameters() > SMALL:
        return
    is_diffused = isinstance(config, MoTTransfusionConfig)
    model = (MoTTransfusionModel if is_diffused else MoTForCausalLM)(config).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 1, 2]])).logits
    if not torch.isfinite(logits).all():
        raise WrongResult("the logits of a new model are not finite")


def _part(rng: Random) -> Case:
    kind = rng.choice(list(_PARTS))
    good, choices = _PARTS[kind]
    bad, names = values.mutated(rng, good, choices, most=1)

    def call() -> None:
        config = kind(**bad)
        if kind is ImageTokenizerConfig:
            codes = MoTImageTokenizer(config).encode([torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()])
            if len(codes) != 1:
                raise WrongResult(f"{len(codes)} grids of codes of one picture")
        elif kind is SpeechTokenizerConfig:
            samples = MoTSpeechTokenizer(config).preprocess(torch.ones(1600).numpy(), 16_000)
            if not torch.isfinite(samples).all():
                raise WrongResult("samples are not finite")
        else:
            config([torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()])

    return Case(f"{kind.__name__}: {values.described(bad, names)}", call, names)


# ------------------------------------------------------------------------------------------------- models of a few bytes


@functools.cache
def token_model() -> MoTForCausalLM:
    torch.manual_seed(0)
    return MoTForCausalLM(MoTConfig.from_variant("mot", MODALITIES, **TOKENS, initializer_range=0.3)).eval()


@functools.cache
def picture_model() -> MoTTransfusionModel:
    torch.manual_seed(0)
    config = MoTTransfusionConfig(**PICTURES, vae_config=VAE, noise_schedule="linear", caption_dropout=0.1)
    return MoTTransfusionModel(config).eval()


def warm() -> None:
    token_model()
    picture_model()


def _ids(*shape: int) -> torch.Tensor:
    return torch.arange(7, 7 + shape[-1]).expand(shape).clone()


PICTURE_ROW = [1, 8, 3, 5, 5, 5, 5, 4, 9, 2]


def _token_batch() -> dict[str, Any]:
    ids = _ids(2, 6)
    ids[:, 3] = 31
    return {"input_ids": ids, "attention_mask": torch.ones(2, 6, dtype=torch.long), "labels": ids.clone(),
            "modality_ids": (ids >= 30).long(), "skip_logits": False}  # fmt: skip


def _picture_batch() -> dict[str, Any]:
    ids = torch.tensor([PICTURE_ROW])
    return {"input_ids": ids, "labels": ids.clone(), "latents": torch.zeros(1, 2, 4, 4), "timesteps": torch.tensor([5]),
            "attention_mask": torch.ones_like(ids)}  # fmt: skip


def _bad_arguments(rng: Random, good: dict[str, Any]) -> dict[str, tuple]:
    length = good["input_ids"].shape[1]
    rows = {
        name: (*(values.tensor(rng, (len(good["input_ids"]), length)) for _ in range(4)), torch.ones(3, length, dtype=torch.long),
               torch.full((len(good["input_ids"]), length - 2), 1), [[1, 2]], "ids", 3)
        for name in ("input_ids", "modality_ids", "attention_mask", "position_ids", "document_ids", "labels", "shift_labels")
    }  # fmt: skip
    ids = good["input_ids"]
    rows["labels"] += (torch.where(ids > 9, ids, -1), ids + 10**6, ids.float(), ids - 1000, ids.flatten())
    rows["input_ids"] += (ids + 10**6, -ids, ids.float(), ids.bool(), ids[:0], ids[:, :0], ids[None])
    rows["attention_mask"] += (
        torch.full(ids.shape, NAN),
        torch.zeros_like(ids),
        ids.bool(),
        torch.ones(len(ids), 1, 3, 3),
    )
    return rows | {
        "skip_logits": (True, "yes", NAN, 3),
        "logits_to_keep": (-1, 10**9, NAN, 2.5, "3", torch.tensor([99]), torch.tensor([0.5])),
        "num_items_in_batch": (0, -1, NAN, "3", torch.tensor(0)),
        "past_key_values": (3, "cache", [], ((1, 2),)),
        "use_cache": ("yes", NAN, 3),
        "routing": (3, "r", {}),
        "attention_plan": (3, "p"),
        "image_blocks": (3, torch.zeros(1, 1)),
        "inputs_embeds": (torch.zeros(2, 6, 32), torch.zeros(2, 6, 5), torch.zeros(2, 6), torch.full((2, 6, 32), INF)),
        "attention_masks": (torch.ones_like(ids),),
        "output_attentions": (NAN, "yes"),
        "latents": (torch.zeros(2, 2, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 0, 4), torch.zeros(2, 4, 4),
                    torch.zeros(1, 2, 4, 4, dtype=torch.long), torch.zeros(1, 2, 4, 4, dtype=torch.complex64), [[1.0]], "latents"),
        "pixel_values": (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 7, 8), torch.zeros(0, 3, 8, 8), 3),
        "image_sizes": ([[4, 4], [4, 4]], [[0, 4]], [[-4, 4]], [[NAN, 4]], [[10**9, 4]], [4, 4], [[2, 2]], "44", torch.zeros(1, 2)),
        "timesteps": (torch.tensor([-1]), torch.tensor([1000]), torch.tensor([10**12]), torch.tensor([NAN]), torch.tensor([1, 2]),
                      torch.tensor(5), [5], 5, torch.tensor([0.5]), torch.zeros(0)),
        "noise": (torch.zeros(1, 2, 4, 5), torch.zeros(1), "noise", 3),
        "clean_images": (torch.tensor([True, False]), torch.tensor([2]), [True], True, torch.tensor([NAN])),
        "image_first": (torch.tensor([True, False]), torch.tensor([NAN]), 3),
        "generator": (3, "g", [torch.Generator()]),
    }  # fmt: skip


def forward(rng: Random, place: Place) -> Case:
    """Arguments of `forward`; losses and logits of what is accepted are finite, but for floats that were not."""
    with_pictures = rng.random() < 0.5
    model, good = (picture_model(), _picture_batch()) if with_pictures else (token_model(), _token_batch())
    choices = _bad_arguments(rng, good)
    if not with_pictures:
        choices = {
            name: bad
            for name, bad in choices.items()
            if name not in ("latents", "pixel_values", "image_sizes", "noise")
        }
    bad, names = values.mutated(rng, good, choices)
    if rng.random() < 0.2 and "labels" in bad:
        bad["skip_logits"] = True

    def call() -> None:
        with torch.no_grad():
            outputs = model(**bad)
        for name in ("loss", "logits"):
            value = getattr(outputs, name, None)
            if value is not None and not torch.isfinite(value).all():
                raise WrongResult(f"{name} is not finite")

    return Case(f"{type(model).__name__}: {values.described(bad, names)}", call, names)


# ------------------------------------------------------------------------------------------------------------- generate

GENERATION = {
    "guidance_scale": (NAN, INF, -1, "3", True, [1.0], 0, 1e308),
    "latent_bound": (NAN, 0, -1, "6", INF, None),
    "num_inference_steps": (0, -1, NAN, 2.5, 10**12, "3", True),
    "scheduler": ("nope", "", 3, "AutoencoderKL", "os.system", "DDPMScheduler", "__class__", "SchedulerMixin", "FlaxDDIMScheduler"),
    "scheduler_kwargs": ({"nope": 1}, {"num_train_timesteps": 0}, {"beta_start": NAN}, 3, {"trained_betas": []}, {"num_train_timesteps": -5}),
    "image_size": (0, [0, 8], [-8, 8], [7, 8], [NAN, 8], [8], [8, 8, 8], "88", [10**9, 10**9], 8.0, [True, True]),
    "image_grid": FIELDS["image_grid"],
    "max_speech_tokens": FIELDS["max_speech_tokens"],
    "max_new_tokens": (0, -1, NAN, 2.5, "3", True, [3]),
    "min_new_tokens": (10**9, -1, NAN, "3"),
    "max_length": (0, -1, NAN, "3", 2),
    "temperature": (0.0, -1.0, NAN, INF, "1", [1.0], 1e-320),
    "top_k": (0, -1, NAN, 2.5, 10**9, "3"),
    "top_p": (0.0, -0.1, 1.5, NAN, "1"),
    "num_beams": (0, -1, NAN, 2.5, "2"),
    "num_return_sequences": (0, -1, NAN, 2.5, "2"),
    "repetition_penalty": (0.0, -1.0, NAN, "1", INF),
    "eos_token_id": (-1, 10**9, NAN, "2", [], [[2]]),
    "pad_token_id": (-1, 10**9, NAN, "0"),
    "bad_words_ids": ([], [[]], [[10**9]], [["a"]], 3, [[-1]]),
    "suppress_tokens": ([10**9], [-1], ["a"], 3, list(range(60))),
    "forced_eos_token_id": (10**9, -1, "a"),
    "negative_prompt_ids": ([10_000], [], "abc", [[1], [1], [1]], torch.tensor([[1, 5, 5]]), [NAN], [-1], [[1, 2], [3]], torch.zeros(1, 0)),
    "negative_prompt_attention_mask": ([1], torch.ones(1, 9), [NAN], "mask"),
    "callback_on_step_end": (3, "call", lambda *_: 3, lambda *_: {"latents": 3}, lambda *_: {"latents": torch.zeros(1, 9, 1, 1)},
                             lambda *_: {"latents": torch.full((1, 2, 4, 4), NAN)}, lambda *_: {"latents": torch.zeros(3, 2, 4, 4)}, lambda: None),
    "intermediate_every": (0, -1, NAN, "2", 2.5),
    "output_type": ("nope", None, 3, "np"),
    "generation_mode": ("nope", "audio", 3, "image", "video", ""),
    "generator": (3, "g", [], [torch.Generator()] * 5, torch.Generator),
    "modality_ids": (torch.zeros(1, 2, dtype=torch.long), torch.full((1, 4), 9), torch.full((1, 4), -1), torch.zeros(1, 4), [[0]], "m",
                     torch.zeros(3, 4, dtype=torch.long)),
    "attention_mask": (torch.ones(3, 4, dtype=torch.long), torch.ones(1, 2), torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), NAN),
                       [[1]], torch.ones(4), torch.full((1, 4), 7)),
    "attention_masks": (torch.ones(1, 4),),
    "document_ids": (torch.zeros(1, 4),),
    "input_ids": (torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long), torch.full((1, 4), 10**6), torch.full((1, 4), -1),
                  torch.ones(1, 4), torch.ones(4, dtype=torch.long), [[1, 7]], "ids", None, torch.tensor([[1, 5, 5, 5]])),
    "constrain_spans": (NAN, "no", 3),
    "do_sample": (NAN, "yes", 3),
    "latents": (torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), NAN), 3),
    "pixel_values": (torch.zeros(1, 3, 8, 8), 3, torch.zeros(1, 3, 7, 7)),
    "documents": ([], [{}], [{"type": "text", "text": "a"}], 3),
    "processor": (3, None),
    "past_key_values": (3, "cache", []),
    "cache_implementation": ("static", "nope", 3),
    "stopping_criteria": (3, [3], "stop"),
    "logits_processor": (3, [3], [lambda ids, scores: scores[:, :3]], [lambda ids, scores: scores * NAN], [lambda ids, scores: None]),
    "streamer": (3, object()),
    "prefix_allowed_tokens_fn": (3, lambda row, ids: [], lambda row, ids: [10**9]),
    "stop_strings": ("a", 3),
    "assistant_model": (3, "nope"),
    "generation_config": (3, "nope", {}),
    "progress_bar": (3, "yes"),
}  # fmt: skip


def prompt(model: Any) -> dict[str, Any]:
    good = {
        "input_ids": torch.tensor([[1, 8, 9, 3]]),
        "max_new_tokens": 8,
        "do_sample": True,
        "generator": torch.Generator().manual_seed(0),
    }
    return good | ({"num_inference_steps": 2} if isinstance(model, MoTTransfusionModel) else {})


def generate(rng: Random, place: Place) -> Case:
    """Arguments of `generate()`; tokens of what is accepted are in the vocabulary, and pictures finite."""
    model = rng.choice([token_model, picture_model])()
    bad, names = values.mutated(rng, prompt(model), GENERATION)
    if bad.get("guidance_scale") not in (None, 1) and rng.random() < 0.5:
        bad["output_type"] = "latent"
    return Case(
        f"{type(model).__name__}: {values.described(bad, names)}",
        lambda: check_made(model.generate(**bad), model),
        names,
    )


def check_made(made: Any, model: Any) -> None:
    """Raises WrongResult for tokens outside of the vocabulary, and for pictures and latents that are not finite."""
    ids = getattr(made, "sequences", made)
    if (
        isinstance(ids, torch.Tensor)
        and ids.numel()
        and not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size
    ):
        raise WrongResult(f"token {int(ids.max())} is outside of the vocabulary")
    for name in ("latents", "images"):
        for row in getattr(made, name, None) or ():
            for picture in row if isinstance(row, (list, tuple)) else [row]:
                if isinstance(picture, torch.Tensor) and not torch.isfinite(picture).all():
                    raise WrongResult(f"{name} are not finite")
