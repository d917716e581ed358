"""Generation across modalities: what may follow in each span, and routing for every cached step."""

# R sequences, L tokens so far, V vocabulary

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
from .decoding_loop import Sampling, sample
from .serving_mot import MoTServer
from .serving_requests import TextSequence
from .tower_routing import ModalityRouting, keeps_methods


class Span(NamedTuple):
    """A stretch of one modality's tokens between two markers.

    Attributes:
        modality: its name.
        opening, closing: the markers.
        fewest, most: how many tokens may stand between them; `most` is None where there is no bound.
    """

    modality: str
    opening: int
    closing: int
    fewest: int
    most: int | None

    def opened(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Where the last one of each row begins, counted from 1, and whether it is open.  (R, L) -> (R,), (R,)"""
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        opened = (places * (input_ids == self.opening)).amax(dim=1)
        return opened, opened > (places * (input_ids == self.closing)).amax(dim=1)


def spans_of(config, image_grid=None, max_speech_tokens=None) -> list[Span]:
    """The spans of tokens that a model can write; images that are diffused are none.

    Args:
        config: a `MoTConfig` with `modality_token_ranges`.
        image_grid: rows and columns of an image's codes; None leaves the number to the model.
        max_speech_tokens: the longest span of speech; None for no bound.

    Raises:
        ValueError: a grid that is not two positive numbers, or no room for speech.
    """
    check_spans(image_grid, max_speech_tokens)
    codes = None if image_grid is None else image_grid[0] * image_grid[1]
    spans = [
        Span("image", config.boi_token_id, config.eoi_token_id, codes or 1, codes),
        Span("speech", config.begin_of_speech_token_id, config.end_of_speech_token_id, 1, max_speech_tokens),
    ]
    return [span for span in spans if span.opening is not None and span.modality in config.modality_token_ranges]


class ModalitySpanLogitsProcessor(LogitsProcessor):
    """Only what the open span may contain: codes up to the grid's number and then EOI in an image,
    units until end of speech in speech, text elsewhere. No span begins that does not fit, and one that
    has begun ends in time.

    The span is read off the tokens of each sequence, so beams and assistants may reorder and
    discard them freely. Continuous batching has no such sequences and leaves this processor out.

    Args:
        config: a `MoTConfig` with `modality_token_ranges`.
        image_grid: rows and columns of an image's codes; None leaves the number to the model.
        max_speech_tokens: the longest span of speech; None for no bound.
        prompt_length: of the prompts; spans that these leave open are as long as the caller lets them be.
        max_length: of the sequences, prompts included; None for no bound.

    Raises:
        ValueError: a grid that is not two positive numbers, or no room for speech.
    """

    supports_continuous_batching = False

    def __init__(self, config, image_grid=None, max_speech_tokens=None, device=None, prompt_length=0, max_length=None):
        self.prompt_length, self.max_length = prompt_length, max_length
        self.spans, allowed = spans_of(config, image_grid, max_speech_tokens), []
        ranges = config.modality_token_ranges
        # Tokens outside of all ranges are text, as they are for routing: a resized vocabulary has them.
        text = torch.ones(config.vocab_size, dtype=torch.bool, device=device)
        for modality in config.token_modalities[1:]:
            text[slice(*ranges[modality])] = False
        for modality, opening in (("image", config.boi_token_id), ("speech", config.begin_of_speech_token_id)):
            if opening is not None and modality not in ranges and modality not in config.modalities:
                text[opening] = False  # nothing could stand in such a span
        for span in self.spans:
            inside = torch.zeros_like(text)
            inside[slice(*ranges[span.modality])] = True
            text[span.closing] = False
            end = torch.zeros_like(text)
            end[span.closing] = True
            allowed += [inside, end, inside | end]
        # What may not follow: in text, then for each span where it must go on, where it must end, where it may do both.
        self.hidden = ~torch.stack([text, *allowed])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(R, L), (R, V) -> (R, V)"""
        # In text, until a span is found to be open; and so at a prompt of embeddings.
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
        constrained = scores.masked_fill(self.hidden[state], -float("inf"))
        for span in self.spans:
            if left < span.fewest + 2:
                constrained[:, span.opening] = -float("inf")
        # Where other processors, `forced_eos_token_id` for one, left nothing of what may follow, theirs is the choice.
        nothing_left = constrained.amax(dim=-1, keepdim=True) <= torch.finfo(scores.dtype).min
        return torch.where(nothing_left, scores, constrained) if nothing_left.any() else constrained


class OpenSpanCriteria(StoppingCriteria):
    """Ends what has reached a length, but not inside of a picture or speech.

    Args:
        spans: see `spans_of`.
        length: of a sequence, its prompt included.
    """

    def __init__(self, spans: list[Span], length: int):
        self.spans, self.length = spans, length

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        """(R, L) -> (R,)"""
        ends = torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)
        for span in self.spans if input_ids.shape[1] >= self.length else ():
            ends &= ~span.opened(input_ids)[1]
        return ends


OWN_SETTINGS = ("image_grid", "max_speech_tokens", "constrain_spans", "generator")


class MoTGenerationMixin(GenerationMixin):
    """`generate()` for sequences of several modalities.

    Arguments are those of `GenerationMixin.generate`. No picture or speech begins that `max_new_tokens` cannot hold;
    without one, and without `max_length`, it is 20, and a picture or speech that is open then is finished. And:

        modality_ids: (B, L) of the prompt; those of new tokens follow from `config.modality_token_ranges`.
        image_grid: rows and columns of codes in an image, instead of `config.image_grid`.
        max_speech_tokens: instead of `config.max_speech_tokens`.
        constrain_spans: False to sample from the whole vocabulary everywhere (default True).
        generator: of sampled tokens: a `torch.Generator`, or one for each sequence; default: torch's global one.
        generation_mode: "image" or "audio" opens a picture or speech behind prompts that do not end with one opened; a
            picture is then all that is made, whatever `max_new_tokens`. Default, and "text": as the model chooses.

    `guidance_scale` with `negative_prompt_ids` guides pictures away from the unconditional prompt.
    """

    def generate(self, inputs=None, *args, **kwargs):
        self._check_call(inputs, args, kwargs)
        if len(self.config.tower_names) > 1 and self.config.modality_token_ranges is None:
            raise ValueError(
                "generate() needs config.modality_token_ranges to know the modality of each new token; it is None"
            )
        if (mode := kwargs.pop("generation_mode", None)) not in (None, "text"):
            if mode not in self.output_modalities:
                raise ValueError(f"generation_mode={mode!r} is not one of {', '.join(self.output_modalities)}")
            input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
            check_spans(kwargs.get("image_grid"), None)
            grid = kwargs.get("image_grid") or self.config.image_grid
            if mode == "image" and grid is not None:
                kwargs["max_new_tokens"] = grid[0] * grid[1] + 1
            opening = {"image": "boi_token_id", "audio": "begin_of_speech_token_id"}[mode]
            inputs, kwargs = self._opened(input_ids, kwargs, opening, mode)
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
        """The names that transformers' pipelines have for them."""
        return tuple("audio" if modality == "speech" else modality for modality in self.config.modalities)

    def _opened(self, input_ids, kwargs, opening, mode):
        """The opening token of a span behind each prompt that does not end with it."""
        if input_ids is None or not input_ids.shape[1]:
            raise ValueError(f"generation_mode={mode!r} needs input_ids, behind which the span is opened")
        token = getattr(self.config, opening)
        ended = input_ids[:, -1] == token
        if ended.all():
            return input_ids, kwargs
        if ended.any():
            raise ValueError(f"generation_mode={mode!r}, but some prompts end with {opening} and some do not")
        for name, value in (("attention_mask", 1), ("modality_ids", 0)):
            if kwargs.get(name) is not None:
                kwargs[name] = F.pad(kwargs[name], (0, 1), value=value)
        return F.pad(input_ids, (0, 1), value=token), kwargs

    def _validate_model_kwargs(self, model_kwargs):
        check_prompt_keywords(self, model_kwargs)
        super()._validate_model_kwargs(model_kwargs)

    def _prepare_model_inputs(self, inputs=None, bos_token_id=None, model_kwargs=None):
        prompt, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        check_prompt(prompt, model_kwargs)
        return prompt, name, model_kwargs

    def _prepare_generation_config(self, generation_config, **kwargs):
        check_config(generation_config)  # of a server
        check_lengths(kwargs)
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

    def _prepare_generated_length(self, generation_config, has_default_max_length, *args, **kwargs):
        is_default = has_default_max_length and generation_config.max_new_tokens is None
        generation_config = super()._prepare_generated_length(
            generation_config, has_default_max_length, *args, **kwargs
        )
        if is_default and self._constrains_spans(generation_config):
            length, longest = generation_config.max_length, self.config.max_position_embeddings
            generation_config.open_spans = spans_of(self.config, *self._span_settings(generation_config)), length
            ends = [
                longest if span.most is None else length + span.most + 1 for span in generation_config.open_spans[0]
            ]
            generation_config.max_length = max([length, *(min(end, longest) for end in ends)])
        return generation_config

    def _get_stopping_criteria(self, generation_config, *args, **kwargs):
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if getattr(generation_config, "open_spans", None) is not None:
            criteria.append(OpenSpanCriteria(*generation_config.open_spans))
        return criteria

    def _get_logits_processor(self, generation_config, *args, logits_processor=None, **kwargs):
        logits_processor = LogitsProcessorList(logits_processor or [])
        if self._constrains_spans(generation_config):
            # Custom processors run before temperature and top-k, which so choose among what may follow.
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
                # Its forwards do not go through prepare_inputs_for_generation.
                processor.model = partial(self, token_choice=True)
        return processors

    def _get_candidate_generator(self, *args, model_kwargs, assistant_model=None, **kwargs):
        if getattr(kwargs.get("generation_config"), "generator", None) is not None:
            raise ValueError("generator= with assisted decoding, which draws from torch's global one: leave it out")
        if assistant_model is not None and "modality_ids" not in signature(assistant_model.forward).parameters:
            # A draft model of text alone has no use for them and would refuse them.
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "modality_ids"}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

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
        generator = getattr(generation_config, "generator", None)
        lean = None if synced_gpus else self._lean_decoder(input_ids, generation_config, model_kwargs)
        if lean is None and generator is None:
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        if self._shows_insides(generation_config) or synced_gpus:
            raise ValueError("generator= goes with neither output_attentions, output_hidden_states nor synced_gpus")
        sampling = Sampling(self, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        return sample(sampling, lean, streamer)

    @staticmethod
    def _shows_insides(generation_config) -> bool:
        return bool(generation_config.output_attentions or generation_config.output_hidden_states)

    def _lean_decoder(self, input_ids, generation_config, model_kwargs) -> LeanDecoder | None:
        """What runs the steps after the prompt, or None where the model's own forward does."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        if self._shows_insides(generation_config) or not model_kwargs.get("use_cache") or not is_plain_dynamic(cache):
            return None
        is_continued = cache.get_seq_length() > 0 and mask is not None and mask.shape[1] <= cache.get_seq_length()
        given, embeds = model_kwargs.get("modality_ids"), model_kwargs.get("inputs_embeds")
        runs_ahead = given is not None and embeds is None and given.shape[1] > input_ids.shape[1]
        return None if is_continued or runs_ahead else LeanDecoder.of(self)

    def generate_batch(
        self, inputs, generation_config=None, continuous_batching_config=None, progress_bar=False, **kwargs
    ) -> dict:
        """Serve requests together: each gets what `generate()` would have given it alone (paper, section 6.3).

        Args:
            inputs: of each request its tokens, (L,) as a list or tensor; or a dictionary of what `generate()` would be
                called with: `input_ids` (or `documents` with `processor`), `generator`, `max_new_tokens`, `streamer`, ...
            generation_config, kwargs: arguments of `generate()` for all of them, or of `MoTServer`.
            continuous_batching_config: transformers' `ContinuousBatchingConfig`, see `init_continuous_batching`.
            progress_bar: show one that counts requests.

        Returns:
            dict: "req_0", "req_1", ... -> `MoTRequestOutput`. What a request cannot have is in its `error`.
        """
        server = self.init_continuous_batching(generation_config, continuous_batching_config, **kwargs)
        return server.serve(inputs, progress_bar)

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, **kwargs) -> MoTServer:
        """A server of requests that come while others run.

        Args:
            generation_config, kwargs: arguments of `generate()` for all requests, or of `MoTServer`.
            continuous_batching_config: transformers' `ContinuousBatchingConfig`, of which `max_requests_per_batch`
                (default 16), `max_batch_tokens` and `max_queue_size` are read; see `MoTServer`.
        """
        limits = {
            name: value
            for name in ("max_requests_per_batch", "max_batch_tokens", "max_queue_size")
            if (value := getattr(continuous_batching_config, name, None)) is not None
        }
        kwargs.pop("cache_implementation", None)  # "paged" is what brings `generate()` here
        return MoTServer(self, **limits, generation_config=generation_config, **kwargs)

    def _served(self, request, decoder) -> TextSequence:
        """One request of a server, from its prompt on."""
        return TextSequence(self, request, decoder)

    def _studio(self):
        """Where a server's requests draw pictures, for models that do."""

    def prepare_inputs_for_generation(self, input_ids, *args, modality_ids=None, inputs_embeds=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if len(self.config.tower_names) > 1:
            inputs["modality_ids"] = self._modality_ids_of_step(input_ids, inputs, modality_ids, inputs_embeds)
            if keeps_methods(self, "prepare_inputs_for_generation"):  # else more tokens may come, as virtual ones do
                # Outside of the forward, so that a compiled forward has no data-dependent step.
                inputs["routing"] = ModalityRouting.from_modality_ids(inputs.pop("modality_ids"), self.config)
        if self.config.moe_towers:
            # Expert choice looks at later tokens; generation takes each token's own choice.
            inputs["token_choice"] = True
        return inputs

    def _modality_ids_of_step(self, input_ids, inputs, modality_ids, inputs_embeds):
        """Those given for the prompt; what came after it follows from the vocabulary.  -> (B, tokens of this step)"""
        step_ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        length = (inputs["inputs_embeds"] if step_ids is None else step_ids).shape[1]
        if step_ids is None and input_ids.shape[1] >= length:
            step_ids = input_ids[:, -length:]  # the embeddings are those of these tokens
        if step_ids is None and modality_ids is None:
            raise ValueError(
                "generate() got inputs_embeds alone, which do not say which of the towers "
                f"{self.config.tower_names} they are for: pass modality_ids, (batch, length), or input_ids beside them"
            )
        if step_ids is None:
            derived = input_ids.new_zeros(input_ids.shape[0], length)
        else:
            derived = self.model.modality_ids_of(step_ids)
        if modality_ids is None:
            return derived
        if inputs_embeds is None and modality_ids.shape[1] <= input_ids.shape[1]:
            first = input_ids.shape[1] - length  # they begin at the same token, which may follow cached ones
        else:  # embeddings, or one chunk of a long prompt
            first = 0 if cache is None else int(cache.get_seq_length())
        given = modality_ids[:, first : first + length]
        return torch.cat([given, derived[:, given.shape[1] :]], dim=1)
