"""Which modules may be replaced by their weights, and which methods are still those of this package.

Whoever takes the weights of a module instead of calling it leaves out adapters, hooks and replaced forwards.
"""

import inspect

from torch import nn


def is_plain(module: nn.Module, *types: type) -> bool:
    """True if the module is of exactly one of these types, without hooks and with the forward of its class.

    The type decides, since adapters, quantised maps and parametrised weights have types of their own, often of the same
    name.
    """
    return type(module) in types and _has_own_forward(module)


def is_of_this_package(module: nn.Module) -> bool:
    """True if the module has no hooks and the forward of this package; a derived class may change other methods."""
    return _has_own_forward(module) and keeps_methods(module, "forward")


def keeps_methods(owner: object, *names: str) -> bool:
    """True if these methods are those of this package or of transformers: no class of a user, and no object, has its own."""
    of_libraries = (f"{__package__}.", "transformers.")
    methods = [inspect.unwrap(getattr(type(owner), name)) for name in names]
    return not any(name in vars(owner) for name in names) and all(
        method.__module__.startswith(of_libraries) for method in methods
    )


def _has_own_forward(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not ("forward" in vars(module) or module._compiled_call_impl is not None or any(hooks))


def has_whole_weight(module: nn.Module) -> bool:
    """True if the weight is one tensor, and not made of others, as sharded and quantised ones are."""
    return not hasattr(module.weight, "__tensor_flatten__")


def is_plain_linear(module: nn.Module) -> bool:
    """True if the module is a linear map and no more, with a whole weight."""
    return is_plain(module, nn.Linear) and has_whole_weight(module)
