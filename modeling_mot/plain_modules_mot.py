"""Whether a module may be taken apart: whoever uses its weights without calling it leaves out what was hung onto it."""

from torch import nn


def is_plain(module: nn.Module, *forwards: str) -> bool:
    """Whether calling the module is no more than a forward of these names: no hooks, nothing in its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    replaced = "forward" in vars(module) or module._compiled_call_impl is not None
    return not (replaced or any(hooks)) and type(module).forward.__qualname__ in forwards


def has_whole_weight(module: nn.Module) -> bool:
    """Whether the weight is a tensor, and not made of others, as sharded and quantised ones are."""
    return not hasattr(module.weight, "__tensor_flatten__")


def is_plain_linear(module: nn.Module) -> bool:
    """The same of a linear map; adapters and quantised maps have forwards of its name, but are of other types, or their
    weights are made of other tensors (as sharded ones are)."""
    return type(module) is nn.Linear and has_whole_weight(module) and is_plain(module, "Linear.forward")
