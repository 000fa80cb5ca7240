"""The five visual attention ratios against numpy on the model's own patterns, by hand, and where truth was planted."""

from collections.abc import Callable
from typing import Any

import jaxtyping
import numpy as np
import planted
import pytest
import tiny
import torch
import zoo
from zoo.boxes import noise

import mechvlm as mv
from mechvlm.experiments.ratios import averaged, ratios
from mechvlm.references import own_patterns

KINDS = [name for name in zoo.VARIANTS if not zoo.there(name)]
RATIOS = ("mass", "density", "density_share", "lift", "vas")


def by_numpy(pattern: np.ndarray, spans: dict[str, list[int]], rows: list[int], out: list[int]) -> dict[str, Any]:
    """The five of one layer from its whole pattern, `head query key`, written down as in the papers."""
    kept = [key for key in range(pattern.shape[-1]) if key not in out]
    held = {name: [key for key in keys if key not in out] for name, keys in spans.items()}
    rows = [row for row in rows if (pattern[0, row, kept] > 0).any()]
    a = pattern[:, rows]
    a = a / a[..., kept].sum(-1, keepdims=True) if out else a
    mass = {name: a[..., keys].sum(-1).mean(-1) for name, keys in held.items()}
    sees = pattern[0, rows] > 0
    even = {name: (sees[:, keys].sum(-1) / sees[:, kept].sum(-1)).mean() for name, keys in held.items()}
    others = [key for key in kept if key not in held["image"]]
    image, rest = a[..., held["image"]].mean((1, 2)), a[..., others].mean((1, 2))
    paid = a[..., held.get("bos", []) + held.get("prefix", [])].sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "mass": mass,
            "even": even,
            "density": {name: mass[name] / np.float64(len(keys)) for name, keys in held.items()},
            "density_share": image / (image + rest),
            "lift": {name: mass[name] / np.float64(even[name] or np.nan) for name in held},
            "length": {name: mass[name] / (np.float64(len(keys) or np.nan) / len(kept)) for name, keys in held.items()},
            "vas": a[..., held["image"]].sum((1, 2)) / np.where(paid > 0, paid, np.nan),
        }


def compare(found: Any, own: dict[str, Any], most: float) -> None:
    """Each number of one example and layer, relative to its size where that is above 1, and lift in units of mass."""
    for name, expected in own.items():
        if name == "even":
            continue
        values = found["lift" if name == "length" else name]
        pairs = [(values, expected, 1.0)]
        if isinstance(expected, dict):
            weights = own["even"] if name == "lift" else dict.fromkeys(expected, 1.0)
            pairs = [(values.sel(span=span), one, weights[span]) for span, one in expected.items()]
        for value, one, weight in pairs:
            assert np.array_equal(np.isnan(value), np.isnan(one)), name
            error = weight * np.abs(value - one) / np.maximum(1, np.abs(one) * weight)
            assert not (error > most).any(), name


@pytest.mark.parametrize("kind", zoo.each_kind(KINDS))
def test_each_ratio_is_numpys_on_the_models_own_pattern(kind: str) -> None:
    vlm = zoo.build(kind, "eager" if kind in zoo.EAGER_ONLY else "sdpa", torch.float64)
    prompt = zoo.ask(vlm, noise(0))
    own = own_patterns(vlm, prompt)
    out = sorted({0, len(prompt) - 2, *prompt.image[: len(prompt.image) // 2]})
    profiles = {
        ("all", ()): mv.attention_profile(vlm, prompt, queries="all"),
        ("text", tuple(out)): mv.attention_profile(vlm, prompt, queries="text", without=out),
    }
    rows = {"all": list(range(len(prompt))), "text": prompt.question + prompt.last}
    for (queries, taken), profile in profiles.items():
        for layer in range(vlm.shape.layers["text"]):
            here = profile.sel(example=0, layer=layer)
            site = mv.Site("pattern", layer)
            if site not in own:
                assert all(np.isnan(here[name]).all() for name in RATIOS)
                continue
            expected = by_numpy(own[site][0].double().numpy(), prompt.spans, rows[queries], list(taken))
            expected.pop("length")
            compare(here, expected, 1e-6)


def test_each_ratio_by_hand() -> None:
    """Two queries of one head; keys: one of bos, two of the image, one of the question."""
    masses = np.array([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]])
    sees = np.array([[1.0, 2.0, 0.0], [1.0, 2.0, 1.0]])
    keys = np.array([[1.0, 2.0, 1.0]] * 2)
    names, image = ["bos", "image", "question"], [False, True, False]

    def told(even: np.ndarray) -> dict[str, list]:
        found = {name: values[None, None] for name, values in averaged(masses, even, keys, image).items()}
        five = ratios(found, names, keys[:1].astype(int))
        return {name: values.squeeze().tolist() for name, values in five.items()}

    five = told(sees)
    assert five["mass"] == [0.375, 0.375, 0.25]
    assert five["density"] == [0.375, 0.1875, 0.25]
    assert five["density_share"] == pytest.approx(0.1875 / (0.1875 + 0.3125))
    assert five["lift"] == pytest.approx([0.375 / (7 / 24), 0.375 / (7 / 12), 0.25 / 0.125])
    assert five["vas"] == 1.0
    assert told(keys)["lift"] == [1.5, 0.75, 1.0]


def test_rows_are_made_to_sum_to_one_before_they_are_averaged() -> None:
    """A query that leaves 0.1 to the keys that stay counts as much as one that leaves all."""
    masses = np.array([[[0.1, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    found = averaged(masses, np.ones((3, 2)), np.ones((3, 2)), [True, False], part=True)
    assert found["mass"].tolist() == [[0.5, 0.5]]


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return tiny.vlm(dtype=torch.float64)


@pytest.fixture(scope="module")
def prompts(vlm: mv.VLM) -> list[mv.Prompt]:
    asked = [
        (1, "is there a red cat ?"),
        (2, "what colour ?"),
        (3, "is there a red dog ?"),
        (4, "is there a dog in it ?"),
    ]
    return [vlm.prompt(tiny.picture(seed), words) for seed, words in asked]


@pytest.mark.parametrize(
    ("queries", "without"), [("last", None), ("text", "each"), ("all", "bos"), ([-1, 4], "each"), ("all", None)]
)
def test_a_list_of_prompts_gives_what_each_gives_alone(
    vlm: mv.VLM, prompts: list[mv.Prompt], queries: Any, without: Any
) -> None:
    each = [[0, 3], [5], [0, 3], []] if without == "each" else [without] * 4
    together = mv.attention_profile(vlm, prompts, queries, without=each if without == "each" else without)
    for number, prompt in enumerate(prompts):
        alone = mv.attention_profile(vlm, prompt, queries, without=each[number])
        for name in (*RATIOS, "n_keys", "n_queries"):
            np.testing.assert_allclose(together[name][number], alone[name][0], rtol=1e-10, atol=1e-12)


def test_published_lift_compares_with_the_spans_share_of_all_positions(vlm: mv.VLM, prompts: list[mv.Prompt]) -> None:
    prompt = prompts[0]
    found = mv.attention_profile(vlm, prompt, "text", even="length").isel(example=0)
    for layer in range(3):
        own = own_patterns(vlm, prompt)[mv.Site("pattern", layer)][0].double().numpy()
        expected = by_numpy(own, prompt.spans, prompt.question + prompt.last, [])
        expected.pop("lift")
        compare(found.sel(layer=layer), expected, 1e-6)


def test_generated_tokens_look_as_they_would_in_one_pass(vlm: mv.VLM, prompts: list[mv.Prompt]) -> None:
    prompt, out = prompts[0], [0, 6]
    found = mv.attention_profile(vlm, prompt, "generated", without=out, max_new_tokens=5).isel(example=0)
    made = vlm.generate(prompt, max_new_tokens=5, do_sample=False).tokens[0]
    count = len(made) - 1
    ids = torch.cat([prompt.encoding["input_ids"], made[None, :-1]], 1)
    encoding = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": prompt.encoding["pixel_values"],
    }
    whole = vlm.prompt(encoding=encoding)
    spans = {**prompt.spans, "generated": list(range(len(prompt), len(prompt) + count))}
    assert count > 1 and (found.n_queries == count).all() and found.n_keys.sel(span="generated") == count
    for layer in range(3):
        own = own_patterns(vlm, whole)[mv.Site("pattern", layer)][0].double().numpy()
        expected = by_numpy(own, spans, spans["generated"], out)
        here = found.sel(layer=layer)
        compare(here, {"mass": expected["mass"], "vas": expected["vas"]}, 1e-6)
        # Those made later are no keys yet, so densities go by each step's own number of keys.
        a = own[:, len(prompt) :, :].copy()
        a[..., out] = 0
        a /= a.sum(-1, keepdims=True)
        steps = np.arange(1, count + 1)
        dense = a[..., spans["generated"]].sum(-1) / steps
        assert np.abs(here.density.sel(span="generated") - dense.mean(-1)).max() < 1e-6
        left = len(prompt) - len(out) + steps
        even = np.mean((len(prompt.image) - 1) / left)
        assert np.abs(here.lift.sel(span="image") - expected["mass"]["image"] / even).max() < 1e-6


def test_the_planted_head_looks_at_the_image_alone() -> None:
    vlm, real, _, layer, head = planted.planted()
    found = mv.attention_profile(vlm, real, even="length").isel(example=0)
    share, image = found.density_share, found.lift.sel(span="image")
    here = {"layer": layer, "head": head}
    assert found.mass.sel(**here, span="image") == pytest.approx(1)
    assert share.sel(**here) == pytest.approx(1) and image.sel(**here) == pytest.approx(len(real) / len(real.image))
    others = ~((found.layer == layer) & (found["head"] == head))
    assert np.allclose(share.where(others).stack(at=("layer", "head")).dropna("at"), 0.5)
    assert np.allclose(found.vas.where(others).stack(at=("layer", "head")).dropna("at"), len(real.image) / 2)


def test_without_an_image_there_is_no_ratio_of_it(vlm: mv.VLM) -> None:
    found = mv.attention_profile(vlm, vlm.prompt(None, "is there a cat ?"))
    assert np.isnan(found.vas).all() and np.isnan(found.density_share).all()
    assert np.allclose(found.mass.sum("span"), 1)


def test_sinks_of_a_prompt_are_taken_out(vlm: mv.VLM, prompts: list[mv.Prompt]) -> None:
    found = [mv.sinks(vlm, prompt, threshold=1.0) for prompt in prompts]
    out = [mv.sink_positions(one) for one in found]
    assert all(out)
    names = [attention.mass for attention in (profile(vlm, prompts, found), profile(vlm, prompts, out))]
    assert (names[0] == names[1]).all()
    by_function = profile(vlm, prompts[0], lambda prompt: mv.sink_positions(mv.sinks(vlm, prompt, threshold=1.0)))
    assert (by_function.mass[0] == profile(vlm, prompts[0], found[0]).mass[0]).all()


def profile(vlm: mv.VLM, prompts: Any, without: Any) -> Any:
    return mv.attention_profile(vlm, prompts, "text", without=without)


def test_rows_that_have_nothing_left_are_not_counted(vlm: mv.VLM, prompts: list[mv.Prompt]) -> None:
    """Without the first three keys the first three queries have nothing left."""
    without = mv.attention_profile(vlm, prompts[0], [0, 2, 5, -1], without=[0, 1, 2])
    alone = mv.attention_profile(vlm, prompts[0], [5, -1], without=[0, 1, 2])
    assert without.n_queries.dims == ("example", "layer", "head") and (without.n_queries == 2).all()
    np.testing.assert_allclose(without.mass, alone.mass, rtol=1e-12)


def test_a_layer_with_a_window_counts_its_own_rows() -> None:
    vlm = zoo.build("llava_next-sliding")
    prompt = zoo.ask(vlm, noise(0))
    found = mv.attention_profile(vlm, prompt, "all", without=range(len(prompt) - 3)).n_queries.isel(example=0)
    for layer in range(vlm.shape.layers["text"]):
        own = own_patterns(vlm, prompt)[mv.Site("pattern", layer)][0]
        expected = (own[..., len(prompt) - 3 :] > 0).any(-1).sum(-1)
        assert found.sel(layer=layer).values.tolist() == expected.tolist()


def test_the_position_that_looks_is_counted_from_the_first(vlm: mv.VLM, prompts: list[mv.Prompt]) -> None:
    last = len(prompts[0]) - 1
    assert mv.attention_map(vlm, prompts[0], 1)["query"] == last
    assert mv.attention_map(vlm, prompts[0], 1, query=[-1, 4])["query"].values.tolist() == [last, 4]


@pytest.mark.here  # it watches pieces in this process
@pytest.mark.parametrize("queries", ["last", "text", "all"])
def test_no_map_of_all_queries_by_all_keys_is_made(
    vlm: mv.VLM, prompts: list[mv.Prompt], queries: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one row at a time the numbers are the same, and no piece has more."""
    from mechvlm import pieces

    expected, made = mv.attention_profile(vlm, prompts[:3], queries), []
    own = pieces.scores

    def watched(q: torch.Tensor, *more: Any) -> torch.Tensor:
        made.append(q.shape[2])
        return own(q, *more)

    monkeypatch.setattr(pieces, "scores", watched)
    monkeypatch.setattr(vlm, "attention_budget", 1)
    found = mv.attention_profile(vlm, prompts[:3], queries)
    assert max(made) == 1
    for name in RATIOS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-10)


Call = Callable[[mv.VLM, list[mv.Prompt]], object]
WRONG: list[tuple[Call, str]] = [
    (
        lambda vlm, prompts: mv.attention_profile(vlm, prompts, even="uniform"),
        "even='uniform' is not known; choose 'visible' or 'length'.",
    ),
    (
        lambda vlm, prompts: mv.attention_profile(vlm, prompts, "generated", max_new_tokens=1),
        "max_new_tokens=1 makes no token that looks back, since the last one made never does; give 2 or more.",
    ),
    (
        lambda vlm, prompts: profile(vlm, prompts, "prefix"),
        "without='prefix' is not known; write 'bos', or give positions or a function of a prompt.",
    ),
    (
        lambda vlm, prompts: profile(vlm, prompts, 3),
        "without=3 says no keys; give 'bos', positions, sinks, or a function of a prompt.",
    ),
    (
        lambda vlm, prompts: profile(vlm, prompts, [[0], [1]]),
        "without holds 2 lists, and there are 4 prompts; give one each.",
    ),
    (
        lambda vlm, prompts: profile(vlm, prompts, [99]),
        "without holds position 99; give positions of the prompt, which has 27.",
    ),
    (
        lambda vlm, prompts: mv.attention_profile(vlm, prompts[:2], [0], without="bos"),
        "without takes out all that the queries of prompt 0 look at (queries: 1); take out fewer keys, or ask "
        "positions that see others.",
    ),
    (
        lambda vlm, prompts: profile(vlm, prompts[0], mv.sinks(vlm, prompts[1])),
        "without holds the sinks of a prompt with 24 positions, and this one has 27; make them with "
        "mv.sinks(vlm, prompt).",
    ),
    (
        lambda vlm, prompts: profile(vlm, prompts[0], range(27)),
        "without takes out all positions of the prompt; leave at least one.",
    ),
    (
        lambda vlm, prompts: profile(vlm, prompts, mv.sinks(vlm, prompts[0])),
        "without holds the sinks of one prompt, and there are 4; give a list with one dataset for each, or a function "
        "of a prompt.",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_what_cannot_be_profiled_is_refused(vlm: mv.VLM, prompts: list[mv.Prompt], call: Call, sentence: str) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises((ValueError, TypeError)) as refused:
            call(vlm, prompts)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert str(refused.value) == sentence
