"""Where code comes from: with Python or with an installed package, or from the user.

Rule this module guards: one answer for all that ask. What users write may change from run to run, is told by its source
and is sent along; what is installed is known by its name.

>>> installed("/usr/local/lib/python3.12/dist-packages/torch/__init__.py"), installed("/home/ann/study.py")
(True, False)
"""

import sys
import sysconfig
from pathlib import Path

FOLDERS = {"site-packages", "dist-packages"}
"""Where packages are installed: the second by Debian and those that build on it, Colab among them."""
OWN = frozenset(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
"""Where this Python keeps its own, and what is installed."""


def installed(file: str) -> bool:
    """Whether a file came with Python or with an installed package.

    Example:
        >>> import os
        >>> installed(os.__file__)
        True
    """
    path = Path(file)
    return bool(FOLDERS & set(path.parts)) or any(path.is_relative_to(place) for place in OWN)


def file_of(module: str) -> str:
    """The file an imported module was read from; empty where it has none, or is not imported.

    Example:
        >>> file_of("sys"), file_of("json").endswith("__init__.py")
        ('', True)
    """
    return str(vars(sys.modules[module]).get("__file__") or "") if module in sys.modules else ""
