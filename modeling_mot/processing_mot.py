"""MoTProcessor: documents of text, pictures and sound to one sequence of tokens, and back.

The vocabulary is text (specials included), then image codes, then speech units, each a contiguous range.
Shapes: B sequences, L tokens.
"""

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.processing_utils import _MARKED_RE, ProcessorMixin

from .document_decoding_mot import DocumentDecoder
from .image_tokenizer_mot import IMAGE_TOKENIZER_CONFIG_NAME, MoTImageTokenizer
from .processor_inputs_mot import check_document, flatten, flatten_audio, load_if_present
from .speech_tokenizer_mot import SPEECH_TOKENIZER_CONFIG_NAME, MoTSpeechTokenizer
from .vocabulary_mot import CHAT_TEMPLATE, extend_tokenizer, modality_ranges


SUB_TOKENIZERS = {
    "image_tokenizer": (MoTImageTokenizer, IMAGE_TOKENIZER_CONFIG_NAME),
    "speech_tokenizer": (MoTSpeechTokenizer, SPEECH_TOKENIZER_CONFIG_NAME),
}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")

__all__ = ["MoTProcessor", "extend_tokenizer"]


class MoTProcessor(ProcessorMixin):
    """Text tokenizer, VQ image tokenizer and speech-unit tokenizer behind one call.

    `tokenizer` must hold the special, image and speech tokens: `extend_tokenizer` adds them to any fast tokenizer.
    Either sub-tokenizer may be None. Everything is saved in one folder: text files at the top, the others in
    `image_tokenizer/` and `speech_tokenizer/`.
    """

    def __init__(self, tokenizer, image_tokenizer=None, speech_tokenizer=None, chat_template=None):
        self.image_tokenizer = image_tokenizer
        self.speech_tokenizer = speech_tokenizer
        self.modality_token_ranges = modality_ranges(tokenizer)
        for modality, sub_tokenizer, size in (
            ("image", image_tokenizer, getattr(image_tokenizer, "num_codes", 0)),
            ("speech", speech_tokenizer, getattr(speech_tokenizer, "num_units", 0)),
        ):
            first, last = self.modality_token_ranges.get(modality, [0, 0])
            if sub_tokenizer is not None and last - first != size:
                raise ValueError(
                    f"the tokenizer holds {last - first} {modality} tokens but the {modality} tokenizer has {size} "
                    "codes; build it with extend_tokenizer(tokenizer, num_image_codes, num_speech_units)"
                )
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.audio_token, self.audio_token_id = tokenizer.audio_token, tokenizer.audio_token_id
        self.image_token_ids = list(range(*self.modality_token_ranges.get("image", [0, 0])))
        self.audio_token_ids = list(range(*self.modality_token_ranges.get("speech", [0, 0])))
        super().__init__(tokenizer, chat_template=CHAT_TEMPLATE if chat_template is None else chat_template)

    # -- what the vocabulary is ---------------------------------------------------------------------------------------

    @classmethod
    def get_attributes(cls) -> list[str]:
        # The two discrete tokenizers are models, not transformers tokenizers; they are saved by us, in subfolders.
        return ["tokenizer"]

    @property
    def modalities(self) -> list[str]:
        return list(self.modality_token_ranges)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "modality_ids"]

    def config_kwargs(self) -> dict[str, Any]:
        """Arguments of `MoTConfig` that follow from this processor."""
        tokenizer = self.tokenizer
        size = max(last for _, last in self.modality_token_ranges.values())
        if len(tokenizer) > size:
            raise ValueError(
                f"{len(tokenizer) - size} tokens were added after the image and speech tokens, so they belong to no "
                "modality; add them to the text tokenizer before extend_tokenizer"
            )
        kwargs = {
            "vocab_size": size,
            "modalities": self.modalities,
            "modality_token_ranges": copy.deepcopy(self.modality_token_ranges),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "boi_token_id": tokenizer.boi_token_id,
            "eoi_token_id": tokenizer.eoi_token_id,
            "begin_of_speech_token_id": tokenizer.begin_of_speech_token_id,
            "end_of_speech_token_id": tokenizer.end_of_speech_token_id,
        }
        if self.image_tokenizer is not None:
            kwargs["image_grid"] = self.image_tokenizer.image_grid
        return kwargs

    def modality_ids_of(self, input_ids: Any) -> Any:
        """Index of each token's modality, in the form (list, array, tensor) of `input_ids`."""
        bounds = [first for first, _ in self.modality_token_ranges.values()][1:]
        if isinstance(input_ids, torch.Tensor):
            return torch.bucketize(input_ids, torch.tensor(bounds, device=input_ids.device), right=True)
        if isinstance(input_ids, np.ndarray):
            return np.digitize(input_ids, bounds)
        if input_ids and isinstance(input_ids[0], (list, tuple, np.ndarray, torch.Tensor)):
            return [self.modality_ids_of(row) for row in input_ids]
        return np.digitize(np.asarray(input_ids, dtype=np.int64), bounds).tolist()

    def fingerprint(self) -> str:
        """sha256 over everything that changes tokens: tokenizer, configurations and weights."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are left over from the last call, not properties of the vocabulary.
        backend = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
        digest = hashlib.sha256(json.dumps(backend, sort_keys=True).encode())
        digest.update(json.dumps(self.config_kwargs(), sort_keys=True).encode())
        for sub_tokenizer in (self.image_tokenizer, self.speech_tokenizer):
            digest.update(b"none" if sub_tokenizer is None else sub_tokenizer.fingerprint().encode())
        return digest.hexdigest()

    # -- encoding -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        documents: list[dict] | list[list[dict]] | None = None,
        images: Any = None,
        text: str | list[str] | None = None,
        audio: Any = None,
        add_eos: bool | None = None,
        continue_with: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """`input_ids`, `modality_ids`, `attention_mask` of documents, or of text with placeholders.

        A document is a list of segments, `{"type": "text" | "image" | "audio", ...}`; one document or a list of them.
        It starts with bos and ends with eos unless `add_eos` is False or `continue_with` ("text", "image", "audio")
        names what the model is to go on with. Text inside segments never becomes control tokens.

        `text=` is a prompt as elsewhere in transformers: special tokens in it are obeyed (chat templates write them),
        and each `<|image|>` or `<|audio|>` stands for the next of `images=` or `audio=`. Give text from strangers as
        documents, or through `apply_chat_template`.

        `padding`, `padding_side`, `max_length`, `truncation`, `return_tensors` ("pt", "np" or None) are the
        tokenizer's; documents are never truncated: one longer than `max_length` is an error.
        """
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        if documents is None:
            if add_eos is not None or continue_with is not None:
                raise ValueError("add_eos and continue_with go with documents=; in text= write the special tokens")
            return self.encode_prompts(text, images, audio, merged)
        if text is not None or images is not None or audio is not None:
            raise ValueError("give either documents= or text= with images= and audio=, not both")
        is_single = len(documents) > 0 and isinstance(documents[0], dict)
        rows = self.encode_documents([documents] if is_single else documents, add_eos, continue_with)
        return self.pad_rows(rows, merged["text_kwargs"], is_single)

    def encode_documents(
        self, documents: list[list[dict]], add_eos: bool | None = None, continue_with: str | None = None
    ) -> list[list[int]]:
        """Token ids of each document, pictures of all documents encoded in batches."""
        if not isinstance(documents, (list, tuple)) or not documents:
            raise ValueError("documents= must be a document (a list of segments) or a non-empty list of documents")
        openings = {None: [], "text": [], "image": ["boi"], "audio": ["begin_of_speech"]}
        if continue_with not in openings:
            raise ValueError(f"continue_with={continue_with!r} is not one of text, image, audio")
        if continue_with is not None and add_eos:
            raise ValueError(f"add_eos=True ends the document, so it cannot continue with {continue_with!r}")
        ending = [self.token_id(name) for name in openings[continue_with]]
        if continue_with is None and add_eos is not False:
            ending = [self.tokenizer.eos_token_id]

        for document in documents:
            check_document(document, may_be_empty=continue_with is not None)
        flat = [segment for document in documents for segment in document]
        pictures = iter(self.encode_images([s["image"] for s in flat if s["type"] == "image"]))
        encode = {"text": self.encode_segment, "audio": self.encode_segment, "image": lambda _: next(pictures)}
        rows = []
        for document in documents:
            ids = [self.tokenizer.bos_token_id]
            for segment in document:
                ids += encode[segment["type"]](segment)
            rows.append(ids + ending)
        return rows

    def encode_segment(self, segment: dict) -> list[int]:
        """Token ids of one segment, begin and end markers included."""
        check_document([segment])
        if segment["type"] == "image":
            return self.encode_images([segment["image"]])[0]
        if segment["type"] == "audio":
            return self.encode_audio([segment["audio"]], segment.get("sampling_rate"))[0]
        return self.encode_text(segment["text"])

    def encode_text(self, text: str) -> list[int]:
        """Plain text: whatever looks like a special token is spelled out instead."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode_images(self, images: list[Any]) -> list[list[int]]:
        """boi, the codes row by row, eoi for every picture."""
        if not images:
            return []
        first = self.first_code("image", self.image_tokenizer)
        boi, eoi = self.token_id("boi"), self.token_id("eoi")
        return [[boi, *(grid.flatten() + first).tolist(), eoi] for grid in self.image_tokenizer.encode(images)]

    def encode_audio(self, audio: list[Any], sampling_rate: int | None = None) -> list[list[int]]:
        """Begin of speech, the units, end of speech for every sound."""
        if not audio:
            return []
        first = self.first_code("speech", self.speech_tokenizer)
        begin, end = self.token_id("begin_of_speech"), self.token_id("end_of_speech")
        return [[begin, *(units + first).tolist(), end] for units in self.speech_tokenizer.encode(audio, sampling_rate)]

    def first_code(self, modality: str, sub_tokenizer: Any) -> int:
        if sub_tokenizer is None:
            raise ValueError(
                f"this processor has no {modality} tokenizer; build MoTProcessor(..., {modality}_tokenizer=...)"
            )
        return self.modality_token_ranges[modality][0]

    def token_id(self, name: str) -> int:
        return getattr(self.tokenizer, f"{name}_token_id")

    def encode_prompts(self, text: Any, images: Any, audio: Any, merged: dict[str, dict]) -> BatchFeature:
        """The ecosystem's way: placeholders in text become the tokens of the given pictures and sounds."""
        pictures, sounds = flatten(images), flatten_audio(audio)
        if text is None and not pictures and not sounds:
            raise ValueError("there is nothing to process: give documents=, text=, images= or audio=")
        if text is None:
            text = self.image_token * len(pictures) + self.audio_token * len(sounds)
        prompts = [text] if isinstance(text, str) else text
        self.check_placeholders(prompts, pictures, sounds)
        text_kwargs = dict(merged["text_kwargs"])
        with_offsets = text_kwargs.pop("return_text_replacement_offsets", merged.get("return_text_replacement_offsets"))
        with_types = text_kwargs.pop("return_mm_token_type_ids", merged.get("return_mm_token_type_ids"))
        sampling_rate = merged["audio_kwargs"].get("sampling_rate")
        prompts, offsets = self.get_text_with_replacements(
            list(prompts),
            images_replacements=[self.spelled(ids) for ids in self.encode_images(pictures)],
            audio_replacements=[self.spelled(ids) for ids in self.encode_audio(sounds, sampling_rate)],
        )
        return_tensors = text_kwargs.pop("return_tensors", None)
        is_single = isinstance(text, str) and return_tensors is None and not (pictures or sounds)
        encoded = dict(self.tokenizer(prompts, **text_kwargs))
        encoded.pop("token_type_ids", None)
        self._check_special_mm_tokens(prompts, encoded, modalities=["image", "audio"])
        encoded["modality_ids"] = self.modality_ids_of(encoded["input_ids"])
        if with_types:
            encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
        if with_offsets:
            encoded["text_replacement_offsets"] = offsets
        if is_single:
            encoded = {name: values[0] for name, values in encoded.items()}
        return BatchFeature(encoded, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def check_placeholders(self, prompts: Any, pictures: list, sounds: list) -> None:
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"text= must be a string or a non-empty list of strings, not {prompts!r}")
        # A placeholder that a chat's author wrote (marked as such by apply_chat_template) is text.
        own = [_MARKED_RE.sub("", prompt) for prompt in prompts]
        for name, token, given in (("images", self.image_token, pictures), ("audio inputs", self.audio_token, sounds)):
            count = sum(prompt.count(token) for prompt in own)
            if count != len(given):
                raise ValueError(
                    f"the number of {token} tokens in the prompts should be the same as the number of {name} passed; "
                    f"there are {count} and {len(given)}"
                )

    def spelled(self, ids: list[int]) -> str:
        """Tokens as the text that the tokenizer reads them back from."""
        return "".join(self.tokenizer.convert_ids_to_tokens(ids))

    def pad_rows(self, rows: list[list[int]], text_kwargs: dict, is_single: bool) -> BatchFeature:
        return_tensors, max_length = text_kwargs.get("return_tensors"), text_kwargs.get("max_length")
        if max_length is not None and max(map(len, rows)) > max_length:
            raise ValueError(
                f"a document has {max(map(len, rows))} tokens, more than max_length={max_length}; documents are not "
                "truncated, since a cut picture or sound is not a document: shorten it or raise max_length"
            )
        names = ("padding", "max_length", "pad_to_multiple_of", "padding_side")
        options = {name: text_kwargs[name] for name in names if text_kwargs.get(name) is not None}
        batch = self.tokenizer.pad({"input_ids": rows}, **{"padding": False, **options}, return_attention_mask=True)
        batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        batch["modality_ids"] = self.modality_ids_of(batch["input_ids"])
        if is_single and return_tensors is None:
            batch = {name: values[0] for name, values in batch.items()}
        try:
            return BatchFeature(batch, tensor_type=return_tensors)
        except ValueError as error:
            raise ValueError(f"documents of different lengths make no tensor; pass padding=True ({error})") from None

    def apply_chat_template(self, conversation, chat_template=None, tools=None, documents=None, **kwargs):
        """As in transformers; with our own template, what users write never becomes control tokens or placeholders."""
        if kwargs.get("sanitize_control_tokens") is None:
            ours = chat_template is None and self.chat_template == CHAT_TEMPLATE
            masked = kwargs.get("return_assistant_tokens_mask", False)  # transformers cannot do both
            kwargs["sanitize_control_tokens"] = bool(ours and kwargs.get("tokenize") and not masked)
        return super().apply_chat_template(conversation, chat_template, tools, documents, **kwargs)

    def _multimodal_inputs_from_conversations(self, conversations, audio_loading_params, load_audio_from_video=False):
        """Pictures and sounds of conversations, in order; decoding is left to the sub-tokenizers."""
        images, sounds = [], []
        for conversation in conversations:
            blocks = [b for m in conversation if isinstance(m.get("content"), (list, tuple)) for b in m["content"]]
            found = {"image": [], "audio": []}
            for block in blocks:
                if block["type"] in found:
                    keys = (block["type"], "url", "path", "base64")
                    found[block["type"]] += [block[key] for key in keys if block.get(key) is not None][:1]
            images.append(found["image"])
            sounds += found["audio"]
        return images, [], sounds, {}

    # -- decoding -----------------------------------------------------------------------------------------------------

    def decode_document(self, ids: Any, image_grids: list | None = None, allow_incomplete: bool = False) -> list[dict]:
        """Segments of a sequence of token ids: text, PIL pictures, float32 waveforms; see `DocumentDecoder`."""
        return DocumentDecoder(self).decode(ids, image_grids, allow_incomplete)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens=True, generation_mode=None, **kwargs
    ):
        """Generated ids -> text ("text" or None), pictures ("image"), waveforms ("audio"), or segments ("document")."""
        rows = generated_outputs.tolist() if hasattr(generated_outputs, "tolist") else generated_outputs
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(rows, skip_special_tokens=skip_special_tokens, **kwargs)
        if generation_mode not in ("image", "audio", "document"):
            raise ValueError(f"generation_mode={generation_mode!r} is not one of text, image, audio, document")
        documents = [self.decode_document(row, allow_incomplete=True) for row in rows]
        if generation_mode == "document":
            return documents
        return [[s[generation_mode] for s in document if s["type"] == generation_mode] for document in documents]

    # -- saving and loading -------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        # Sub-tokenizers have their own folders, the template its own file: what is left is how to find this class.
        output = {"processor_class": type(self).__name__}
        if self._auto_class is not None:
            module = type(self).__module__.rsplit(".", 1)[-1]
            output["auto_map"] = {self._auto_class: f"{module}.{type(self).__name__}"}
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """One folder with everything, the code included; `push_to_hub` uploads it as a repository."""
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.save_pretrained(save_directory)
            return self.push_to_hub(repo_id, **kwargs)
        files = super().save_pretrained(save_directory, **kwargs)
        for name in SUB_TOKENIZERS:
            if getattr(self, name) is not None:
                getattr(self, name).save_pretrained(os.path.join(save_directory, name))
        return files

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        arguments = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        for name, (sub_class, config_name) in SUB_TOKENIZERS.items():
            if name in kwargs:
                arguments.append(kwargs[name])
                continue
            folder = "/".join(part for part in (kwargs.get("subfolder"), name) if part)
            arguments.append(load_if_present(sub_class, config_name, pretrained_model_name_or_path, folder, hub_kwargs))
        return arguments


MoTProcessor.register_for_auto_class("AutoProcessor")
