"""Optional packages: imported where they are needed, with one sentence that says what to install."""

import importlib
from types import ModuleType


def require(module: str, purpose: str, extra: str = "train") -> ModuleType:
    """Imports `module`, or raises ImportError naming the package, its `purpose` and the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module  # what `module` itself imports may be what is missing
        if module == "torch.utils.tensorboard":
            missing = "tensorboard"
        top = missing.split(".")[0]
        package = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}.get(top, top)
        how = f'pip install ".[{extra}]" in the sources of fastkd'  # it is on no index
        raise ImportError(f"{purpose} needs {package} ({error}): {how}") from error
