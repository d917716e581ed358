"""Generation across modalities: what may follow in each span, and routing for every cached step."""

# R sequences, L tokens so far, V vocabulary

from functools import partial

import torch
from transformers.generation import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .modality_routing import ModalityRouting


class ModalitySpanLogitsProcessor(LogitsProcessor):
    """Only what the open span may contain: codes up to the grid's number and then EOI in an image,
    units until end of speech in speech, text elsewhere.

    The span is read off the tokens of each sequence, so beams and assistants may reorder and
    discard them freely.

    Args:
        config: a `MoTConfig` with `modality_token_ranges`.
        image_grid: rows and columns of an image's codes; None leaves the number to the model.
        max_speech_tokens: the longest span of speech; None for no bound.
    """

    def __init__(self, config, image_grid=None, max_speech_tokens=None, device=None):
        ranges = config.modality_token_ranges
        codes = None if image_grid is None else image_grid[0] * image_grid[1]
        # modality -> (opening token, closing token, fewest and most tokens between them)
        markers = {
            "image": (config.boi_token_id, config.eoi_token_id, codes or 1, codes),
            "speech": (config.begin_of_speech_token_id, config.end_of_speech_token_id, 1, max_speech_tokens),
        }
        self.spans = []
        # Tokens outside of all ranges are text, as they are for routing: a resized vocabulary has them.
        text = torch.ones(config.vocab_size, dtype=torch.bool, device=device)
        for modality in config.modalities[1:]:
            text[slice(*ranges[modality])] = False
        for modality, (opening, closing, fewest, most) in markers.items():
            if opening is None:
                continue
            if modality not in ranges:
                text[opening] = False  # nothing could stand in such a span
                continue
            inside = torch.zeros_like(text)
            inside[slice(*ranges[modality])] = True
            text[closing] = False
            self.spans.append((opening, closing, fewest, most, inside))
        self.text = text

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(R, L), (R, V) -> (R, V)"""
        if input_ids.shape[1] == 0:  # a prompt of embeddings
            return scores.masked_fill(~self.text, -float("inf"))
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        allowed = self.text.expand_as(scores)
        for opening, closing, fewest, most, inside in self.spans:
            opened = (places * (input_ids == opening)).amax(dim=1)
            is_open = opened > (places * (input_ids == closing)).amax(dim=1)
            length = (input_ids.shape[1] - opened).unsqueeze(-1)  # (R, 1) tokens since the opening one
            is_closing = torch.zeros_like(inside)
            is_closing[closing] = True
            may_close = (length >= fewest) & is_closing
            may_go_on = inside.expand_as(scores) if most is None else (length < most) & inside
            allowed = torch.where(is_open.unsqueeze(-1), may_close | may_go_on, allowed)
        return scores.masked_fill(~allowed, -float("inf"))


class MoTGenerationMixin(GenerationMixin):
    """`generate()` for sequences of several modalities.

    Arguments are those of `GenerationMixin.generate`, and:

        modality_ids: (B, L) of the prompt; those of new tokens follow from `config.modality_token_ranges`.
        image_grid: rows and columns of codes in an image, instead of `config.image_grid`.
        max_speech_tokens: instead of `config.max_speech_tokens`.
        constrain_spans: False to sample from the whole vocabulary everywhere (default True).

    `guidance_scale` with `negative_prompt_ids` guides pictures away from the unconditional prompt.
    """

    def generate(self, inputs=None, *args, **kwargs):
        if kwargs.get("document_ids") is not None:
            raise ValueError("generate() got document_ids: packed rows are for training, pass one document per row")
        if len(self.config.tower_names) > 1 and self.config.modality_token_ranges is None:
            raise ValueError(
                "generate() needs config.modality_token_ranges to know the modality of each new token; it is None"
            )
        return super().generate(inputs, *args, **kwargs)

    def _prepare_generation_config(self, generation_config, **kwargs):
        own = {name: kwargs.pop(name, None) for name in ("image_grid", "max_speech_tokens", "constrain_spans")}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, value in own.items():
            if value is None:
                value = getattr(generation_config, name, None)
            setattr(generation_config, name, getattr(self.config, name, None) if value is None else value)
        return generation_config, model_kwargs

    def _get_logits_processor(self, generation_config, *args, logits_processor=None, **kwargs):
        logits_processor = LogitsProcessorList(logits_processor or [])
        has_spans = self.config.boi_token_id is not None or self.config.begin_of_speech_token_id is not None
        constrain = generation_config.constrain_spans is not False
        if constrain and has_spans and self.config.modality_token_ranges is not None:
            # Custom processors run before temperature and top-k, which so choose among what may follow.
            logits_processor.append(
                ModalitySpanLogitsProcessor(
                    self.config, generation_config.image_grid, generation_config.max_speech_tokens, kwargs.get("device")
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

    def prepare_inputs_for_generation(
        self, input_ids, modality_ids=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if len(self.config.tower_names) > 1:
            # Outside of the forward, so that a compiled forward has no data-dependent step.
            modality_ids = self._modality_ids_of_step(input_ids, inputs, modality_ids)
            inputs["routing"] = ModalityRouting.from_modality_ids(modality_ids, self.config)
        if self.config.moe_towers:
            # Expert choice looks at later tokens; generation takes each token's own choice.
            inputs["token_choice"] = True
        return inputs

    def _modality_ids_of_step(self, input_ids, inputs, modality_ids):
        new_ids = inputs.get("input_ids")
        if new_ids is None:  # a prompt of embeddings, which are text unless modality_ids say otherwise
            shape = inputs["inputs_embeds"].shape[:2]
            return input_ids.new_zeros(shape) if modality_ids is None else modality_ids
        if modality_ids is None or modality_ids.shape[1] > input_ids.shape[1]:
            return self.model.modality_ids_of(new_ids)
        # Those of the prompt were given; what came after it follows from the vocabulary.
        later = self.model.modality_ids_of(input_ids[:, modality_ids.shape[1] :])
        return torch.cat([modality_ids, later], dim=1)[:, -new_ids.shape[1] :]
