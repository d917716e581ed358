"""Tiny random checkpoints of dense language models, saved by transformers itself."""

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (model type, what its configuration says beside the sizes)
SOURCES = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "arcee": ("arcee", {"head_dim": 16, "mlp_bias": True}),
    "mistral": ("mistral", {"head_dim": 12, "sliding_window": None}),
    "ministral": ("ministral", {"head_dim": 8, "sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "seed_oss": ("seed_oss", {"head_dim": 16, "attention_out_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "olmo2": ("olmo2", {}),
    "gemma": ("gemma", {"head_dim": 24}),
}


def dense_model(name: str, dtype: torch.dtype = torch.float32, **fields) -> PreTrainedModel:
    """A model of `SOURCES`, every tensor of it random: norms of ones and biases of zeros would hide a mistake."""
    model_type, own = SOURCES[name]
    config = CONFIG_MAPPING[model_type](**SIZES | own | fields)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Norms around 1 (or, with an offset, 0).
            parameter.copy_(parameter.round() if "norm" in parameter_name else 0).add_(
                0.3 * torch.randn_like(parameter)
            )
    return model


def save_source(folder: Path, name: str, tokenizer: bool = False, shard_size: str = "5GB", **fields) -> PreTrainedModel:
    """Save a model of `SOURCES`, and beside it a tokenizer of its vocabulary where one is wanted."""
    model = dense_model(name, **fields)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer:
        words_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return model


def spelled_out(plan: str) -> str:
    """A printed plan with a line for each layer in the place of a line for `layers.{0..2}`."""
    lines = []
    for line in plan.splitlines():
        span = re.search(r"\{(\d+)\.\.(\d+)\}", line)
        layers = range(int(span[1]), int(span[2]) + 1) if span else [0]
        lines += [re.sub(r"\{\d+\.\.\d+\}", str(layer), line) for layer in layers]
    return "\n".join(lines)


def words_tokenizer(size: int, bos: bool = True, **settings) -> PreTrainedTokenizerFast:
    """A fast tokenizer of `size` words, "w3" ... after padding, begin, end and unknown."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
        settings["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **settings
    )
