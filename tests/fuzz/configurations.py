"""Bad configurations: of models, by class, variant, preset, dictionary and file, and of the processor's parts."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from modeling_mot import MoTConfig, MoTForCausalLM, MoTTransfusionConfig, MoTTransfusionModel
from modeling_mot.image_processing import MoTImageProcessor
from modeling_mot.image_tokenizer import ImageTokenizerConfig, MoTImageTokenizer
from modeling_mot.speech_tokenizer import MoTSpeechTokenizer, SpeechTokenizerConfig
from tests.conftest import MODALITIES, TINY
from tests.modeling_mot import naive_transfusion as transfusion
from tests.modeling_mot.naive_transfusion import VAE
from tests.modeling_mot.test_image_tokenizer import TINY as VQ

from . import files, values
from .case import Case, Place, WrongResult
from .values import INF, NAN


SMALL = 2_000_000  # most parameters of a model that is built to try an accepted configuration
PICTURE = np.zeros((16, 16, 3), dtype=np.uint8)

SIZES = (0, -1, NAN, 2.5, True, 10**9, 10**30, "8", None, [8])
SHARES = (-0.1, 1.0, 1.5, NAN, INF, -INF, "0.1", True)
SCALES = (0, -1.0, NAN, INF, -INF, "1e-5", None, 1e308)
TOKEN_IDS = (-1, 3, 4, 5, 59, 60, 10**12, NAN, "3", True, [3], [[3]])
IMAGE_GRIDS = (
    [NAN, 2], [2.5, 2], [True, True], [0, 2], [-1, -1], [2], [2, 3, 4], 4, "23", [10**9, 10**9], [INF, 1],
    [None, None], [],
)  # fmt: skip
SPEECH_LENGTHS = (0, -1, NAN, 2.5, "4", True, INF)
_REST = {"image": [30, 45], "speech": [45, 60]}
FIELDS: dict[str, tuple] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
         "num_key_value_heads", "max_position_embeddings", "num_experts", "tokenizer_vocab_size"),
        SIZES,
    ),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "z_loss_coefficient", "caption_dropout"), SHARES),
    **dict.fromkeys(
        ("rms_norm_eps", "initializer_range", "embedding_multiplier", "diffusion_loss_weight"), SCALES
    ),
    **dict.fromkeys(
        ("boi_token_id", "eoi_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "image_token_id",
         "begin_of_speech_token_id", "end_of_speech_token_id"),
        TOKEN_IDS,
    ),
    "hidden_act": ("nope", "", None, 3, "gelu\0", "__class__"),
    "rope_parameters": (
        {"a": 1}, {}, {"rope_type": "nope"}, {"rope_type": "default", "rope_theta": NAN}, {"rope_theta": 0}, [1], 3,
        {"rope_type": "linear", "factor": -1}, {"rope_type": "yarn"}, {"rope_theta": "x"},
        {"mrope_section": [2, 1, 1]}, {"mrope_section": [4], "mrope_interleaved": True},
        {"mrope_section": [NAN, 1, 1], "mrope_interleaved": True}, {"mrope_section": 3, "mrope_interleaved": "yes"},
    ),
    "modalities": (
        [], ["text"], ["image", "text"], ["text", "text"], ["text", 3], ["text", ""], "text", None, ["text", "a.b"],
        ["text", "\ud800"], ["text", "__class__"], ["text", "image", "speech", "x" * 10_000],
    ),
    "towers": (
        {}, {"text": "a"}, {"text": "a.b", "image": "b", "speech": "c"},
        {"text": "shared", "image": "b", "speech": "c"},
        {"text": "", "image": "", "speech": ""}, {"text": "weight", "image": "bias", "speech": "forward"}, [1], 3,
        {"text": "a/b", "image": "\0", "speech": "*"}, {"text": "keys", "image": "items", "speech": "training"},
        {"text": None},
    ),
    "tower_configs": (
        {}, {"nope": {}}, {"image": {"nope": 3}}, {"image": {"hidden_size": 0}}, {"image": {"hidden_size": 10**9}},
        {"image": {"hidden_size": 20}}, {"text": {"hidden_size": 20}}, {"image": {"hidden_act": "nope"}}, {"image": 3},
        {"image": {"rms_norm_eps": NAN}}, {"image": {"gated_mlp": 1}}, {"image": {"qk_norm": "layer"}}, [1], 3, "image",
        {"image": {"hidden_size": None}}, {3: {}},
    ),
    "gated_mlp": (False, None, 1, "no"),
    "untied": (["nope"], ["norm", "norm"], "norm", [3], [None], {}),
    "moe_towers": (["nope"], ["text", "text"], "text", [3], [None]),
    "unseen_towers": ({"nope": ["text"]}, {"text": ["text"]}, {"text": "image"}, {"text": [3]}, {3: []}, ["text"], 3),
    "cross_key_norm": (["nope"], "text", [3], [None], 3),
    "norm_position": ("middle", None, 3, "PRE"),
    "qk_norm": ("nope", 3, True, ""),
    "modality_token_ranges": (
        {}, {"text": [0, 30]}, {"text": [0, 31]} | _REST, _REST | {"text": [0, 30], "image": [45, 30]}, [[0, 30]],
        {"text": [0, NAN]} | _REST, {"text": [0]} | _REST, {"text": 3}, {"text": [0, 30, 40]} | _REST,
        {"text": [-5, 30]} | _REST, {"text": ["0", "30"]} | _REST, {"text": [0, 30]} | _REST | {"speech": [45, 61]},
    ),
    "image_grid": IMAGE_GRIDS,
    "max_speech_tokens": SPEECH_LENGTHS,
    "layers_without_rope": ([-1], [2], [0.5], ["0"], [True], 3, [NAN], [10**12]),
    "latent_size": (
        [], [4], [4, 4, 4], [0, 4], [-4, 4], [3, 3], [NAN, 4], [4.0, 4], "44", [10**9, 10**9], [True, True],
    ),
    "patch_size": (0, -1, 3, 16, NAN, 2.0, "2", 10**9),
    "partial_patches": (3, "yes", None),
    "image_positions": ("nope", None, 3, "grid"),
    "modality_margin": (-1, NAN, 2.5, "3", 10**12, 5),
    "base_frames_per_second": (0, -1.0, NAN, INF, "24", 24),
    "latent_channels": (0, -1, NAN, 2.5, 10**9, "2"),
    "unet_channels": ([], [8], [8, 16, 32], [0, 0], [-8, 16], [8.5, 16], ["8", 16], [10**9, 10**9], 8, [7, 13]),
    "unet_layers": (0, -1, 10**9, NAN, "1"),
    "unet_norm_groups": (0, -1, 3, 10**9, NAN, "4"),
    "num_train_timesteps": (0, -1, NAN, 10**12, 2.5, "1000"),
    "timestep_shift": (*SCALES, [], [[4]], [[4, 0.0]], [[NAN, 1.0]], [[4, 3.0], [4, 5.0]], ["43"], [4, 3.0]),
    "timestep_sampling": ("nope", None, "beta", 3),
    "timestep_sampling_parameters": ([], [0, 0], [1.0], [NAN, 1.0], "11", 3, [1.0, 1.0, 1.0], [True, True]),
    "timestep_range": ([], [0.5], [1, 0], [NAN, 1.0], [-0.1, 1.0], [0.0, 2.0], "01", 0.5, None),
    "timestep_direction": ("nope", None, "clean"),
    "smallest_divisor": SCALES,
    "prediction_type": ("nope", None, 3),
    "patchifier": ("nope", None, ""),
    "noise_schedule": ("nope", None, ""),
    "timestep_addition": ("nope", 3, True),
    "noised_images_advance": (False, 3, "no"),
    "latent_position_table_size": ([4, 4], [4], [0, 4], [NAN, 4], 4, "44", [10**9, 10**9]),
    "num_placeholder_tokens": (-1, NAN, 2.5, True, 10**9, "2"),
    "continuous_modalities": (
        {}, {"vision": {}}, {"vision": None}, {"image": {"kind": "features"}}, [1], 3,
        {"vision": {"kind": "features", "encoder": "eye", "placeholder_token_id": NAN}},
        {"vision": {"kind": "os.system", "encoder": "eye", "placeholder_token_id": 40}},
    ),
    "encoders": ({}, {"eye": {}}, {"eye": None}, {"eye": {"type": "nope"}}, {"a.b": {}}, [1], 3, {"eye": {"a": 1}}),
    "image_first_max_timestep": (-1, 10**9, NAN, "5", 0),
    "vae_config": (
        {}, {"_class_name": "nope"}, {"_class_name": "os.system"}, VAE | {"latent_channels": 3}, VAE | {"a": 1}, [1],
        VAE | {"norm_num_groups": 0}, VAE | {"block_out_channels": []}, VAE | {"scaling_factor": NAN},
        VAE | {"scaling_factor": 0}, VAE | {"down_block_types": ["nope"] * 2}, VAE | {"layers_per_block": 10**9},
    ),
    "auto_map": ({"AutoModel": "attacker/repo--evil.Evil"}, {"AutoConfig": "evil.Evil"}, 3, [1]),
    "dtype": ("nope", "float7", 3),
    "quantization_config": ({"quant_method": "nope"}, 3),
    "attn_implementation": ("nope", 3),
}  # fmt: skip
_SIDES = (0, -16, [16], [16, 16, 16], [NAN, 16], "16", [10**9, 10**9], [16.5, 16])
_COLOURS = ([], [255], [300, 0, 0], [NAN] * 3, "white", 3)
PARTS: dict[type, tuple[dict, dict[str, tuple]]] = {
    ImageTokenizerConfig: (
        {"image_size": [16, 16], "patch_size": 2, "model": VQ},
        {
            "image_size": _SIDES,
            "fit": ("nope", 3, None),
            "max_pixels": (0, -1, NAN, INF, "9"),
            "patch_size": (0, -1, 3, NAN, "2", 10**9),
            "batch_size": (0, -1, NAN, 2.5, "3"),
            "background": _COLOURS,
            "resample": ("nope", None),
            "backend": ("nope", "os"),
            "model": ({}, {"a": 1}, VQ | {"num_vq_embeddings": 0}, VQ | {"norm_num_groups": 0},
                      VQ | {"block_out_channels": []}, 3, None),
            "storage_dtype": ("int8", None),
            "image_processor": ({"size": 0}, 3, {"a": 1}),
        },
    ),
    SpeechTokenizerConfig: (
        {"num_units": 8},
        {
            "num_units": (0, -1, NAN, 2.5, "8", 10**12),
            "units_per_second": (0, -1, 3, NAN, "25", 10**9, 101),
            "sampling_rate": (0, -1, 1, 100, 11_127, 192_001, 10**9, NAN, "16000"),
            "features": ("nope", None, "encoder"),
            "num_mel_bands": (0, -1, NAN, 10**7),
            "num_coefficients": (0, -1, 41, NAN),
            "loudness": (NAN, -1, INF, "x"),
            "encoder": ("nope", "/etc", 3),
            "encoder_layer": (10**9, NAN),
            "griffin_lim_iterations": (-1, NAN, 10**12),
        },
    ),
    MoTImageProcessor: (
        {"image_size": [16, 16], "downsampling": 4},
        {
            "image_size": (*_SIDES, [17, 16]),
            "downsampling": (0, -1, 3, NAN, 2.5, "4", 10**9),
            "fit": ("nope", 3, None),
            "resample": ("nope", None),
            "background": _COLOURS,
            "max_pixels": (0, -1, NAN, INF, "9"),
        },
    ),
}  # fmt: skip


def configure(rng: Random, place: Place) -> Case:
    """Make a configuration with a bad field. If it is accepted, it is saved, read and built."""
    return _part(rng) if rng.random() < 0.3 else _model(rng, place)


def _model(rng: Random, place: Place) -> Case:
    kind, good = rng.choice(
        [(MoTConfig, {"modalities": MODALITIES} | TINY), (MoTTransfusionConfig, dict(transfusion.TINY))]
    )
    choices = {name: bad for name, bad in FIELDS.items() if hasattr(kind, name) or name in ("auto_map", "dtype")}
    bad, names = values.mutated(rng, good, choices)
    says, way = values.described(bad, names), rng.choice(["class", "class", "variant", "preset", "file", "dict"])
    make: Callable[[], Any] = partial(kind, **bad)
    if way == "variant":
        bad.pop("modalities", None)
        variant = rng.choice(["mot", "moe-4x", "hybrid", "loo-text", "nope", "", 3, None, "loo-nope"])
        modalities = rng.choice([MODALITIES, ["text", "image"], ["text"], [], None, "text"])
        make = partial(kind.from_variant, variant, modalities, **bad)
        says, names = f"variant {variant!r} of {modalities!r}, {says}", (*names, "variant", "modalities")
    elif way == "preset":
        preset = rng.choice(["chameleon-7b", "nope", "", 3, None, "../../x"])
        make = partial(kind.from_preset, preset, **{name: bad[name] for name in names if name in bad})
        says, names = f"preset {preset!r}, {says}", (*names, "preset")
    elif way == "dict":
        make = partial(kind.from_dict, bad)
    elif way == "file":
        bad = values.as_json(bad)
        data = json.dumps(bad).encode()
        if rng.random() < 0.4:
            (data, says), names = files.bad_json(rng, bad), ("config.json", str(place.inside))
        (place.inside / "config.json").write_bytes(data)
        make = partial(kind.from_pretrained, place.inside)
    return Case(f"{kind.__name__} by {way}: {says}", lambda: _try(make(), place.inside), (*names, "config"))


def good(folder: Path) -> None:
    _try(MoTConfig(modalities=MODALITIES, **TINY), folder / "tokens")
    _try(MoTTransfusionConfig(**transfusion.TINY), folder / "pictures")
    for kind, (fields, _) in PARTS.items():
        _USES[kind](kind(**fields))


def _try(config: Any, folder: Path) -> None:
    """Check an accepted configuration: it is saved and read unchanged, and a small one makes finite logits."""
    config.save_pretrained(folder / "saved")
    again = type(config).from_pretrained(folder / "saved")
    if again.to_dict() != config.to_dict() and "nan" not in str(config.to_dict()):
        raise WrongResult("a configuration is read otherwise than it was saved")
    if "--" in json.dumps(json.loads((folder / "saved" / "config.json").read_text()).get("auto_map")):
        raise WrongResult("the saved auto_map names code of another repository")
    if config.num_hidden_layers > 4 or config.num_parameters() > SMALL:
        return
    model = (MoTTransfusionModel if isinstance(config, MoTTransfusionConfig) else MoTForCausalLM)(config).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 1, 2]])).logits
    if not torch.isfinite(logits).all():
        raise WrongResult("the logits of a new model are not finite")


def _part(rng: Random) -> Case:
    kind = rng.choice(list(PARTS))
    good, choices = PARTS[kind]
    bad, names = values.mutated(rng, good, choices, most=1)
    return Case(f"{kind.__name__}: {values.described(bad, names)}", lambda: _USES[kind](kind(**bad)), names)


def _codes(config: ImageTokenizerConfig) -> None:
    grids = MoTImageTokenizer(config).encode([PICTURE])
    if len(grids) != 1:
        raise WrongResult(f"{len(grids)} grids of codes of one picture")


def _samples(config: SpeechTokenizerConfig) -> None:
    samples = MoTSpeechTokenizer(config).preprocess(np.ones(1600, dtype=np.float32), 16_000)
    if not torch.isfinite(samples).all():
        raise WrongResult("samples are not finite")


def _pixels(processor: MoTImageProcessor) -> None:
    processor([PICTURE])


_USES = {ImageTokenizerConfig: _codes, SpeechTokenizerConfig: _samples, MoTImageProcessor: _pixels}
