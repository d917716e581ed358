"""Mixture-of-Transformers for Hugging Face transformers. Importing the package registers it with the auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_mot import MoTConfig
from .configuration_mot_transfusion import MoTTransfusionConfig
from .modeling_mot import MoTForCausalLM, MoTModel, MoTPreTrainedModel
from .modeling_mot_transfusion import MoTTransfusionModel
from .pipeline_mot_transfusion import MoTTransfusionPipeline
from .processing_mot import MoTProcessor
from .tower_routing import ModalityRouting


AutoConfig.register(MoTConfig.model_type, MoTConfig)
AutoModel.register(MoTConfig, MoTModel)
for _auto_class in (AutoModelForCausalLM, AutoModelForMultimodalLM):
    _auto_class.register(MoTConfig, MoTForCausalLM)
AutoProcessor.register(MoTConfig, MoTProcessor)

AutoConfig.register(MoTTransfusionConfig.model_type, MoTTransfusionConfig)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(MoTTransfusionConfig, MoTTransfusionModel)
AutoProcessor.register(MoTTransfusionConfig, MoTProcessor)

__all__ = [
    "ModalityRouting",
    "MoTConfig",
    "MoTForCausalLM",
    "MoTModel",
    "MoTPreTrainedModel",
    "MoTProcessor",
    "MoTTransfusionConfig",
    "MoTTransfusionModel",
    "MoTTransfusionPipeline",
]
