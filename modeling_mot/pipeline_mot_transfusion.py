"""Draw pictures from prompts, by the call that diffusers' pipelines have."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from .modeling_mot_transfusion import MoTTransfusionModel
from .processing_mot import HUB_ARGUMENTS, MoTProcessor


class MoTTransfusionPipeline(DiffusionPipeline):
    """Draw pictures with a `MoTTransfusionModel`, from a prompt, or from a picture and an instruction.

    Args:
        model: a `MoTTransfusionModel`.
        processor: the model's `MoTProcessor`, with an image processor.

    Example, with a model of random weights that has no VAE:

        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from modeling_mot import MoTProcessor, MoTTransfusionConfig, MoTTransfusionModel
        >>> from modeling_mot.image_processing import MoTImageProcessor
        >>> from modeling_mot.processing_vocabulary import extend_tokenizer
        >>> words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "cat": 2}, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words), num_image_codes=0)
        >>> pictures = MoTImageProcessor(image_size=[8, 8], downsampling=4)  # 2 x 2 patches a picture
        >>> processor = MoTProcessor(tokenizer, image_processor=pictures)
        >>> config = MoTTransfusionConfig(
        ...     hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, latent_channels=2,
        ...     latent_size=[4, 4], unet_channels=[8, 16], unet_layers=1, unet_norm_groups=4,
        ...     **processor.config_kwargs(),
        ... )
        >>> pipe = MoTTransfusionPipeline(MoTTransfusionModel(config).eval(), processor)
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(["a cat", "a"], num_inference_steps=2, output_type="latent").images.shape
        torch.Size([2, 2, 4, 4])
    """

    def __init__(self, model: MoTTransfusionModel, processor: MoTProcessor):
        super().__init__()
        self.register_modules(model=model, processor=processor)

    @classmethod
    def from_pretrained(cls, name_or_path: str, **kwargs) -> "MoTTransfusionPipeline":
        """Load the folder or repository of a model with its processor.

        Args:
            name_or_path: the folder, or the repository on the Hub.
            kwargs: of `MoTTransfusionModel.from_pretrained`. A revision, a token and the like go to the processor too.

        Raises:
            ValueError: the checkpoint is not complete, or does not fit.
        """
        model = MoTTransfusionModel.from_pretrained(name_or_path, **kwargs)
        hub_kwargs = {name: value for name, value in kwargs.items() if name in HUB_ARGUMENTS}
        return cls(model, MoTProcessor.from_pretrained(name_or_path, **hub_kwargs))

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save model and processor in one folder, which `AutoModel` and `AutoProcessor` read too."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def __call__(
        self,
        prompt: str | list[str] = "",
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        image_size: int | list[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        scheduler: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        return_dict: bool = True,
        **kwargs,
    ) -> ImagePipelineOutput | tuple:
        """Draw `num_images_per_prompt` pictures for each prompt; pictures of one prompt stand together.

        Args:
            prompt: a text or a list of them; "" draws without one.
            image: a picture to edit, in any form the processor takes, or a list with one (or None) for each prompt.
            height, width: of the pictures in pixels; or `image_size`: one side or both. Default: the model's.
            negative_prompt: a prompt that guidance leads away from, one for all or one for each prompt; default: none.
            generator: one for all, or one for each picture.
            output_type: "pil", "np" (N, H, W, 3) and "pt" (N, 3, H, W) in [0, 1], or "latent" (N, C, h, w). Pictures of
                several sizes are a list of such arrays, each without N.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents", "rows"}).
            num_inference_steps, guidance_scale, image_guidance_scale, scheduler, kwargs: as in
                `MoTTransfusionModel.generate`, such as `guidance_renorm`. Default: of the model's generation
                configuration.
            return_dict: False for a tuple of the pictures alone.

        Returns:
            diffusers' `ImagePipelineOutput`, with the pictures in `images`.

        Raises:
            ValueError: an argument that cannot be followed; the message names it.
        """
        # Check the arguments that `generate()` does not see.
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        images = list(image) if isinstance(image, (list, tuple)) else [image] * len(prompts)
        if not prompts or len(images) != len(prompts):
            raise ValueError(
                f"{len(images)} images came for {len(prompts)} prompts; give one prompt, and image, for each"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is not one of 'pil', 'np', 'pt', 'latent'")
        if self.model.vae is None and output_type != "latent":
            raise ValueError(
                f"output_type={output_type!r}, but this model has no VAE (config.vae_config is None): take 'latent'"
            )

        # Each picture has a document of its own.
        if height is not None or width is not None:
            if image_size is not None:
                raise ValueError(f"pass either image_size={image_size} or height={height} and width={width}, not both")
            usual = [side * self.model.config.vae_downsampling for side in self.model.config.latent_size]
            image_size = [height or usual[0], width or usual[1]]
        documents = [
            ([] if source is None else [{"type": "image", "image": source}])
            + ([{"type": "text", "text": text}] if text.strip() else [])
            for source, text in zip(images, prompts)
            for _ in range(num_images_per_prompt)
        ]

        # A callback of diffusers is given the pipeline, and one of `generate()` the model.
        if callback_on_step_end is not None:
            given = callback_on_step_end

            def callback_on_step_end(model, step, timestep, state):
                return given(self, step, timestep, state)

        output = self.model.generate(
            documents=documents,
            processor=self.processor,
            generation_mode="image",
            image_size=image_size,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            scheduler=scheduler,
            generator=generator,
            output_type="pt" if output_type == "np" else output_type,
            callback_on_step_end=callback_on_step_end,
            progress_bar=not getattr(self, "_progress_bar_config", {}).get("disable", False),
            **self._negative(negative_prompt, len(prompts), num_images_per_prompt),
            **kwargs,
        )

        # diffusers' output is one list or one array; edited pictures may have sizes of their own, and are a list.
        pictures = [picture for own in (output.images or output.latents) for picture in own]
        if output_type == "np":
            pictures = [picture.permute(1, 2, 0).cpu().numpy() for picture in pictures]
        if output_type != "pil" and len({picture.shape for picture in pictures}) == 1:
            pictures = np.stack(pictures) if output_type == "np" else torch.stack(pictures)
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _negative(self, negative_prompt: str | list[str] | None, count: int, repeats: int) -> dict:
        """Encode negative prompts as arguments of `generate()`.

        Args:
            count: of the prompts.
            repeats: pictures of each prompt.
        """
        if negative_prompt is None:
            return {}
        texts = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(texts) not in (1, count):
            raise ValueError(
                f"{len(texts)} negative prompts came for {count} prompts; give one for all, or one for each"
            )
        # Each picture of a prompt has the negative prompt of that prompt.
        if len(texts) > 1:
            texts = [text for text in texts for _ in range(repeats)]
        encoded = self.processor(
            documents=[[{"type": "text", "text": text}] if text.strip() else [] for text in texts],
            continue_with="image",
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return {
            "negative_prompt_ids": encoded["input_ids"],
            "negative_prompt_attention_mask": encoded["attention_mask"],
        }
