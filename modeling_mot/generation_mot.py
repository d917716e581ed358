"""`generate()` for sequences of several modalities: routing for every step, and spans that begin and end as they must.

`MoTGenerationMixin` hooks into transformers' `generate()`. A *span* is a stretch of tokens of one modality between two
markers, such as an image's codes between BOI and EOI; the classes for spans stand behind the mixin.
"""

# R sequences, B of them in a batch, L tokens so far, V vocabulary

from functools import partial
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.generation import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .checks_arguments import (
    CACHE,
    cache_as,
    check_call,
    check_called,
    check_config,
    check_lengths,
    check_prompt,
    check_prompt_keywords,
    check_settings,
    check_streamer,
    negative_prompt,
)
from .configuration_mot import check_spans
from .decoding_lean import LeanDecoder, is_plain_dynamic
from .decoding_loop import Request, Sampling
from .serving_mot import MoTServer
from .serving_requests import TextSequence
from .tower_routing import ModalityRouting, keeps_methods


OWN_SETTINGS = ("image_grid", "max_speech_tokens", "constrain_spans", "generator")


class MoTGenerationMixin(GenerationMixin):
    """Adds to transformers' `GenerationMixin`: modalities, spans, a faster loop over tokens, and serving."""

    def generate(self, inputs=None, *args, **kwargs):
        """Continue prompts with text, pictures and speech.

        The arguments are those of `GenerationMixin.generate`, and the ones below. No picture or speech begins that
        `max_new_tokens` cannot hold. Without `max_new_tokens` and `max_length`, 20 tokens are made, and a picture or
        speech that is open then is finished. `guidance_scale` with `negative_prompt_ids` guides pictures away from the
        unconditional prompt.

        Args:
            inputs, input_ids: (B, L) prompts, padded on the left.
            modality_ids: (B, L) of the prompts; those of new tokens follow from `config.modality_token_ranges`.
            image_grid: rows and columns of codes in an image, instead of `config.image_grid`.
            max_speech_tokens: instead of `config.max_speech_tokens`.
            constrain_spans: False to sample from all tokens everywhere (default True).
            generator: of sampled tokens: a `torch.Generator`, or one for each sequence; default: torch's global one.
            generation_mode: "image" or "audio" ("speech" is the same) opens a picture or speech behind prompts that
                do not end with one opened. A picture is then all that is made, whatever `max_new_tokens`. Default, and
                "text": as the model chooses.

        Returns:
            (B, L + new) prompts and new tokens; or transformers' output that holds them, if
            `return_dict_in_generate` asks for it.

        Raises:
            ValueError: an argument that cannot be followed; the message names it.

        Example:

            >>> import torch
            >>> from modeling_mot import MoTConfig, MoTForCausalLM
            >>> ranges = {"text": [0, 24], "image": [24, 32]}
            >>> config = MoTConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            ...                    num_attention_heads=2, modality_token_ranges=ranges, boi_token_id=3,
            ...                    eoi_token_id=4, image_grid=[1, 2])
            >>> model = MoTForCausalLM(config).eval()
            >>> tokens = model.generate(torch.tensor([[1, 9, 3]]), max_new_tokens=3, do_sample=False)
            >>> codes = tokens[0, 3:5]  # a picture of two codes behind BOI
            >>> bool((codes >= 24).all()), int(tokens[0, 5])
            (True, 4)
        """
        kwargs = cache_as(CACHE, kwargs)
        self._check_call(inputs, args, kwargs)
        if len(self.config.tower_names) > 1 and self.config.modality_token_ranges is None:
            raise ValueError(
                "generate() needs config.modality_token_ranges to know the modality of each new token; it is None"
            )

        # A prompt that asks for a picture or speech ends with its opening token.
        if (mode := kwargs.pop("generation_mode", None)) not in (None, "text"):
            mode = "audio" if mode == "speech" else mode
            if mode not in self.output_modalities:
                raise ValueError(f"generation_mode={mode!r} is not one of {', '.join(self.output_modalities)}")
            input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
            check_spans(kwargs.get("image_grid"), None)
            grid = kwargs.get("image_grid") or self.config.image_grid
            if mode == "image" and grid is not None:
                kwargs["max_new_tokens"] = grid[0] * grid[1] + 1
            opening = {"image": "boi_token_id", "audio": "begin_of_speech_token_id"}[mode]
            inputs, kwargs = self._opened(input_ids, kwargs, opening, getattr(self.config, opening), mode)

        # One unconditional prompt is enough for all.
        negative = [kwargs.get(f"negative_prompt_{name}") for name in ("ids", "attention_mask")]
        if any(value is not None for value in negative):
            given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            count = next((len(value) for value in given if value is not None), 1)
            tensors = (
                tensor.expand(count, -1).to(self.device) for tensor in negative_prompt(self.config, *negative, count)
            )
            kwargs["negative_prompt_ids"], kwargs["negative_prompt_attention_mask"] = tensors
        return super().generate(inputs, *args, **kwargs)

    @staticmethod
    def _check_call(inputs, args, kwargs) -> None:
        if kwargs.get("document_ids") is not None:
            raise ValueError("generate() got document_ids: packed rows are for training, pass one document per row")
        check_streamer(kwargs.get("streamer"))
        given = dict(zip(("generation_config", "logits_processor", "stopping_criteria"), args)) | kwargs
        check_config(given.get("generation_config"))  # before transformers reads it
        for name in ("logits_processor", "stopping_criteria"):
            check_called(name, given.get(name))
        check_call(inputs, kwargs)

    @property
    def output_modalities(self) -> tuple[str, ...]:
        """The modalities by the names that transformers' pipelines have for them."""
        return tuple("audio" if modality == "speech" else modality for modality in self.config.modalities)

    @staticmethod
    def _opened(input_ids, kwargs, opening, token, mode):
        """Append the opening token of a span to prompts that do not end with it.  -> (B, L [+ 1]), keywords

        Args:
            opening: the name of the token.
        """
        if input_ids is None or not input_ids.shape[1]:
            raise ValueError(f"generation_mode={mode!r} needs input_ids, behind which the span is opened")
        # All prompts stay of one length: all of them get the token, or none.
        ended = input_ids[:, -1] == token
        if ended.all():
            return input_ids, kwargs
        if ended.any():
            raise ValueError(f"generation_mode={mode!r}, but some prompts end with {opening} and some do not")
        for name, value in (("attention_mask", 1), ("modality_ids", 0)):
            if kwargs.get(name) is not None:
                kwargs[name] = F.pad(kwargs[name], (0, 1), value=value)
        return F.pad(input_ids, (0, 1), value=token), kwargs

    # -------------------------------------------------------------------------------------- hooks: checks and settings

    def _validate_model_kwargs(self, model_kwargs):
        model_kwargs = cache_as("past_key_values", model_kwargs)  # as the forward has it
        check_prompt_keywords(self, model_kwargs)
        super()._validate_model_kwargs(model_kwargs)

    def _prepare_model_inputs(self, inputs=None, bos_token_id=None, model_kwargs=None):
        prompt, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        check_prompt(prompt, model_kwargs)
        return prompt, name, model_kwargs

    def _prepare_generation_config(self, generation_config, **kwargs):
        check_config(generation_config)  # a server calls this without `generate()`
        check_lengths(kwargs)

        # Settings of ours bypass transformers, which would take them for arguments of the model.
        own = {name: kwargs.pop(name) for name in OWN_SETTINGS if kwargs.get(name) is not None}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, value in own.items():
            setattr(generation_config, name, value)
        check_settings(generation_config)
        if own.get("generator") is not None and (generation_config.num_beams or 1) > 1:
            raise ValueError(
                f"generator= with num_beams={generation_config.num_beams}: beams draw from torch's global one"
            )
        return generation_config, model_kwargs

    def _own_setting(self, generation_config, name):
        value = getattr(generation_config, name, None)
        return getattr(self.config, name, None) if value is None else value

    def _constrains_spans(self, generation_config) -> bool:
        has_spans = self.config.boi_token_id is not None or self.config.begin_of_speech_token_id is not None
        constrain = self._own_setting(generation_config, "constrain_spans") is not False
        return constrain and has_spans and self.config.modality_token_ranges is not None

    def _span_settings(self, generation_config) -> tuple:
        return tuple(self._own_setting(generation_config, name) for name in ("image_grid", "max_speech_tokens"))

    # ----------------------------------------------------------------------------------------- hooks: spans and length

    def _prepare_generated_length(self, generation_config, has_default_max_length, *args, **kwargs):
        is_default = has_default_max_length and generation_config.max_new_tokens is None
        generation_config = super()._prepare_generated_length(
            generation_config, has_default_max_length, *args, **kwargs
        )
        # Nobody asked for a length: a span that is open at the default one goes on to its end.
        if is_default and self._constrains_spans(generation_config):
            length, longest = generation_config.max_length, self.config.max_position_embeddings
            spans = spans_of(self.config, *self._span_settings(generation_config))
            generation_config.open_spans = spans, length
            ends = [longest if span.most is None else length + span.most + 1 for span in spans]
            generation_config.max_length = max([length, *(min(end, longest) for end in ends)])
        return generation_config

    def _get_stopping_criteria(self, generation_config, *args, **kwargs):
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if getattr(generation_config, "open_spans", None) is not None:
            criteria.append(OpenSpanCriteria(*generation_config.open_spans))
        return criteria

    def _get_logits_processor(self, generation_config, *args, logits_processor=None, **kwargs):
        # Custom processors run before temperature and top-k, which then choose among the tokens that may follow.
        logits_processor = LogitsProcessorList(logits_processor or [])
        encoded = self.config.tokenizer_vocab_size
        if encoded is not None and encoded < self.config.vocab_size:
            logits_processor.append(EncodedTokensLogitsProcessor(encoded))
        if self._constrains_spans(generation_config):
            logits_processor.append(
                ModalitySpanLogitsProcessor(
                    self.config,
                    *self._span_settings(generation_config),
                    kwargs.get("device"),
                    kwargs.get("input_ids_seq_length") or 0,
                    generation_config.max_length,
                )
            )
        processors = super()._get_logits_processor(
            generation_config, *args, logits_processor=logits_processor, **kwargs
        )
        for processor in processors:
            if self.config.moe_towers and isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                # Its forwards do not go through `prepare_inputs_for_generation`.
                processor.model = partial(self, token_choice=True)
        return processors

    def _get_candidate_generator(self, *args, model_kwargs, assistant_model=None, **kwargs):
        if getattr(kwargs.get("generation_config"), "generator", None) is not None:
            raise ValueError("generator= with assisted decoding, which draws from torch's global one: leave it out")
        if assistant_model is not None and "modality_ids" not in signature(assistant_model.forward).parameters:
            # A draft model of text alone has no use for modalities and would refuse them.
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "modality_ids"}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    # -------------------------------------------------------------------------------------------- the loop over tokens

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        request = Request(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, streamer)
        lean = None if synced_gpus else self._lean_decoder(request)
        # Transformers' own loop, where ours has nothing to add.
        if lean is None and getattr(generation_config, "generator", None) is None:
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )

        # Ours draws from a generator for each sequence, and may run lean steps.
        if self._shows_insides(generation_config) or synced_gpus:
            raise ValueError("generator= goes with neither output_attentions, output_hidden_states nor synced_gpus")
        return Sampling(self, request).run(lean)

    @staticmethod
    def _shows_insides(generation_config) -> bool:
        return bool(generation_config.output_attentions or generation_config.output_hidden_states)

    def _lean_decoder(self, request: Request) -> LeanDecoder | None:
        """Return the decoder of the steps behind the prompt, or None where the model's own forward must run them."""
        given = request.model_kwargs
        cache, mask, modality_ids = given.get(CACHE), given.get("attention_mask"), given.get("modality_ids")
        if self._shows_insides(request.generation_config) or not given.get("use_cache") or not is_plain_dynamic(cache):
            return None
        # A mask no longer than the cache, or modalities of tokens that are still to come, are the forward's to read.
        is_continued = cache.get_seq_length() > 0 and mask is not None and mask.shape[1] <= cache.get_seq_length()
        has_ids_alone = modality_ids is not None and given.get("inputs_embeds") is None
        runs_ahead = has_ids_alone and modality_ids.shape[1] > request.input_ids.shape[1]
        return None if is_continued or runs_ahead else LeanDecoder.of(self)

    # --------------------------------------------------------------------------------------------------------- serving

    def generate_batch(
        self, inputs, generation_config=None, continuous_batching_config=None, progress_bar=False, **kwargs
    ) -> dict:
        """Serve requests together: each gets what `generate()` would have given it alone (paper, section 6.3).

        Args:
            inputs: for each request its tokens, (L,) as a list or tensor; or a dictionary of arguments of `generate()`:
                `input_ids` (or `documents` with `processor`), `generator`, `max_new_tokens`, `streamer`, ...
            generation_config, kwargs: arguments of `generate()` for all requests, or of `MoTServer`.
            continuous_batching_config: transformers' `ContinuousBatchingConfig`, see `init_continuous_batching`.
            progress_bar: show one that counts requests.

        Returns:
            dict: "req_0", "req_1", ... -> `MoTRequestOutput`. A request that cannot be served has an `error`.

        Raises:
            ValueError: a limit of the server that is not a whole number; or the model cannot be served, see
                `decoder_of`.
            RuntimeError: the server failed, and not a request.

        Example:

            >>> from modeling_mot import MoTConfig, MoTForCausalLM
            >>> ranges = {"text": [0, 24], "image": [24, 32]}
            >>> config = MoTConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            ...                    num_attention_heads=2, modality_token_ranges=ranges)
            >>> model = MoTForCausalLM(config).eval()
            >>> requests = [[1, 9, 12], {"input_ids": [1, 7], "max_new_tokens": 2}]
            >>> results = model.generate_batch(requests, max_new_tokens=4, do_sample=False)
            >>> {name: len(result.generated_tokens) for name, result in results.items()}
            {'req_0': 4, 'req_1': 2}
        """
        server = self.init_continuous_batching(generation_config, continuous_batching_config, **kwargs)
        return server.serve(inputs, progress_bar)

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, **kwargs) -> MoTServer:
        """Make a server of requests that come while others run.

        Args:
            generation_config, kwargs: arguments of `generate()` for all requests, or of `MoTServer`.
            continuous_batching_config: transformers' `ContinuousBatchingConfig`, of which `max_requests_per_batch`
                (default 16), `max_batch_tokens` and `max_queue_size` are read; see `MoTServer`.

        Raises:
            ValueError: as of `generate_batch`.
        """
        limits = {
            name: value
            for name in ("max_requests_per_batch", "max_batch_tokens", "max_queue_size")
            if (value := getattr(continuous_batching_config, name, None)) is not None
        }
        kwargs.pop("cache_implementation", None)  # "paged" is what brings `generate()` here
        return MoTServer(self, **limits, generation_config=generation_config, **kwargs)

    def _served(self, request, decoder) -> TextSequence:
        """Return the sequence that decodes a request for a server."""
        return TextSequence(self, request, decoder)

    def _studio(self):
        """Return the `Studio` of a server's pictures; None for a model that draws none."""

    # ------------------------------------------------------------------------------------------------ inputs of a step

    def prepare_inputs_for_generation(self, input_ids, *args, modality_ids=None, inputs_embeds=None, **kwargs):
        kwargs = cache_as(CACHE, kwargs)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        inputs = cache_as("past_key_values", inputs)  # as the forward has it, and adapters look for it
        if len(self.config.tower_names) > 1:
            inputs["modality_ids"] = self._modality_ids_of_step(input_ids, inputs, modality_ids, inputs_embeds)
            # Routing is made outside of the forward, so that a compiled forward has no data-dependent step. An adapter
            # that prepares inputs may add virtual tokens, for which it would not fit.
            if keeps_methods(self, "prepare_inputs_for_generation"):
                inputs["routing"] = ModalityRouting.from_modality_ids(inputs.pop("modality_ids"), self.config)
        if self.config.unseen_towers:
            inputs["modality_ids"] = self._modality_ids_so_far(input_ids, inputs, modality_ids)
        if self.config.moe_towers:
            # Expert choice looks at later tokens; generation takes each token's own choice.
            inputs["token_choice"] = True
        return inputs

    def _modality_ids_of_step(self, input_ids, inputs, modality_ids, inputs_embeds):
        """Return the modalities of a step's tokens: as given for the prompt, from the vocabulary behind it.

        -> (B, tokens of this step)
        """
        # The tokens of this step.
        step_ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        length = (inputs["inputs_embeds"] if step_ids is None else step_ids).shape[1]
        if step_ids is None and input_ids.shape[1] >= length:
            step_ids = input_ids[:, -length:]  # embeddings came for these tokens
        if step_ids is None and modality_ids is None:
            raise ValueError(
                "generate() got inputs_embeds alone, which do not say which of the towers "
                f"{self.config.tower_names} they are for: pass modality_ids, (batch, length), or input_ids beside them"
            )

        # Their modalities from the vocabulary. Embeddings without tokens are given theirs below.
        if step_ids is None:
            derived = input_ids.new_zeros(input_ids.shape[0], length)
        else:
            derived = self.model.modality_ids_of(step_ids)
        if modality_ids is None:
            return derived

        # The given ones come first; they say where in the prompt this step begins.
        if inputs_embeds is None and modality_ids.shape[1] <= input_ids.shape[1]:
            first = input_ids.shape[1] - length  # they begin at the same token, which may follow cached ones
        else:  # embeddings, or one chunk of a long prompt
            first = 0 if cache is None else int(cache.get_seq_length())
        given = modality_ids[:, first : first + length]
        return torch.cat([given, derived[:, given.shape[1] :]], dim=1)

    def _modality_ids_so_far(self, input_ids, inputs, modality_ids):
        """Return the modalities of all keys that a step may see, for `config.unseen_towers`.  -> (B, past + L)"""
        step = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        past = inputs.get("past_key_values")
        length = step.shape[1] + (0 if past is None else int(past.get_seq_length()))
        if input_ids.shape[1] < length:
            raise ValueError(
                f"unseen_towers={self.config.unseen_towers} needs the tokens of all keys: pass input_ids to generate() "
                "instead of inputs_embeds"
            )
        derived = self.model.modality_ids_of(input_ids)
        given = derived[:, :0] if modality_ids is None else modality_ids
        return torch.cat([given, derived[:, given.shape[1] :]], dim=1)[:, :length]


# ---------------------------------------------------------------------------------------------- tokens that may follow


class EncodedTokensLogitsProcessor(LogitsProcessor):
    """Hides ids that stand for no token, of a vocabulary with more rows than tokens.

    Args:
        count: the number of tokens, which are the first rows.
    """

    supports_continuous_batching = True

    def __init__(self, count: int):
        self.count = count

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Hide the ids from `count` on: (R, L), (R, V) -> (R, V)"""
        scores = scores.clone()  # the logits may be returned as they were
        scores[..., self.count :] = -float("inf")
        return scores


class Span(NamedTuple):
    """A stretch of one modality's tokens between two markers.

    Attributes:
        modality: the name of the modality.
        opening, closing: the markers' tokens.
        fewest, most: the number of tokens between them; `most` is None if there is no bound.
    """

    modality: str
    opening: int
    closing: int
    fewest: int
    most: int | None

    def opened(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Return the place of each row's last opening marker, from 1, and if its span is open.  (R, L) -> (R,), (R,)"""
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        opened = (places * (input_ids == self.opening)).amax(dim=1)
        return opened, opened > (places * (input_ids == self.closing)).amax(dim=1)


def spans_of(config, image_grid=None, max_speech_tokens=None) -> list[Span]:
    """Return the spans that a model can write. An image that is diffused is no span.

    Args:
        config: a `MoTConfig` with `modality_token_ranges`.
        image_grid: rows and columns of an image's codes; None leaves the number to the model.
        max_speech_tokens: the longest span of speech; None for no bound.

    Raises:
        ValueError: the grid is not two positive numbers, or there is no room for speech.
    """
    check_spans(image_grid, max_speech_tokens)
    # A grid fixes the number of codes; the model may have none of these markers.
    codes = None if image_grid is None else image_grid[0] * image_grid[1]
    spans = [
        Span("image", config.boi_token_id, config.eoi_token_id, codes or 1, codes),
        Span("speech", config.begin_of_speech_token_id, config.end_of_speech_token_id, 1, max_speech_tokens),
    ]
    return [span for span in spans if span.opening is not None and span.modality in config.modality_token_ranges]


class ModalitySpanLogitsProcessor(LogitsProcessor):
    """Hides tokens that may not follow in the open span.

    In an image, as many codes as the grid has may follow, and then EOI; in speech, units until its end; elsewhere,
    text. No span begins that does not fit into `max_length`, and a span that has begun ends in time.

    The span is read from the tokens of each sequence, so that beams and assistants may reorder and discard tokens.
    Transformers' own continuous batching has no such sequences and leaves this processor out.

    Args:
        config: a `MoTConfig` with `modality_token_ranges`.
        image_grid: rows and columns of an image's codes; None leaves the number to the model.
        max_speech_tokens: the longest span of speech; None for no bound.
        prompt_length: of the prompts. A span that a prompt leaves open may be cut by `max_length`.
        max_length: of the sequences, prompts included; None for no bound.

    Raises:
        ValueError: the grid is not two positive numbers, or there is no room for speech.
    """

    supports_continuous_batching = False

    def __init__(self, config, image_grid=None, max_speech_tokens=None, device=None, prompt_length=0, max_length=None):
        self.prompt_length = prompt_length
        self.max_length = max_length
        self.spans = spans_of(config, image_grid, max_speech_tokens)

        # In text: tokens outside of all ranges are text too, as they are for routing. A resized vocabulary has them.
        ranges = config.modality_token_ranges
        text = torch.ones(config.vocab_size, dtype=torch.bool, device=device)
        for modality in config.token_modalities[1:]:
            text[slice(*ranges[modality])] = False
        for modality, opening in (("image", config.boi_token_id), ("speech", config.begin_of_speech_token_id)):
            if opening is not None and modality not in ranges and modality not in config.modalities:
                text[opening] = False  # nothing could stand in such a span

        # In each span, where it must go on, where it must end, and where it may do both.
        allowed = []
        for span in self.spans:
            inside = torch.zeros_like(text)
            inside[slice(*ranges[span.modality])] = True
            text[span.closing] = False
            end = torch.zeros_like(text)
            end[span.closing] = True
            allowed += [inside, end, inside | end]
        self.hidden = ~torch.stack([text, *allowed])  # (1 + 3 spans, V): a row for each state

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Hide the tokens that must not follow: (R, L), (R, V) -> (R, V)"""
        # The state is text until a span is found to be open. A prompt of embeddings is text.
        state = input_ids.new_zeros(len(input_ids))
        left = float("inf") if self.max_length is None else self.max_length - input_ids.shape[1]
        for number, span in enumerate(self.spans if input_ids.shape[1] else ()):
            opened, is_open = span.opened(input_ids)
            length = input_ids.shape[1] - opened  # tokens since the opening one
            may_close = length >= span.fewest
            may_go_on = torch.ones_like(may_close) if span.most is None else length < span.most
            if left <= 1:
                may_go_on &= ~may_close | (opened <= self.prompt_length)
            state = torch.where(is_open, 3 * number + may_go_on.long() + 2 * may_close.long(), state)

        # Hide the tokens that may not follow in this state, and spans that there is no room for.
        constrained = scores.masked_fill(self.hidden[state], -float("inf"))
        for span in self.spans:
            if left < span.fewest + 2:
                constrained[:, span.opening] = -float("inf")

        # If other processors (`forced_eos_token_id`, say) have hidden everything else, theirs is the choice.
        nothing_left = constrained.amax(dim=-1, keepdim=True) <= torch.finfo(scores.dtype).min
        return torch.where(nothing_left, scores, constrained) if nothing_left.any() else constrained


class OpenSpanCriteria(StoppingCriteria):
    """Ends sequences that have reached a length, but not inside of a picture or speech.

    Args:
        spans: see `spans_of`.
        length: of a sequence, its prompt included.
    """

    def __init__(self, spans: list[Span], length: int):
        self.spans = spans
        self.length = length

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        """Tell which sequences are done: (R, L) -> (R,)"""
        # Spans are looked for only once the length is reached.
        ends = torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)
        for span in self.spans if input_ids.shape[1] >= self.length else ():
            ends &= ~span.opened(input_ids)[1]
        return ends
