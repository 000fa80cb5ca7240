"""Where a Q-Former's queries look: against the model's own weights, and against what was planted."""

from collections.abc import Callable
from typing import Any

import jaxtyping
import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from torch import Tensor
from zoo import boxes
from zoo.queries import QUERIES, VARIANTS

import mechvlm as mv
from mechvlm.experiments.queries import compose_queries, queries_to_patches
from mechvlm.references import own_patterns

WORDS = "is there a red dog in the image ?"
LOOKING, HEADS, PATCHES = [0, 2], 4, 17
ARGUMENTS = ("hidden_states", "attention_mask", "encoder_hidden_states")
YES = mv.logit_difference("yes", "no")
every = pytest.mark.parametrize("name", VARIANTS)


def made(name: str = "instructblip") -> mv.VLM:
    return mv.VLM(VARIANTS[name].model(), VARIANTS[name].processor(), name=name)


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return made()


@pytest.fixture(scope="module")
def real(vlm: mv.VLM) -> mv.Prompt:
    return vlm.prompt(boxes.noise(0), WORDS)


@pytest.fixture(scope="module")
def looks(vlm: mv.VLM, real: mv.Prompt) -> xr.DataArray:
    return queries_to_patches(vlm, real)


def inputs_of(model: Any, attention: Any, encoding: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What an attention module's queries and keys are made of, caught by a hook."""
    caught: list[tuple[Tensor, Tensor]] = []

    def catch(_module: Any, given: tuple, named: dict[str, Any]) -> None:
        arguments = {**dict(zip(ARGUMENTS, given, strict=False)), **named}
        caught.append((arguments["hidden_states"][0], arguments["encoder_hidden_states"][0]))

    handle = attention.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        model(**encoding)
    handle.remove()
    return caught[0]


def plant(vlm: mv.VLM, prompt: mv.Prompt, patches: list[int]) -> None:
    """Make query j of the Q-Former look at `patches[j]` alone, in every head of every layer that looks."""
    for number in LOOKING:
        attention = vlm.hf.qformer.encoder.layer[number].crossattention.attention
        queries, keys = inputs_of(vlm.hf, attention, prompt.encoding)
        wanted = torch.zeros(len(keys), QUERIES)
        wanted[patches, range(QUERIES)] = 1
        with torch.no_grad():
            for layer, weight in (
                (attention.query, 100 * queries.pinverse()),
                (attention.key, keys.pinverse() @ wanted),
            ):
                layer.weight.copy_(weight.T.repeat(HEADS, 1))
                layer.bias.zero_()


@every
def test_the_weights_are_those_of_the_models_own_eager_attention(name: str) -> None:
    vlm = made(name)
    prompt = vlm.prompt(boxes.noise(1), WORDS)
    found, own = queries_to_patches(vlm, prompt), own_patterns(vlm, prompt)
    assert found.dims == ("layer", "head", "query", "patch")
    assert found.shape == (len(LOOKING), HEADS, QUERIES, PATCHES)
    assert found.layer.values.tolist() == LOOKING
    for layer in LOOKING:
        expected = own[mv.Site("cross_pattern", layer, "qformer")][0].numpy()
        assert np.abs(found.sel(layer=layer) - expected).max() < 1e-6
    assert np.abs(found.sum("patch") - 1).max() < 1e-6


def test_patches_have_their_places_and_queries_their_positions(real: mv.Prompt, looks: xr.DataArray) -> None:
    assert looks.position.values.tolist() == real.image
    assert looks.patch.values.tolist() == list(range(PATCHES))
    for number in range(PATCHES):
        at = looks.isel(patch=number)
        cell = real.images[0].cell(number) or (-1, -1, -1)
        assert (int(at.tile), int(at.row), int(at.column)) == cell
    assert looks.row.values[0] == -1


def test_one_layer_and_head_are_a_part_of_all(vlm: mv.VLM, real: mv.Prompt, looks: xr.DataArray) -> None:
    one = queries_to_patches(vlm, real, layer=2, head=3)
    assert one.shape == (1, 1, QUERIES, PATCHES)
    xr.testing.assert_allclose(one, looks.sel(layer=[2], head=[3]))


@every
def test_a_query_that_was_made_to_look_at_one_patch_looks_there_alone(name: str) -> None:
    vlm = made(name)
    prompt = vlm.prompt(boxes.noise(0), WORDS)
    patches = [5, 16, 1, 9, 12, 2, 7, 14]
    plant(vlm, prompt, patches)
    found = queries_to_patches(vlm, prompt)
    for query, patch in enumerate(patches):
        assert float(found.sel(query=query, patch=patch).min()) > 0.999
    values = np.arange(1.0, QUERIES + 1)
    expected = np.zeros(PATCHES)
    expected[patches] = values
    carried = compose_queries(values, found)
    assert np.abs(carried - expected).max() < 0.01
    figure = mv.plot.over_image(carried, prompt.images[0], prompt.pictures[0])
    drawn = np.array(figure.data[0].z, dtype=float)
    assert np.abs(drawn.flatten() - expected[1:]).max() < 0.01
    assert "patch 1<br>row 0, column 0" in figure.data[0].hovertext[0][0]


def test_a_composition_is_values_times_mean_weights(vlm: mv.VLM, real: mv.Prompt, looks: xr.DataArray) -> None:
    seen = mv.attention_map(vlm, real, 1, 2, query=[-1, -3])
    carried = compose_queries(seen, looks)
    assert carried.dims == ("query", "patch")
    assert np.abs(carried.values - seen.values @ looks.values.mean((0, 1))).max() < 1e-6
    assert np.abs(carried.sum("patch") - seen.sum("position")).max() < 1e-6
    one = compose_queries(seen, looks, layers=[2])
    assert np.abs(one.values - seen.values @ looks.sel(layer=2).values.mean(0)).max() < 1e-6
    assert np.abs(one - carried).max() > 1e-4


def test_a_part_of_the_weights_is_scaled_to_one_for_each_query(looks: xr.DataArray) -> None:
    carried = compose_queries([1.0] * QUERIES, looks.isel(patch=slice(1, None)))
    assert float(carried.sum()) == pytest.approx(QUERIES)


def test_values_find_their_query_by_position(real: mv.Prompt, looks: xr.DataArray) -> None:
    values = xr.DataArray(np.arange(QUERIES, dtype=float), dims=["position"], coords={"position": real.image})
    assert (
        np.abs(
            compose_queries(values.isel(position=slice(None, None, -1)), looks) - compose_queries(values, looks)
        ).max()
        < 1e-9
    )


def test_a_composition_says_that_it_is_one(vlm: mv.VLM, real: mv.Prompt, looks: xr.DataArray) -> None:
    carried = compose_queries(mv.gradient_attribution(vlm, real, YES).attribution, looks.sel(head=[1, 2]), layers=[0])
    assert carried.attrs["composed"] == (
        "values on queries x the Q-Former's attention, mean over its layers 0 and heads 1, 2: a first-order path "
        "product, not attention to patches"
    )
    assert carried.attrs["long_name"] == "gradient x input, through the Q-Former’s attention"


def test_weights_and_compositions_can_be_written_to_files(
    vlm: mv.VLM, real: mv.Prompt, looks: xr.DataArray, tmp_path: Any
) -> None:
    carried = compose_queries(mv.attention_map(vlm, real, 1), looks)
    for number, result in enumerate((looks, carried)):
        result.to_netcdf(tmp_path / f"{number}.nc", engine="h5netcdf")
        xr.testing.assert_identical(xr.load_dataarray(tmp_path / f"{number}.nc", engine="h5netcdf"), result)


NO_QFORMER = (
    "this model has no Q-Former, so no queries stand between its picture and its text; mv.attention_map shows "
    "attention to the picture itself."
)
REFUSED: list[tuple[Callable[[mv.VLM, mv.Prompt], object], str]] = [
    (
        lambda vlm, real: queries_to_patches(vlm, real, layer=1),
        "the Q-Former's layers 0, 2 look at the picture, so there is no attention to it in layer 1.",
    ),
    (
        lambda vlm, real: queries_to_patches(vlm, real, head=4),
        "the Q-Former has 4 heads a layer, counted from 0, so there is no head 4.",
    ),
    (
        lambda vlm, real: compose_queries([1.0, 2.0], queries_to_patches(vlm, real)),
        "there are 8 queries, and values of shape (2,) were given; give one each.",
    ),
    (
        lambda vlm, real: compose_queries([1.0] * QUERIES, queries_to_patches(vlm, real), layers=[1]),
        "looks holds layers 0, 2, and layers=[1] was given; choose from those, or None for all.",
    ),
    (
        lambda vlm, real: compose_queries(
            [1.0] * QUERIES, queries_to_patches(vlm, real).sum("patch").rename("weights")
        ),
        "looks is a DataArray; give what mv.queries_to_patches returns, with dims query and patch and their "
        "coordinates.",
    ),
    (
        lambda vlm, real: compose_queries(
            queries_to_patches(vlm, real).isel(layer=0, head=0), queries_to_patches(vlm, real)
        ),
        "values must have dim position, the queries' in the prompt, and these have query, patch.",
    ),
    (
        lambda vlm, real: compose_queries(
            mv.attention_map(vlm, real, 0).isel(position=slice(3)), queries_to_patches(vlm, real)
        ),
        "the values belong to positions [0, 1, 2], and the queries stand at [0, 1, 2, 3, 4, 5, 6, 7]; give those "
        "alone.",
    ),
]


@pytest.mark.parametrize(("wrong", "sentence"), REFUSED, ids=[sentence[:40] for _, sentence in REFUSED])
def test_what_cannot_be_is_refused(
    vlm: mv.VLM, real: mv.Prompt, wrong: Callable[[mv.VLM, mv.Prompt], object], sentence: str
) -> None:
    with pytest.raises(ValueError) as error:
        wrong(vlm, real)
    assert str(error.value) == sentence


def test_a_model_without_a_q_former_is_refused() -> None:
    other = tiny.vlm()
    with pytest.raises(ValueError) as error:
        queries_to_patches(other, other.prompt(tiny.picture(), "is there a cat ?"))
    assert str(error.value) == NO_QFORMER


def test_several_prompts_are_refused(vlm: mv.VLM, real: mv.Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the test run's type checks, as users meet them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError) as error:
        queries_to_patches(vlm, [real])  # type: ignore[arg-type]
    assert str(error.value) == (
        "a list is not one prompt; make it with vlm.prompt(image, text), and ask about several one by one."
    )
