"""Mixture-of-Transformers for Hugging Face transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from .configuration_mot import MoTConfig
from .modality_routing import ModalityRouting
from .modeling_mot import MoTForCausalLM, MoTModel, MoTPreTrainedModel
from .processing_mot import MoTProcessor


AutoConfig.register(MoTConfig.model_type, MoTConfig)
AutoModel.register(MoTConfig, MoTModel)
AutoModelForCausalLM.register(MoTConfig, MoTForCausalLM)
AutoProcessor.register(MoTConfig, MoTProcessor)

__all__ = ["ModalityRouting", "MoTConfig", "MoTForCausalLM", "MoTModel", "MoTPreTrainedModel", "MoTProcessor"]
