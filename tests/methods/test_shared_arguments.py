"""FT and PCL take the arguments of what they are made of, which are written there alone."""

import inspect

import pytest
from dkel_helpers import tiny
from torch import nn

from fastkd import methods, models


def keywords(kind):
    found = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}


def test_signatures_are_those_of_the_base():
    feed, dkel = keywords(methods.FEED), keywords(methods.DKEL)
    assert keywords(methods.FT) == {name: value for name, value in feed.items() if name != "mode"}
    fixed = ("decay", "ensemble_ramp", "init")
    assert keywords(methods.PCL) == {name: value for name, value in dkel.items() if name not in fixed} | {"c": 1.0}
    assert [*inspect.signature(methods.FT).parameters][:3] == ["student", "teacher", "beta"]
    assert inspect.signature(methods.PCL).parameters["c"].annotation == "float"


def test_defaults_and_given_arguments_arrive():
    make = lambda: models.create("plain2", 3, image_size=8, channels=1, width=0.0625)  # noqa: E731
    assert methods.FT(make(), make()).beta == keywords(methods.FEED)["beta"] and methods.FT(make(), make(), p=2).p == 2
    assert methods.PCL(tiny(0)).c == 1.0 and methods.PCL(tiny(0), c=0.5).c == 0.5
    assert methods.PCL(tiny(0)).init is None


@pytest.mark.parametrize("make, unknown", [
    (lambda: methods.PCL(tiny(0), decay=0.5), "decay"), (lambda: methods.PCL(tiny(0), init=2), "init"),
    (lambda: methods.FT(nn.Linear(1, 1), nn.Linear(1, 1), mode="parallel"), "mode"),
])  # fmt: skip
def test_what_they_fix_cannot_be_given(make, unknown):
    with pytest.raises(TypeError, match=f"(PCL|FT): got an unexpected keyword argument '{unknown}'"):
        make()
