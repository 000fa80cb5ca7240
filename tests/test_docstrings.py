"""Every example in a docstring of the package, run on the demo model: what it prints is what it says it prints.

Numbers in them are rounded to what any machine gives. Examples that need a download are marked `# doctest: +SKIP` where
they stand.
"""

import doctest
import random
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import evaluations
import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

import mechvlm as mv
from mechvlm import demo
from mechvlm.report import Study

PACKAGE = Path(mv.__file__).parent
MODULES = sorted(
    ".".join(("mechvlm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


class Claimed(doctest.OutputChecker):
    """Compares what an example claims to print; one that claims nothing, such as a figure's, has only to run."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples take for granted."""
    vlm, scene = mv.load("demo"), demo.scenes()[0]
    real = vlm.prompt(scene.image, "Is there a 7 in the image?")
    null = real.with_image(mv.images.black)
    yes = mv.logit_difference("yes", "no")
    public = {name: getattr(mv, name) for name in dir(mv) if not name.startswith("_")}
    return {
        **public,
        "mv": mv,
        "torch": torch,
        "np": np,
        "random": random,
        "xr": xr,
        "base": evaluations.baseline(),
        "edited": evaluations.changed(evaluations.baseline(), 0.5),
        "Image": Image,
        "vlm": vlm,
        "scene": scene,
        "image": scene.image,
        "real": real,
        "null": null,
        "prompt": real,
        "other": null,
        "yes": yes,
        "layer": 3,
        "direction": torch.ones(vlm.shape.d_model["text"]),
        "image_mean": vlm.run(real, read=["text.0.resid_pre"])["text.0.resid_pre"][0, real.image].mean(0),
        "profile": mv.attention_profile(vlm, real),
        "probabilities": mv.answer_probabilities(vlm, {"real": real, "null": null}, ["yes", "no"]),
        "study": Study(vlm, real, null),
    }


def examples() -> Iterator[doctest.DocTest]:
    """Every docstring of the package that holds examples."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        module = import_module(name)
        yield from (test for test in finder.find(module, name) if test.examples)


EXAMPLES = list(examples())


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
def test_example(
    example: doctest.DocTest, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("cat.png", "other.png"):
        if any(file in one.source for one in example.examples):
            names["image"].save(file)
    example.globs = {**names, **example.globs}
    said: list[str] = []
    found = doctest.DocTestRunner(Claimed(), verbose=False, optionflags=FLAGS).run(example, out=said.append)
    assert not found.failed, "".join(said)
