"""The identities that every reading and edit rests on, as functions that measure how far a model is from them.

The tests run them over tiny random models; `vlm.check()` and `mechvlm check MODEL` run them on anyone's checkpoint. A
law compares with what does not pass through mechvlm where there is such a thing (`mechvlm.references`, `generate` of
transformers). The numbers are those of docs/architecture.md.

>>> [finding.holds for finding in law_7_lens(vlm, prompt)]
[True, True]
"""

import sys
from typing import Any

from mechvlm.laws.attending import law_4_patterns, law_6_biases
from mechvlm.laws.elsewhere import law_12_elsewhere
from mechvlm.laws.exact import law_1_reading, law_2_writing_back, law_3_residuals, law_5_patching
from mechvlm.laws.finding import Finding as Finding
from mechvlm.laws.runs import law_7_lens, law_8_batches, law_9_generation, law_10_gradients, law_13_positions
from mechvlm.laws.sweeps import law_8_sweeps
from mechvlm.prompt import Prompt


def check(vlm: Any, prompt: Prompt | None = None, show: bool = True) -> Any:
    """Measure every law on a model; a pandas DataFrame with a row a finding.

    Args:
        prompt: by default a question about a picture of coloured squares, where the model has a processor.
        show: also write the table to standard output.

    Raises:
        ValueError: for a model whose weights are not here.
    """
    import pandas  # half a second to import, and only needed here

    if vlm.place.remote and vlm.embedding.is_meta:
        raise ValueError(
            f"the laws compare {vlm.name} with itself run without mechvlm, and its weights are elsewhere; check it "
            "where they are, mv.load(name).check()."
        )

    prompt = prompt or vlm.prompt(squares(), "Is there a dog in the image?")
    found = [finding for law in LAWS for finding in law(vlm, prompt)]
    table = pandas.DataFrame(
        [(one.law, one.what, one.error, one.allowed, "holds" if one.holds else "BROKEN") for one in found],
        columns=["law", "what", "error", "allowed", "verdict"],
    )
    if show:
        sys.stdout.write(f"{vlm!r}\n{table.to_string(index=False)}\n")
    return table


def squares() -> Any:
    """A picture of coloured squares, different at every place."""
    import numpy as np
    from PIL import Image

    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(48, 0).repeat(48, 1))


LAWS = (
    law_1_reading,
    law_2_writing_back,
    law_3_residuals,
    law_4_patterns,
    law_5_patching,
    law_6_biases,
    law_7_lens,
    law_8_batches,
    law_8_sweeps,
    law_9_generation,
    law_10_gradients,
    law_12_elsewhere,
    law_13_positions,
)
