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
from mechvlm.methods.contrast import _Mixing, contrast_logits, vcd_generate, vcd_pope

STEPS = 8


@cache
def vlm() -> mv.VLM:
    return tiny.vlm()


@cache
def real() -> mv.Prompt:
    return vlm().prompt(tiny.picture(), "is there a dog ?")


@cache
def null() -> mv.Prompt:
    return real().with_image(mv.images.diffusion(500))


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
    both = torch.cat([said.real, said.null])
    drawn = [mixing(torch.empty(2, 0), both) for _ in range(2000)]
    assert all(torch.equal(one[0], one[1]) for one in drawn)
    counts = np.bincount([int(one[0].argmax()) for one in drawn], minlength=both.shape[1])
    expected = said.logits[0].double().softmax(-1).numpy()
    assert counts[expected == 0].sum() == 0 and (expected > 0.05).sum() > 1
    deviation = np.sqrt(len(drawn) * expected * (1 - expected)) + 1
    assert (np.abs(counts - len(drawn) * expected) < 5 * deviation).all()


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
    found = vcd_generate(vlm(), real(), edits=edits, max_new_tokens=1)
    for prompt, said in ((real(), found.real), (null(), found.null)):
        assert torch.allclose(vlm().run(prompt, edits=edits).logits, said, atol=1e-5)


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


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("beta", "kinds"), [(0.01, {"none", "no"}), (0.1, {"no", "both"})])
def test_a_word_that_was_cut_is_not_said(beta: float, kinds: set[str], swapped: bool) -> None:
    """With the tokens of yes and no exchanged, what is cut is too."""
    ids = list(one_token().values())
    tokens = dict(zip(("yes", "no"), ids[::-1] if swapped else ids, strict=True))
    real, _ = of_both()
    gone = real < np.log(beta) + real.max(1, keepdims=True)
    yes, no = (gone[:, tokens[word][0]] for word in ("yes", "no"))
    found = vcd_pope(vlm(), ASKED, mv.images.black, beta=beta, tokens=tokens)
    expected = ["both" if a and b else "yes" if a else "no" if b else "none" for a, b in zip(yes, no, strict=True)]
    assert found.cut.values.tolist() == expected
    assert set(expected) == {"yes" if kind == "no" and swapped else kind for kind in kinds}
    sure = {"yes": (0.0, "no"), "no": (1.0, "yes")}
    for cut, p_yes, predicted in zip(expected, found.p_yes.values, found.predicted.values, strict=True):
        assert cut not in sure or (p_yes, predicted) == sure[cut]


def test_nothing_taken_off_is_the_plain_evaluation() -> None:
    found, plain = vcd_pope(vlm(), ASKED, alpha=0.0, beta=0.0), mv.evaluate.pope(vlm(), ASKED)
    assert np.allclose(found.margin, plain.margin, atol=1e-5) and np.allclose(found.p_yes, plain.p_yes, atol=1e-6)
    assert (found.correct == plain.correct).all()
    same = mv.evaluate.stats.compare(plain, found, resamples=20)
    assert float(same.difference.sel(metric="accuracy")) == 0.0


def test_a_repeated_question_gets_the_same_answer() -> None:
    found = vcd_pope(vlm(), [*ASKED, {**ASKED[1], "question_id": 99}], mv.images.black)
    assert found.duplicate_of[-1] == 1 and found.margin[-1] == found.margin[1]


def test_the_published_evaluation_is_against_grey_without_a_cut() -> None:
    found = vcd_pope(vlm(), ASKED, tokens=one_token(), convention="viar-2026")
    by_hand = vcd_pope(vlm(), ASKED, mv.images.grey, 1.0, 0.0, tokens=one_token())
    assert np.array_equal(found.margin, by_hand.margin) and np.array_equal(found.predicted, by_hand.predicted)
    assert (found.attrs["null"], found.attrs["convention"]) == ("grey", "viar-2026")


REFUSED: list[tuple[str, Callable[[], object]]] = [
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
