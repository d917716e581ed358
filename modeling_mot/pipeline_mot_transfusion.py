"""Pictures from prompts with the call that diffusers' pipelines have."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from .modeling_mot_transfusion import MoTTransfusionModel
from .processing_mot import HUB_ARGUMENTS, MoTProcessor


class MoTTransfusionPipeline(DiffusionPipeline):
    """Draw pictures with a `MoTTransfusionModel`, also from a picture and an instruction.

    Args:
        model: a `MoTTransfusionModel`.
        processor: its `MoTProcessor`, with an image processor.
    """

    def __init__(self, model: MoTTransfusionModel, processor: MoTProcessor):
        super().__init__()
        self.register_modules(model=model, processor=processor)

    @classmethod
    def from_pretrained(cls, name_or_path: str, **kwargs) -> "MoTTransfusionPipeline":
        """From the folder or repository of a model with its processor; arguments go to the model."""
        model = MoTTransfusionModel.from_pretrained(name_or_path, **kwargs)
        hub_kwargs = {name: value for name, value in kwargs.items() if name in HUB_ARGUMENTS}
        return cls(model, MoTProcessor.from_pretrained(name_or_path, **hub_kwargs))

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """One folder, as `AutoModel` and `AutoProcessor` read it."""
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
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        scheduler: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        return_dict: bool = True,
        **kwargs,
    ) -> ImagePipelineOutput | tuple:
        """One picture for each prompt, or `num_images_per_prompt` of them, which stand together.

        Args:
            prompt: a text or a list of them; "" draws without one.
            image: a picture to edit, in any form the processor takes, or a list with one (or None) for each prompt.
            height, width: of the pictures in pixels; or `image_size`: one side or both. Default: the model's.
            negative_prompt: what guidance leads away from, one for all or one for each prompt; default: no prompt.
            generator: one for all, or one for each picture.
            output_type: "pil", "np" (N, H, W, 3) and "pt" (N, 3, H, W) in [0, 1], or "latent" (N, C, h, w).
            callback_on_step_end: called as (pipeline, step, timestep, {"latents", "rows"}).
            num_inference_steps, guidance_scale, scheduler, kwargs: as in `MoTTransfusionModel.generate`; by default what
                the model's generation configuration says.

        Raises:
            ValueError: what cannot be drawn, by name.
        """
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
            scheduler=scheduler,
            generator=generator,
            output_type="pt" if output_type == "np" else output_type,
            callback_on_step_end=callback_on_step_end,
            progress_bar=not getattr(self, "_progress_bar_config", {}).get("disable", False),
            **self._negative(negative_prompt, len(prompts), num_images_per_prompt),
            **kwargs,
        )
        pictures = [picture for own in (output.images or output.latents) for picture in own]
        if output_type != "pil":
            pictures = torch.stack(pictures)
        if output_type == "np":
            pictures = pictures.permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _negative(self, negative_prompt: str | list[str] | None, count: int, repeats: int) -> dict:
        if negative_prompt is None:
            return {}
        texts = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(texts) not in (1, count):
            raise ValueError(
                f"{len(texts)} negative prompts came for {count} prompts; give one for all, or one for each"
            )
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
