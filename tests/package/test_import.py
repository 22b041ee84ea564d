"""What `import fastkd` reaches."""

import subprocess
import sys


def test_every_part_is_reached_and_listed():
    code = """
import fastkd
names = dir(fastkd)
assert set(fastkd.__all__) <= set(names) and names == sorted(names), names
assert fastkd.graphs.Graphs and all(getattr(fastkd, name) is not None for name in fastkd.__all__)
try:
    fastkd.graph
except AttributeError as error:
    assert "'graph'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
