"""The Transfusion setting written out again, one row at a time, with loops over images, patches and pairs of tokens."""

# L tokens of one row, D hidden size, C latent channels, (h, w) latents, p patch size

import math

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel

from .naive import by_modality, causal_softmax_attention, rms_norm, rotate, swiglu, weights_of


TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "boi_token_id": 3,
    "eoi_token_id": 4,
    "image_token_id": 5,
    "latent_channels": 2,
    "latent_size": [4, 4],
    "patchifier": "linear",
    "unet_channels": [8, 16],
    "unet_layers": 1,
    "unet_norm_groups": 4,
}
SPEECH = {
    "modality_token_ranges": {"text": [0, 40], "speech": [40, 60]},
    "begin_of_speech_token_id": 6,
    "end_of_speech_token_id": 7,
    "max_speech_tokens": 4,
}
BOS, EOS, BOI, EOI, PATCH = 1, 2, 3, 4, 5
# Two pixels to a latent's side.
VAE = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 2,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
}


def tiny_config(variant="mot", modalities=("text", "image"), **fields):
    speech = SPEECH if "speech" in modalities else {}
    return MoTTransfusionConfig.from_variant(variant, modalities, **(TINY | speech | fields))


def tiny_model(variant="mot", **fields):
    """In eval mode, with weights large enough to tell apart. An `attn_implementation` goes to the model."""
    attention = {"attn_implementation": fields.pop("attn_implementation")} if "attn_implementation" in fields else {}
    return MoTTransfusionModel._from_config(tiny_config(variant, **fields), **attention).eval()


def uncompiled_flex(monkeypatch):
    """Flex attention's kernel and mask take half a minute to compile; the functions as they are give the same."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.WrappedFlexAttention", lambda training: lambda: flex_attention
    )
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask",
        lambda *args, **kwargs: create_block_mask(*args, **(kwargs | {"_compile": False})),
    )


def image(height=4, width=4, patch_size=2):
    """The tokens of a picture of height x width latents, markers included."""
    return [BOI, *[PATCH] * (height // patch_size * (width // patch_size)), EOI]


# ------------------------------------------------------------------------------------------ who sees whom, and where


def image_of_each_token(config, tokens):
    """The number of the image that each token belongs to, or None, by walking from BOI to EOI."""
    numbers, number, inside = [], -1, False
    for token in tokens:
        if token == config.boi_token_id:
            number, inside = number + 1, True
        belongs = inside and (token == config.image_token_id or config.markers_in_image_block)
        numbers.append(number if belongs else None)
        if token == config.eoi_token_id:
            inside = False
    return numbers


def visible(config, tokens, documents=None, padding=(), clean=None):
    """The rule, pair by pair.  -> (L, L) bool, row: who looks, column: at whom"""
    numbers = image_of_each_token(config, tokens)

    def sees(query, key):
        if key in padding or (documents is not None and documents[query] != documents[key]):
            return False
        if numbers[key] is not None and numbers[key] == numbers[query]:
            return True
        is_hidden = not config.noised_images_visible and numbers[key] is not None and not clean[numbers[key]]
        return key <= query and not is_hidden

    places = range(len(tokens))
    return torch.tensor([[sees(query, key) for key in places] for query in places])


def positions(config, tokens, documents=None, padding=()):
    """The position of each token, counted one after another.  -> (L,)"""
    numbers, counted, position = image_of_each_token(config, tokens), [], -1
    for place in range(len(tokens)):
        if documents is not None and place and documents[place] != documents[place - 1]:
            position = -1
        shares = config.image_positions == "shared" and place and numbers[place] is not None
        if place not in padding and not (shares and numbers[place] == numbers[place - 1]):
            position += 1
        counted.append(max(position, 0))
    return torch.tensor(counted)


# ------------------------------------------------------------------------------------------------------- the network


def time_embedding(w, name, timestep, frequencies):
    """Cosines, then sines, of t / 10000^(i / half); two linear layers with SiLU between.  -> (E,)"""
    half = frequencies // 2
    angles = [float(timestep) * math.exp(-math.log(10000.0) * i / half) for i in range(half)]
    weight = w[f"{name}.mlp.linear_1.weight"]
    sinusoids = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]).to(weight.dtype)
    hidden = F.silu(weight @ sinusoids + w[f"{name}.mlp.linear_1.bias"])
    return w[f"{name}.mlp.linear_2.weight"] @ hidden + w[f"{name}.mlp.linear_2.bias"]


def sincos_of(row, column, dim):
    """Sines and cosines of the column, then of the row, each over dim / 4 frequencies."""
    quarter = dim // 4
    values = []
    for place in (column, row):
        angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
        values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(values)


class NaiveTransfusion:
    """The model from its weights by name; a linear patchifier in loops, a U-Net as the model has it."""

    def __init__(self, model, dtype=torch.float64):
        self.config, self.w, self.dtype = model.config, weights_of(model, dtype), dtype
        self.patchifier = model.patchifier  # of a U-Net

    def embed(self, latents, timestep):
        """(C, h, w) with noise -> one hidden state for each patch, and what a U-Net keeps for the way back"""
        config, w, size = self.config, self.w, self.config.patch_size
        features = None
        scale = 1 / config.num_train_timesteps if config.timestep_format == "fraction" else 1
        places = [
            (row, column) for row in range(latents.shape[1] // size) for column in range(latents.shape[2] // size)
        ]
        if config.patchifier == "unet":
            tokens, features = self.patchifier.embed(latents[None].float(), torch.as_tensor(timestep)[None])
            tokens = list(tokens[0].to(self.dtype))
        else:
            if config.timestep_direction == "clean":
                timestep = config.num_train_timesteps - timestep
            time = time_embedding(w, "patchifier.time_encoder", timestep * scale, 256)
            tokens = []
            for row, column in places:
                values = [
                    latents[channel, row * size + i, column * size + j]
                    for i in range(size)
                    for j in range(size)
                    for channel in range(config.latent_channels)
                ]
                patch = torch.stack(values).to(self.dtype) + time
                tokens.append(w["patchifier.proj_in.weight"] @ patch + w["patchifier.proj_in.bias"])
        if config.latent_position_table == "sincos":
            tokens = [
                token + sincos_of(*place, config.hidden_size).to(self.dtype) for token, place in zip(tokens, places)
            ]
        return tokens, features

    def predict(self, hidden_states, features, height, width):
        """One hidden state for each patch -> (C, h, w)"""
        config, w, size = self.config, self.w, self.config.patch_size
        if config.patchifier == "unet":
            return self.patchifier.predict(hidden_states[None].float(), features, height, width)[0].to(self.dtype)
        rows = [[[None] * width for _ in range(height)] for _ in range(config.latent_channels)]
        for number, hidden in enumerate(hidden_states):
            values = w["patchifier.proj_out.weight"] @ hidden + w["patchifier.proj_out.bias"]
            top, left = number // (width // size) * size, number % (width // size) * size
            for index, value in enumerate(values):
                i, rest = divmod(index, size * config.latent_channels)
                j, channel = divmod(rest, config.latent_channels)
                rows[channel][top + i][left + j] = value
        return torch.stack([torch.stack([torch.stack(line) for line in channel]) for channel in rows])

    def feed_forward(self, name):
        """Of one tower: SwiGLU, or a mixture in which each token takes the expert that its router likes best."""
        w = self.w
        if f"{name}.router.weight" not in w:
            return lambda x: swiglu(x, w, name)

        def mixture(x):
            rows = []
            for token in x:
                affinity = (w[f"{name}.router.weight"] @ token).softmax(-1)
                best = max(range(len(affinity)), key=affinity.tolist().__getitem__)
                rows.append(affinity[best] * swiglu(token, w, f"{name}.experts.{best}"))
            return torch.stack(rows)

        return mixture

    def layer(self, x, number, modality_ids, seen, places):
        """A pre-norm layer.  (L, D) -> (L, D)"""
        config, w = self.config, self.w
        towers = [config.towers[name] for name in config.modalities]
        name = f"model.layers.{number}"

        def part(kind, module):
            """Each token through the module of its tower, or of all towers where this kind is not untied."""
            is_untied = kind in config.untied or (kind == "query_key_value" and "attention" in config.untied)
            names = towers if is_untied else ["shared"] * len(towers)
            return lambda x: by_modality(x, modality_ids, names, module)

        def norm(which):
            return part("norm", lambda x, tower: rms_norm(x, w[f"{name}.{which}.{tower}.weight"], config.rms_norm_eps))

        def linear(which):
            kind = "attention" if which == "o" else "query_key_value"
            return part(kind, lambda x, tower: x @ w[f"{name}.self_attn.{which}_proj.{tower}.weight"].T)

        normed, theta = norm("input_layernorm")(x), config.rope_parameters["rope_theta"]
        q, k, v = (linear(which)(normed).unflatten(-1, (-1, config.head_dim)) for which in "qkv")
        attended = causal_softmax_attention(rotate(q, places, theta), rotate(k, places, theta), v, seen)
        x = x + linear("o")(attended)
        normed = norm("post_attention_layernorm")(x)
        feed_forward = part("feed_forward", lambda x, tower: self.feed_forward(f"{name}.mlp.{tower}")(x))
        return x + feed_forward(normed)

    def __call__(self, tokens, images=(), seen=None, places=None, modality_ids=None):
        """One row.

        Args:
            tokens: (L,) ids.
            images: (latents (C, h, w) with noise, timestep) of each image.
            seen, places: `visible` and `positions` of the tokens by default, all images clean.

        Returns:
            logits (L, V) and the prediction (C, h, w) of each image.
        """
        config, w, tokens = self.config, self.w, list(tokens)
        seen = visible(config, tokens, clean=[True] * len(images)) if seen is None else seen
        places = positions(config, tokens) if places is None else places
        if modality_ids is None:
            speech = config.modality_token_ranges["speech"][0] if config.modality_token_ranges else config.vocab_size
            modality_ids = torch.tensor([1 if t == PATCH else 2 if t >= speech else 0 for t in tokens])
        embedded = [self.embed(*one) for one in images]
        patches = iter([patch for one, _ in embedded for patch in one])
        table = w["model.embed_tokens.weight"]
        x = torch.stack([next(patches) if token == PATCH else table[token] for token in tokens])
        for number in range(config.num_hidden_layers):
            x = self.layer(x, number, modality_ids, seen, places)
        names = [config.towers[name] if "norm" in config.untied else "shared" for name in config.modalities]
        x = by_modality(
            x, modality_ids, names, lambda x, name: rms_norm(x, w[f"model.norm.{name}.weight"], config.rms_norm_eps)
        )
        predictions, at_patches = [], iter([i for i, token in enumerate(tokens) if token == PATCH])
        for (latents, _), (one, features) in zip(images, embedded):
            rows = torch.stack([x[next(at_patches)] for _ in one])
            predictions.append(self.predict(rows, features, *latents.shape[1:]))
        return x @ w["lm_head.weight"].T, predictions
