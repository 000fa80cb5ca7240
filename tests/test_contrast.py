"""Visual contrastive decoding: its formula by hand, and its two branches against runs of the whole text again."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from jaxtyping import config

import mechvlm as mv
from mechvlm.methods.contrast import _Mixing, contrast_logits, vcd_generate
from mechvlm.methods.contrast_pope import _scored, vcd_pope
from mechvlm.methods.nulled import PixelDiffusion

STEPS = 8


@cache
def vlm() -> mv.VLM:
    return tiny.vlm()


@cache
def real() -> mv.Prompt:
    return vlm().prompt(tiny.picture(), "is there a dog ?")


@cache
def null() -> mv.Prompt:
    return PixelDiffusion(500).of(vlm(), real())


def again(prompt: mv.Prompt, tokens: torch.Tensor) -> torch.Tensor:
    """The last logits of a prompt with tokens behind it, by a plain pass of the model without a cache."""
    ids = torch.cat([prompt.encoding["input_ids"], tokens], 1)
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pixels = {"pixel_values": prompt.encoding["pixel_values"]} if prompt.image else {}
        return vlm().hf(**given, **pixels, use_cache=False).logits[0, -1]


def test_the_formula_by_hand() -> None:
    real, null = torch.tensor([2.0, 1.0, -0.2, -0.5]), torch.tensor([1.0, 3.0, 0.0, -4.0])
    # ln 0.1 = -2.303, so what is below 2 - 2.303 = -0.303 is cut: the last token, which the contrast would have liked.
    found = contrast_logits(real, null, alpha=1.0, beta=0.1)
    assert torch.allclose(found[:3], torch.tensor([3.0, -1.0, -0.4])) and found[3] == -torch.inf
    assert torch.allclose(contrast_logits(real, null, 1.0, 0.0), torch.tensor([3.0, -1.0, -0.4, 3.0]))


def test_the_cut_is_of_the_real_branch_before_the_contrast(generator: torch.Generator) -> None:
    real, null = torch.randn(2, 5, 40, generator=generator) * 3
    share = real.softmax(-1) / real.softmax(-1).amax(-1, keepdim=True)
    for beta in (0.1, 0.2, 1.0):
        cut = contrast_logits(real, null, 1.0, beta) == -torch.inf
        assert torch.equal(cut, share < beta)
        assert not cut.gather(1, real.argmax(-1, keepdim=True)).any()


def test_taking_nothing_off_is_generating() -> None:
    said = vlm().generate(real(), max_new_tokens=STEPS, do_sample=False)
    for beta in (0.0, 0.3):
        found = vcd_generate(vlm(), real(), alpha=0.0, beta=beta, max_new_tokens=STEPS)
        assert torch.equal(found.tokens, said.tokens) and found.text == said.text


@pytest.mark.parametrize("sampled", [False, True])
def test_both_branches_keep_their_picture_and_are_given_the_chosen_token(sampled: bool) -> None:
    found = vcd_generate(vlm(), real(), alpha=1.0, beta=0.1, max_new_tokens=STEPS, do_sample=sampled, temperature=2.0)
    steps = found.tokens.shape[1]
    assert steps > 3
    assert not torch.equal(found.real[1:], found.null[1:])
    for step in range(steps):
        before = found.tokens[:, :step]
        assert torch.allclose(found.real[step], again(real(), before), atol=1e-5)
        assert torch.allclose(found.null[step], again(null(), before), atol=1e-5)
        assert torch.equal(found.logits[step], contrast_logits(found.real[step], found.null[step], 1.0, 0.1))
    if not sampled:
        assert torch.equal(found.tokens[0], found.logits.argmax(-1))


def test_the_contrast_says_something_else() -> None:
    """With the test above: not the real branch's own words."""
    plain = vlm().generate(real(), max_new_tokens=STEPS, do_sample=False)
    found = vcd_generate(vlm(), real(), mv.images.black, alpha=3.0, beta=0.01, max_new_tokens=STEPS)
    assert not torch.equal(found.tokens, plain.tokens)


def test_draws_follow_the_contrasted_probabilities() -> None:
    """Many draws from one pair of branches, against the softmax of their contrast over what is plausible."""
    said = vcd_generate(vlm(), real(), max_new_tokens=1)
    mixing = _Mixing(1.0, 0.1, 1.0, torch.Generator().manual_seed(0))
    both = contrast_logits(said.real, said.null, 1.0, 0.1).expand(2, -1)
    drawn = [mixing(torch.empty(2, 0), both) for _ in range(600)]
    assert all(torch.equal(one[0], one[1]) for one in drawn)
    counts = np.bincount([int(one[0].argmax()) for one in drawn], minlength=both.shape[1])
    expected = said.logits[0].double().softmax(-1).numpy()
    assert counts[expected == 0].sum() == 0 and (expected > 0.05).sum() > 1
    deviation = np.sqrt(len(drawn) * expected * (1 - expected)) + 1
    assert (np.abs(counts - len(drawn) * expected) < 5 * deviation).all()


def test_a_token_that_the_null_branch_forbids_stays_as_it_is() -> None:
    found = contrast_logits(torch.tensor([2.0, 1.0, -torch.inf]), torch.tensor([-torch.inf, 0.0, 0.0]), 1.0, 0.0)
    assert found.tolist() == [2.0, 2.0, -torch.inf]


def test_the_same_seed_draws_the_same() -> None:
    def said(seed: int) -> torch.Tensor:
        return vcd_generate(vlm(), real(), max_new_tokens=STEPS, do_sample=True, temperature=3.0, seed=seed).tokens

    assert torch.equal(said(1), said(1)) and not torch.equal(said(1), said(2))


def test_another_instruction_can_be_the_other_branch() -> None:
    """Of another length, without a picture: each branch has its own positions."""
    other = vlm().prompt(None, "what colour is the cat and how many")
    found = vcd_generate(vlm(), real(), other, max_new_tokens=3)
    for step in range(found.tokens.shape[1]):
        assert torch.allclose(found.null[step], again(other, found.tokens[:, :step]), atol=1e-5)


def test_edits_act_in_both_branches() -> None:
    edits = [mv.bias_attention(1, real().image, 2.0)]
    for given in (edits, lambda prompt: [mv.bias_attention(1, prompt.image, 2.0)]):
        found = vcd_generate(vlm(), real(), edits=given, max_new_tokens=1)
        for prompt, said in ((real(), found.real), (null(), found.null)):
            assert torch.allclose(vlm().run(prompt, edits=edits).logits, said, atol=1e-5)


def test_the_noise_is_that_of_the_formula_on_the_pixels_the_model_is_given() -> None:
    """By the source's formula, at the strength it has there, for a picture much larger than the model's input."""
    large = vlm().prompt(tiny.picture().resize((240, 240)), "is there a dog ?")
    beta = torch.linspace(-6, 6, 1000).double().sigmoid() * (5e-3 - 1e-5) + 1e-5
    share = (1 - beta).cumprod(0)[500]
    x = large.encoding["pixel_values"].double()
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    found = PixelDiffusion(500, seed=3).of(vlm(), large)
    assert torch.allclose(
        found.encoding["pixel_values"].double(), share.sqrt() * x + (1 - share).sqrt() * eps, atol=1e-5
    )
    apart = PixelDiffusion(500).of(vlm(), large).encoding["pixel_values"] - share.sqrt() * x
    assert float(apart.std()) == pytest.approx(0.505, abs=0.02)
    assert torch.equal(found.encoding["input_ids"], large.encoding["input_ids"]) and found.image == large.image
    said = vcd_generate(vlm(), large, max_new_tokens=1)
    assert torch.allclose(vlm().run(PixelDiffusion(500).of(vlm(), large)).logits, said.null, atol=1e-5)


def test_both_frames_of_a_patch_get_the_same_noise() -> None:
    rows = PixelDiffusion(500).noise(torch.zeros(5, 3 * 2 * 16), frames=2).reshape(5, 3, 2, 16)
    assert torch.equal(rows[:, :, 0], rows[:, :, 1]) and float(rows.std()) == pytest.approx(1.0, abs=0.1)


def test_a_tile_that_is_only_room_stays_empty() -> None:
    pixels = torch.ones(1, 2, 3, 4, 4)
    pixels[:, 1] = 0.0
    made = mv.Prompt("", "", {"pixel_values": pixels}, [], [], [], [], [], [], [])
    found = PixelDiffusion(500).of(vlm(), made).encoding["pixel_values"]
    assert bool((found[:, 0] != 1).all()) and not found[:, 1].any()


def test_a_null_is_given_by_name() -> None:
    found = vcd_generate(vlm(), real(), "black", max_new_tokens=1)
    assert torch.allclose(found.null, vlm().run(real().with_image(mv.images.black)).logits, atol=1e-5)
    assert vcd_generate(vlm(), real(), "no_image", max_new_tokens=1).settings["null"] == "no_image"


def test_a_models_own_processors_come_after_the_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that its configuration suppresses: the cut and the branches are as without, and it is not said."""
    plain = vcd_generate(vlm(), real(), max_new_tokens=1)
    likeliest = int(plain.real[0].argmax())
    monkeypatch.setattr(vlm().hf.generation_config, "suppress_tokens", [likeliest])
    found = vcd_generate(vlm(), real(), beta=0.02, max_new_tokens=1)
    assert torch.equal(found.real, plain.real) and torch.equal(found.null, plain.null)
    expected = contrast_logits(plain.real, plain.null, 1.0, 0.02)
    expected[0, likeliest] = -torch.inf
    assert torch.equal(found.logits, expected) and int(found.tokens) == int(expected.argmax())
    assert not vlm().hf._forward_hooks


def test_the_published_comparison_has_no_cut_and_a_grey_picture() -> None:
    found = vcd_generate(vlm(), real(), max_new_tokens=1, convention="viar-2026")
    grey = vlm().run(real().with_image(mv.images.grey)).logits
    assert torch.allclose(found.logits, 2 * vlm().run(real()).logits - grey, atol=1e-5)
    assert (found.settings["null"], found.settings["beta"]) == ("grey", 0.0)


# -- evaluations -------------------------------------------------------------------------------------------------------

ASKED: list[dict[str, Any]] = [
    {
        "question_id": at,
        "question": f"is there a {thing} ?",
        "answer": label,
        "image_source": str(at // 2),
        "image": one,
    }
    for at, (thing, label, one) in enumerate(
        (thing, label, tiny.picture(number)) for number in range(3) for thing, label in (("dog", "yes"), ("cat", "no"))
    )
]


def of_both(null: Callable = mv.images.black) -> tuple[np.ndarray, np.ndarray]:
    """The last logits of every question, with the real picture and with a null one, one plain pass each."""
    prompts = [vlm().prompt(row["image"], row["question"]) for row in ASKED]
    nulled = [prompt.with_image(null) for prompt in prompts]
    nothing = torch.empty(1, 0, dtype=torch.long)
    real, null_ = (np.stack([again(prompt, nothing).double().numpy() for prompt in one]) for one in (prompts, nulled))
    return real, null_


def one_token() -> dict[str, list[int]]:
    return {word: vlm().token_ids(word)[:1] for word in ("yes", "no")}


def test_an_evaluation_is_of_the_contrast_of_both_runs() -> None:
    real, null = of_both()
    found = vcd_pope(vlm(), ASKED, mv.images.black, alpha=1.5, beta=0.0, tokens=one_token())
    margins = [logits[:, one_token()["yes"][0]] - logits[:, one_token()["no"][0]] for logits in (real, null)]
    assert np.allclose(found.margin, 2.5 * margins[0] - 1.5 * margins[1], atol=1e-4)
    assert np.allclose(found.margin_real, margins[0], atol=1e-5) and np.allclose(
        found.margin_null, margins[1], atol=1e-5
    )
    assert np.allclose(found.p_yes, 1 / (1 + np.exp(-found.margin)))
    assert found.predicted.values.tolist() == ["yes" if margin > 0 else "no" for margin in found.margin]
    assert set(found.cut.values) == {"none"}


def test_a_spelling_that_was_cut_is_not_counted() -> None:
    """By hand: of two yeses and two noes the cut leaves one yes, so that no is likelier, which all spellings hid."""
    scoring = mv.evaluate.parsers.Scoring((0, 1), (2, 3))
    real, null = torch.tensor([[1.0, 0.0, 1.2, 1.1, 0.0]]), torch.tensor([[1.0, -3.0, 1.2, 1.1, 0.0]])
    # ln 0.5 = -0.693: what is below 0.507 is cut. The contrast is 1, 3 (cut), 1.2, 1.1.
    margin, *cut = _scored(scoring, real, null, 1.0, 0.5)[:3]
    assert margin == pytest.approx(1.0 - np.log(np.exp(1.2) + np.exp(1.1)), abs=1e-6) and margin < 0
    assert cut == [False, False]
    assert _scored(scoring, real, null, 1.0, 0.0)[0] > 0


@pytest.mark.parametrize(("beta", "swapped", "kinds"), [(0.01, True, {"none", "yes"}), (0.1, False, {"no", "both"})])
def test_a_word_that_was_cut_is_not_said(beta: float, swapped: bool, kinds: set[str]) -> None:
    """With the tokens of yes and no exchanged, what is cut is too."""
    ids = list(one_token().values())
    tokens = dict(zip(("yes", "no"), ids[::-1] if swapped else ids, strict=True))
    real, _ = of_both()
    gone = real < np.log(beta) + real.max(1, keepdims=True)
    yes, no = (gone[:, tokens[word][0]] for word in ("yes", "no"))
    found = vcd_pope(vlm(), ASKED, mv.images.black, beta=beta, tokens=tokens)
    expected = ["both" if a and b else "yes" if a else "no" if b else "none" for a, b in zip(yes, no, strict=True)]
    assert found.cut.values.tolist() == expected and set(expected) == kinds
    assert np.isfinite(found.margin).all() and not found.correct.values[yes & no].any()
    sure = {"yes": (0.0, "no"), "no": (1.0, "yes")}
    for cut, p_yes, predicted in zip(expected, found.p_yes.values, found.predicted.values, strict=True):
        assert cut not in sure or (p_yes, predicted) == sure[cut]
        assert (predicted == "other") == (cut == "both")


def test_nothing_taken_off_is_the_plain_evaluation() -> None:
    found, plain = vcd_pope(vlm(), ASKED, alpha=0.0, beta=0.0), mv.evaluate.pope(vlm(), ASKED)
    assert np.allclose(found.margin, plain.margin, atol=1e-5) and np.allclose(found.p_yes, plain.p_yes, atol=1e-6)
    assert (found.correct == plain.correct).all()
    same = mv.evaluate.stats.compare(plain, found, resamples=20)
    assert float(same.difference.sel(metric="accuracy")) == 0.0


def test_a_repeated_question_gets_the_same_answer() -> None:
    found = vcd_pope(vlm(), [*ASKED[:2], {**ASKED[1], "question_id": 99}], "black")
    assert found.duplicate_of[-1] == 1 and found.margin[-1] == found.margin[1] and found.attrs["null"] == "black"


def test_an_evaluation_is_against_drowned_pixels() -> None:
    found = vcd_pope(vlm(), ASKED[:1], beta=0.0, tokens=one_token())
    said = vcd_generate(vlm(), real(), PixelDiffusion(500), max_new_tokens=1)
    yes, no = (one_token()[word][0] for word in ("yes", "no"))
    assert float(found.margin_null[0]) == pytest.approx(float(said.null[0, yes] - said.null[0, no]), abs=1e-5)
    assert found.attrs["null"] == said.settings["null"] == "diffusion(t=500, seed=0) of pixel_values"


def test_the_published_evaluation_is_against_grey_without_a_cut() -> None:
    found = vcd_pope(vlm(), ASKED[:2], tokens=one_token(), convention="viar-2026")
    by_hand = vcd_pope(vlm(), ASKED[:2], mv.images.grey, 1.0, 0.0, tokens=one_token())
    assert np.array_equal(found.margin, by_hand.margin) and np.array_equal(found.predicted, by_hand.predicted)
    assert (found.attrs["null"], found.attrs["convention"]) == ("grey", "viar-2026")


REFUSED: list[tuple[str, Callable[[], object]]] = [
    (
        "real_logits is [1.0, 2.0], and must be a tensor; write torch.tensor(...).",
        lambda: contrast_logits([1.0, 2.0], [0.0, 0.0]),  # type: ignore[arg-type]
    ),
    ("seed 'a' is not a whole number.", lambda: vcd_generate(vlm(), real(), do_sample=True, seed="a")),  # type: ignore[arg-type]
    ("seed=-1 is not a seed; give a whole number from 0.", lambda: vcd_generate(vlm(), real(), seed=-1)),
    ("seed=-1 is not a seed; give a whole number from 0.", lambda: PixelDiffusion(500, -1)),
    (
        "diffusion has no step t=1000; steps are whole numbers from 0 to 999, and 500 is the usual.",
        lambda: PixelDiffusion(1000),
    ),
    (
        "the prompt 'is there a dog ?' holds no image, so there is nothing to drown in noise.",
        lambda: PixelDiffusion().of(vlm(), vlm().prompt(None, "is there a dog ?")),
    ),
    (
        "null='swap' needs prompts about several pictures; give mv.images.swap(picture).",
        lambda: vcd_pope(vlm(), ASKED, "swap"),
    ),
    (
        "null is one prompt, and an evaluation asks many; give a null image, or the name of a null.",
        lambda: vcd_pope(vlm(), ASKED, null()),
    ),
    (
        "the edits that the function gives for the two branches differ, and both are rows of one generation; give a "
        "null that leaves positions as they are, or a list of edits.",
        lambda: vcd_generate(vlm(), real(), "no_image", edits=lambda one: [mv.cut_attention(0, one.question[:1])]),
    ),
    (
        "the model's generation settings forbid every token that the cut left; give a smaller beta, or change "
        "vlm.hf.generation_config.",
        lambda: _Mixing(1.0, 1.0, 1.0, None)(torch.empty(2, 0), torch.full((2, 4), -torch.inf)),
    ),
    (
        "alpha=-1 takes nothing off; give a number from 0, for instance 1.",
        lambda: contrast_logits(torch.zeros(3), torch.zeros(3), alpha=-1),
    ),
    (
        "beta=2 is no share of the largest probability; give one from 0 (no cut) to 1.",
        lambda: contrast_logits(torch.zeros(3), torch.zeros(3), beta=2),
    ),
    (
        "the branches' logits are (3,) and (4,); they must be of the same rows and the same vocabulary.",
        lambda: contrast_logits(torch.zeros(3), torch.zeros(4)),
    ),
    (
        "max_new_tokens=5 with convention='viar-2026': the published code took the picture away after the first token, "
        "which is no contrast with it; give 1, or leave convention out.",
        lambda: vcd_generate(vlm(), real(), max_new_tokens=5, convention="viar-2026"),
    ),
    (
        "beta=0.2 with convention='viar-2026', which has no cut; leave one of them out.",
        lambda: vcd_generate(vlm(), real(), beta=0.2, max_new_tokens=1, convention="viar-2026"),
    ),
    (
        "temperature=0 divides nothing; give a number above 0.",
        lambda: vcd_generate(vlm(), real(), do_sample=True, temperature=0),
    ),
]


@pytest.mark.parametrize(("message", "wrong"), REFUSED, ids=[message[:40] for message, _ in REFUSED])
def test_is_refused(message: str, wrong: Callable[[], object]) -> None:
    """Without the test run's type checks, as users meet them."""
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises((ValueError, TypeError)) as refused:
            wrong()
    finally:
        config.update("jaxtyping_disable", False)
    assert str(refused.value) == message
