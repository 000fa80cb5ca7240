"""Activation patching: what was planted is found, and every patch is what a hand-written hook does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import tiny
import torch
import xarray as xr
import zoo
from plain import Plain
from torch import Tensor

import mechvlm as mv
from mechvlm.experiments.exchange import window_of
from mechvlm.references import layer_at

PLANTED = mv.logit_difference(planted.YES, planted.NO)
YES = mv.logit_difference("yes", "no")
WORDS = mv.logit_difference(30, 31)


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return tiny.vlm(2, "eager")


def near(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert np.abs(np.asarray(found, dtype=float) - np.asarray(expected, dtype=float)).max() < tolerance


def only(array: xr.DataArray, **place: int) -> None:
    """One at a place of an array and zero elsewhere."""
    expected = xr.zeros_like(array)
    expected.loc[place] = 1.0
    near(array, expected)


# -- what was planted ------------------------------------------------------------------------------------------------


def other_word(vlm: mv.VLM, real: mv.Prompt) -> mv.Prompt:
    """The same picture, with another word at the end than the one that asks."""
    ids = real.encoding["input_ids"].clone()
    ids[0, -1] = 8
    return vlm.prompt(encoding={"input_ids": ids, "pixel_values": real.encoding["pixel_values"]})


@pytest.mark.parametrize("plant", [(1, 2, 2), (2, 1, 4)])
def test_positions_carry_what_was_planted_in_both_directions(plant: tuple[int, int, int]) -> None:
    vlm, real, null, layer, _ = planted.planted(*plant)
    found = mv.patch_positions(vlm, real, null, PLANTED, direction="both", positions=[0, *real.question, *real.last])
    expected = np.zeros((2, 3, 5))
    expected[:, layer + 1 :, -1] = 1.0
    near(found.normalised, expected)
    assert found.direction.values.tolist() == ["denoise", "noise"]
    assert found.metric.sel(layer=0, position=0).values.tolist() == [
        found.attrs["target_metric"],
        found.attrs["source_metric"],
    ]


def test_the_planted_head_carries_the_picture_by_its_values_and_by_nothing_else() -> None:
    vlm, real, null, layer, head = planted.planted()
    for kind, of in (("z", {"head": head}), ("v", {"kv_head": head // 2}), ("pattern", None), ("k", None)):
        found = mv.patch_heads(vlm, real, null, PLANTED, kind=kind).normalised
        only(found, layer=layer, **of) if of else near(found, np.zeros(found.shape))


def test_the_planted_head_carries_the_word_by_where_it_looks() -> None:
    vlm, real, _, layer, head = planted.planted()
    null = other_word(vlm, real)
    carried = []
    for kind in ("z", "q", "pattern"):
        found = mv.patch_heads(vlm, real, null, PLANTED, kind=kind, positions=real.last, direction="both")
        carried.append(found.metric.sel(layer=layer, head=head).values)
        moved = np.abs(found.normalised) > 1e-5
        assert moved.sum() == 2 and moved.sel(layer=layer, head=head).all()
    near(carried, np.tile(carried[0], (3, 1)))
    for kind in ("k", "v"):
        found = mv.patch_heads(vlm, real, null, PLANTED, kind=kind).normalised
        near(found, np.zeros(found.shape))


def test_a_window_finds_the_planted_layer_from_each_layer_that_it_reaches_it_from() -> None:
    vlm, real, null, *_ = planted.planted(0, 3, 4)
    found = mv.patch_spans(vlm, real, null, PLANTED, kind="attn_out", window=3).normalised
    near(found.sel(span="last"), [1, 1, 0])
    near(found.drop_sel(span="last"), np.zeros((3, 3)))
    assert [list(window_of(layer, 3, 3)) for layer in range(3)] == [[0, 1], [0, 1, 2], [1, 2]]
    assert list(window_of(5, 4, 20)) == [3, 4, 5, 6]


def test_features_of_all_of_the_picture_carry_all_and_its_halves_something() -> None:
    vlm, real, null, *_ = planted.planted()
    halves = {"all": real.image, "upper": real.image[:8], "lower": real.image[8:]}
    found = mv.patch_features(vlm, real, null, PLANTED, halves, direction="both").normalised
    near(found.sel(region="all"), [1, 1])
    assert (found.sel(region="upper") > 0.01).all()
    near(found.sel(region="upper"), found.sel(region="lower"))
    single = mv.patch_features(vlm, real, null, PLANTED)
    assert single.position.values.tolist() == real.image
    assert single.row.values.tolist() == [at // 4 for at in range(16)]


# -- what must be true of every model --------------------------------------------------------------------------------


def test_everything_from_the_source_gives_its_answer_and_from_itself_changes_nothing(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt
) -> None:
    everywhere = {"all": list(range(len(real)))}
    for kind, window in (("resid_pre", 1), ("resid_post", 2)):
        found = mv.patch_spans(vlm, real, other, YES, everywhere, kind, direction="both", window=window)
        near(found.normalised, np.ones((2, 3, 1)), 1e-3)
    for same in (
        mv.patch_heads(vlm, real, real, YES, kind="pattern", direction="both"),
        mv.patch_positions(vlm, real, real, YES, [3, 20], kind="scores"),
        mv.patch_features(vlm, real, real, YES, {"all": real.image}),
    ):
        near(same.metric, np.full(same.metric.shape, same.attrs["source_metric"]))
        assert np.isnan(same.normalised).all() and "nothing to carry over" in same.attrs["note"]


@pytest.mark.parametrize("name", ["llava_next-vicuna", "qwen2_5_vl", "blip2-opt"])
def test_all_of_the_vision_tower_and_all_features_carry_the_picture(name: str) -> None:
    vlm = zoo.build(name)
    real, null = (zoo.ask(vlm, tiny.picture(seed, 60, 40)) for seed in (0, 1))
    last = [vlm.shape.live["vision"] - 1]
    near(mv.patch_spans(vlm, real, null, WORDS, None, "resid_post", layers=last, tower="vision").normalised, 1, 1e-3)
    near(mv.patch_features(vlm, real, null, WORDS, {"all": real.image}).normalised, 1, 1e-3)


# -- what a hook does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["q", "k", "v", "z", "scores", "pattern"])
@pytest.mark.parametrize("positions", [None, [4, 21, -1]], ids=["everywhere", "at some positions"])
def test_heads_equal_a_plain_attention_in_which_they_are_replaced(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, kind: str, positions: list[int] | None
) -> None:
    at = None if positions is None else [position % len(real) for position in positions]
    found = mv.patch_heads(vlm, real, other, YES, at, kind, layers=[1]).metric
    model = tiny.model(2, "eager")  # not the one that the VLM holds: nnsight rewrites the attention it watches
    source = Plain(model)
    source(real.encoding)
    kept, measure = source.seen[kind, 1, "text"], vlm.metric(YES)
    where = slice(None) if at is None else at
    for head in range(found.sizes[str(found.dims[1])]):

        def replaced(x: Tensor, head: int = head) -> Tensor:
            if kind in ("scores", "pattern"):
                x[:, head, where] = kept[:, head, where]
            else:
                x[:, where, head] = kept[:, where, head]
            return x

        logits = Plain(model, [((kind, 1, "text"), replaced, "value")])(other.encoding)
        near(found[0, head], measure(logits[:, -1]).item())


@contextmanager
def before(module: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A plain pre-hook that changes what a module is called with first."""

    def hook(_: Any, given: tuple, named: dict) -> tuple[tuple, dict]:
        if given:
            return (change(given[0]), *given[1:]), named
        return given, {**named, "hidden_states": change(named["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    yield
    handle.remove()


def plain_logits(vlm: mv.VLM, prompt: mv.Prompt) -> Tensor:
    with torch.no_grad():
        return vlm.hf(**prompt.encoding).logits[:, -1]


@pytest.mark.parametrize(
    ("name", "tower"),
    [("llava_next-vicuna", "text"), ("qwen2_5_vl", "text"), ("llava_next-vicuna", "vision"), ("qwen2_5_vl", "vision")],
)
def test_positions_equal_a_hook_before_the_layer(name: str, tower: str) -> None:
    vlm = zoo.build(name)
    real, null = (zoo.ask(vlm, tiny.picture(seed, 60, 40)) for seed in (0, 1))
    positions = [1, 6, len(real) - 1] if tower == "text" else [0, 5]
    found = mv.patch_positions(vlm, real, null, WORDS, positions, layers=[1], tower=tower, direction="both").metric
    layer = layer_at(vlm, tower, 1)
    seen: dict[mv.Prompt, Tensor] = {}
    for prompt in (real, null):

        def kept(x: Tensor, prompt: mv.Prompt = prompt) -> Tensor:
            return seen.setdefault(prompt, x.clone())

        with before(layer, kept):
            plain_logits(vlm, prompt)
    for way, source, target in (("denoise", real, null), ("noise", null, real)):
        for position in positions:

            def replaced(x: Tensor, source: mv.Prompt = source, position: int = position) -> Tensor:
                x = x.clone()
                x[..., position, :] = seen[source][..., position, :]
                return x

            with before(layer, replaced):
                expected = WORDS_OF(plain_logits(vlm, target))
            near(found.sel(direction=way, layer=1, position=position), expected)


def WORDS_OF(logits: Tensor) -> float:  # noqa: N802
    return float(logits[0, 30] - logits[0, 31])


def test_features_equal_a_hook_behind_the_projector(vlm: mv.VLM, real: mv.Prompt) -> None:
    null = real.with_image(mv.images.black)
    regions = {"some": real.image[2:5], "one": [real.image[7]]}
    found = mv.patch_features(vlm, real, null, YES, regions).metric
    with torch.no_grad():
        kept = vlm.hf.model.get_image_features(real.encoding["pixel_values"]).pooler_output
    kept = torch.cat(list(kept)) if isinstance(kept, list | tuple) else kept
    for name, positions in regions.items():
        index = [position - real.image[0] for position in positions]

        def replaced(_m: Any, _g: Any, out: Tensor, index: list[int] = index) -> Tensor:
            out = out.clone()
            out.reshape(-1, out.shape[-1])[index] = kept.reshape(-1, out.shape[-1])[index]
            return out

        handle = vlm.hf.model.multi_modal_projector.register_forward_hook(replaced)
        expected = float(vlm.metric(YES)(plain_logits(vlm, null)))
        handle.remove()
        near(found.sel(region=name), expected)


# -- many pairs ------------------------------------------------------------------------------------------------------


class Ready(mv.MinimalPair):
    """A pair whose prompts are ready encodings: a brightness, its opposite, and how much of it."""

    def prompts(self, vlm: mv.VLM) -> tuple[mv.Prompt, mv.Prompt]:
        ids = torch.tensor([[1, 2, *[planted.IMAGE] * 16, 3, 4, 7, planted.LAST]])
        pixels = [torch.full((1, 3, 8, 8), value) for value in (self.image_a, self.image_b)]
        first, second = (vlm.prompt(encoding={"input_ids": ids, "pixel_values": one}) for one in pixels)
        return first, second


def pairs_of(*values: tuple[float, float, str]) -> list[mv.MinimalPair]:
    return [Ready(a, b, "", planted.YES, planted.NO, cluster=cluster) for a, b, cluster in values]


BRIGHT = pairs_of((1.0, -1.0, "one"), (0.5, -0.5, "one"), (2.0, -1.0, "two"), (-1.0, 1.0, "three"))


@pytest.fixture(scope="module")
def over_pairs() -> xr.Dataset:
    return mv.patch_pairs(planted.planted()[0], BRIGHT, controls=2)


def test_pairs_give_the_planted_way_and_leave_out_what_is_not_answered_right(over_pairs: xr.Dataset) -> None:
    (vlm, *_, layer, _), found = planted.planted(), over_pairs
    assert found.pair.values.tolist() == [0, 1, 2] and found.attrs["left_out"] == 1
    expected = xr.zeros_like(found["mean"])
    expected.loc[{"span": "image", "layer": range(layer + 1)}] = 1.0
    expected.loc[{"span": "last", "layer": range(layer + 1, 3)}] = 1.0
    near(found["mean"], expected)
    near(found.low, expected)
    near(found.high, expected)
    assert found.cluster.values.tolist() == ["one", "one", "two"] and found.attrs["clusters"] == 2
    alone = mv.patch_spans(vlm, *BRIGHT[2].prompts(vlm), PLANTED, direction="both")
    near(found.metric.sel(pair=2), alone.metric.transpose(*found.metric.sel(pair=2).dims))
    every = mv.patch_pairs(vlm, BRIGHT, controls=0, only_right=False, layers=[0], direction="denoise")
    assert found.attrs["pairs"] == 3 and every.sizes["pair"] == 4


def test_random_sets_of_positions_carry_less_than_the_planted_one() -> None:
    vlm, *_ = planted.planted()
    found = mv.patch_pairs(vlm, BRIGHT[:2], controls=19, direction="noise", layers=[2])
    assert found.control.dims == ("control", "layer", "span")
    assert (
        float(found.p_value.sel(span="last", layer=2)) < 0.35 < 0.99 < float(found.p_value.sel(span="prefix", layer=2))
    )
    # A random set carries all if the last position is in it, and nothing else.
    share = float(found.control.sel(span="image").mean())
    assert abs(share - 16 / 22) < 0.25
    heads = mv.patch_pairs(vlm, BRIGHT[:1], "heads", controls=40, direction="denoise", positions=[21])
    best = heads.p_value.stack(at=["layer", "head"])
    assert best.idxmin("at").item() == (1, 2) and float(best.min()) < 0.25


def test_means_over_pairs_are_those_of_their_values(vlm: mv.VLM) -> None:
    asked = "is there a red cat ?"
    pairs = [mv.MinimalPair(tiny.picture(a), tiny.picture(a + 5), asked, "yes", "no", cluster=a // 2) for a in range(4)]
    found = mv.patch_pairs(vlm, pairs, "positions", only_right=False, controls=0, positions=[5, 20], layers=[1])
    gap = found.source_metric - found.target_metric
    # The quotient of what is carried over and what there is to carry, each summed over pairs, whatever its sign.
    carried = np.sign(gap) * (found.metric.sel(direction="denoise") - found.target_metric)
    near(found["mean"].sel(direction="denoise"), carried.sum("pair") / abs(gap).sum(), 1e-6)
    sums = [float(carried[rows].sum("pair")[0, 0]) for rows in (slice(0, 2), slice(2, 4))]
    gaps = [float(abs(gap)[rows].sum()) for rows in (slice(0, 2), slice(2, 4))]
    ends = sorted(one / other for one, other in zip(sums, gaps, strict=True))  # either picture drawn twice
    near([found.low[0, 0, 0], found.high[0, 0, 0]], ends, 1e-6)
    assert found.right.dims == ("pair",)


def test_finished_points_are_found_again_in_their_folders(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, tmp_path: Path
) -> None:
    folder = tmp_path / "heads"
    first, again = (
        mv.patch_heads(vlm, real, other, YES, real.last, layers=[2], direction="both", out=folder) for _ in range(2)
    )
    assert again.attrs["engine"] == "read from denoise" != first.attrs["engine"]
    assert again.drop_attrs().identical(first.drop_attrs())
    pairs = [mv.MinimalPair(tiny.picture(0), tiny.picture(1), "is there a red cat ?", "yes", "no")]
    mv.patch_pairs(
        vlm, pairs, controls=0, only_right=False, layers=[2], spans={"last": [-1 % len(real)]}, out=tmp_path / "pairs"
    )
    assert sorted(path.name for path in (tmp_path / "pairs" / "pair 0").iterdir()) == ["denoise", "noise"]


# -- figures ---------------------------------------------------------------------------------------------------------


def test_figures_show_the_values(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt) -> None:
    found = mv.patch_positions(vlm, real, other, YES, kind="attn_out", layers=[0, 2]).normalised
    table = mv.plot.patched_positions(found)
    near(table.data[0].z, found.values, 1e-12)
    words = table.layout.xaxis.ticktext
    assert words[3] == "image tokens" and words[4] == "is" and len(words) == len(real) - 15
    small = mv.plot.layers_over_image(found, real, layers=[0, 2])
    assert len(small.data) == 2
    heat = real.images[0].heat(found.sel(layer=2, position=real.image).values)
    near(small.data[1].z, heat, 1e-12)
    assert small.data[1].x[0] == 0.5


def test_figures_of_pairs_show_means_beside_those_of_random_sets(over_pairs: xr.Dataset) -> None:
    (vlm, *_), found = planted.planted(), over_pairs
    figure = mv.plot.patched_pairs(found, "noise")
    drawn = {trace.name: trace.y for trace in figure.data if trace.showlegend is not False}
    here = found.sel(direction="noise", span="last")
    near(drawn["last, patched"], here["mean"].values, 1e-12)
    near(drawn["last, random sets"], here.control.mean("control").values, 1e-12)

    def halves(prompt: mv.Prompt) -> dict[str, list[int]]:
        return {"upper": prompt.image[:8], "lower": prompt.image[8:]}

    regions = mv.patch_pairs(vlm, BRIGHT, "features", controls=0, regions=halves, direction="denoise")
    near(mv.plot.patched_pairs(regions).data[0].y, regions["mean"].values, 1e-12)
