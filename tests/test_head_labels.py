"""Heads that are built to look somewhere get that label and no other; scores are those of whole patterns."""

from functools import partial

import numpy as np
import planted
import planted_heads
import pytest
import tiny
import xarray as xr
import zoo

import mechvlm as mv
from mechvlm.experiments.head_scores import alone, behind, repeated


@pytest.fixture(scope="module")
def found(vlm: mv.VLM, real: mv.Prompt) -> xr.Dataset:
    return mv.label_heads(vlm, real, objects=[real.image[3:7]], sink_threshold=2.0, repeat=5)


def patterns(vlm: mv.VLM, prompt: mv.Prompt) -> np.ndarray:
    """All patterns whole, `layer head query key`."""
    sites = [mv.Site("pattern", layer) for layer in range(3)]
    run = vlm.run(prompt, read=sites)
    return np.stack([run[site][0].numpy() for site in sites])


def test_scores_are_those_of_whole_patterns(vlm: mv.VLM, real: mv.Prompt, found: xr.Dataset) -> None:
    whole, score = patterns(vlm, real), found.score[0]
    for row, queries in (("last", real.last), ("question", real.question)):
        for span, keys in (("image", real.image), ("object", real.image[3:7]), ("bos", real.bos)):
            expected = whole[:, :, queries][..., keys].sum(-1).mean(-1)
            assert np.abs(score.sel(kind=f"{span}->{row}") - expected).max() < 1e-6
    before = [at for at in range(1, len(real)) if at not in real.image]
    assert np.abs(score.sel(kind="previous") - whole[:, :, before, [at - 1 for at in before]].mean(-1)).max() < 1e-6


def test_baselines_are_even_attention_over_what_is_seen_and_random_image_tokens(
    vlm: mv.VLM, real: mv.Prompt, found: xr.Dataset
) -> None:
    baseline = found.baseline[0]
    assert np.allclose(baseline.sel(kind="image->last"), len(real.image) / len(real))
    before = [at for at in range(1, len(real)) if at not in real.image]
    assert np.allclose(baseline.sel(kind="previous"), np.mean([1 / (at + 1) for at in before]))
    whole = patterns(vlm, real)[:, :, -1, real.image]
    drawn = [np.random.default_rng(at).choice(16, 4, replace=False) for at in range(4000)]
    means = np.mean([whole[..., some].sum(-1) for some in drawn], 0)
    assert np.abs(baseline.sel(kind="object->last") - means).max() < 0.01


def test_words_written_twice_are_read_where_they_stand(vlm: mv.VLM, real: mv.Prompt) -> None:
    words = [20, 21, 22, 23, 24]
    for made, start in ((behind(vlm, real, words), len(real)), (alone(vlm, real, words), 1)):
        assert made is not None
        assert made.encoding["input_ids"][0, start:].tolist() == [*words, *words]
        whole = patterns(vlm, made)
        rows = range(start + 5, start + 9)
        expected = np.mean([whole[:, :, at, at - 4] for at in rows], 0)
        read = {mv.Site("pattern", layer): mv.lazy(partial(repeated, 4, list(rows))) for layer in range(3)}
        run = vlm.run(made, read=read)
        own = np.stack([run[site][0, :, 0].numpy() for site in read])
        assert np.abs(own[:, :-1] - expected).max() < 1e-6
        assert np.allclose(own[:, -1], np.mean([1 / (at + 1) for at in rows]))


def test_the_head_that_copies_brightness_is_one_for_the_image() -> None:
    vlm, bright, dark, layer, head = planted.planted(1, 2)
    found = mv.label_heads(vlm, [bright, dark], repeat=4)
    expected = np.full((3, 4), "none", dtype=object)
    expected[layer, head] = "image->last"
    assert (found.label.values == expected).all()
    assert float(found.score.sel(kind="image->last", layer=layer, head=head).min()) > 0.999


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=zoo.second_environment)])
def test_the_head_that_looks_before_and_the_one_that_stands_on_it(attention: str) -> None:
    vlm, prompt = planted_heads.asked(attention)
    found = mv.label_heads(vlm, prompt, repeat=5, seed=2)
    assert found.label.values[0, 0] == "previous" and found.label.values[1, 1] == "induction"
    assert float(found.score.sel(kind="previous", layer=0, head=0)[0]) > 0.95
    # Alone the first word has nothing before it and takes itself for it, so that one of four words looks at two places.
    for kind, share in {"induction": 1.0, "induction in text": 3.5 / 4}.items():
        assert float(found.score.sel(kind=kind, layer=1, head=1)[0]) == pytest.approx(share, abs=1e-3)
        assert float(np.abs(found.excess.sel(kind=kind, layer=1, head=0)).max()) < 1e-5
    assert found.label.values[0, 1] == found.label.values[1, 0] == "none"


@zoo.second_environment
def test_intervals_are_over_pictures_and_a_label_needs_its_lower_end(vlm: mv.VLM, real: mv.Prompt) -> None:
    prompts = [real, vlm.prompt(tiny.picture(2), "is there a red cat ?"), vlm.prompt(tiny.picture(3), "what colour ?")]
    found = mv.label_heads(vlm, prompts, repeat=4, least=0.05, clusters=["a", "a", "b"])
    own = mv.mean_interval(found.excess.sel(kind="image->last").rename(layer="l", head="h"), "prompt", ["a", "a", "b"])
    assert np.allclose(found["low"].sel(kind="image->last"), own.low)
    held = found.holds.sel(kind="image->last")
    assert "units" not in found.holds.attrs  # it is true or false, and no share of attention
    assert (held == ((own.low.values > 1e-5) & (found.score.sel(kind="image->last").mean("prompt") >= 0.05))).all()
    best = found["mean"].where(found.holds, -np.inf)
    for layer, head in np.ndindex(3, 4):
        expected = str(best["kind"].values[int(best[:, layer, head].argmax("kind"))])
        assert found.label.values[layer, head] == (expected if bool(found.holds[:, layer, head].any()) else "none")
