"""The examples in the docstrings of modeling_mot run, and no public class is without one."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import modeling_mot


MODULES = sorted(path.stem for path in Path(modeling_mot.__file__).parent.glob("*.py"))
# The public classes of the one file that is the model.
PARTS = {
    name: part
    for name, part in vars(modeling_mot.modeling_mot).items()
    if inspect.isclass(part) and part.__module__ == modeling_mot.modeling_mot.__name__ and not name.startswith("_")
}
GENERATE = [modeling_mot.MoTForCausalLM.generate, modeling_mot.MoTTransfusionModel.generate]


def owners(name):
    """Every (name, object) of a module that may have a docstring: itself, its functions, its classes, their methods."""
    module = importlib.import_module("modeling_mot" if name == "__init__" else f"modeling_mot.{name}")
    yield name, module
    for member, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        yield f"{name}.{member}", value
        # Of methods too that a decorator of another library has wrapped, which doctest's own finder leaves out.
        if inspect.isclass(value):
            yield from ((f"{name}.{member}.{method}", part) for method, part in vars(value).items())


def examples(name, owner, names=()):
    """The examples of a docstring; they see `names`, by default none, as doctest lets them see their module's."""
    doc = getattr(owner, "__doc__", None)
    return doctest.DocTestParser().get_doctest(doc if isinstance(doc, str) else "", dict(names), name, None, None)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    runner = doctest.DocTestRunner(verbose=False)
    (_, module), *_ = found = list(owners(name))
    said = []
    for place, owner in found:
        runner.run(examples(place, owner, vars(module)), out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.mark.parametrize("name", modeling_mot.__all__)
def test_a_public_class_has_an_example(name):
    assert examples(name, getattr(modeling_mot, name)).examples


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_the_model_has_an_example(name):
    assert examples(name, PARTS[name]).examples


@pytest.mark.parametrize("generate", GENERATE, ids=lambda generate: generate.__qualname__)
def test_generate_has_an_example(generate):
    assert examples("generate", generate).examples
