import beartype  # noqa: F401  (first of all: nnsight mounts `.save` on `object`, and beartype cannot be imported after that)

# isort: split
"""What every test runs under. mechvlm is not imported here: pytest reads this file before the jaxtyping hook is set."""

import os
import random
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads; one that tries fails with a sentence instead of waiting
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # notes on random weights and lazy imports, which are not test output

import checked
import hypothesis
import jaxtyping
import loopback
import numpy as np
import pytest
import torch

if find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # The wheel of PyPI is built for CUDA, and a CPU build of torch misses two of its operators. No processor uses
        # them.
        SHIM = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            SHIM.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

vars(jaxtyping)["jaxtyped"] = checked.jaxtyped  # what the hook puts around each function, quicker
torch.set_num_threads(1)  # the models here are so small that threads would only wait for one another

hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(autouse=True, scope="session")
def elsewhere() -> None:
    """With MECHVLM_ELSEWHERE=1 every model runs as if it were elsewhere: law 12, over whatever tests are asked for."""
    if os.environ.get("MECHVLM_ELSEWHERE") == "1":
        from mechvlm import places, vlm

        vlm.place_of = lambda remote: places.place_of(remote or "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what looks into this process, where every model runs as if it were elsewhere."""
    if os.environ.get("MECHVLM_ELSEWHERE") == "1":
        for item in items:
            if item.get_closest_marker("here"):
                item.add_marker(pytest.mark.skip(reason="looks at what happens in this process"))


@pytest.fixture(autouse=True)
def generator() -> torch.Generator:
    """Every test starts from the same random numbers; one that wants its own stream asks for this generator."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def vlm() -> Any:
    """A tiny model in double precision; modules that want another define it."""
    import tiny

    return tiny.vlm(2, "sdpa", torch.float64)


@pytest.fixture(scope="module")
def real(vlm: Any) -> Any:
    """A prompt to the module's model."""
    import tiny

    return vlm.prompt(tiny.picture(1), "is there a red cat ?")


@pytest.fixture(scope="module")
def other(vlm: Any) -> Any:
    """Another picture and another word."""
    import tiny

    return vlm.prompt(tiny.picture(2), "is there a red dog ?")


@pytest.fixture(scope="session")
def running() -> Iterator[loopback.Server]:
    """A server on this machine in an environment without mechvlm; one for all tests of a process."""
    with loopback.serve() as one:
        yield one


@pytest.fixture
def server(running: loopback.Server) -> Iterator[loopback.Server]:
    """The server, with nothing wrong with it until a test says so, and alive again after the test."""
    running.fail()
    yield running
    if running.process is None:
        running.start()
