"""Published methods, one paper a file, built from public names: what they compute, and under which convention.

A published convention that is a mistake has a name (`convention="viar-2026"`) and is never the default.

`mv.methods.viar`: VIAR, the reference study, whole; `mv.methods.contrast`: visual contrastive decoding.
"""

from mechvlm.methods import contrast as contrast
from mechvlm.methods import viar as viar

__all__ = ["contrast", "viar"]
