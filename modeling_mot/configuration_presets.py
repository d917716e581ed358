"""The rows of the paper's Tables 1, 3, 4 and 5, its model variants, and the styles of Chameleon's models, as data.

The rows set what the tables and their sections name: sizes, vocabularies and modalities. The paper takes data and
tokenizers from Chameleon, and names neither z-loss nor dropout nor QK-norm. A row therefore has none of them, unless a
style is asked for by name.
"""

# Chameleon's vocabulary: 65,536 entries, 8,192 of them image codes; 500 speech units (section 3.3.1).
_SPECIAL = {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "boi_token_id": 3,
    "eoi_token_id": 4,
}
_SPEECH = {"begin_of_speech_token_id": 5, "end_of_speech_token_id": 6}
_CHAMELEON = _SPECIAL | {
    "modalities": ["text", "image"],
    "vocab_size": 65536,
    "modality_token_ranges": {"text": [0, 57344], "image": [57344, 65536]},
    "image_grid": [32, 32],
    "max_position_embeddings": 4096,
}
_CHAMELEON_SPEECH = (
    _CHAMELEON
    | _SPEECH
    | {
        "modalities": ["text", "image", "speech"],
        "modality_token_ranges": {"text": [0, 56844], "image": [56844, 65036], "speech": [65036, 65536]},
    }
)
# Images are continuous in the Transfusion setting: the vocabulary is Llama 2's, all of it text.
_TRANSFUSION = {
    "modalities": ["text", "image"],
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
}
# A Transfusion model adds three tokens to such a row, in a vocabulary of a multiple of 16, and a U-Net of 0.27 B.
TRANSFUSION_FIELDS = {
    "vocab_size": 32016,
    "boi_token_id": 32000,
    "eoi_token_id": 32001,
    "image_token_id": 32002,
}


def _sizes(hidden_size, num_hidden_layers, num_attention_heads):
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
    }


PRESETS = {
    # Table 1: Chameleon, text and image
    "chameleon-37m": _CHAMELEON | _sizes(256, 4, 8),
    "chameleon-94m": _CHAMELEON | _sizes(512, 8, 8),
    "chameleon-443m": _CHAMELEON | _sizes(1024, 24, 16),
    "chameleon-1.5b": _CHAMELEON | _sizes(2048, 24, 16),
    "chameleon-7b": _CHAMELEON | _sizes(4096, 32, 32),
    # Table 3: text, image and speech
    "chameleon-speech-443m": _CHAMELEON_SPEECH | _sizes(1024, 24, 16),
    "chameleon-speech-880m": _CHAMELEON_SPEECH | _sizes(1536, 24, 24),
    "chameleon-speech-1.5b": _CHAMELEON_SPEECH | _sizes(2048, 24, 16),
    "chameleon-speech-7b": _CHAMELEON_SPEECH | _sizes(4096, 32, 32),
    # Table 4: the transformer of the Transfusion models
    "transfusion-163m": _TRANSFUSION | _sizes(768, 16, 12),
    "transfusion-760m": _TRANSFUSION | _sizes(1536, 24, 24),
    "transfusion-1.4b": _TRANSFUSION | _sizes(2048, 24, 16),
    "transfusion-7b": _TRANSFUSION | _sizes(4096, 32, 32),
    # Table 5: the untying ablation
    "ablation-880m": _CHAMELEON | _sizes(1536, 24, 24),
}

TRANSFUSION_PRESETS = {name: fields for name, fields in PRESETS.items() if name.startswith("transfusion-")}

VARIANTS = (
    "dense",
    "moe-4x",
    "mot",
    "hybrid",
    "loo-text",
    "loo-image",
    "loo-speech",
    "untied-feed-forward",
    "untied-feed-forward-qkv",
    "untied-feed-forward-attention",
)

# Options that stabilise the training of Chameleon (arXiv 2405.09818, section 2.3 and Table 1), all of them or none.
STYLES = {
    "chameleon-7b": {
        "qk_norm": "layer",
        "norm_position": "pre",
        "hidden_dropout": 0.1,
        "z_loss_coefficient": 1e-5,
    },
    "chameleon-34b": {
        "qk_norm": "layer",
        "norm_position": "post",
        "hidden_dropout": 0.0,
        "z_loss_coefficient": 1e-5,
    },
}
