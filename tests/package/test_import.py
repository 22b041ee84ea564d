"""What `import fastkd` reaches."""

import os
import subprocess
import sys

CODE = """
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
print(fastkd.backend_info()["cpu"])
"""


def test_every_part_is_reached_and_listed_and_without_kernels_importing_warns_of_nothing(tmp_path):
    """As where no compiler was found: warnings that are errors stop no program before its first loss."""
    environment = os.environ | {"FASTKD_LIBRARY_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"libfastkd_cpu.so is not in {tmp_path}, which FASTKD_LIBRARY_DIR names; for the kernels" in done.stdout
