"""The environment of the examples where its packages cannot be had."""

import pytest

from . import conftest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ci, outcome", [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_packages_that_cannot_be_had_skip_the_tests_and_fail_in_ci(ci, outcome, monkeypatch, tmp_path):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr(conftest, "FOLDER", tmp_path)
    with pytest.raises(outcome, match=r"requirements\.txt could not be installed: .*accelerate"):
        conftest._install()
