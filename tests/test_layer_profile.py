"""What text rows pay to the picture: against the published formulas on the model's own maps, by hand, and planted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zoo
from zoo.boxes import noise

import mechvlm as mv
from mechvlm.experiments.conventions import called
from mechvlm.experiments.layer_profile import of_pattern
from mechvlm.prompt import Prompt
from mechvlm.references import own_patterns

VIAR = "viar-2026"
QUANTITIES = ("density_share", "mass", "density", "all_rows")


def llava15(length: int = 600) -> Prompt:
    """The positions of LLaVA-1.5 with a prompt that begins `USER: <image>`: bos, four tokens, 576 image tokens."""
    question, image = list(range(581, length - 1)), list(range(5, 581))
    return Prompt("", "", {}, [""] * length, [0], [1, 2, 3, 4], image, question, [length - 1], images=[])


def both_lengths(vlm: mv.VLM) -> list[Prompt]:
    return [vlm.prompt(noise(0), "is there a cat ?"), vlm.prompt(noise(1), "is there a red cat in the image ?")]


@pytest.fixture(scope="module")
def wide() -> mv.VLM:
    return tiny.vlm(dtype=torch.float64)


def as_published(a: np.ndarray, visual: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """The published formulas on one layer's whole map, `head query key`; `visual` says which columns, `rows` which."""
    text = a[:, rows]
    to_image, to_rest = text[..., visual], text[..., ~visual]

    def entropy(part: np.ndarray) -> float:
        p = part / (part.sum(-1, keepdims=True) + 1e-10)
        return float(-(p * np.log(p + 1e-10)).sum(-1).mean())

    h = entropy(to_image), entropy(to_rest)
    heads = a[..., visual].sum(-1).mean(-1)
    return {
        "density_share": to_image.mean() / (to_image.mean() + to_rest.mean()),
        "mass": to_image.sum(-1).mean(),
        "density": to_image.mean(),
        "all_rows": a[..., visual].sum(-1).mean(),
        "h_image": h[0],
        "h_rest": h[1],
        "h_ratio": h[0] / h[1],
        "entropy": float(-(a * np.log(a + 1e-10)).sum(-1).mean()),
        "image_rows": a[:, visual][..., visual].sum(-1).mean(),
        "heads": heads,
    }


def visual_columns(convention: str | None, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Which columns are called the image, and which rows text, as the published scripts slice them."""
    at, count = np.arange(len(prompt)), len(prompt.image)
    if convention is None:
        visual = np.isin(at, prompt.image)
        return visual, at > max(prompt.image)
    if convention == "viar-2026-qwen2-vl":
        visual = np.isin(at, prompt.image)
        return visual, ~visual
    visual = at < (count if convention == VIAR else 1)
    return visual, ~visual


@pytest.mark.parametrize("convention", [None, VIAR, "viar-2026-mistral", "viar-2026-qwen2-vl"])
def test_every_number_is_that_of_the_published_formula_on_the_models_own_map(
    wide: mv.VLM, convention: str | None
) -> None:
    prompts = both_lengths(wide)
    found = mv.layer_profile(wide, prompts, convention=convention)
    for number, prompt in enumerate(prompts):
        own, where = own_patterns(wide, prompt), visual_columns(convention, prompt)
        for layer in range(3):
            here = found.sel(prompt=number, layer=layer)
            expected = as_published(own[mv.Site("pattern", layer)][0].numpy(), *where)
            mine = {name: here.vis_l.sel(quantity=name) for name in QUANTITIES}
            mine |= {name: here[name].mean() for name in ("h_image", "h_rest", "h_ratio", "entropy")}
            mine["image_rows"] = here.paid.sel(rows="image", span="image").mean()
            mine["heads"] = here.paid.sel(rows="all", span="image")
            for name, value in mine.items():
                np.testing.assert_allclose(value, expected[name], rtol=2e-6, atol=1e-7, err_msg=name)


def test_the_corrected_ratios_are_those_of_attention_profile(wide: mv.VLM) -> None:
    prompts = both_lengths(wide)
    found, other = mv.layer_profile(wide, prompts), mv.attention_profile(wide, prompts, queries="text")
    for name in ("mass", "density", "density_share", "lift", "vas"):
        np.testing.assert_allclose(found[name], other[name], rtol=1e-9, err_msg=name)


def test_published_columns_of_llava_take_five_of_text_and_leave_five_of_the_image() -> None:
    prompt = llava15()
    own, published = called(prompt), called(prompt, VIAR)
    assert (own.image, own.text) == (tuple(range(5, 581)), tuple(range(581, 600)))
    assert (published.image, published.text) == (tuple(range(576)), tuple(range(576, 600)))
    assert set(published.image) - set(own.image) == set(range(5))
    assert set(own.image) - set(published.image) == {*range(576, 581)} <= set(published.text)


def test_a_sink_is_visual_attention_by_the_published_columns_and_none_by_the_corrected_ones() -> None:
    """By hand: every row pays 0.9 to the first token, 0.1 to itself."""
    prompt = llava15()
    pattern = 0.1 * torch.eye(600)[None] + torch.zeros(2, 600, 600)
    pattern[:, :, 0] += 0.9
    own, published, first = (of_pattern(pattern, called(prompt, name)) for name in (None, VIAR, "viar-2026-mistral"))
    image = list(called(prompt).spans).index("image")
    np.testing.assert_allclose(own["mass"][:, image], 0, atol=1e-7)
    np.testing.assert_allclose(published["mass"][:, 0], 0.9, rtol=1e-6)
    np.testing.assert_allclose(published["really"].mean(0), [0.9, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(published["density"][:, 0], 0.9 / 576, rtol=1e-6)
    np.testing.assert_allclose(first["mass"][:, 0], first["density"][:, 0], rtol=1e-9)
    for found in (own, published, first):
        np.testing.assert_allclose(found["first"], 0.9, rtol=1e-6)


def test_the_last_image_tokens_are_text_by_the_published_columns() -> None:
    """By hand: text looks at the last five image tokens alone."""
    prompt = llava15()
    pattern = torch.eye(600)[None].clone()
    pattern[:, 581:] = 0
    pattern[:, 581:, 576:581] = 0.2
    own, published = (of_pattern(pattern, called(prompt, name)) for name in (None, VIAR))
    assert own["mass"][0, list(called(prompt).spans).index("image")] == pytest.approx(1)
    assert own["h_image"][0] == pytest.approx(np.log(5))
    assert np.isnan(own["h_rest"][0])
    assert published["mass"][0].tolist() == pytest.approx([0, 1])
    assert published["h_image"][0] == 0
    assert published["h_rest"][0] == pytest.approx(19 / 24 * np.log(5))


def test_a_sink_planted_in_a_model_is_visual_attention_by_the_published_columns_only() -> None:
    vlm = tiny.vlm()
    prompt = vlm.prompt(tiny.picture(), "is there a cat ?")
    sink = [mv.bias_attention(layer, prompt.bos, 40.0) for layer in range(3)]
    own, published = (mv.layer_profile(vlm.with_edits(sink), prompt, convention=name) for name in (None, VIAR))
    assert float(own.vis_l.sel(quantity="mass").max()) < 1e-6
    assert float(published.vis_l.sel(quantity="mass").min()) > 1 - 1e-6
    np.testing.assert_allclose(published.really.sel(own="bos"), own["first"], rtol=1e-5)


def test_rows_divide_what_they_pay_and_blocks_are_means_over_prompts_and_heads(wide: mv.VLM) -> None:
    found = mv.layer_profile(wide, both_lengths(wide), convention=VIAR)
    np.testing.assert_allclose(found.paid.sum("span"), 1, rtol=1e-9)
    blocks = mv.attention_blocks(found)
    np.testing.assert_allclose(blocks.vis2vis, 1)
    np.testing.assert_allclose(blocks.text2vis, found.mass.sel(span="image").mean(["prompt", "head"]))
    share = tiny.TOKENS / len(both_lengths(wide)[-1])
    np.testing.assert_allclose(blocks.vis_frac_aggregate, blocks.text2vis * (1 - share) + share)
    heads = found.paid.sel(rows="all", span="image").mean("prompt").values
    np.testing.assert_allclose(blocks.head_vis_frac_std, heads.std(1))
    np.testing.assert_allclose(blocks.head_vis_frac_max, heads.max(1))
    own = mv.attention_blocks(mv.layer_profile(wide, both_lengths(wide)))
    np.testing.assert_allclose(own.text2vis + own.text2text, 1)
    assert (own.vis2text > 0.01).all()  # image rows see bos and prefix


def test_questions_about_one_picture_are_one_cluster_of_the_interval(wide: mv.VLM) -> None:
    same = [wide.prompt(noise(0), words) for words in ("is there a cat ?", "is there a dog ?")]
    found = mv.layer_profile(wide, same)
    assert found.low.isnull().all() and len(set(found.cluster.values)) == 1
    np.testing.assert_allclose(found["mean"], found.vis_l.mean("prompt"))
    named = mv.layer_profile(wide, same, clusters=["a", "b"])
    assert (named.low <= named["mean"]).all() and (named["mean"] <= named.high).all()


def test_a_q_formers_tokens_are_profiled_as_image_tokens() -> None:
    vlm = zoo.build("blip2-opt")
    prompt = zoo.ask(vlm, noise(0))
    found = mv.layer_profile(vlm, prompt)
    assert found.n_keys.sel(span="image").item() == len(prompt.image)
    np.testing.assert_allclose(found.mass.sum("span"), 1, rtol=1e-5)


def test_figures_show_the_curves_of_the_profile_and_what_the_columns_hold(wide: mv.VLM) -> None:
    prompts = both_lengths(wide)
    own, published = (mv.layer_profile(wide, prompts, convention=name) for name in (None, VIAR))
    beside = mv.plot.published_beside(own, published, "density")
    curves = {trace.name: trace.y for trace in beside.data if trace.mode == "lines+markers"}
    np.testing.assert_allclose(curves["corrected"], own["mean"].sel(quantity="density"))
    np.testing.assert_allclose(curves[VIAR], published["mean"].sel(quantity="density"))
    bos = float(published.really.sel(own="bos").mean())
    assert beside.layout.annotations[0].text.startswith(f"What {VIAR} calls the image is paid, on average")
    assert f"{bos:.3f} bos" in beside.layout.annotations[0].text.replace("<br>", " ")
    spans = {trace.name: trace.y for trace in mv.plot.layer_spans(own).data if trace.mode == "lines+markers"}
    np.testing.assert_allclose(spans["position 0"], own["first"].mean(["prompt", "head"]))
    np.testing.assert_allclose(spans["image"], own["mean"].sel(quantity="mass"))
    columns = mv.plot.layer_spans(published)
    assert [trace.name for trace in columns.data if trace.mode == "lines+markers"] == ["columns 0 to 15", "position 0"]
    assert f"what {VIAR} calls the image, position 0 among them." in columns.layout.annotations[0].text.replace(
        "<br>", " "
    )
    with pytest.raises(ValueError) as caught:
        mv.plot.published_beside(own, published, "vas")
    assert str(caught.value) == (
        "quantity='vas' is not known; choose from 'mass', 'all_rows', 'density', 'density_share'."
    )


def image_alone(vlm: mv.VLM) -> Prompt:
    ids = torch.tensor([[tiny.IMAGE] * tiny.TOKENS])
    return vlm.prompt(encoding={"input_ids": ids, "pixel_values": tiny.encoding()["pixel_values"]})


WRONG: list[tuple[Callable[[mv.VLM], object], str]] = [
    (
        lambda vlm: mv.layer_profile(vlm, both_lengths(vlm)[0], level=2),
        "level=2 is no share; give for instance 0.95.",
    ),
    (lambda vlm: mv.layer_profile(vlm, []), "the list of prompts is empty."),
    (
        lambda vlm: mv.layer_profile(vlm, vlm.prompt(None, "is there a cat ?")),
        "the prompt holds no image to look at; make it with vlm.prompt(image, text).",
    ),
    (
        lambda vlm: mv.layer_profile(vlm, both_lengths(vlm), convention="viar"),
        "convention='viar' is not known; choose from 'viar-2026', 'viar-2026-mistral', 'viar-2026-qwen2-vl', or None "
        "for the positions as they are.",
    ),
    (
        lambda vlm: mv.layer_profile(vlm, image_alone(vlm), convention="viar-2026"),
        "the prompt's 16 positions are all image tokens, so no row is text; ask a question about the image.",
    ),
    (
        lambda _: mv.layer_profile(zoo.build("mllama"), zoo.ask(zoo.build("mllama"), noise(0))),
        "the words of this model see the picture by cross-attention, whose weights are all the picture's, so there is "
        "no share to profile; mv.attention_map shows what such a layer looks at.",
    ),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_cannot_be_profiled_is_refused_in_a_sentence(wrong: Callable[[mv.VLM], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        wrong(tiny.vlm())
    assert str(caught.value) == message
