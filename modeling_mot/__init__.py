"""Mixture-of-Transformers for Hugging Face transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_mot import MoTConfig
from .modality_routing import ModalityRouting
from .modeling_mot import MoTForCausalLM, MoTModel, MoTPreTrainedModel


AutoConfig.register("mixture_of_transformers", MoTConfig)
AutoModel.register(MoTConfig, MoTModel)
AutoModelForCausalLM.register(MoTConfig, MoTForCausalLM)

__all__ = ["ModalityRouting", "MoTConfig", "MoTForCausalLM", "MoTModel", "MoTPreTrainedModel"]
