"""What ablations, searches, sets of image tokens and their figures refuse, word for word; and what the figures show."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jaxtyping
import numpy as np
import pytest
import tiny
import torch
import xarray as xr

import mechvlm as mv

YES = mv.logit_difference("yes", "no")


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without the test run's type checks, so that a wrong type meets our own sentence, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@cache
def vlm() -> mv.VLM:
    return tiny.vlm()


@cache
def real() -> mv.Prompt:
    return vlm().prompt(tiny.picture(), "is there a dog ?")


@cache
def longer() -> mv.Prompt:
    return vlm().prompt(tiny.picture(), "is there a red dog ?")


def each(*args: Any, prompts: Any = None, metric: Any = YES, **more: Any) -> xr.Dataset:
    return mv.ablate_each(vlm(), prompts or real(), metric, *args, **more)


def in_order(order: Any, **more: Any) -> xr.Dataset:
    return mv.ablate_in_order(vlm(), real(), YES, order, **more)


def tokens(sets: Any, prompts: Any = None, **more: Any) -> xr.Dataset:
    return mv.ablate_image_tokens(vlm(), prompts or real(), YES, sets, **more)


def first() -> dict[str, list[int]]:
    return {"first": real().image[:2]}


def by_length(prompt: mv.Prompt) -> dict[str, list[int]]:
    return {f"of {len(prompt)}": prompt.image[:1]}


CASES: list[tuple[str, Callable[[], object]]] = [
    (
        "what='neuron' cannot be taken out; choose from head, attention, mlp, layer, position, region.",
        lambda: each("neuron"),
    ),
    (
        "kind='z' is for positions and regions, and what='mlp' says it itself; leave it out.",
        lambda: each("mlp", kind="z"),
    ),
    (
        "regions are taken out with what='region', and what='head'; write that, or leave them out.",
        lambda: each(regions={"image": [3]}),
    ),
    (
        "positions are not heard with what='region', whose regions say them; leave them out.",
        lambda: each("region", positions=[3]),
    ),
    (
        "'pattern' is no activation with positions; choose from resid_pre, q, k, v, z, attn_out, resid_mid, mlp_out, "
        "resid_post.",
        lambda: each("region", kind="pattern"),
    ),
    ("2 metrics were given for 1 prompts; give one for each, or one for all.", lambda: each(metric=[YES, YES])),
    (
        "the prompts have 26, 27 positions, so that no position is the same in all; take what='region', whose "
        "positions may differ.",
        lambda: each("position", prompts=[real(), longer()]),
    ),
    (
        "one prompt's regions are of 26, and another's of 27; give all the same names.",
        lambda: each("region", prompts=[real(), longer()], regions=by_length),
    ),
    (
        "regions=[3, 4] does not name positions; write for instance {'image': prompt.image}.",
        lambda: each("region", regions=[3, 4]),
    ),
    ("regions names no positions; give at least one name.", lambda: each("region", regions=lambda _: {})),
    (
        "to=3 is neither a prompt nor tensors for attn_out and mlp_out; write {'attn_out': [...], 'mlp_out': [...]}, "
        "lists of one for each of 3 layers.",
        lambda: each("layer", to=3),
    ),
    (
        "to=3 is neither a prompt nor a list of tensors, one for each of 3 layers.",
        lambda: each("mlp", to=3),
    ),
    ("to holds 1 tensors; give one for each of the 3 layers.", lambda: each("mlp", to=[torch.zeros(32)])),
    (
        "to has 27 positions and the prompt 26, so positions cannot be matched; make it with prompt.with_image, which "
        "keeps them.",
        lambda: each("mlp", to=longer()),
    ),
    (
        "what is put at text.0.mlp_out holds (31,); it must be (32,), or that once for each of 26 positions.",
        lambda: each("mlp", to=[torch.zeros(31)] * 3),
    ),
    (
        "positions='all' is not known; give positions, a function of a prompt, or 'each'.",
        lambda: mv.mean_activations(vlm(), real(), positions="all"),
    ),
    (
        "the prompts have 26, 27 positions, so that no position is the same in all; leave positions='each' out, or ask "
        "the same words about pictures of one size.",
        lambda: mv.mean_activations(vlm(), [real(), longer()], positions="each"),
    ),
    (
        "a prompt holds no image, so it has no image features; make it with vlm.prompt(image, text).",
        lambda: mv.mean_features(vlm(), vlm().prompt(None, "is there a dog ?")),
    ),
    (
        "what='region' is no part that can be taken out; choose from head, attention, mlp, layer.",
        lambda: in_order([(0, 1)], what="region"),
    ),
    (
        "[3] is not a list of parts; each must be a pair (layer, head), and there must be one or more.",
        lambda: in_order([3]),
    ),
    ("the part 0, 1 is given more than once; give each once.", lambda: in_order([(0, 1), (0, 1)])),
    (
        "counts=[3] cannot be taken from 2 parts; give numbers from 0 to that.",
        lambda: in_order([0, 1], what="mlp", counts=[3]),
    ),
    (
        "controls=0 compares with nothing; give 1 random set or more.",
        lambda: in_order([0], what="mlp", controls=0),
    ),
    (
        "2 parts cannot be drawn of 1 candidates; give more candidates.",
        lambda: in_order([0, 1], what="mlp", candidates=[2]),
    ),
    ("objective='less' is not known; choose 'lower' or 'higher'.", lambda: in_order([(0, 1)], objective="less")),
    (
        "strongest takes effects over layer and head, or layer, and was given 3; take the mean over prompts, "
        'ablate_each(...)["mean"].',
        lambda: mv.strongest(3, 1),  # type: ignore[arg-type]
    ),
    (
        "count=4 parts cannot be taken of 3; give a number from 1 to that.",
        lambda: mv.strongest(xr.DataArray(np.zeros(3), dims=["layer"]), 4),
    ),
    (
        "count=3 heads cannot be found among 2; give a number from 1 to that.",
        lambda: mv.find_heads(vlm(), real(), YES, 3, [(0, 1), (0, 2)]),
    ),
    ("amount=2 is no share of attention; give a number from 0 to 1.", lambda: mv.soft_identity(0, [1], 2.0)),
    (
        "the set 'text' holds 0, which is no image token; give some of prompt.image.",
        lambda: tokens({"text": [0]}),
    ),
    (
        "the set 'all' holds 16 of 16 image tokens, so there are not as many others to compare it with; give smaller "
        "sets.",
        lambda: tokens({"all": real().image}),
    ),
    (
        "controls=-1 compares with nothing; give 1 random set or more.",
        lambda: tokens(first(), controls=-1),
    ),
    (
        "one prompt's sets are of 26, and another's of 27; give all the same names.",
        lambda: tokens(by_length, [real(), longer()]),
    ),
    (
        "to='nothing' cannot take the place of image features; give 'mean', 'zero', a prompt, or what mv.mean_features "
        "returns.",
        lambda: tokens(first(), to="nothing"),
    ),
    (
        "to holds (31,) for image_features; it must be one vector of 32.",
        lambda: tokens(first(), to=torch.zeros(31)),
    ),
    (
        "to has 32 image tokens and the prompt 16, so they cannot be matched; make it with prompt.with_image.",
        lambda: tokens(first(), to=vlm().prompt([tiny.picture(), tiny.picture()], "is there a dog ?")),
    ),
    (
        "the prompt holds no image to take tokens of; make it with vlm.prompt(image, text).",
        lambda: mv.norm_outliers(vlm(), vlm().prompt(None, "is there a dog ?"), count=1),
    ),
    (
        "outliers are so many, or longer than so many times the median; give count or factor.",
        lambda: mv.norm_outliers(vlm(), real()),
    ),
    (
        "count=17 image tokens cannot be taken of 16; give a number from 1 to that.",
        lambda: mv.norm_outliers(vlm(), real(), count=17),
    ),
    (
        "the answer 'maybe' is to be told from others, and the words are ('yes', 'no').",
        lambda: mv.accuracy(vlm(), "maybe"),
    ),
    (
        "effects draws what ablate_each returns, and was given a DataArray; make it with mv.ablate_each.",
        lambda: mv.plot.effects(xr.DataArray([1.0], dims=["layer"])),  # type: ignore[arg-type]
    ),
    (
        "head_search draws what find_heads returns, and was given a Dataset with layer; make it with mv.find_heads.",
        lambda: mv.plot.head_search(xr.Dataset({"layer": 1})),
    ),
]


@pytest.mark.parametrize(("message", "wrong"), CASES, ids=[message[:60] for message, _ in CASES])
@pytest.mark.usefixtures("untyped")
def test_is_refused(message: str, wrong: Callable[[], object]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        wrong()
    assert str(caught.value) == message


def test_no_token_is_as_long_as_asked_for() -> None:
    with pytest.raises(ValueError, match=r"^no image token is longer than .*, 100 times the median; the longest has"):
        mv.norm_outliers(vlm(), real(), factor=100)


# -- figures ---------------------------------------------------------------------------------------------------------


def test_a_table_of_effects_tells_the_interval_on_hover() -> None:
    found = each(prompts=[real(), longer()])
    figure = mv.plot.effects(found)
    assert np.array_equal(figure.data[0].z, found["mean"].values)
    here = found.sel(layer=1, head=2)
    assert figure.data[0].hovertext[1][2].endswith(f"from {float(here.low):.4g} to {float(here.high):.4g}")
    assert mv.plot.effects(each("mlp")).data[0].y.tolist() == each("mlp")["mean"].values.tolist()


def test_orders_searches_and_sets_are_drawn_beside_chance() -> None:
    found = in_order([(0, 1), (2, 3)], controls=3)
    drawn = {trace.name: trace for trace in mv.plot.ablation_order(found).data if trace.showlegend is None}
    assert drawn["ranked"].y.tolist() == found["mean"].values.tolist()
    assert np.allclose(drawn["random"].y, found.random.mean(["prompt", "sample"]))
    search = mv.find_heads(vlm(), real(), YES, 2, [(0, 1), (2, 3)], held_out=[longer()])
    figure = mv.plot.head_search(search)
    assert figure.layout.xaxis.ticktext == ("none", *(f"+ {layer}.{head}" for layer, head in mv.heads_found(search)))
    assert [trace.name for trace in figure.data] == ["searched", "held out", "candidates"]
    assert figure.data[1].y.tolist() == search.held_out[0].values.tolist()
    sets = tokens(first(), controls=3)
    bars = mv.plot.token_sets(sets).data
    assert (bars[0].y.item(), bars[1].y.item()) == (sets["mean"].item(), sets.random.mean().item())
