"""The loop of `generate()` in the Transfusion setting: text steps for all sequences, pictures where one has BOI."""

# B sequences, P columns of the prompts, n tokens of an image, C latent channels, (h, w) latents, V vocabulary

import torch
from transformers.cache_utils import DynamicCache

from .denoising_mot import ImageForward, Prefix, denoise
from .image_processor_mot import MoTImageProcessor
from .latents_mot import decode_latents


IMAGE_INPUTS = ("latents", "pixel_values", "image_sizes")


def pictures_of(model, latents: torch.Tensor, output_type: str) -> list:
    """(N, C, h, w) -> N pictures: PIL, tensors (3, H, W) in [0, 1], or the latents ("latent", or there is no VAE)."""
    if model.vae is None or output_type == "latent":
        return list(latents)
    pixels = decode_latents(model.vae, latents)
    return list((pixels + 1) / 2) if output_type == "pt" else MoTImageProcessor.to_pictures(pixels)


class InterleavedDecoding:
    """One call of `generate()`.

    While some sequences draw a picture the others wait, so at any time sequences may differ in length: the cache is
    padded on the left. Logits processors and stopping criteria see each sequence as the prompt it was given with what
    followed, so that nothing depends on the others.

    Attributes:
        running: the sequences that go on.
        new_tokens: what each sequence has beside its prompt.
        latents, images, intermediates: of each sequence, what it drew, in order.
    """

    def __init__(
        self, model, prompt, model_kwargs, generation_config, logits_processor, stopping_criteria, streamer=None
    ):
        self.model, self.config, self.streamer = model, model.config, streamer
        self.generation_config, self.settings = generation_config, generation_config.diffusion
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.prompt, mask = prompt, model_kwargs.get("attention_mask")
        mask = torch.ones_like(prompt) if mask is None else mask
        pad = generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        self.size = self.settings.latent_size(self.config)
        self.length = self.config.image_length(*self.size)
        self.budget = generation_config.max_length - prompt.shape[1]
        self._check(mask)
        count = len(prompt)
        self.running = list(range(count))
        self.new_tokens, self.latents, self.images, self.intermediates = ([[] for _ in range(count)] for _ in range(4))
        self.scores, self.raw_logits = (), ()
        self.generators = self._generators(count)
        self.unconditional: Prefix | None = None
        images = {name: model_kwargs[name] for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}
        self.logits, self.prefix = self._prefill(
            prompt, mask, model_kwargs.get("position_ids"), model_kwargs.get("modality_ids"), images
        )
        self.cache = self.prefix.cache()

    def _check(self, mask: torch.Tensor) -> None:
        if (mask[:, -1] == 0).any() or (mask[:, 1:] < mask[:, :-1]).any():
            raise ValueError("attention_mask has padding on the right; pad prompts on the left (padding_side='left')")
        if (self.prompt[:, -1] == self.config.image_token_id).any():
            raise ValueError(
                f"a prompt ends inside of an image, with image_token_id={self.config.image_token_id}; eoi_token_id="
                f"{self.config.eoi_token_id} must follow the image, or boi_token_id={self.config.boi_token_id} stand alone "
                "where one is to be drawn"
            )
        if self.budget <= self.length and (self.prompt[:, -1] == self.config.boi_token_id).any():
            raise ValueError(
                f"max_new_tokens={self.budget} is shorter than the picture that boi_token_id begins: it takes "
                f"{self.length} tokens and EOI; set max_new_tokens to at least {self.length + 1}"
            )
        if self.streamer is not None and len(self.prompt) > 1:
            raise ValueError(f"a streamer follows one sequence, not {len(self.prompt)}; generate them one by one")

    def _generators(self, count: int) -> list[torch.Generator | None]:
        generator = self.settings.generator
        if generator is None:
            return [None] * count
        if isinstance(generator, (list, tuple)):
            if len(generator) != count:
                raise ValueError(
                    f"generator has {len(generator)} entries for {count} sequences; give one for each, or one"
                )
            return list(generator)
        seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()
        return [torch.Generator(device=generator.device).manual_seed(seed) for seed in seeds]

    def _prefill(self, ids, mask, position_ids=None, modality_ids=None, images=None) -> tuple[torch.Tensor, Prefix]:
        """Prompts with their images clean.  (B, P) -> the next logits (B, V), and what is cached"""
        images = dict(images or {})
        if "pixel_values" in images and "latents" not in images:
            encoded = self.model.encode_images(images.pop("pixel_values"), images.get("image_sizes"))
            images["latents"], images["image_sizes"] = encoded
        if "latents" in images:
            latents = images["latents"]
            nothing = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
            images |= {"timesteps": nothing, "clean_images": nothing == 0, "noise": torch.zeros_like(latents)}
        if position_ids is None:
            position_ids = self.model.positions_of_prompts(ids, mask)
        position_ids = position_ids.expand_as(ids)
        cache = DynamicCache(config=self.config)
        outputs = self.model(
            ids, modality_ids, mask, position_ids, past_key_values=cache, logits_to_keep=1, return_dict=True, **images
        )
        return outputs.logits[:, -1].float(), Prefix.of_cache(cache, mask, position_ids[:, -1] + 1)

    def run(self) -> None:
        while self.running:
            drawing = [row for row in self.running if self._last_token(row) == self.config.boi_token_id]
            if drawing:
                self._draw(drawing)
            else:
                self._sample()
        if self.streamer is not None:
            self.streamer.end()

    def _last_token(self, row: int) -> int:
        return self.new_tokens[row][-1] if self.new_tokens[row] else int(self.prompt[row, -1])

    def _by_length(self, rows: list[int]):
        """Sequences of one length, and a batch (B, L) of it in which only they are right.

        The others, cut or padded to that length, keep the places that processors and criteria may count by.
        """
        for length in sorted({len(self.new_tokens[row]) for row in rows}):
            tokens = [(tokens + [self.pad] * length)[:length] for tokens in self.new_tokens]
            group = [row for row in rows if len(self.new_tokens[row]) == length]
            yield group, torch.cat([self.prompt, self.prompt.new_tensor(tokens)], dim=1)

    def _stop(self, rows: list[int]) -> None:
        for group, ids in self._by_length(rows):
            done = self.stopping_criteria(ids, self.scores or None).tolist()
            self.running = [row for row in self.running if not (row in group and done[row])]

    # ---------------------------------------------------------------------------------------------------- text mode

    def _sample(self) -> None:
        """One token for each sequence."""
        scores = self._processed(self.logits)
        if self.generation_config.output_scores:
            self.scores += (scores,)
        if self.generation_config.output_logits:
            self.raw_logits += (self.logits,)
        tokens = self._chosen(scores).tolist()
        for row in self.running:
            self.new_tokens[row].append(tokens[row])
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens))
        self._stop(self.running)
        if self.running:
            self._step([token if row in self.running else self.pad for row, token in enumerate(tokens)])

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, V) -> (B, V)"""
        config, logits = self.config, logits.clone()
        logits[:, [config.image_token_id, config.eoi_token_id]] = -float("inf")  # only ever appended
        for row, tokens in enumerate(self.new_tokens):
            if self.budget - len(tokens) < self.length + 2 or self.settings.generation_mode == "text":
                logits[row, config.boi_token_id] = -float("inf")
        scores = logits.clone()
        for group, ids in self._by_length(self.running):
            scores[group] = self.logits_processor(ids, logits.clone())[group]
        return scores

    def _chosen(self, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) -> (B,)"""
        if not self.generation_config.do_sample:
            return scores.argmax(dim=-1)
        probabilities = scores.softmax(dim=-1)
        if self.generators[0] is None:
            return torch.multinomial(probabilities, 1).squeeze(1)
        drawn = [
            torch.multinomial(row.to(generator.device), 1, generator=generator)
            for row, generator in zip(probabilities, self.generators)
        ]
        return torch.cat([token.cpu() for token in drawn])

    def _step(self, tokens: list[int]) -> None:
        ids = self.prompt.new_tensor(tokens)[:, None]
        mask = torch.cat([self.prefix.mask, torch.ones_like(ids)], dim=1)
        outputs = self.model.model(
            input_ids=ids,
            modality_ids=self.model.model.modality_ids_of(ids),
            attention_mask=mask,
            position_ids=self.prefix.position[:, None],
            past_key_values=self.cache,
        )
        self.logits = self.model.lm_head(outputs.last_hidden_state[:, -1]).float()
        self.prefix = Prefix.of_cache(self.cache, mask, self.prefix.position + 1)

    # ----------------------------------------------------------------------------------------------- diffusion mode

    def _draw(self, rows: list[int]) -> None:
        """A picture and EOI in each of these sequences."""
        index = torch.tensor(rows, device=self.prompt.device)
        prefix = self.prefix.rows(index, drop_last=int(self.config.markers_in_image_block))
        generators = [self.generators[row] for row in rows]
        latents, estimates = denoise(self.model, prefix, self._unconditional(rows), self.settings, generators, rows)
        self._keep(rows, latents, estimates)
        self._stop(rows)
        places = [place for place, row in enumerate(rows) if row in self.running]
        if places:
            self._commit([rows[place] for place in places], prefix.rows(torch.tensor(places)), latents[places])

    def _commit(self, rows: list[int], prefix: Prefix, latents: torch.Tensor) -> None:
        """Run the pictures of these sequences once, clean, with EOI; the others move to the right as far."""
        cache = prefix.cache()
        forward = ImageForward(self.model, prefix, self.size, with_end=True, cache=cache)
        hidden_states, _ = forward(latents, 0)
        drew = Prefix.of_cache(cache, forward.mask, forward.position_ids[:, -1] + 1)
        order = rows + [row for row in range(len(self.prompt)) if row not in rows]
        index = torch.tensor(order, device=self.prompt.device)
        self.prefix = drew.beside(self.prefix.rows(index[len(rows) :])).rows(index.argsort())
        self.cache = self.prefix.cache()
        self.logits[index[: len(rows)]] = self.model.lm_head(hidden_states[:, -1]).float()

    def _unconditional(self, rows: list[int]) -> Prefix | None:
        """The prefixes that guidance leads away from, prefilled once."""
        if self.settings.guidance_scale == 1:
            return None
        if self.unconditional is None:
            ids, mask = self.settings.unconditional_prompts(self.config, len(self.prompt), self.prompt.device)
            _, self.unconditional = self._prefill(ids, mask)
        # One for all, or one for each prompt, whose sequences stand together.
        repeats = len(self.prompt) // len(self.unconditional.mask)
        index = torch.tensor(rows, device=self.prompt.device) // repeats
        return self.unconditional.rows(index, drop_last=int(self.config.markers_in_image_block))

    def _keep(self, rows: list[int], latents: torch.Tensor, estimates: list[torch.Tensor]) -> None:
        pictures = pictures_of(self.model, latents, self.settings.output_type)
        along = [pictures_of(self.model, estimate, self.settings.output_type) for estimate in estimates]
        tokens = [self.config.image_token_id] * self.length + [self.config.eoi_token_id]
        for place, row in enumerate(rows):
            self.new_tokens[row].extend(tokens)
            self.latents[row].append(latents[place])
            self.images[row].append(pictures[place])
            self.intermediates[row].append([estimate[place] for estimate in along])
            if self.streamer is not None:
                self.streamer.put(torch.tensor(tokens))
                if hasattr(self.streamer, "put_image"):
                    self.streamer.put_image(pictures[place])

    def sequences(self) -> torch.Tensor:
        """(B, P + longest), padded on the right."""
        longest = max(map(len, self.new_tokens))
        padded = [tokens + [self.pad] * (longest - len(tokens)) for tokens in self.new_tokens]
        return torch.cat([self.prompt, self.prompt.new_tensor(padded)], dim=1)
