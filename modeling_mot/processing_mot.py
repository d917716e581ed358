"""Encode documents of text, pictures and sounds as one sequence of tokens, and decode them: `MoTProcessor`.

A *picture* is what a person sees: a file, a PIL picture, pixels. An *image* is the modality inside the model: tokens,
placeholders, latents. With an image tokenizer a picture becomes an image of codes of the vocabulary. With an image
processor it stays pixels, and an image is a placeholder for each patch. With an encoder processor too, a picture may
stand in a document in several *roles*, each with placeholders of its own: as latents and as an encoder's features.
"""

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from .checks_fields import Maybe, OneOf, Typed, check_fields
from .hub_push import PushWithoutCard
from .hub_trust import check_tokenizer_files, check_vocabulary, forget_code, reading
from .image_processing import IMAGE_PROCESSOR_CONFIG_NAME, MoTImageProcessor
from .image_tokenizer import IMAGE_TOKENIZER_CONFIG_NAME, MoTImageTokenizer
from .processing_documents import DocumentDecoder, token_rows
from .processing_prompts import (
    CHAT_TEMPLATE,
    PromptMixin,
    check_text_options,
    framed_chat_template,
    pad_documents,
)
from .processing_vocabulary import (
    FEATURES,
    OTHER_NAMES,
    ROLES,
    SEGMENT_TYPES,
    begin_token_id,
    check_text,
    checked_document,
    extend_tokenizer,
    modality_ids_of,
    modality_ranges,
    stretches,
)
from .speech_tokenizer import SPEECH_TOKENIZER_CONFIG_NAME, MoTSpeechTokenizer


# B sequences, L tokens of a sequence, N pictures of (H, W) pixels, S samples of a sound

CALL_RULES = {
    "allow_urls": Typed(bool),
    "allow_paths": Typed(bool),
    "continue_with": Maybe(OneOf((*SEGMENT_TYPES, *OTHER_NAMES))),
    "think": Typed(bool),
}
OUTPUT_RULES = {"generation_mode": OneOf((*SEGMENT_TYPES, *OTHER_NAMES, "document"))}
# The parts beside the tokenizer, in the order of the constructor's arguments. Each is saved in a folder of its name.
PARTS = {
    "image_tokenizer": (MoTImageTokenizer, IMAGE_TOKENIZER_CONFIG_NAME),
    "speech_tokenizer": (MoTSpeechTokenizer, SPEECH_TOKENIZER_CONFIG_NAME),
    "image_processor": (MoTImageProcessor, IMAGE_PROCESSOR_CONFIG_NAME),
    "encoder_processor": (MoTImageProcessor, IMAGE_PROCESSOR_CONFIG_NAME),
}
SETTINGS_RULES = {"frames_texts": Typed(bool), "thinking_prompts": Maybe(Typed(dict))}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")

__all__ = ["MoTProcessor", "extend_tokenizer"]


class Pictures(NamedTuple):
    """The pictures of documents as a model takes them, in order of appearance.

    Attributes:
        pixels: of each image of latents, (3, H, W) uint8.
        clean: of each of them, False where it is to be noised.
        seen: pixels for the encoder, (3, H, W) uint8.
    """

    pixels: list[np.ndarray]
    clean: list[bool]
    seen: list[np.ndarray]

    def stacked(self, tells_clean: bool = False) -> dict[str, np.ndarray]:
        """Stack them as arguments of a model; see `MoTImageProcessor.stack`.

        Args:
            tells_clean: say by `clean_images` (N,) which images are clean.
        """
        inputs = MoTImageProcessor.stack(self.pixels)
        inputs |= {f"encoder_{name}": values for name, values in MoTImageProcessor.stack(self.seen).items()}
        return inputs | ({"clean_images": np.array(self.clean)} if tells_clean and self.pixels else {})


class MoTProcessor(PushWithoutCard, PromptMixin, ProcessorMixin):
    """Text tokenizer, speech tokenizer, and image tokenizer or image processor behind one call.

    Everything is saved in one folder: the tokenizer's files at the top, the other parts in folders of their names.

    Args:
        tokenizer: a fast tokenizer with the special, image and speech tokens that `extend_tokenizer` adds.
        image_tokenizer: makes pictures codes of the vocabulary.
        speech_tokenizer: makes sounds units of the vocabulary.
        image_processor: in the place of `image_tokenizer`, keeps pictures pixels for a model that diffuses images; the
            vocabulary then holds no image codes.
        encoder_processor: beside `image_processor`, makes pixels for an encoder of what that one has fitted; the
            tokenizer then has a `vision_token`.
        chat_template: a template of Jinja instead of our own.
        frames_texts: each text stands between the begin and the end token, and documents have none of their own, as in
            BAGEL.
        thinking_prompts: "text" and "image" -> the text that asks for a thought before an answer of that kind.

    Attributes:
        modalities: names in the order of `modality_ids`.
        modality_token_ranges: [first, last + 1] of the token ids of each modality that has tokens of its own.

    Raises:
        ValueError: both an image tokenizer and an image processor, or parts that do not fit the vocabulary.

    Example, with a vocabulary of two words and pictures of 2 x 2 placeholders:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> from modeling_mot.image_processing import MoTImageProcessor
        >>> words = Tokenizer(models.WordLevel({"cat": 0, "dog": 1}, unk_token="cat"))
        >>> tokenizer = extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words))
        >>> processor = MoTProcessor(tokenizer, image_processor=MoTImageProcessor([32, 32], downsampling=16))
        >>> document = [{"type": "text", "text": "dog"}, {"type": "image", "image": np.zeros((50, 40, 3), np.uint8)}]
        >>> batch = processor(document, return_tensors="np")
        >>> tokenizer.decode(batch["input_ids"][0])
        '<|bos|> dog <|boi|> <|image|> <|image|> <|image|> <|image|> <|eoi|> <|eos|>'
        >>> batch["modality_ids"].tolist(), batch["pixel_values"].shape
        ([[0, 0, 0, 1, 1, 1, 1, 0, 0]], (1, 3, 32, 32))
    """

    def __init__(
        self,
        tokenizer,
        image_tokenizer=None,
        speech_tokenizer=None,
        image_processor=None,
        encoder_processor=None,
        chat_template=None,
        frames_texts=False,
        thinking_prompts=None,
    ):
        self.image_tokenizer = image_tokenizer
        self.speech_tokenizer = speech_tokenizer
        self.image_processor = image_processor
        self.encoder_processor = encoder_processor
        self.frames_texts = frames_texts
        self.thinking_prompts = thinking_prompts
        self.modality_token_ranges = modality_ranges(tokenizer)
        self._check_parts(tokenizer)

        # Transformers' names of the placeholders in prompts, and of the tokens that stand for pictures and sounds.
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        self.audio_token = getattr(tokenizer, "audio_token", None)
        self.audio_token_id = getattr(tokenizer, "audio_token_id", None)
        self.audio_token_ids = list(range(*self.modality_token_ranges.get("speech", [0, 0])))
        # Modality -> the token that stands for each patch of its pictures.
        self.placeholder_token_ids = {}
        if image_processor is None:
            self.modalities = list(self.modality_token_ranges)
            self.image_token_ids = list(range(*self.modality_token_ranges.get("image", [0, 0])))
        else:
            if encoder_processor is not None:
                self.placeholder_token_ids[FEATURES] = tokenizer.vision_token_id
            self.placeholder_token_ids["image"] = self.image_token_id
            self.modalities = ["text", *self.placeholder_token_ids, *list(self.modality_token_ranges)[1:]]
            self.image_token_ids = list(self.placeholder_token_ids.values())
        if chat_template is None:
            chat_template = framed_chat_template(tokenizer) if frames_texts else CHAT_TEMPLATE
        super().__init__(tokenizer, chat_template=chat_template)

    def _check_parts(self, tokenizer) -> None:
        """Raise ValueError for parts that exclude each other or do not fit the vocabulary."""
        # Settings.
        check_fields(self, SETTINGS_RULES)
        for mode, prompt in (self.thinking_prompts or {}).items():
            if mode not in ("text", "image") or not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(
                    f"thinking_prompts[{mode!r}]={prompt!r} must be a text, under the name 'text' or 'image' of what "
                    "is thought about"
                )
        for name in ("bos_token", "eos_token") if self.frames_texts else ():
            if getattr(tokenizer, name) is None:
                raise ValueError(f"frames_texts=True needs a tokenizer with a {name}, which stands around texts")
        if self.encoder_processor is not None and (
            self.image_processor is None or getattr(tokenizer, "vision_token", None) is None
        ):
            raise ValueError(
                "encoder_processor= needs image_processor=, which fits pictures before it, and a tokenizer with a "
                "vision_token, the placeholder of what the encoder sees"
            )

        # Pictures are codes or pixels.
        has_codes = self.image_tokenizer is not None or "image" in self.modality_token_ranges
        if self.image_processor is not None and has_codes:
            raise ValueError(
                "pictures are either codes (image_tokenizer=) or pixels (image_processor=); for pixels leave the image "
                "tokenizer out and build the tokenizer with extend_tokenizer(tokenizer, num_image_codes=0), or take "
                "processing_vocabulary.without_codes(tokenizer)"
            )

        # The vocabulary has one token for each code and unit.
        for modality, part, size in (
            ("image", self.image_tokenizer, getattr(self.image_tokenizer, "num_codes", 0)),
            ("speech", self.speech_tokenizer, getattr(self.speech_tokenizer, "num_units", 0)),
        ):
            first, last = self.modality_token_ranges.get(modality, [0, 0])
            if part is not None and last - first != size:
                raise ValueError(
                    f"the tokenizer holds {last - first} {modality} tokens but the {modality} tokenizer has {size} "
                    "codes; build it with extend_tokenizer(tokenizer, num_image_codes, num_speech_units)"
                )

    # --------------------------------------------------------------------------------------------------- the vocabulary

    @classmethod
    def get_attributes(cls) -> list[str]:
        # The other parts are no classes of transformers; `save_pretrained` below saves them.
        return ["tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        """The model's inputs, without `image_sizes`, which comes only with pictures that differ in size."""
        names = ["input_ids", "attention_mask", "modality_ids"]
        names += [] if self.image_processor is None else ["pixel_values"]
        return names + ([] if self.encoder_processor is None else ["encoder_pixel_values"])

    @property
    def bos_token_id(self) -> int | None:
        """The token that documents and the tokenizer's texts begin with; None if texts begin with none."""
        return begin_token_id(self.tokenizer)

    def config_kwargs(self) -> dict[str, Any]:
        """Return the arguments of a model's configuration that follow from the processor.

        They are those of `MoTConfig`, or with an image processor of `MoTTransfusionConfig`. `modality_token_ranges` are
        then the ranges of text and speech, or None where text is alone. A model of more rows takes their number as
        `vocab_size`, and the processor's as `tokenizer_vocab_size`.

        Raises:
            ValueError: tokens were added to the tokenizer behind those of all modalities.

        Example, from the root of the repository, which carries a processor:
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> arguments = processor.config_kwargs()
            >>> arguments["vocab_size"], arguments["modalities"], arguments["image_grid"]
            (5620, ['text', 'image', 'speech'], [8, 8])
        """
        # Every token must have a modality.
        tokenizer = self.tokenizer
        size = max(last for _, last in self.modality_token_ranges.values())
        if len(tokenizer) > size:
            raise ValueError(
                f"{len(tokenizer) - size} tokens were added after the image and speech tokens, so they belong to no "
                "modality; add them to the text tokenizer before extend_tokenizer"
            )

        # Fields that every model has, and those of images of codes or of pixels.
        kwargs = {
            "vocab_size": size,
            "modalities": self.modalities,
            "modality_token_ranges": copy.deepcopy(self.modality_token_ranges),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "boi_token_id": tokenizer.boi_token_id,
            "eoi_token_id": tokenizer.eoi_token_id,
            "begin_of_speech_token_id": getattr(tokenizer, "begin_of_speech_token_id", None),
            "end_of_speech_token_id": getattr(tokenizer, "end_of_speech_token_id", None),
        }
        if self.image_tokenizer is not None:
            kwargs["image_grid"] = self.image_tokenizer.image_grid
        if self.image_processor is not None:
            kwargs["image_token_id"] = self.image_token_id
            if len(self.modality_token_ranges) == 1:
                kwargs["modality_token_ranges"] = None
        return kwargs

    def modality_ids_of(self, input_ids: Any) -> Any:
        """Return the index of each token's modality in `modalities`, in the form (list, array, tensor) of `input_ids`.

        Example, from the root of the repository:
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> processor.modality_ids_of([processor.token_id("boi"), *processor.image_token_ids[:2]])
            [0, 1, 1]
        """
        firsts, names = stretches(self.modality_token_ranges)
        indices = [self.modalities.index(name) for name in names]
        placeholders = {token: self.modalities.index(name) for name, token in self.placeholder_token_ids.items()}
        return modality_ids_of(input_ids, firsts, indices, placeholders)

    def fingerprint(self) -> str:
        """Return the sha256 of all that changes tokens: the tokenizer, and settings and weights of the other parts."""
        # The vocabulary, without padding and truncation, which are left over from the last call.
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        backend = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
        digest = hashlib.sha256(json.dumps(backend, sort_keys=True).encode())
        digest.update(json.dumps(self.config_kwargs(), sort_keys=True).encode())

        # The other parts. An image processor came later: processors without one keep their fingerprints.
        for sub_tokenizer in (self.image_tokenizer, self.speech_tokenizer):
            digest.update(b"none" if sub_tokenizer is None else sub_tokenizer.fingerprint().encode())
        for part in (self.image_processor, self.encoder_processor):
            if part is not None:
                digest.update(part.fingerprint().encode())
        if self.frames_texts:
            digest.update(b"framed")
        return digest.hexdigest()

    # --------------------------------------------------------------------------------------------------------- encoding

    def __call__(
        self,
        documents: list[dict] | list[list[dict]] | None = None,
        images: Any = None,
        text: str | list[str] | None = None,
        audio: Any = None,
        add_eos: bool | None = None,
        continue_with: str | None = None,
        think: bool = False,
        allow_urls: bool = False,
        allow_paths: bool = True,
        **kwargs,
    ) -> BatchFeature:
        """Encode documents, or prompts with placeholders, as tokens.

        Pictures and sounds come in any form that `load_picture` and `load_sound` take.

        Args:
            documents: one document or a list of them. A document is a list of segments, `{"type": "text" | "image" |
                "audio", ...}` with the content under the name of its type; "speech" is "audio". It begins with
                `bos_token_id` and ends with the end token. Text inside segments never becomes control tokens. With an
                encoder processor a picture may have `"roles"`, a list of "noised", "latents" and "features"; see
                `roles_of` for the default.
            text, images, audio: a prompt as elsewhere in transformers. Special tokens in the text are obeyed (chat
                templates write them), and each `<|image|>` or `<|audio|>` stands for the next of `images` or `audio`. A
                text that begins with the begin token, as rendered chats do, gets no second one. Give text from
                strangers as documents, or through `apply_chat_template`.
            add_eos: False leaves the end token of documents out.
            continue_with: "text", "image" or "audio" ("speech" is the same): how the model is to continue the
                documents. They then end with the begin token of an image or sound, or with nothing for text (its begin
                token, if the processor frames texts). With an encoder processor it goes with `text` too.
            think: True to begin documents with the text of `thinking_prompts` that goes with `continue_with`. The
                thought comes first: a document to be continued with an image ends as one to be continued with text.
            allow_urls: True to fetch addresses.
            allow_paths: True to open local files. False is right for content that strangers send.
            kwargs: `padding`, `padding_side`, `max_length`, `truncation`, `return_tensors` ("pt", "np" or None) are the
                tokenizer's. But an image or sound of tokens that does not fit is left out whole, and documents are
                never truncated: one longer than `max_length` is an error.

        Returns:
            `input_ids`, `attention_mask` and `modality_ids`, (B, L). With an image processor and pictures also, in
            order of appearance, `pixel_values` (N, 3, H, W) float32 in [-1, 1] and, where they differ in size,
            `image_sizes` (N, 2); see `MoTImageProcessor.stack`. With an encoder processor also `encoder_pixel_values`
            and `encoder_image_sizes`; and without `continue_with`, as in training, `clean_images` (N,).

        Raises:
            ValueError: an argument, segment, picture or sound that cannot be used, by name.

        Example, from the root of the repository:
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> prompts = [[{"type": "text", "text": name}] for name in ("rocket", "red apple")]
            >>> batch = processor(prompts, continue_with="image", padding=True, return_tensors="pt")
            >>> batch["input_ids"].shape, batch["input_ids"][1, -1].item() == processor.token_id("boi")
            (torch.Size([2, 5]), True)
        """
        access = {"allow_urls": allow_urls, "allow_paths": allow_paths}
        check_fields(access | {"continue_with": continue_with, "think": think}, CALL_RULES)
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        check_text_options(merged["text_kwargs"])

        # Text with placeholders, or documents.
        if documents is None:
            if add_eos is not None or think or (continue_with is not None and self.encoder_processor is None):
                raise ValueError(
                    "add_eos, think and continue_with go with documents=; in text= write the special tokens"
                )
            return self.encode_prompts(text, images, audio, merged, continue_with, **access)
        if text is not None or images is not None or audio is not None:
            raise ValueError("give either documents= or text= with images= and audio=, not both")

        # One document is a batch of one.
        is_single = isinstance(documents, (list, tuple)) and len(documents) > 0 and isinstance(documents[0], dict)
        documents = [documents] if is_single else documents
        rows, pictures = self.encode_documents(documents, add_eos, continue_with, think, **access)
        inputs = pictures.stacked(tells_clean=self.encoder_processor is not None and continue_with is None)
        return self.pad_rows(rows, inputs, merged["text_kwargs"], is_single)

    def encode_documents(
        self,
        documents: list[list[dict]],
        add_eos: bool | None = None,
        continue_with: str | None = None,
        think: bool = False,
        **access: bool,
    ) -> tuple[list[list[int]], Pictures]:
        """Encode each document as token ids and, with an image processor, return the pixels of all pictures too.

        Args:
            documents: a list of documents; it and the other arguments are those of `__call__`.
            access: `allow_urls` and `allow_paths` of `__call__`, here and in the other methods.

        Returns:
            The rows of ids, and the pictures that go with them.

        Example, from the root of the repository:
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> rows, _ = processor.encode_documents([[{"type": "text", "text": "rocket"}]])
            >>> processor.tokenizer.decode(rows[0])
            '<|bos|>rocket<|eos|>'
        """
        if not isinstance(documents, (list, tuple)) or not documents:
            raise ValueError("documents= must be a document (a list of segments) or a non-empty list of documents")
        check_fields({"continue_with": continue_with}, CALL_RULES)
        if continue_with is not None and add_eos:
            raise ValueError(f"add_eos=True ends the document, so it cannot continue with {continue_with!r}")

        # The tokens that every document begins and ends with.
        mode = OTHER_NAMES.get(continue_with, continue_with)
        openings = {None: [], "text": ["bos"] * self.frames_texts, "image": ["boi"], "audio": ["begin_of_speech"]}
        ending = [self.token_id(name) for name in openings["text" if think else mode]]
        if continue_with is None and add_eos is not False and not self.frames_texts:
            ending = [self.tokenizer.eos_token_id]
        beginning = [] if self.bos_token_id is None else [self.bos_token_id]

        # All pictures at once, since the image tokenizer takes them in batches.
        checked = [checked_document(document, may_be_empty=continue_with is not None) for document in documents]
        if think:
            checked = [[self.thinking_prompt(mode), *document] for document in checked]
        pictures = [s["image"] for document in checked for s in document if s["type"] == "image"]
        roles = [roles for document in checked for roles in self.roles_of(document, mode)]
        spans, inputs = self.encode_copies(pictures, roles, **access)
        images = iter(spans)

        # Texts, images and sounds in the order of the document.
        rows = []
        for document in checked:
            ids = list(beginning)
            for segment in document:
                ids += next(images) if segment["type"] == "image" else self.encode_segment(segment, **access)
            rows.append(ids + ending)
        return rows, inputs

    def thinking_prompt(self, mode: str | None) -> dict:
        """Return the segment that asks for a thought before an answer; ValueError if there is none."""
        prompt = (self.thinking_prompts or {}).get(mode)
        if prompt is None:
            raise ValueError(
                f"think=True with continue_with={mode!r}: this processor asks for thoughts before "
                f"{' and '.join(self.thinking_prompts or ()) or 'nothing'} (thinking_prompts)"
            )
        return {"type": "text", "text": prompt}

    def roles_of(self, document: list[dict], continue_with: str | None = None) -> list[tuple[str, ...]]:
        """Return the roles of each picture of a document, as its segment says or by the rule of the processor.

        Without an encoder processor pictures are latents: noised in training, clean in prompts. With one, the rule is
        BAGEL's. A picture of a prompt is latents and features where the answer is an image, else features. In training
        (`continue_with=None`) pictures before all text are a prompt for the last segment, and the others are learnt:
        such a picture is noised, and if something follows it also latents and features.

        Args:
            document: of `checked_document`.

        Raises:
            ValueError: roles that the processor does not have, or a prompt with a picture to be noised.
        """
        last = len(document) - 1
        ends_with_image = continue_with == "image" or continue_with is None and document[last]["type"] == "image"
        found, is_prompt = [], True
        for place, segment in enumerate(document):
            is_prompt &= segment["type"] == "image" or continue_with is not None
            if segment["type"] != "image":
                continue
            if (given := segment.get("roles")) is not None:
                self._check_roles(given, f"segment {place}", continue_with)
                roles = tuple(role for role in ROLES if role in given)
            elif self.encoder_processor is None:
                roles = ("noised",) if continue_with is None else ("latents",)
            elif is_prompt and (place < last or continue_with is not None):
                roles = ("latents", "features") if ends_with_image else ("features",)
            else:
                roles = ROLES if place < last else ("noised",)
            found.append(roles)
        return found

    def _check_roles(self, roles: list[str], where: str, continue_with: str | None) -> None:
        if self.image_processor is None or "features" in roles and self.encoder_processor is None:
            raise ValueError(
                f"{where} has roles={roles!r}, but this processor has no "
                f"{'image_processor' if self.image_processor is None else 'encoder_processor'}; leave the roles out"
            )
        if "noised" in roles and continue_with is not None:
            raise ValueError(
                f"{where} has roles={roles!r}, but a noised picture is learnt, and continue_with={continue_with!r} "
                "makes a prompt: give 'latents' or 'features'"
            )

    def encode_segment(self, segment: dict, **access: bool) -> list[int]:
        """Encode one segment as token ids, begin and end markers included.

        Example, from the root of the repository:
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> silence = np.zeros(16_000, np.float32)
            >>> ids = processor.encode_segment({"type": "speech", "speech": silence, "sampling_rate": 16_000})
            >>> len(ids)  # a second at 25 units a second, between two markers
            27
        """
        (segment,) = checked_document([segment])
        if segment["type"] == "image":
            return self.encode_images([segment["image"]], **access)[0]
        if segment["type"] == "audio":
            return self.encode_audio([segment["audio"]], segment.get("sampling_rate"), **access)[0]
        ids = self.encode_text(segment["text"])
        return [self.token_id("bos"), *ids, self.token_id("eos")] if self.frames_texts else ids

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text as token ids; a special token that is spelled in the text stays text.

        Example, from the root of the repository:
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> processor.token_id("boi") in processor.encode_text("<|boi|>")
            False
        """
        check_text(text)
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode_images(self, images: list[Any], **access: bool) -> list[list[int]]:
        """Encode each picture as the token ids of its image: boi, codes or placeholders row by row, eoi.

        Example, from the root of the repository:
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> ids = processor.encode_images([np.zeros((100, 80, 3), np.uint8)])[0]
            >>> len(ids), processor.image_tokenizer.image_grid
            (66, [8, 8])
        """
        return self.prepare_pictures(images, **access)[0]

    def prepare_pictures(self, pictures: list[Any], **access: bool) -> tuple[list[list[int]], list[np.ndarray]]:
        """Encode each picture as its image's token ids and, with an image processor, its pixels (3, H, W) uint8."""
        if self.image_processor is not None:
            pixels = self.image_processor.fit_pictures(pictures, **access)
            return [self.placeholder_ids(*picture.shape[1:]) for picture in pixels], pixels

        # Codes of the vocabulary; without pictures the image tokenizer is not needed.
        if not pictures:
            return [], []
        first = self.first_code("image", self.image_tokenizer)
        boi, eoi = self.token_id("boi"), self.token_id("eoi")
        grids = self.image_tokenizer.encode(pictures, **access)
        return [[boi, *(grid.flatten() + first).tolist(), eoi] for grid in grids], []

    # The name that `prepare_pictures` had before.
    encode_pictures = prepare_pictures

    def encode_copies(
        self, pictures: list[Any], roles: list[tuple[str, ...]], **access: bool
    ) -> tuple[list[list[int]], Pictures]:
        """Encode each picture as the token ids of all its copies, each between markers, in the order of its roles.

        What the encoder sees is made of what the image processor has fitted, as BAGEL does when it generates.

        Args:
            roles: of each picture, see `roles_of`.
        """
        spans, pixels = self.prepare_pictures(pictures, **access)
        if self.image_processor is None:
            return spans, Pictures([], [], [])
        made, rows = Pictures([], [], []), []
        for span, fitted, own in zip(spans, pixels, roles, strict=True):
            ids: list[int] = []
            for role in own:
                if role == "features":
                    picture = Image.fromarray(np.moveaxis(fitted, 0, -1))
                    (seen,) = self.encoder_processor.fit_pictures([picture])
                    made.seen.append(seen)
                    ids += self.features_ids(*seen.shape[1:])
                else:
                    made.pixels.append(fitted)
                    made.clean.append(role == "latents")
                    ids += span
            rows.append(ids)
        return rows, made

    def placeholder_ids(self, height: int, width: int) -> list[int]:
        """Return the image of a picture of height x width pixels: boi, a placeholder for each patch, eoi."""
        rows, columns = self.image_processor.grid(height, width)
        return [self.token_id("boi"), *[self.image_token_id] * (rows * columns), self.token_id("eoi")]

    def features_ids(self, height: int, width: int) -> list[int]:
        """Return a picture of height x width pixels as the encoder sees it: boi, a placeholder for each patch, eoi."""
        rows, columns = self.encoder_processor.grid(height, width)
        placeholder = self.placeholder_token_ids[FEATURES]
        return [self.token_id("boi"), *[placeholder] * (rows * columns), self.token_id("eoi")]

    def encode_audio(
        self, audio: list[Any], sampling_rate: int | None = None, deduplicate: bool | None = None, **access: bool
    ) -> list[list[int]]:
        """Encode each sound as token ids: begin of speech, the units, end of speech.

        Args:
            audio: sounds in any form that `load_sound` takes.
            sampling_rate: in Hz, of arrays that come without their own.
            deduplicate: make runs of one unit a single one; None: as the speech tokenizer is configured.

        Example, from the root of the repository:
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> ids = processor.encode_audio([np.zeros(16_000, np.float32)], sampling_rate=16_000)[0]
            >>> len(ids)  # 25 units a second, between two markers
            27
        """
        if not audio:
            return []
        first = self.first_code("speech", self.speech_tokenizer)
        begin, end = self.token_id("begin_of_speech"), self.token_id("end_of_speech")
        sounds = self.speech_tokenizer.encode(audio, sampling_rate, deduplicate, **access)
        return [[begin, *(units + first).tolist(), end] for units in sounds]

    def first_code(self, modality: str, sub_tokenizer: Any) -> int:
        """Return the token id of code 0 of a modality; ValueError if the processor cannot make its codes."""
        if sub_tokenizer is None:
            or_pixels = " or MoTProcessor(..., image_processor=...)" if modality == "image" else ""
            raise ValueError(
                f"this processor has no {modality} tokenizer; build MoTProcessor(..., {modality}_tokenizer=...)"
                f"{or_pixels}"
            )
        return self.modality_token_ranges[modality][0]

    def token_id(self, name: str) -> int:
        """Return the id of a special token: "boi", "eoi", "begin_of_speech", "pad" and so on."""
        return getattr(self.tokenizer, f"{name}_token_id")

    def pad_rows(
        self, rows: list[list[int]], inputs: dict[str, np.ndarray], text_kwargs: dict, is_single: bool
    ) -> BatchFeature:
        """Pad encoded documents to a batch; a single document has no axis of documents unless it is a tensor."""
        # The ids and what goes with them.
        return_tensors = text_kwargs.get("return_tensors")
        batch = pad_documents(self.tokenizer, rows, text_kwargs)
        batch["modality_ids"] = self.modality_ids_of(batch["input_ids"])
        if is_single and return_tensors is None:
            batch = {name: values[0] for name, values in batch.items()}
        batch |= inputs

        # Rows of different lengths stay lists, or fail here.
        try:
            return BatchFeature(batch, tensor_type=return_tensors)
        except ValueError as error:
            raise ValueError(f"documents of different lengths make no tensor; pass padding=True ({error})") from None

    # --------------------------------------------------------------------------------------------------------- decoding

    def decode_document(
        self, ids: Any, images: list | None = None, image_grids: list | None = None, allow_incomplete: bool = False
    ) -> list[dict]:
        """Decode one sequence of token ids to segments: text, PIL pictures, float32 samples; see `DocumentDecoder`.

        Args:
            ids: (L,) or (1, L), a list, array or tensor.
            images: with an image processor the pictures of the document in order, such as `generate()` returns.
            image_grids: (rows, columns) of each image of codes, where they are not those of the image tokenizer.
            allow_incomplete: decode images and sounds that are cut off as far as they go.

        Raises:
            ValueError: ids that are no document, or pictures that do not fit it.

        Example, from the root of the repository:
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> ids = processor([{"type": "text", "text": "rocket"}])["input_ids"]
            >>> processor.decode_document(ids)
            [{'type': 'text', 'text': 'rocket'}]
        """
        return DocumentDecoder(self).decode(ids, images, image_grids, allow_incomplete)

    def decode(self, token_ids: Any, *args, **kwargs) -> str | list[str]:
        """Decode one sequence of token ids, or several, as text, as the tokenizer does.

        Raises:
            ValueError: ids that stand for no token; the tokenizer would leave them out.
        """
        return super().decode(token_rows(token_ids, len(self.tokenizer), "token_ids"), *args, **kwargs)

    def batch_decode(self, sequences: Any, *args, **kwargs) -> list[str]:
        """Decode several sequences of token ids as text; see `decode`."""
        return super().batch_decode(token_rows(sequences, len(self.tokenizer), "sequences"), *args, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs):
        """Decode generated ids as text; see `decode`."""
        rows = token_rows(generated_outputs, len(self.tokenizer))
        return super().post_process_image_text_to_text(rows, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens=True, generation_mode=None, **kwargs
    ):
        """Decode generated ids to the content of one type, for each sequence.

        Args:
            generated_outputs: ids (B, L) or, where images are diffused, what `generate()` returned: an output with
                `sequences` and with `images`, a list of pictures for each sequence.
            generation_mode: "text" (or None) for texts, "image" for pictures, "audio" ("speech" is the same) for
                samples, "document" for segments.

        Example, from the root of the repository:
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> ids = processor([[{"type": "text", "text": "rocket"}]])["input_ids"]
            >>> processor.post_process_multimodal_output(ids)
            ['rocket']
        """
        # Texts alone are the tokenizer's to decode.
        images = getattr(generated_outputs, "images", None)
        sequences = getattr(generated_outputs, "sequences", generated_outputs)
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(sequences, skip_special_tokens=skip_special_tokens, **kwargs)
        rows = token_rows(sequences, len(self.tokenizer))
        check_fields({"generation_mode": generation_mode}, OUTPUT_RULES)
        kind = OTHER_NAMES.get(generation_mode, generation_mode)

        # Sequences may be cut off, or begin in the midst of a document.
        images = images if images is not None and self.image_processor is not None else [None] * len(rows)
        documents = [self.decode_document(row, own, allow_incomplete=True) for row, own in zip(rows, images)]
        if kind == "document":
            return documents
        return [[segment[kind] for segment in document if segment["type"] == kind] for document in documents]

    # ----------------------------------------------------------------------------------------------- saving and loading

    def to_dict(self) -> dict[str, Any]:
        """Return how transformers finds this class; the parts have their own folders, the template its own file."""
        output = {"processor_class": type(self).__name__}
        settings = {name: getattr(self, name) for name in SETTINGS_RULES}
        output |= {name: value for name, value in settings.items() if value}
        if self._auto_class is not None:
            module = type(self).__module__.rsplit(".", 1)[-1]
            output["auto_map"] = {self._auto_class: f"{module}.{type(self).__name__}"}
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Write everything to one folder, the code included; `push_to_hub` uploads it as a repository.

        Example, from the root of the repository:
            >>> from tempfile import TemporaryDirectory
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> with TemporaryDirectory() as folder:
            ...     files = processor.save_pretrained(folder)
            ...     MoTProcessor.from_pretrained(folder).fingerprint() == processor.fingerprint()
            True
        """
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.save_pretrained(save_directory)
            return self.push_to_hub(repo_id, **kwargs)

        # Padding and truncation are left over from the last call; saved, they would become settings of every call.
        forget_code(self.tokenizer)
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        files = super().save_pretrained(save_directory, **kwargs)
        for name in PARTS:
            if getattr(self, name) is not None:
                getattr(self, name).save_pretrained(os.path.join(save_directory, name))
        return files

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The tokenizer, whose settings may come from a stranger.
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        check_tokenizer_files(pretrained_model_name_or_path, subfolder=kwargs.get("subfolder") or "", **hub_kwargs)
        with reading(
            f"the tokenizer of {pretrained_model_name_or_path} cannot be read: tokenizer.json or its settings"
        ):
            arguments = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        check_vocabulary(arguments[0], pretrained_model_name_or_path)

        # The other parts: as the caller gives them, or from their folders, where there is one.
        for name in PARTS:
            if name in kwargs:
                arguments.append(kwargs[name])
            else:
                folder = "/".join(part for part in (kwargs.get("subfolder"), name) if part)
                arguments.append(_part_of(pretrained_model_name_or_path, name, folder, hub_kwargs))
        return arguments


def _part_of(name_or_path: str | os.PathLike, name: str, subfolder: str, hub_kwargs: dict) -> Any:
    """Load a part of a saved processor; None if the folder or repository has no such part."""
    part_class, config_name = PARTS[name]
    found = cached_file(
        str(name_or_path), config_name, subfolder=subfolder, _raise_exceptions_for_missing_entries=False, **hub_kwargs
    )
    return None if found is None else part_class.from_pretrained(name_or_path, subfolder=subfolder, **hub_kwargs)


MoTProcessor.register_for_auto_class("AutoProcessor")
