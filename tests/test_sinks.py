"""Sinks where they were planted, by numpy on the model's own states and patterns, and drawn where they are."""

import html
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jaxtyping
import numpy as np
import planted
import pytest
import tiny
import torch
import xarray as xr
import zoo
from zoo.boxes import noise

import mechvlm as mv
from mechvlm.experiments.sinks import labels
from mechvlm.references import layer_at, own_logits, own_patterns

DIMS, BOS_ID, SQUARE = (20, 27), 1, 6
LAYERS, ALPHA, THRESHOLD = 4, 3.0, 3.9
"""In a model of width 32 with two massive dimensions, phi is 4."""


@cache
def built() -> tuple[mv.VLM, mv.Prompt, int]:
    """A model whose first word and whose bright square are massive in two dimensions, and one head that looks there."""
    model = planted.build(0, 0, kv_heads=4, layers=LAYERS)
    parts = model.model
    with torch.no_grad():
        for layer in parts.language_model.layers:
            attention = layer.self_attn
            width = attention.head_dim
            attention.q_proj.weight.zero_()
            attention.k_proj.weight.zero_()
            # The slowest rotary pair of head 1, which does not turn within this text.
            attention.q_proj.weight[2 * width - 1, [planted.CONSTANT, planted.MARK]] = 12.0
            attention.k_proj.weight[2 * width - 1, list(DIMS)] = 0.1
        parts.language_model.embed_tokens.weight[BOS_ID, list(DIMS)] = 1e3
        parts.multi_modal_projector.linear_2.weight[list(DIMS), 0] = 1e3
    vlm = mv.VLM(model)
    ids = torch.tensor([[BOS_ID, 2, *[planted.IMAGE] * 16, 3, 4, 7, planted.LAST]])
    pixels = torch.full((1, 3, 8, 8), -1.0)
    row, column = divmod(SQUARE, 4)
    pixels[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1.0
    prompt = vlm.prompt(encoding={"input_ids": ids, "pixel_values": pixels})
    return vlm, prompt, prompt.image[SQUARE]


@pytest.fixture(scope="module")
def found() -> xr.Dataset:
    vlm, prompt, _ = built()
    return mv.sinks(vlm, prompt, threshold=THRESHOLD, alpha=ALPHA)


def test_the_planted_sink_is_found_by_both_rules_and_nothing_else(found: xr.Dataset) -> None:
    *_, square = built()
    assert found.attrs["dims"] == ", ".join(map(str, DIMS))
    for layer in range(2, LAYERS):
        here = found.sel(layer=layer)
        assert here.position[here.sink_by_activation].values.tolist() == [0, square]
        assert here.position[here.sink_by_mass].values.tolist() == [square]
    assert not found.sink_by_activation.sel(layer=[0, 1]).any() and not found.sink_by_mass.sel(layer=[0, 1]).any()
    assert mv.sink_positions(found, "both") == [square]
    assert mv.sink_positions(found, "either") == mv.sink_positions(found) == [0, square]


def test_the_planted_sink_is_where_it_was_painted(found: xr.Dataset) -> None:
    *_, square = built()
    one = found.sel(position=square)
    assert (str(one.span.item()), int(one.image), int(one.tile)) == ("image", 0, 0)
    assert (int(one.row), int(one.column)) == divmod(SQUARE, 4)
    assert (found.row == -1).values.tolist() == [str(span) != "image" for span in found.span.values]


def test_a_sink_like_the_first_token_is_primary(found: xr.Dataset) -> None:
    *_, square = built()
    assert found.position[found.label == "primary"].values.tolist() == [0, square]
    assert (found.label == "none").sum() == found.sizes["position"] - 2
    assert found.lifetime.sel(position=[0, square]).values.tolist() == [LAYERS, LAYERS]
    assert found.attrs["first"] == "position 0, since the prompt has no bos token"


def test_the_planted_head_alone_pays_the_sink(found: xr.Dataset) -> None:
    """From words, head 1 looks at the first word and the square, half and half; the others look everywhere."""
    *_, square = built()
    paid = found.column_mass.sel(position=square)
    assert (paid.sel(head=1) > 0.4).all() and (paid.sel(head=1) < 0.5).all()
    even = np.mean(1 / np.arange(square + 1, found.sizes["position"] + 1))
    assert np.allclose(paid.sel(head=[0, 2, 3]), even, atol=1e-6)


def test_without_its_sinks_the_planted_head_looks_elsewhere(found: xr.Dataset) -> None:
    vlm, prompt, square = built()
    before, after = (
        mv.attention_profile(vlm, prompt, without=without).mass.sel(example=0, layer=2, head=1, span="image")
        for without in (None, found)
    )
    assert float(before) == pytest.approx(0.5, abs=1e-3)
    row = own_patterns(vlm, prompt)[mv.Site("pattern", 2)][0, 1, -1].double().numpy()
    row[[0, square]] = 0
    assert float(after) == pytest.approx(row[prompt.image].sum() / row.sum(), rel=1e-5)
    assert float(after) < 0.01


KINDS = ["llava", "qwen2_5_vl", "gemma3", "instructblip", "llava_next-sliding", "mllama"]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_numpys_on_the_models_own_states_and_patterns(kind: str) -> None:
    vlm = zoo.build(kind, dtype=torch.float64)
    prompt = zoo.ask(vlm, noise(0))
    entering: list[np.ndarray] = []
    hooks = [
        layer_at(vlm, "text", index).register_forward_pre_hook(
            lambda _, given, named: entering.append((given[0] if given else named["hidden_states"])[0].numpy()),
            with_kwargs=True,
        )
        for index in range(vlm.shape.layers["text"])
    ]
    own_logits(vlm, prompt)
    for hook in hooks:
        hook.remove()
    found, patterns = mv.sinks(vlm, prompt, dims=[3, 5], threshold=1.5, alpha=2.0), own_patterns(vlm, prompt)
    for layer, h in enumerate(entering):
        here = found.sel(layer=layer)
        phi = np.abs(h[:, [3, 5]]).max(1) / np.sqrt((h**2).mean(1))
        assert np.abs(here.phi - phi).max() < 1e-9
        assert np.abs(here.cosine - h @ h[0] / np.linalg.norm(h, axis=1) / np.linalg.norm(h[0])).max() < 1e-9
        assert (here.sink_by_activation == ((phi > 1.5) & (layer >= 2))).all()
        site = mv.Site("pattern", layer)
        if site not in patterns:
            assert np.isnan(here.column_mass).all()
            continue
        own = patterns[site][0].double().numpy()
        columns = own.sum(1) / (own[0] > 0).sum(0)
        assert np.abs(here.column_mass - columns).max() < 1e-6
        expected = (columns.mean(0) > 2 / len(prompt)) & (layer >= 2) & (np.arange(len(prompt)) > 0)
        assert (here.sink_by_mass == expected).all()
    alike = (np.abs(found.cosine) > 0.9).sum("layer")
    assert (found.lifetime == alike).all()
    assert ("note" in found.attrs) == (kind == "mllama")


def test_a_threshold_that_no_state_reaches_is_noted() -> None:
    vlm = tiny.vlm()
    prompt = vlm.prompt(tiny.picture(1), "is there a cat ?")
    found = mv.sinks(vlm, prompt)
    assert found.attrs["note"] == (
        "no state reaches the threshold of 20, since phi is at most 5.7 in a model of width 32: take a smaller one"
    )
    assert "note" not in mv.sinks(vlm, prompt, threshold=5.6).attrs
    caption = mv.plot.sinks_over_image(found, prompt).layout.annotations[-1].text.replace("<br>", " ")
    assert caption.endswith(f"Note: {found.attrs['note']}.")


def test_dimensions_are_the_first_tokens_largest_in_the_middle_layers() -> None:
    vlm = tiny.vlm(layers=5)
    prompt = vlm.prompt(tiny.picture(1), "is there a cat ?")
    with torch.no_grad():
        states = vlm.hf(**prompt.encoding, output_hidden_states=True).hidden_states
    size = np.mean([(s[0, 0].abs() / s[0, 0].pow(2).mean().sqrt()).numpy() for s in states[1:4]], 0)
    found = mv.sinks(vlm, prompt)
    assert found.attrs["dims"] == ", ".join(map(str, np.argsort(-size)[:2]))
    assert found.attrs["first"] == "position 0, the bos token"


def test_lifetimes_are_judged_relative_to_the_layers() -> None:
    lifetime, massive = np.array([17, 16, 4, 3, 32]), np.array([True] * 4 + [False])
    assert labels(lifetime, massive, 32).tolist() == ["primary", "secondary", "secondary", "none", "none"]
    assert labels(np.array([5, 4, 1, 0]), np.array([True] * 4), 8).tolist() == [
        "primary",
        "secondary",
        "secondary",
        "none",
    ]


def test_sinks_survive_netcdf(found: xr.Dataset, tmp_path: Path) -> None:
    found.to_netcdf(tmp_path / "sinks.nc", engine="h5netcdf")
    again = xr.load_dataset(tmp_path / "sinks.nc", engine="h5netcdf")
    xr.testing.assert_equal(again, found)
    assert mv.sink_positions(again) == mv.sink_positions(found)


@pytest.fixture(scope="module")
def drawn() -> tuple[mv.Prompt, xr.Dataset]:
    """A dataset as `sinks` makes it, with one sink of each kind on a real picture."""
    vlm = tiny.vlm()
    prompt = vlm.prompt(tiny.picture(1), "is there a cat ?")
    found = mv.sinks(vlm, prompt, threshold=100.0, alpha=100.0)
    primary, secondary, unlike, paid = (prompt.image[at] for at in (0, 5, 10, 15))
    found.label.loc[{"position": primary}] = "primary"
    found["label"] = found.label.astype("<U9")
    found.label.loc[{"position": secondary}] = "secondary"
    found.label.loc[{"position": primary}] = "primary"
    found.sink_by_activation.loc[{"position": [primary, secondary, unlike], "layer": 2}] = True
    found.sink_by_mass.loc[{"position": [paid, primary], "layer": 2}] = True
    return prompt, found


def test_each_kind_of_sink_is_marked_on_its_square(drawn: tuple[mv.Prompt, xr.Dataset]) -> None:
    prompt, found = drawn
    figure = mv.plot.sinks_over_image(found, prompt)
    marks = {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data if trace.type == "scatter"}
    centres = {}
    for name, at in (("primary", 0), ("secondary", 5), ("massive only", 10)):
        left, top, right, bottom = prompt.images[0].box(prompt.image[at]) or (0, 0, 0, 0)
        centres[name] = [((left + right) / 2, (top + bottom) / 2)]
    boxes = [prompt.images[0].box(prompt.image[at]) or (0, 0, 0, 0) for at in (0, 15)]
    centres["by mass"] = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in boxes]
    assert marks == centres


def test_the_squares_are_coloured_by_the_layer_where_they_are_most_massive(
    drawn: tuple[mv.Prompt, xr.Dataset],
) -> None:
    prompt, found = drawn
    heat = next(trace for trace in mv.plot.sinks_over_image(found, prompt).data if trace.type == "heatmap")
    largest = found.phi.sel(position=prompt.image).max("layer").values
    assert np.array_equal(np.array(heat.z, dtype=float).flatten(), largest)
    one = next(t for t in mv.plot.sinks_over_image(found, prompt, layer=1).data if t.type == "heatmap")
    assert np.array_equal(np.array(one.z, dtype=float).flatten(), found.phi.sel(position=prompt.image, layer=1))


def test_colours_end_at_the_threshold_and_are_pale_below_half_of_it(drawn: tuple[mv.Prompt, xr.Dataset]) -> None:
    prompt, found = drawn
    axis = mv.plot.sinks_over_image(found, prompt).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 100)
    strength = {at: float(ink.rstrip(")").split(",")[-1]) for at, ink in axis.colorscale}
    assert strength[0.0] == 0 and strength[0.5] < 0.2 and strength[1.0] <= 0.5


def test_the_caption_names_the_sinks_that_are_not_in_the_picture(drawn: tuple[mv.Prompt, xr.Dataset]) -> None:
    prompt, found = drawn
    found = found.copy(deep=True)
    found.sink_by_activation.loc[{"position": [0, prompt.last[0]], "layer": 2}] = True
    found.label.loc[{"position": 0}] = "primary"

    def caption(layer: int | None = None) -> str:
        return mv.plot.sinks_over_image(found, prompt, layer).layout.annotations[-1].text.replace("<br>", " ")

    last, word = prompt.last[0], html.escape(prompt.tokens[prompt.last[0]], quote=False)
    begin = html.escape(prompt.tokens[0], quote=False)
    named = f"Sinks that stand for no place in this picture: 0 '{begin}' (primary), {last} '{word}' (massive only)."
    assert caption().startswith(named)
    assert caption(1).startswith("No sink in layer 1 by activation (threshold 100) or by mass (alpha 100).")


WRONG: list[tuple[Callable[[mv.VLM, mv.Prompt, xr.Dataset], object], str]] = [
    (
        lambda vlm, prompt, _: mv.sinks(vlm, prompt, dims=[32]),
        "dims holds dimension 32; the residual stream has dimensions 0 to 31.",
    ),
    (
        lambda vlm, prompt, _: mv.sinks(vlm, prompt, dims=[]),
        "dims holds an empty list; the residual stream has dimensions 0 to 31.",
    ),
    (
        lambda vlm, prompt, _: mv.sinks(vlm, prompt, threshold=0),
        "threshold=0 is not above zero, so every position would be a sink; give a higher one.",
    ),
    (
        lambda _, __, found: mv.sink_positions(found, "norm"),
        "rule='norm' is not known; choose 'activation', 'mass', 'either', 'both'.",
    ),
    (
        lambda _, __, found: mv.sink_positions(found[["phi"]]),
        "sinks are a dataset with sink_by_activation and sink_by_mass, and this one has phi; make it with "
        "mv.sinks(vlm, prompt).",
    ),
    (
        lambda vlm, prompt, _: mv.sinks(vlm, prompt, layers=[1, 0, 1]),
        "layers holds 1 more than once; give each layer once.",
    ),
    (
        lambda vlm, _, found: mv.plot.sinks_over_image(found, vlm.prompt(tiny.picture(1), "is there ?")),
        "the sinks are of a prompt with 26 positions, and this one has 24; make them with mv.sinks(vlm, prompt).",
    ),
    (
        lambda _, prompt, found: mv.plot.sinks_over_image(found, prompt, layer=9),
        "layer 9 is not among the sinks; their layers are 0, 1, 2.",
    ),
    (
        lambda _, prompt, found: mv.plot.sinks_over_image(found[["phi"]], prompt),
        "sinks are a dataset with phi, label, sink_by_activation, sink_by_mass, and this one has phi; make it with "
        "mv.sinks(vlm, prompt).",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_what_cannot_be_is_refused(
    drawn: tuple[mv.Prompt, xr.Dataset], call: Callable[[mv.VLM, mv.Prompt, xr.Dataset], object], sentence: str
) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError) as refused:
            call(tiny.vlm(), *drawn)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("kind", "how"), [("blip2-llama", "a Q-Former"), ("mllama", "cross-attention")])
def test_sinks_are_not_drawn_where_positions_stand_for_no_place(kind: str, how: str) -> None:
    vlm = zoo.build(kind)
    prompt = vlm.prompt(noise(0), zoo.QUESTION)
    with pytest.raises(ValueError) as refused:
        mv.plot.sinks_over_image(mv.sinks(vlm, prompt, threshold=2.0), prompt)
    assert str(refused.value).startswith("sinks, which are positions, cannot be drawn: this picture is seen ")
    assert how in str(refused.value)
