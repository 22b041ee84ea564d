"""Optional packages: imported where they are needed, with one sentence that says what to install."""

import importlib
from types import ModuleType


def require(module: str, purpose: str, extra: str = "train") -> ModuleType:
    """Imports `module`, or raises ImportError naming the package, its `purpose` and the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        names = {"sklearn": "scikit-learn", "PIL": "pillow", "torch.utils.tensorboard": "tensorboard"}
        top = module.split(".")[0]
        package = names.get(module) or names.get(top, top)
        raise ImportError(f'{purpose} needs {package} ({error}): pip install "fastkd[{extra}]"') from error
