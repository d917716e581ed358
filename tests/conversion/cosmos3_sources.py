"""Tiny Cosmos 3 checkpoints with random weights, made by diffusers, and its forward on rows of ours."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, Cosmos3OmniTransformer, UniPCMultistepScheduler
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_text_tokens, get_3d_mrope_ids_vae_tokens
from safetensors.torch import load_file, save_file
from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration
from transformers.models.cosmos3_edge.configuration_cosmos3_edge import Cosmos3EdgeTextConfig
from transformers.models.cosmos3_edge.modeling_cosmos3_edge import Cosmos3EdgeTextModel

from conversion.import_cosmos3 import main


TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 40,
    "latent_channel": 3,
    "latent_patch_size": 2,
    "patch_latent_dim": 12,
    "rope_axes_dim": [4, 2, 2],
}
NANO = TINY | {"action_gen": True, "action_dim": 6, "num_embodiment_domains": 3, "sound_gen": True, "sound_dim": 5}
EDGE = TINY | {
    "hidden_act": "relu2",
    "qk_norm_for_text": False,
    "use_und_k_norm_for_gen": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e8,
}
FAMILY = {"nano": NANO, "edge": EDGE}
# Modules of attention: of the reasoner in transformers and in the training, and of both towers in diffusers.
QWEN = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
REASONER = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k")
GENERATOR = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k")
TOKEN_IDS = ("--token-ids", "eos=3", "vision_start=4", "vision_end=5")
EOS, BOI, EOI, PATCH = 3, 4, 5, 40  # the placeholder lies behind the vocabulary


def cosmos3_model(**fields) -> Cosmos3OmniTransformer:
    """Make a transformer whose weights are large enough to tell apart, the norms and the embeddings of sound too."""
    torch.manual_seed(0)
    model = Cosmos3OmniTransformer(**fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(
                    0, 0.3 if parameter.dim() < 2 or "embed_tokens" in name else parameter.shape[1] ** -0.5
                )
    return model


def save_pipeline(model: Cosmos3OmniTransformer, folder: Path, **options) -> Path:
    """Save as the `transformer/` of a pipeline."""
    model.save_pretrained(folder / "transformer", **options)
    return folder


def save_training(model: Cosmos3OmniTransformer, folder: Path) -> Path:
    """Save as a checkpoint of the training, whose names are spelled out here once more."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(("layers.", "norm", "embed_tokens")):
            of_generator = zip(GENERATOR, (f"{own}_moe_gen" for own in QWEN))
            for theirs, own in (*of_generator, *zip(REASONER, QWEN)):
                name = name.replace(f"self_attn.{theirs}.", f"self_attn.{own}.")
            name = f"language_model.model.{name}"
        for theirs, own in (
            ("lm_head", "language_model.lm_head"), ("proj_in", "vae2llm"), ("proj_out", "llm2vae"),
            ("time_embedder.linear_1", "time_embedder.mlp.0"), ("time_embedder.linear_2", "time_embedder.mlp.2"),
            ("action_proj_in", "action2llm"), ("action_proj_out", "llm2action"),
            ("audio_proj_in", "sound2llm"), ("audio_proj_out", "llm2sound"),
        ):  # fmt: skip
            if name.startswith(f"{theirs}."):
                name = own + name.removeprefix(theirs)
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert(source: Path, out: Path, *options: str) -> Path:
    assert main([str(source), str(out), *TOKEN_IDS, *options]) == 0
    return out


def their_velocity(model, text: list[int], latents: torch.Tensor, time: float, clean=(), rate=None) -> torch.Tensor:
    """Run diffusers' forward on one row: text, then a picture or a video.  (C, f, h, w) -> (C, f, h, w)

    Args:
        time: from 0 to 1000.
        clean: frames without noise.
    """
    config, p = model.config, model.config.latent_patch_size
    _, frames, height, width = latents.shape
    grid = (frames, -(-height // p), -(-width // p))
    noisy = [frame for frame in range(frames) if frame not in clean]
    area = grid[1] * grid[2]
    places = torch.arange(len(text), len(text) + frames * area)
    of_noisy = torch.cat([places[frame * area : (frame + 1) * area] for frame in noisy])
    of_text, offset = get_3d_mrope_ids_text_tokens(len(text), 0, use_float_positions=config.enable_fps_modulation)
    of_latents, _ = get_3d_mrope_ids_vae_tokens(
        *grid, offset + config.unified_3d_mrope_temporal_modality_margin,
        fps=rate if config.enable_fps_modulation else None, base_fps=float(config.base_fps),
    )  # fmt: skip
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(text),
            text_indexes=torch.arange(len(text)),
            position_ids=torch.cat([of_text, of_latents.to(of_text.dtype)], dim=1),
            und_len=len(text),
            sequence_length=len(text) + len(places),
            vision_tokens=[latents[None]],
            vision_token_shapes=[grid],
            vision_sequence_indexes=places,
            vision_mse_loss_indexes=of_noisy,
            vision_timesteps=torch.full((len(of_noisy),), time),
            vision_noisy_frame_indexes=[torch.tensor(noisy)],
        )
    return output.sample[0][0]


def reasoner_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Run transformers' own model of the reasoner with the same weights.  (B, L) -> (B, L, V)"""
    config = model.config
    is_edge = not config.qk_norm_for_text
    text = {
        name: getattr(config, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act",
        )
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, "mrope_section": list(config.rope_axes_dim)}
    if not is_edge:
        rope["mrope_interleaved"] = True
    text["rope_parameters"] = rope
    weights = {}
    for name, tensor in model.state_dict().items():
        for theirs, own in zip(REASONER, QWEN):
            name = name.replace(f".{theirs}.", f".{own}.")
        if is_edge:
            name = name.replace("mlp.up_proj", "mlp.fc1").replace("mlp.down_proj", "mlp.fc2")
        weights[name] = tensor
    if is_edge:
        reasoner = Cosmos3EdgeTextModel(Cosmos3EdgeTextConfig(**text))
    else:
        vision = {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "deepstack_visual_indexes": [],
        }
        whole = Cosmos3OmniForConditionalGeneration(
            Cosmos3OmniConfig(text_config=text | {"model_type": "qwen3_vl_text"}, vision_config=vision)
        )
        reasoner = whole.model.language_model
    assert not reasoner.eval().load_state_dict(weights, strict=False).missing_keys
    with torch.no_grad():
        return reasoner(ids).last_hidden_state @ weights["lm_head.weight"].T


class Letters:
    """In the place of a tokenizer, for a pipeline: a token for each letter."""

    eos_token_id = EOS

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<|vision_start|>": BOI}[token]

    def apply_chat_template(self, conversation: list[dict], **options) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[6 + ord(letter) % 30 for letter in conversation[-1]["content"]])


def pipeline_of(model: Cosmos3OmniTransformer, folder: Path, native: bool = False, **scheduler) -> Cosmos3OmniPipeline:
    """Make a pipeline around a model, with a tiny autoencoder, and save what an import reads of it."""
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 3, latents_std=[1.0] * 3
    )
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **scheduler)
    pipeline = Cosmos3OmniPipeline(
        model, Letters(), vae, solver, enable_safety_checker=False, use_native_flow_schedule=native
    )
    pipeline.set_progress_bar_config(disable=True)
    save_pipeline(model, folder)
    solver.save_pretrained(folder / "scheduler")
    index = {"_class_name": "Cosmos3OmniPipeline", "use_native_flow_schedule": native}
    (folder / "model_index.json").write_text(json.dumps(index))
    return pipeline


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
