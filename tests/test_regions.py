"""Regions of the picture, minimal pairs and intervals, each against a computation of its own."""

import numpy as np
import pytest
import tiny
import xarray as xr
import zoo
from scipy import stats

import mechvlm as mv


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return tiny.vlm()


@pytest.fixture(scope="module")
def tiled() -> mv.Prompt:
    """Seen in several tiles and padded."""
    return zoo.ask(zoo.build("llava_next-vicuna"), tiny.picture(0, 60, 40))


def pixel_shares(prompt: mv.Prompt, mask: np.ndarray, fine: int = 4) -> dict[int, float]:
    """How much of what each token sees of the picture is in a mask, counted on a fine raster of points."""
    own, found = prompt.images[0], {}
    width, height = own.size
    x, y = ((np.arange(side * fine) + 0.5) / fine for side in (width, height))
    for position in own.positions:
        left, top, right, bottom = own.box(position)  # type: ignore[misc]
        held = mask[y[(y > top) & (y < bottom)].astype(int)][:, x[(x > left) & (x < right)].astype(int)]
        if held.size:
            found[position] = float(held.mean())
    return found


@pytest.mark.parametrize("parts", [(3, 3), (2, 1), (1, 3), (4, 5)])
def test_every_token_that_sees_the_picture_is_in_one_part_of_it(tiled: mv.Prompt, parts: tuple[int, int]) -> None:
    held = mv.image_regions(tiled, *parts)
    every = sorted(position for positions in held.values() for position in positions)
    assert every == sorted(pixel_shares(tiled, np.ones((40, 60), bool)))
    own = tiled.images[0]
    for name, positions in mv.image_regions(tiled, 2, 2).items():
        for position in positions:
            left, top, right, bottom = own.box(position)  # type: ignore[misc]
            x, y = (max(left, 0) + min(right, 60)) / 2, (max(top, 0) + min(bottom, 40)) / 2
            assert name == f"{'bottom' if y >= 20 else 'top'} {'right' if x >= 30 else 'left'}"


def test_parts_have_names(real: mv.Prompt) -> None:
    assert list(mv.image_regions(real))[2:6] == ["top right", "middle left", "centre", "middle right"]
    assert list(mv.image_regions(real, 1, 1)) == ["all"]
    assert list(mv.image_regions(real, 2, 1)) == ["top", "bottom"]
    assert list(mv.image_regions(real, 4, 1))[3] == "row 3, column 0"


def test_tiles_hold_each_token_once(tiled: mv.Prompt) -> None:
    held = mv.tile_regions(tiled)
    assert len(held) == len(tiled.images[0].tiles) > 1
    assert sorted(sum(held.values(), [])) == sorted(tiled.images[0].positions)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_tokens_of_a_mask_are_those_with_enough_of_it_in_their_square(tiled: mv.Prompt, share: float) -> None:
    mask = np.zeros((40, 60), bool)
    mask[5:31, 12:44] = True
    mask[10, 20] = False
    expected = [position for position, part in pixel_shares(tiled, mask, 8).items() if part >= share - 1e-9]
    assert mv.tokens_in(tiled, mask=mask, share=share) == sorted(expected)


def test_a_box_is_the_mask_of_its_pixels(tiled: mv.Prompt) -> None:
    mask = np.zeros((40, 60), bool)
    mask[7:29, 3:41] = True
    for share in (0.05, 0.3, 0.9):
        assert mv.tokens_in(tiled, (3, 7, 41, 29), share=share) == mv.tokens_in(tiled, mask=mask, share=share)


def test_a_border_takes_in_the_tokens_around(real: mv.Prompt) -> None:
    image, inner = real.images[0], mv.tokens_in(real, (6, 6, 12, 12))
    assert [image.cell(position) for position in inner] == [(0, 1, 1)]
    around = [image.cell(position) for position in mv.tokens_in(real, (6, 6, 12, 12), border=1)]
    assert around == [(0, row, column) for row in range(3) for column in range(3)]


def test_keys_of_cross_attention_and_patches_behind_queries_have_regions_when_asked_for() -> None:
    for name, of in (("mllama", "keys"), ("blip2-opt", "patches")):
        prompt = zoo.ask(zoo.build(name), tiny.picture(0, 60, 40))
        held = mv.image_regions(prompt, 2, 2, of=of)
        assert set(sum(held.values(), [])) <= set(prompt.images[0].positions)
        assert len(held) == 4


def test_a_pair_makes_two_prompts_whose_positions_match(vlm: mv.VLM) -> None:
    pair = mv.MinimalPair(tiny.picture(0), tiny.picture(1), "is there a dog ?", "yes", "no")
    first, second = pair.prompts(vlm)
    assert first.spans == second.spans
    assert not (first.encoding["pixel_values"] == second.encoding["pixel_values"]).all()
    assert str(pair.metric) == "logit_difference('yes', 'no')"
    texts = mv.MinimalPair(tiny.picture(0), tiny.picture(0), "is there a dog ?", "yes", "no", "is there a cat ?")
    first, second = texts.prompts(vlm)
    assert (first.encoding["input_ids"] != second.encoding["input_ids"]).sum() == 1


def test_an_interval_is_scipys_where_each_value_stands_alone() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=(60, 2))
    found = mv.mean_interval(xr.DataArray(values, dims=["pair", "layer"]), "pair", resamples=20_000)
    own = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", axis=0, rng=1)
    assert np.abs(found["mean"] - values.mean(0)).max() < 1e-12
    assert np.abs(found.low - own.confidence_interval.low).max() < 0.01
    assert np.abs(found.high - own.confidence_interval.high).max() < 0.01


def test_copies_in_a_cluster_make_an_interval_no_narrower() -> None:
    values = xr.DataArray(np.random.default_rng(0).normal(size=30), dims="pair")
    copies = xr.concat([values] * 4, "pair")
    alone, apart = mv.mean_interval(values, "pair"), mv.mean_interval(copies, "pair")
    together = mv.mean_interval(copies, "pair", clusters=[f"image {at}" for at in range(30)] * 4)
    assert (float(together.low), float(together.high)) == pytest.approx((float(alone.low), float(alone.high)))
    assert float(apart.high - apart.low) < 0.6 * float(together.high - together.low)


def test_what_is_no_number_is_left_out_of_its_own_mean() -> None:
    values = xr.DataArray([[1.0, np.nan], [3.0, np.nan], [8.0, 2.0]], dims=["pair", "layer"])
    found = mv.mean_interval(values, "pair")
    assert found["mean"].values.tolist() == [4.0, 2.0]
    assert found["count"].values.tolist() == [3, 1]
    assert np.isnan(found.low.values[1]) and np.isfinite(found.low.values[0])
