"""The examples in the docstrings: every public function, module and method has one, and each says what is true."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import fastkd

PARTS = ("functional", "losses", "nn", "methods", "models", "data", "testing", "train")
PUBLIC = ("fastkd", *(f"fastkd.{name}" for name in PARTS))
# What nobody makes alone: exceptions, plain records, and what needs a meter around it.
WITHOUT = {"FallbackWarning", "UnreadableImage", "Interrupted", "UserError", "Learner", "Stage", "train_epoch"}


def modules():
    yield fastkd
    for found in pkgutil.walk_packages(fastkd.__path__, "fastkd."):
        if not found.name.endswith("__main__") and not found.name.rpartition(".")[2].startswith("libfastkd"):
            yield importlib.import_module(found.name)


def examples():
    """Every docstring of the package that has an example, public or not."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = {"torch": torch, "fastkd": fastkd}
    found = [test for module in modules() for test in finder.find(module, globs=names) if test.examples]
    return sorted(found, key=lambda test: test.name)


def public_objects():
    for name in PUBLIC:
        module = importlib.import_module(name)
        own = [each for each, thing in vars(module).items() if getattr(thing, "__module__", "") == name]
        for each in getattr(module, "__all__", own):
            thing = getattr(module, each)
            wanted = not each.startswith("_") and each not in WITHOUT
            if wanted and (inspect.isclass(thing) or inspect.isfunction(thing)):
                yield f"{name}.{each}", thing


EXAMPLES = examples()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_example(example, capsys):
    torch.manual_seed(0)
    result = doctest.DocTestRunner().run(example, clear_globs=False)
    assert result.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name, thing", [pytest.param(*each, id=each[0]) for each in public_objects()])
def test_everything_public_has_an_example(name, thing):
    assert ">>> " in (thing.__doc__ or ""), f"{name} has no example in its docstring"


def test_there_are_examples_enough():
    assert sum(len(test.examples) for test in EXAMPLES) >= 150
    assert {"fastkd.ops.multi_teacher.multi_teacher_kd", "fastkd.methods.dkel.DKEL"} <= {test.name for test in EXAMPLES}
