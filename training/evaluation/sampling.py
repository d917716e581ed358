"""Ask a model for pictures, names, spoken words and texts: batches of `generate`, with the processor on both sides."""

import logging
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from modeling_mot import MoTPreTrainedModel, MoTProcessor
from modeling_mot.decoding_loop import pictures_of
from modeling_mot.latent_vae import encode_pixels
from training.data.documents import is_transfusion
from training.recipe import SamplesConfig


logger = logging.getLogger(__name__)

_REPORT_SECONDS = 30.0


class Sampler:
    """Generates from a trained model; the model must be in evaluation mode.

    Args:
        check_stop: called between batches; it may raise to end sampling.
        autocast: makes the context in which the model generates, such as an accelerator's; nothing else runs in it.
        progress_bar: show a bar of the prompts that are done, else a line every half minute.
    """

    def __init__(
        self,
        model: MoTPreTrainedModel,
        processor: MoTProcessor,
        config: SamplesConfig,
        check_stop: Callable[[], None] = lambda: None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        progress_bar: bool = False,
    ):
        self.model = model
        self.processor = processor
        self.config = config
        self.check_stop = check_stop
        self.autocast = autocast
        self.progress_bar = progress_bar
        self.mot = model.config

    @property
    def can_draw(self) -> bool:
        return is_transfusion(self.mot) or self.mot.image_grid is not None

    @property
    def can_edit(self) -> bool:
        return is_transfusion(self.mot)

    def draw(self, names: Sequence[str]) -> list[Image.Image]:
        """Draw a picture of each name, of the size that the model's configuration has."""
        if is_transfusion(self.mot):
            return self._diffuse("drawing", [[{"type": "text", "text": name}] for name in names])
        rows, columns = self.mot.image_grid
        prompts = self._prompts([[{"type": "text", "text": name}] for name in names], "image")
        guidance = {}
        if self.config.guidance_scale > 1:
            # In training, caption dropout left a picture without its name.
            nothing = self._prompts([[]], "image")[0]
            guidance = {"guidance_scale": self.config.guidance_scale, "negative": nothing}
        codes = self._generate("drawing", prompts, rows * columns, self.config.temperature, **guidance)
        return [self.picture(drawn) for drawn in codes]

    def edit(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[Image.Image]:
        """Change each picture by its instruction; for models that diffuse."""
        if not self.can_edit:
            raise ValueError("edit() needs a Transfusion model; discrete pictures are drawn from names")
        documents = [[{"type": "image", "image": image}, {"type": "text", "text": text}] for image, text in pairs]
        return self._diffuse("editing", documents)

    def _diffuse(self, what: str, documents: list) -> list[Image.Image]:
        """Draw the picture that follows each document; its noise depends on its place in the list alone."""
        pictures = []
        for start, some in self._batches(what, documents):
            seeds = range(self.config.seed + start, self.config.seed + start + len(some))
            output = self._run(
                documents=some,
                processor=self.processor,
                generation_mode="image",
                guidance_scale=self.config.guidance_scale,
                num_inference_steps=self.config.num_inference_steps,
                scheduler=self.config.scheduler,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                do_sample=False,
                pad_token_id=self.mot.pad_token_id,
            )
            pictures.extend(drawn[0] for drawn in output.images)
        return pictures

    def picture(self, codes: Sequence[int]) -> Image.Image:
        """Decode the picture of a grid of image tokens, without markers."""
        ids = [self.mot.boi_token_id, *codes, self.mot.eoi_token_id]
        return next(s["image"] for s in self.processor.decode_document(ids) if s["type"] == "image")

    def reconstruct(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Encode and decode pictures by the image tokenizer or the VAE: the best that a drawn picture could be."""
        if is_transfusion(self.mot):
            encoded = self.processor(documents=[[{"type": "image", "image": i}] for i in images], return_tensors="pt")
            latents = encode_pixels(self.model.vae, encoded["pixel_values"])
            return pictures_of(self.model, latents, "pil")
        return [self.picture(ids[1:-1]) for ids in self.processor.encode_images(list(images))]

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """Read the name off each picture."""
        documents = [[{"type": "image", "image": image}] for image in images]
        if is_transfusion(self.mot):
            return self._read_continuous(documents)
        prompts = self._prompts(documents, "text")
        read = self._generate("reading", prompts, self.config.max_text_tokens, 0.0)
        return [self._text(ids).strip() for ids in read]

    def _read_continuous(self, documents: list) -> list[str]:
        texts = []
        for _, some in self._batches("reading", documents):
            output = self._run(
                documents=some,
                processor=self.processor,
                generation_mode="text",
                max_new_tokens=self.config.max_text_tokens,
                do_sample=False,
                pad_token_id=self.mot.pad_token_id,
            )
            # Prompts are a picture alone, so the text begins behind its end.
            eoi = self.mot.eoi_token_id
            texts.extend(self._text(ids[ids.index(eoi) + 1 :]).strip() for ids in output.sequences.tolist())
        return texts

    def hear(self, sounds: Sequence[tuple[np.ndarray, int]]) -> list[str]:
        """Write down the text of each sound, (waveform in [-1, 1], samples a second)."""
        documents = [[{"type": "audio", "audio": audio, "sampling_rate": rate}] for audio, rate in sounds]
        no_pictures = {"generation_mode": "text"} if is_transfusion(self.mot) else {}
        prompts = self._prompts(documents, "text")
        heard = self._generate("hearing", prompts, self.config.max_text_tokens, 0.0, **no_pictures)
        return [self._text(ids).strip() for ids in heard]

    def speak(self, names: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        """Speak each name: (waveform in [-1, 1], samples a second)."""
        prompts = self._prompts([[{"type": "text", "text": name}] for name in names], "audio")
        limit = self.mot.max_speech_tokens or self.config.max_speech_tokens
        begin, end = self.mot.begin_of_speech_token_id, self.mot.end_of_speech_token_id
        clips = []
        spoken = self._generate("speaking", prompts, limit + 1, self.config.temperature, max_speech_tokens=limit)
        for units in spoken:
            units = units[: units.index(end)] if end in units else units
            segments = self.processor.decode_document([begin, *units, end])
            clips.append(next((s["audio"], s["sampling_rate"]) for s in segments if s["type"] == "audio"))
        return clips

    def continue_text(self, prompts: Sequence[str]) -> list[str]:
        """Return what the model writes after each prompt."""
        ids = self._prompts([[{"type": "text", "text": prompt}] for prompt in prompts], "text")
        no_pictures = {"generation_mode": "text"} if is_transfusion(self.mot) else {}
        written = self._generate("writing", ids, self.config.max_text_tokens, 0.0, **no_pictures)
        return [self._text(new) for new in written]

    # ----------------------------------------------------------------------------------------------- generating

    def _batches(self, what: str, prompts: list) -> Iterator[tuple[int, list]]:
        """Cut prompts into batches: (place of the first prompt, batch). Before each, a stop is looked for."""
        reported = time.monotonic()
        with tqdm(total=len(prompts), desc=what, unit="prompt", disable=not self.progress_bar) as bar:
            for start in range(0, len(prompts), self.config.batch):
                self.check_stop()
                some = prompts[start : start + self.config.batch]
                yield start, some
                bar.update(len(some))
                if not self.progress_bar and time.monotonic() - reported > _REPORT_SECONDS:
                    reported = time.monotonic()
                    logger.info("%s: %d of %d prompts", what, start + len(some), len(prompts))

    def _run(self, **arguments):
        """Call the model's `generate`, which alone runs in the precision of training."""
        with self.autocast():
            return self.model.generate(**arguments)

    def _prompts(self, documents: list, continue_with: str) -> list[list[int]]:
        batch = self.processor(documents=documents, continue_with=continue_with, add_eos=False)
        return [[int(token) for token in ids] for ids in batch["input_ids"]]

    def _generate(
        self,
        what: str,
        prompts: list[list[int]],
        new_tokens: int,
        temperature: float,
        negative: list[int] | None = None,
        **kwargs,
    ) -> list[list[int]]:
        """Generate the new tokens of each prompt, in batches padded on the left."""
        sampling = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": self.config.top_k}
        results = []
        torch.manual_seed(self.config.seed)
        for _, some in self._batches(what, prompts):
            input_ids, attention_mask = self._pad(some)
            if negative is not None:
                kwargs["negative_prompt_ids"] = torch.tensor([negative] * len(input_ids), device=self.model.device)
            output = self._run(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=new_tokens,
                pad_token_id=self.mot.pad_token_id,
                **sampling,
                **kwargs,
            )
            sequences = getattr(output, "sequences", output)
            results.extend(sequences[:, input_ids.shape[1] :].tolist())
        return results

    def _pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, prompts))
        ids = [[self.mot.pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _text(self, ids: list[int]) -> str:
        """Return the text before the first token that ends it or opens another modality."""
        ends = (self.mot.eos_token_id, self.mot.pad_token_id, self.mot.boi_token_id, self.mot.begin_of_speech_token_id)
        stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        segments = self.processor.decode_document(ids[:stop]) if stop else []
        return "".join(segment["text"] for segment in segments if segment["type"] == "text")


def write_wav(path: Path, audio: np.ndarray, sampling_rate: int) -> None:
    """Write a waveform in [-1, 1] as 16-bit mono WAV."""
    samples = (np.clip(np.asarray(audio, dtype=np.float64), -1, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(int(sampling_rate))
        file.writeframes(samples.tobytes())
