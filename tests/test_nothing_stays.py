"""What a call made is gone when its result is: no run, graph or batch of activations outlives it."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import test_elsewhere
import tiny
import torch
import zoo

import mechvlm as mv

YES = mv.logit_difference("yes", "no")
STOP = mv.Edit(mv.Site("mlp_out", 1), torch.zeros_like, on="grad", label="stop")
Call = Callable[[mv.VLM, mv.Prompt, mv.Prompt], object]
CALLS: dict[str, Call] = {
    "run": lambda vlm, real, _: vlm.run(real, grad_of=YES),
    "edited gradient": lambda vlm, real, _: vlm.run(real, grad_of=YES, edits=[STOP]),
    "atp*": lambda vlm, real, null: mv.attribution_patching(vlm, real, null, YES, method="atp*", verify=1),
    "ig": lambda vlm, real, null: mv.attribution_patching(vlm, real, null, YES, method="ig", path="pixels"),
    "eap-ig": lambda vlm, real, null: mv.edge_attribution(vlm, real, null, YES, steps=2, verify=1),
    "circuit": lambda vlm, real, null: mv.circuit_faithfulness(
        vlm, mv.Circuit([mv.Edge("image", "m1")]), null, real, YES, controls=1
    ),
    "path": lambda vlm, real, null: mv.path_patching(vlm, real, null, YES, receivers="a1.h1<z>"),
    "relevancy": lambda vlm, real, _: mv.relevancy(vlm, real, YES),
    "patches": lambda vlm, real, null: mv.patch_spans(vlm, real, null, YES),
}


def live() -> int:
    """How many tensors there are."""
    gc.collect()
    return sum(type(one) is torch.Tensor for one in gc.get_objects())


@pytest.mark.parametrize("name", CALLS)
def test_no_tensor_outlives_the_call_that_made_it(name: str) -> None:
    vlm: Any = tiny.vlm(2, "sdpa")
    real = vlm.prompt(tiny.picture(1), "is there a red cat ?")
    null = real.with_image(mv.images.grey)
    CALLS[name](vlm, real, null)  # fills what is kept for later calls on purpose
    before = live()
    CALLS[name](vlm, real, null)
    assert live() <= before


@zoo.second_environment
@pytest.mark.parametrize("name", [name for name in test_elsewhere.CALLS if test_elsewhere.model_of(name) == "llava"])
def test_no_tensor_outlives_any_public_call(name: str) -> None:
    case = test_elsewhere.Case(test_elsewhere.here("llava"))
    test_elsewhere.CALLS[name](case)
    before = live()
    test_elsewhere.CALLS[name](case)
    assert live() <= before
