"""Small tokenizers and chat templates in the schemes of the families that are converted."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer


CORPUS = ["the cat sat on the mat. hello there, what is this?", "  a system of two spaces\n\nand lines"] * 3

CHATML = (  # Qwen: a system prompt of its own, and content that must be a string
    "{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nthe cat<|im_end|>\\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADERS = (  # Llama 3: trimmed, with whitespace and newlines between its blocks
    "\n  {% set loop_messages = messages %}\n{{- bos_token }}\n{%- for message in loop_messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}\n{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{%- endif %}"
)
INST = (  # Mistral: the end token between turns, spaces around
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)
WITHOUT_BEGIN = (
    "  {% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
OF_PARTS = (  # Gemma 3: takes strings and parts
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for item in message['content'] %}{{ item['text'] | trim }}{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
)
ALL_NAMES = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ eos_token }}{{ pad_token }}{% endfor %}"
)


def bytes_backend(specials=("<|end|>", "<|im_start|>", "<|im_end|>"), begin=None, end=None) -> Tokenizer:
    """Byte-level BPE, as of GPT-2, Llama 3, Qwen, SmolLM3, OLMo 2 and Seed-OSS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens(list(specials))
    return framed(backend, begin, end, processors.ByteLevel(trim_offsets=False))


def pieces_backend(scheme: str, begin="<s>", end=None) -> Tokenizer:
    """BPE of pieces with byte fallback, as of sentencepiece. `scheme` is how a space is put before a text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    specials += [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=specials))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    backend.model = models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme == "legacy":  # Llama 2's tokenizer.json
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(steps if scheme in ("never", "gemma") else [*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(specials[:5])
    return framed(backend, begin, end)


def framed(backend: Tokenizer, begin: str | None, end: str | None, before=None) -> Tokenizer:
    """With tokens that are put around a text."""
    if begin or end:
        single = " ".join([*([begin] if begin else []), "$A", *([end] if end else [])])
        tokens = [(token, backend.token_to_id(token)) for token in (begin, end) if token]
        template = processors.TemplateProcessing(single=single, special_tokens=tokens)
        backend.post_processor = template if before is None else processors.Sequence([before, template])
    return backend


def of_class(tokenizer_class, backend: Tokenizer, **names) -> PreTrainedTokenizerFast:
    """A tokenizer of a class that builds its own backend of vocabulary and merges."""
    model = json.loads(backend.to_str())["model"]
    return tokenizer_class(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **names)


def plain(backend: Tokenizer, **names) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@dataclass(frozen=True)
class Family:
    """A source: its model (of `sources.SOURCES`), tokenizer and chat template; whether texts begin with a token."""

    model: str
    build: Callable[[], PreTrainedTokenizerFast]
    template: str | dict[str, str] | None
    begins: bool


PIECES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAMILIES = {
    "llama2": Family("llama", lambda: plain(pieces_backend("legacy"), **PIECES), INST, True),
    "llama2-class": Family(
        "llama", lambda: of_class(LlamaTokenizer, pieces_backend("first"), **PIECES, add_bos_token=True), INST, True
    ),
    "llama3": Family(
        "llama",
        lambda: plain(bytes_backend(begin="<|end|>"), bos_token="<|end|>", eos_token="<|im_end|>"),
        HEADERS,
        True,
    ),
    "mistral": Family("mistral", lambda: plain(pieces_backend("first"), **PIECES), INST, True),
    "ministral": Family("ministral", lambda: plain(pieces_backend("always"), **PIECES), WITHOUT_BEGIN, True),
    "pieces-never": Family("mistral", lambda: plain(pieces_backend("never", end="</s>"), **PIECES), INST, True),
    "qwen2": Family(
        "qwen2", lambda: plain(bytes_backend(), eos_token="<|im_end|>", pad_token="<|end|>"), CHATML, False
    ),
    "qwen3": Family(
        "qwen3",
        lambda: of_class(
            Qwen2Tokenizer, bytes_backend(), eos_token="<|end|>", extra_special_tokens=["<|im_start|>", "<|im_end|>"]
        ),
        CHATML,
        False,
    ),
    "seed_oss": Family(
        "seed_oss",
        lambda: plain(bytes_backend(), bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|end|>"),
        HEADERS,
        False,
    ),
    "smollm3": Family("smollm3", lambda: plain(bytes_backend(), eos_token="<|im_end|>"), CHATML, False),
    "olmo2": Family("olmo2", lambda: plain(bytes_backend(), bos_token="<|end|>", eos_token="<|end|>"), HEADERS, False),
    "gemma": Family(
        "gemma",
        lambda: of_class(
            GemmaTokenizer, pieces_backend("gemma"), **PIECES, pad_token="<unk>", mask_token="<unk>", add_bos_token=True
        ),
        OF_PARTS,
        True,
    ),
    "nameless": Family("smollm3", lambda: plain(bytes_backend()), ALL_NAMES, False),
    "templates": Family(
        "smollm3",
        lambda: plain(bytes_backend(), eos_token="<|end|>"),
        {"default": CHATML, "short": WITHOUT_BEGIN},
        False,
    ),
    "no-template": Family("llama", lambda: plain(pieces_backend("first"), **PIECES), None, True),
}
