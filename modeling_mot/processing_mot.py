"""MoTProcessor: documents of text, pictures and sound to one sequence of tokens, and back.

The vocabulary is text (specials included), then image codes, then speech units, each a contiguous range; an imported
one may hold the codes in the midst of text. With an image processor in the place of the image tokenizer pictures stay
pixels, and a placeholder stands for each patch.
Shapes: B sequences, L tokens, N pictures of (H, W) pixels.
"""

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .checks_fields import Maybe, OneOf, Typed, check_fields
from .hub_push import PushWithoutCard
from .hub_trust import check_tokenizer_files, forget_code, reading
from .image_processing import IMAGE_PROCESSOR_CONFIG_NAME, MoTImageProcessor
from .image_tokenizer import IMAGE_TOKENIZER_CONFIG_NAME, MoTImageTokenizer
from .processing_documents import DocumentDecoder
from .processing_inputs import (
    SEGMENT_TYPES,
    check_conversation,
    check_document,
    check_placeholders,
    check_text,
    check_text_options,
    check_tokens,
    flatten,
    flatten_audio,
    is_extended,
    load_if_present,
    mark_added_tokens,
    media_of,
    tokenize_prompts,
)
from .processing_vocabulary import (
    CHAT_TEMPLATE,
    begin_token_id,
    extend_tokenizer,
    modality_ids_of,
    modality_ranges,
    stretches,
)
from .speech_tokenizer import SPEECH_TOKENIZER_CONFIG_NAME, MoTSpeechTokenizer


CALL_RULES = {
    "allow_urls": Typed(bool),
    "allow_paths": Typed(bool),
    "continue_with": Maybe(OneOf(SEGMENT_TYPES)),
}
# In the order of the constructor's arguments; each is saved in a folder of its own name.
PARTS = {
    "image_tokenizer": (MoTImageTokenizer, IMAGE_TOKENIZER_CONFIG_NAME),
    "speech_tokenizer": (MoTSpeechTokenizer, SPEECH_TOKENIZER_CONFIG_NAME),
    "image_processor": (MoTImageProcessor, IMAGE_PROCESSOR_CONFIG_NAME),
}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")

__all__ = ["MoTProcessor", "extend_tokenizer"]


class MoTProcessor(PushWithoutCard, ProcessorMixin):
    """Text tokenizer, speech-unit tokenizer, and VQ image tokenizer or image processor behind one call.

    `tokenizer` must hold the special, image and speech tokens: `extend_tokenizer` adds them to any fast tokenizer.
    Any other part may be None. With an `image_tokenizer` pictures are codes of the vocabulary; with an
    `image_processor` they are pixels for a model that diffuses them, and the vocabulary holds no image tokens. Everything
    is saved in one folder: text files at the top, the others in folders of their names.

    Attributes:
        modalities: names in the order of `modality_ids`.
        modality_token_ranges: [first, last + 1] of the token ids of each modality that has tokens of its own.
    """

    def __init__(
        self, tokenizer, image_tokenizer=None, speech_tokenizer=None, image_processor=None, chat_template=None
    ):
        self.image_tokenizer = image_tokenizer
        self.speech_tokenizer = speech_tokenizer
        self.image_processor = image_processor
        self.modality_token_ranges = modality_ranges(tokenizer)
        if image_processor is not None and (image_tokenizer is not None or "image" in self.modality_token_ranges):
            raise ValueError(
                "pictures are either codes (image_tokenizer=) or pixels (image_processor=); for pixels leave the image "
                "tokenizer out and build the tokenizer with extend_tokenizer(tokenizer, num_image_codes=0), or take "
                "processing_vocabulary.without_codes(tokenizer)"
            )
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
        if image_processor is not None:
            self.modalities = ["text", "image", *list(self.modality_token_ranges)[1:]]
            self.image_token_ids = [self.image_token_id]
        else:
            self.modalities = list(self.modality_token_ranges)
            self.image_token_ids = list(range(*self.modality_token_ranges.get("image", [0, 0])))
        self.audio_token_ids = list(range(*self.modality_token_ranges.get("speech", [0, 0])))
        super().__init__(tokenizer, chat_template=CHAT_TEMPLATE if chat_template is None else chat_template)

    # -- what the vocabulary is ---------------------------------------------------------------------------------------

    @classmethod
    def get_attributes(cls) -> list[str]:
        # The other parts are no classes of transformers; they are saved by us, in subfolders.
        return ["tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "modality_ids"]
        return names if self.image_processor is None else [*names, "pixel_values"]  # `image_sizes` where they differ

    @property
    def bos_token_id(self) -> int | None:
        """What documents begin with: what the tokenizer puts before a text. None where that is nothing."""
        return begin_token_id(self.tokenizer)

    def config_kwargs(self) -> dict[str, Any]:
        """Arguments of `MoTConfig`, or with an image processor of `MoTTransfusionConfig`, that follow from this one.

        With an image processor `modality_token_ranges` are those of text and speech, or None where text is alone.
        """
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
            "bos_token_id": self.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "boi_token_id": tokenizer.boi_token_id,
            "eoi_token_id": tokenizer.eoi_token_id,
            "begin_of_speech_token_id": tokenizer.begin_of_speech_token_id,
            "end_of_speech_token_id": tokenizer.end_of_speech_token_id,
        }
        if self.image_tokenizer is not None:
            kwargs["image_grid"] = self.image_tokenizer.image_grid
        if self.image_processor is not None:
            kwargs["image_token_id"] = self.image_token_id
            if len(self.modality_token_ranges) == 1:
                kwargs["modality_token_ranges"] = None
        return kwargs

    def modality_ids_of(self, input_ids: Any) -> Any:
        """Index of each token's modality, in the form (list, array, tensor) of `input_ids`."""
        firsts, names = stretches(self.modality_token_ranges)
        indices = [self.modalities.index(name) for name in names]
        placeholder = None if self.image_processor is None else (self.image_token_id, self.modalities.index("image"))
        return modality_ids_of(input_ids, firsts, indices, placeholder)

    def fingerprint(self) -> str:
        """sha256 over everything that changes tokens: tokenizer, configurations and weights."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are left over from the last call, not properties of the vocabulary.
        backend = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
        digest = hashlib.sha256(json.dumps(backend, sort_keys=True).encode())
        digest.update(json.dumps(self.config_kwargs(), sort_keys=True).encode())
        for sub_tokenizer in (self.image_tokenizer, self.speech_tokenizer):
            digest.update(b"none" if sub_tokenizer is None else sub_tokenizer.fingerprint().encode())
        if self.image_processor is not None:
            digest.update(self.image_processor.fingerprint().encode())
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
        allow_urls: bool = False,
        allow_paths: bool = True,
        **kwargs,
    ) -> BatchFeature:
        """`input_ids`, `modality_ids`, `attention_mask` of documents, or of text with placeholders.

        With an image processor also the pictures in order of appearance, where there are any: `pixel_values`
        (N, 3, H, W) float32 in [-1, 1] and, where they differ in size, `image_sizes` (N, 2), see
        `MoTImageProcessor.stack`.

        A document is a list of segments, `{"type": "text" | "image" | "audio", ...}`; one document or a list of them.
        It starts with `bos_token_id` and ends with eos unless `add_eos` is False or `continue_with` ("text", "image",
        "audio") names what the model is to go on with. Text inside segments never becomes control tokens.

        `text=` is a prompt as elsewhere in transformers: special tokens in it are obeyed (chat templates write them),
        and each `<|image|>` or `<|audio|>` stands for the next of `images=` or `audio=`. A text that begins with the
        begin token, as rendered chats do, gets no second one. Give text from strangers as documents, or through
        `apply_chat_template`.

        Pictures and sounds come in any form that `load_picture` and `load_sound` take. Addresses are fetched only with
        `allow_urls`; local files are not opened with `allow_paths=False`, which is right for what strangers send.

        `padding`, `padding_side`, `max_length`, `truncation`, `return_tensors` ("pt", "np" or None) are the
        tokenizer's; but a picture or sound of tokens that does not fit is left out whole, and documents are never
        truncated: one longer than `max_length` is an error.
        """
        access = {"allow_urls": allow_urls, "allow_paths": allow_paths}
        check_fields(access | {"continue_with": continue_with}, CALL_RULES)
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        check_text_options(merged["text_kwargs"])
        if documents is None:
            if add_eos is not None or continue_with is not None:
                raise ValueError("add_eos and continue_with go with documents=; in text= write the special tokens")
            return self.encode_prompts(text, images, audio, merged, **access)
        if text is not None or images is not None or audio is not None:
            raise ValueError("give either documents= or text= with images= and audio=, not both")
        is_single = isinstance(documents, (list, tuple)) and len(documents) > 0 and isinstance(documents[0], dict)
        rows, pixels = self.encode_documents([documents] if is_single else documents, add_eos, continue_with, **access)
        return self.pad_rows(rows, pixels, merged["text_kwargs"], is_single)

    def encode_documents(
        self,
        documents: list[list[dict]],
        add_eos: bool | None = None,
        continue_with: str | None = None,
        **access: bool,
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """Token ids of each document, and with an image processor the pixels of all pictures; see `encode_pictures`.

        `access` is `allow_urls` and `allow_paths` of `__call__`, here and in the other methods.
        """
        if not isinstance(documents, (list, tuple)) or not documents:
            raise ValueError("documents= must be a document (a list of segments) or a non-empty list of documents")
        openings = {None: [], "text": [], "image": ["boi"], "audio": ["begin_of_speech"]}
        check_fields({"continue_with": continue_with}, CALL_RULES)
        if continue_with is not None and add_eos:
            raise ValueError(f"add_eos=True ends the document, so it cannot continue with {continue_with!r}")
        ending = [self.token_id(name) for name in openings[continue_with]]
        if continue_with is None and add_eos is not False:
            ending = [self.tokenizer.eos_token_id]

        for document in documents:
            check_document(document, may_be_empty=continue_with is not None)
        flat = [segment for document in documents for segment in document]
        spans, pixels = self.encode_pictures([s["image"] for s in flat if s["type"] == "image"], **access)
        pictures = iter(spans)
        beginning = [] if self.bos_token_id is None else [self.bos_token_id]
        rows = []
        for document in documents:
            ids = list(beginning)
            for segment in document:
                ids += next(pictures) if segment["type"] == "image" else self.encode_segment(segment, **access)
            rows.append(ids + ending)
        return rows, pixels

    def encode_segment(self, segment: dict, **access: bool) -> list[int]:
        """Token ids of one segment, begin and end markers included."""
        check_document([segment])
        if segment["type"] == "image":
            return self.encode_images([segment["image"]], **access)[0]
        if segment["type"] == "audio":
            return self.encode_audio([segment["audio"]], segment.get("sampling_rate"), **access)[0]
        return self.encode_text(segment["text"])

    def encode_text(self, text: str) -> list[int]:
        """Plain text: whatever looks like a special token is spelled out instead."""
        check_text(text)
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode_pictures(self, images: list[Any], **access: bool) -> tuple[list[list[int]], list[np.ndarray]]:
        """Token ids of every picture and, with an image processor, its pixels (3, H, W) uint8."""
        if self.image_processor is None:
            return self.encode_images(images, **access), []
        pixels = self.image_processor.fit_pictures(images, **access)
        return [self.placeholder_ids(*picture.shape[1:]) for picture in pixels], pixels

    def placeholder_ids(self, height: int, width: int) -> list[int]:
        """boi, a placeholder for each patch, eoi of a picture of height x width pixels."""
        rows, columns = self.image_processor.grid(height, width)
        return [self.token_id("boi"), *[self.image_token_id] * (rows * columns), self.token_id("eoi")]

    def encode_images(self, images: list[Any], **access: bool) -> list[list[int]]:
        """boi, the codes (or, with an image processor, placeholders) row by row, eoi for every picture."""
        if self.image_processor is not None:
            return self.encode_pictures(images, **access)[0]
        if not images:
            return []
        first = self.first_code("image", self.image_tokenizer)
        boi, eoi = self.token_id("boi"), self.token_id("eoi")
        grids = self.image_tokenizer.encode(images, **access)
        return [[boi, *(grid.flatten() + first).tolist(), eoi] for grid in grids]

    def encode_audio(self, audio: list[Any], sampling_rate: int | None = None, **access: bool) -> list[list[int]]:
        """Begin of speech, the units, end of speech for every sound. `sampling_rate` is that of arrays without one."""
        if not audio:
            return []
        first = self.first_code("speech", self.speech_tokenizer)
        begin, end = self.token_id("begin_of_speech"), self.token_id("end_of_speech")
        sounds = self.speech_tokenizer.encode(audio, sampling_rate, **access)
        return [[begin, *(units + first).tolist(), end] for units in sounds]

    def first_code(self, modality: str, sub_tokenizer: Any) -> int:
        if sub_tokenizer is None:
            or_pixels = " or MoTProcessor(..., image_processor=...)" if modality == "image" else ""
            raise ValueError(
                f"this processor has no {modality} tokenizer; build MoTProcessor(..., {modality}_tokenizer=...)"
                f"{or_pixels}"
            )
        return self.modality_token_ranges[modality][0]

    def token_id(self, name: str) -> int:
        return getattr(self.tokenizer, f"{name}_token_id")

    def encode_prompts(
        self, text: Any, images: Any, audio: Any, merged: dict[str, dict], **access: bool
    ) -> BatchFeature:
        """The ecosystem's way: placeholders in text become the tokens of the given pictures and sounds."""
        pictures, sounds = flatten(images), flatten_audio(audio)
        if text is None and not pictures and not sounds:
            raise ValueError("there is nothing to process: give documents=, text=, images= or audio=")
        if text is None:
            text = self.image_token * len(pictures) + self.audio_token * len(sounds)
        prompts = [text] if isinstance(text, str) else text
        check_placeholders(prompts, self.image_token, pictures, self.audio_token, sounds)
        text_kwargs = dict(merged["text_kwargs"])
        with_offsets = text_kwargs.pop("return_text_replacement_offsets", merged.get("return_text_replacement_offsets"))
        with_types = text_kwargs.pop("return_mm_token_type_ids", merged.get("return_mm_token_type_ids"))
        sampling_rate = merged["audio_kwargs"].get("sampling_rate")
        spans, pixels = self.encode_pictures(pictures, **access)
        prompts, offsets = self.get_text_with_replacements(
            list(prompts),
            images_replacements=[self.spelled(ids) for ids in spans],
            audio_replacements=[self.spelled(ids) for ids in self.encode_audio(sounds, sampling_rate, **access)],
        )
        return_tensors = text_kwargs.pop("return_tensors", None)
        is_single = isinstance(text, str) and return_tensors is None and not (pictures or sounds)
        encoded = tokenize_prompts(self.tokenizer, prompts, self.bos_token_id, text_kwargs)
        encoded.pop("token_type_ids", None)
        self._check_special_mm_tokens(prompts, encoded, modalities=["image", "audio"])
        encoded["modality_ids"] = self.modality_ids_of(encoded["input_ids"])
        if with_types:
            encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
        if with_offsets:
            encoded["text_replacement_offsets"] = offsets
        if is_single:
            encoded = {name: values[0] for name, values in encoded.items()}
        encoded |= MoTImageProcessor.stack(pixels)
        return BatchFeature(encoded, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def spelled(self, ids: list[int]) -> str:
        """Tokens as the text that the tokenizer reads them back from."""
        return "".join(self.tokenizer.convert_ids_to_tokens(ids))

    def pad_rows(
        self, rows: list[list[int]], pixels: list[np.ndarray], text_kwargs: dict, is_single: bool
    ) -> BatchFeature:
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
        batch |= MoTImageProcessor.stack(pixels)
        try:
            return BatchFeature(batch, tensor_type=return_tensors)
        except ValueError as error:
            raise ValueError(f"documents of different lengths make no tensor; pass padding=True ({error})") from None

    def apply_chat_template(
        self, conversation, chat_template=None, tools=None, documents=None, processor_kwargs=None, **kwargs
    ):
        """As in transformers; with our own template, what users write never becomes control tokens or placeholders.

        With the template of the model that this one was made of, a chat of text alone has the ids that the tokenizer of
        that model gives it: the template writes all special tokens, and those that were added here are text to it.

        `allow_urls` and `allow_paths` are those of `__call__`. The rate of a sound given as an array is its block's
        `sampling_rate`, or else the `sampling_rate` of `processor_kwargs`.
        """
        access = {name: kwargs.pop(name) for name in ("allow_urls", "allow_paths") if name in kwargs}
        if access:
            processor_kwargs = (processor_kwargs or {}) | access
        check_conversation(conversation)
        if not isinstance(chat_template, (str, type(None))):
            raise ValueError(f"chat_template={chat_template!r} must be a template of Jinja, or the name of one")
        for name, values in (("tools", tools), ("documents", documents)):
            if not isinstance(values, (list, tuple, type(None))):
                raise ValueError(f"{name}={values!r} must be a list")
        masked = kwargs.get("return_assistant_tokens_mask", False)  # transformers cannot do both
        sanitizes = kwargs.get("tokenize") and not masked
        if kwargs.get("sanitize_control_tokens") is None:
            ours = chat_template is None and self.chat_template == CHAT_TEMPLATE
            kwargs["sanitize_control_tokens"] = bool(ours and sanitizes)
        if kwargs.get("tokenize") and is_extended(self._resolve_chat_template(chat_template)):
            processor_kwargs = {"add_special_tokens": False} | (processor_kwargs or {})
            marked = mark_added_tokens(self.tokenizer, conversation) if sanitizes else None
            if marked is not None and not kwargs["sanitize_control_tokens"]:
                conversation = marked
                processor_kwargs["sanitize_control_tokens"] = True
        return super().apply_chat_template(
            conversation, chat_template, tools, documents, processor_kwargs=processor_kwargs, **kwargs
        )

    def _resolve_audio_loading_params(self, processor_kwargs: dict) -> dict:
        # Not transformers' 16 kHz for whatever has no rate: sounds are read, and warned of, by our own reader.
        of_audio = processor_kwargs.get("audio_kwargs", {}).get("sampling_rate")
        return {"sampling_rate": processor_kwargs.get("sampling_rate", of_audio)}

    def _multimodal_inputs_from_conversations(self, conversations, audio_loading_params, load_audio_from_video=False):
        """Pictures and sounds of conversations, in order; decoding is left to the sub-tokenizers."""
        images, sounds = media_of(conversations)
        return images, [], sounds, {}

    # -- decoding -----------------------------------------------------------------------------------------------------

    def decode_document(
        self, ids: Any, images: list | None = None, image_grids: list | None = None, allow_incomplete: bool = False
    ) -> list[dict]:
        """Segments of a sequence of token ids: text, PIL pictures, float32 waveforms; see `DocumentDecoder`.

        With an image processor the pictures are `images`, in order, such as `generate()` returns for this sequence.
        """
        return DocumentDecoder(self).decode(ids, images, image_grids, allow_incomplete)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens=True, generation_mode=None, **kwargs
    ):
        """Generated ids -> text ("text" or None), pictures ("image"), waveforms ("audio"), or segments ("document").

        `generated_outputs` are ids (B, L) or, where pictures are no tokens, what `generate()` returned: an output with
        `sequences` and with `images`, a list of pictures for each sequence.
        """
        images = getattr(generated_outputs, "images", None)
        generated_outputs = getattr(generated_outputs, "sequences", generated_outputs)
        rows = generated_outputs.tolist() if hasattr(generated_outputs, "tolist") else generated_outputs
        if isinstance(rows, (list, tuple)):
            rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
        check_tokens("generated_outputs", rows)
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(rows, skip_special_tokens=skip_special_tokens, **kwargs)
        check_fields({"generation_mode": generation_mode}, {"generation_mode": OneOf((*SEGMENT_TYPES, "document"))})
        images = images if images is not None and self.image_processor is not None else [None] * len(rows)
        documents = [self.decode_document(row, own, allow_incomplete=True) for row, own in zip(rows, images)]
        if generation_mode == "document":
            return documents
        return [[s[generation_mode] for s in document if s["type"] == generation_mode] for document in documents]

    # -- saving and loading -------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        # The other parts have their own folders, the template its own file: what is left is how to find this class.
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
        forget_code(self.tokenizer)
        # Left over from the last call; saved, they would become settings of every call.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        files = super().save_pretrained(save_directory, **kwargs)
        for name in PARTS:
            if getattr(self, name) is not None:
                getattr(self, name).save_pretrained(os.path.join(save_directory, name))
        return files

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        check_tokenizer_files(pretrained_model_name_or_path, subfolder=kwargs.get("subfolder") or "", **hub_kwargs)
        with reading(
            f"the tokenizer of {pretrained_model_name_or_path} cannot be read: tokenizer.json or its settings"
        ):
            arguments = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        for name, (part_class, config_name) in PARTS.items():
            if name in kwargs:
                arguments.append(kwargs[name])
                continue
            folder = "/".join(part for part in (kwargs.get("subfolder"), name) if part)
            arguments.append(
                load_if_present(part_class, config_name, pretrained_model_name_or_path, folder, hub_kwargs)
            )
        return arguments


MoTProcessor.register_for_auto_class("AutoProcessor")
