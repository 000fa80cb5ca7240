"""Visual contrastive decoding: what the picture adds to the words, by taking off what a ruined picture says.

Rule this module guards: both branches keep their own cache and their own picture, both are given the chosen token, and
what is plausible is decided by the real branch's own logits.

>>> vcd_generate(vlm, real, max_new_tokens=3).text
'yes'
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm import images
from mechvlm.edits import Edit, name_of
from mechvlm.evaluate import pope, read_pope
from mechvlm.evaluate.files import Item
from mechvlm.evaluate.parsers import Scoring, scoring_of
from mechvlm.evaluate.pictures import picture_of
from mechvlm.experiments.published import published
from mechvlm.experiments.record import one_prompt
from mechvlm.methods.asked import prompt_of
from mechvlm.methods.published import NULL
from mechvlm.prompt import Prompt
from mechvlm.shared import shared_logits
from mechvlm.sites import number, told, whole
from mechvlm.vlm import VLM

ALPHA, BETA, BETA_POPE = 1.0, 0.1, 0.2


def contrast_logits(
    real_logits: Float[Tensor, "*rows vocab"],
    null_logits: Float[Tensor, "*rows vocab"],
    alpha: float = ALPHA,
    beta: float = BETA,
) -> Float[Tensor, "*rows vocab"]:
    """The contrast of two branches' logits, with what is implausible cut off.

    `(1 + alpha) real - alpha null`, and minus infinity for every token whose real probability is below `beta` times
    that of the likeliest one. The likeliest real token is never cut. With log-probabilities for logits (VIAR's
    `viar.py`, without a cut) a row changes by a constant, and what is said by nothing.

    Args:
        real_logits: of the branch that sees the picture, as the model gave them: before any temperature.
        null_logits: of the branch that sees another one.
        alpha: how much is taken off, from 0; 0 gives the real logits.
        beta: the share of the largest probability that a token needs, from 0 (no cut) to 1 (the likeliest alone).

    Raises:
        ValueError: for other shapes, or numbers out of range.
        TypeError: for what is no number.

    Example:
        >>> contrast_logits(torch.tensor([2.0, 1.0, -3.0]), torch.tensor([2.0, 0.0, -9.0]), alpha=1.0, beta=0.1)
        tensor([2., 2., -inf])

    Source:
        Leng et al. (2024), "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive
        Decoding", equations 3 and 4. Its POPE scripts have alpha 1 and beta 0.2, its command line 0.5 and 0.1.
    """
    _check_weights(alpha, beta)
    if real_logits.shape != null_logits.shape:
        raise ValueError(
            f"the branches' logits are {tuple(real_logits.shape)} and {tuple(null_logits.shape)}; they must be of the "
            "same rows and the same vocabulary."
        )
    # As one difference: two large products of opposite sign would lose what they share, and minus infinity is kept.
    apart = torch.where(real_logits == -torch.inf, 0.0, real_logits - null_logits)
    mixed = real_logits + alpha * apart if alpha else real_logits
    if beta == 0:
        return mixed
    return mixed.masked_fill(real_logits < math.log(beta) + real_logits.amax(-1, keepdim=True), -torch.inf)


@dataclass(frozen=True, repr=False)
class Contrasted:
    """What a contrast of two branches said.

    Attributes:
        text: the generated text; None without a processor.
        tokens: generated token ids, the prompt left out.
        logits: what each token was chosen by; minus infinity for what was cut.
        real, null: what the two branches said at each step, both having been given the tokens chosen so far.
        settings: null image, alpha, beta, how tokens are chosen and the edits, as plain text and numbers.
    """

    text: str | None
    tokens: Int[Tensor, "1 step"]
    logits: Float[Tensor, "step vocab"]
    real: Float[Tensor, "step vocab"]
    null: Float[Tensor, "step vocab"]
    settings: dict[str, str | int | float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Contrasted({self.text!r}, {self.tokens.shape[1]} tokens)"


def vcd_generate(
    vlm: VLM,
    prompt: Prompt,
    null: Callable | Prompt | None = None,
    alpha: float = ALPHA,
    beta: float | None = None,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    seed: int = 0,
    temperature: float = 1.0,
    edits: Sequence[Edit] = (),
    convention: str | None = None,
) -> Contrasted:
    """Let the model answer by visual contrastive decoding.

    The two branches are two rows of one generation, so that each has its own cache and keeps its own picture, and both
    go on with the chosen token.

    Args:
        null: a null image, or a whole prompt for the other branch (another instruction, no picture); None:
            `mv.images.diffusion(500)`.
        alpha, beta: as in `contrast_logits`; beta is 0.1 by default. Gains were published against sampling, not against
            greedy decoding.
        max_new_tokens: at most so many.
        do_sample: draw tokens; by default the likeliest is taken. The model's other settings for sampling (top-p) are
            not used.
        seed: of the draws.
        temperature: what the contrasted logits are divided by before a draw, after the cut.
        edits: made in both branches.
        convention: "viar-2026" is the comparison that VIAR printed: grey instead of noise, and no cut. It is given for
            one token only, since the published code went on without the picture.

    Raises:
        ValueError: for numbers out of range, or more than one token under the published convention.
        TypeError: for more than one prompt.

    Example:
        >>> vcd_generate(vlm, real, mv.images.black, alpha=1.0, beta=0.2, max_new_tokens=3).text
        'yes'

    Source:
        Leng et al. (2024), section 3.3.
    """
    null, beta = _null(null, convention), _beta(beta, BETA, convention)
    _check_weights(alpha, beta)
    if convention and whole("max_new_tokens", max_new_tokens) != 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} with convention={convention!r}: the published code took the picture away "
            "after the first token, which is no contrast with it; give 1, or leave convention out."
        )
    if not number("temperature", temperature) > 0:
        raise ValueError(f"temperature={temperature} divides nothing; give a number above 0.")
    other = null if isinstance(null, Prompt) else one_prompt(prompt).with_image(null)
    mixing = _Mixing(alpha, beta, temperature, torch.Generator().manual_seed(seed) if do_sample else None)
    from transformers import LogitsProcessorList  # which whoever has a model has loaded

    said = vlm.generate(
        [one_prompt(prompt), other],
        edits=edits,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        logits_processor=LogitsProcessorList([mixing]),
    )
    settings: dict[str, str | int | float] = {
        **vlm.provenance(prompt, edits),
        "null": told(other.words) if isinstance(null, Prompt) else name_of(null),
        "decoding": f"sampled, temperature {temperature:g}, seed {seed}" if do_sample else "greedy",
        **{"alpha": float(alpha), "beta": float(beta), "convention": convention or "corrected"},
    }
    text = None if said.text is None else said.text[0]
    real, nulled = (torch.stack([step[row] for step in mixing.branches]) for row in (0, 1))
    return Contrasted(text, said.tokens[:1], torch.stack(mixing.mixed), real, nulled, settings)


def vcd_pope(
    vlm: VLM,
    questions: Any,
    null: Callable | None = None,
    alpha: float = ALPHA,
    beta: float | None = None,
    images: Any = None,
    edits: Sequence[Edit] | Callable[[Prompt], Sequence[Edit]] = (),
    split: str | Sequence[str] | None = None,
    template: str = "{question}",
    joined: str = "logsumexp",
    tokens: Any = None,
    batch_size: int | None = None,
    convention: str | None = None,
) -> xr.Dataset:
    """An evaluation by visual contrastive decoding: what the contrast says to each question, by its first token.

    Args:
        questions, images, edits, split, template, joined, tokens, batch_size: as in `mv.evaluate.pope`; edits are made
            in both branches.
        null, alpha: as in `vcd_generate`.
        beta: the cut; 0.2 by default, as in the source's POPE scripts.
        convention: "viar-2026": grey instead of noise, and no cut.

    Returns:
        What `mv.evaluate.pope` returns, so that `mv.evaluate.stats.compare` takes it. `margin` is that of the contrast
        before the cut, and finite; `p_yes` and `predicted` are those after it, where the cut left one of the words
        alone, so that such an evaluation has no threshold for `compare` to move (that of one it is compared with is).
        `cut` says which of them it took: "none", "yes", "no" or "both", and of both the margin decides. `margin_real`
        and `margin_null` are the branches' own.

    Raises:
        ValueError, TypeError: as `mv.evaluate.pope`, and for numbers out of range.

    Example:
        >>> some = mv.evaluate.read_pope("demo", "adversarial")[:6]
        >>> mv.methods.viar.vcd_pope(vlm, some, mv.images.black).correct.values.tolist()
        [True, True, True, True, True, True]

    Source:
        Leng et al. (2024), section 4; VIAR printed it as a comparison, without the cut.
    """
    null, beta = _null(null, convention), _beta(beta, BETA_POPE, convention)
    _check_weights(alpha, beta)
    base = pope(vlm, questions, images, edits, split, template, joined, batch_size=batch_size, tokens=tokens)
    scoring, answers = scoring_of(vlm, joined, tokens), dict[int, tuple[float, ...]]()
    items, about = read_pope(questions, split), dict[str, list[Item]]()
    for item in items:
        if item.duplicate_of == item.number:
            about.setdefault(item.image, []).append(item)
    for some in about.values():
        picture = picture_of(some[0], images)
        real, other = (
            shared_logits(vlm, [prompt_of(vlm, item, None, template, shown) for item in some], edits).logits.float()
            for shown in (picture, null(picture))
        )
        for row, item in enumerate(some):
            answers[item.number] = _scored(scoring, real[row : row + 1], other[row : row + 1], alpha, beta)
    rows = [answers[item.duplicate_of] for item in items]
    margin, yes_cut, no_cut, real_margin, null_margin = np.array(rows).T
    return (
        _evaluation(base, margin, yes_cut > 0, no_cut > 0)
        .assign(margin_real=("item", real_margin), margin_null=("item", null_margin))
        .assign_attrs(
            null=name_of(null),
            alpha=float(alpha),
            beta=float(beta),
            convention=convention or "corrected",
            decoding="the first token's logits, contrasted",
        )
    )


@dataclass
class _Mixing:
    """A processor of scores, as transformers calls them: two branches in, and the same choice for both out."""

    alpha: float
    beta: float
    temperature: float
    generator: torch.Generator | None
    branches: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)

    def __call__(self, _ids: Tensor, scores: Float[Tensor, "2 vocab"]) -> Float[Tensor, "2 vocab"]:
        """The contrast of the two rows, in both of them; where tokens are drawn, the one drawn stands alone."""
        mixed = contrast_logits(scores[0], scores[1], self.alpha, self.beta)
        self.branches.append(scores.detach().cpu().clone())
        self.mixed.append(mixed.detach().cpu().clone())
        if self.generator is not None:
            likely = (self.mixed[-1].double() / self.temperature).softmax(-1)
            drawn = int(torch.multinomial(likely, 1, generator=self.generator))
            mixed = torch.full_like(mixed, -torch.inf)
            mixed[drawn] = 0.0
        return mixed[None].expand(2, -1).clone()


def _scored(
    scoring: Scoring, real: Float[Tensor, "1 vocab"], null: Float[Tensor, "1 vocab"], alpha: float, beta: float
) -> tuple[float, ...]:
    """The margin of a contrast; whether yes, and no, were cut; and the margins of both branches."""
    left = contrast_logits(real, null, alpha, beta)[0]
    cut = [bool((left[list(ids)] == -torch.inf).all()) for ids in (scoring.yes, scoring.no)]
    found = [scoring(one)[0].item() for one in (contrast_logits(real, null, alpha, 0.0), real, null)]
    return (found[0], *cut, *found[1:])


def _evaluation(base: xr.Dataset, margin: np.ndarray, yes_cut: np.ndarray, no_cut: np.ndarray) -> xr.Dataset:
    """An evaluation with other margins, and with words that were cut."""
    p_yes = torch.from_numpy(margin).sigmoid().numpy()
    alone = yes_cut != no_cut
    p_yes = np.where(alone, no_cut.astype(float), p_yes)
    predicted = np.where(np.where(alone, no_cut, margin > 0), "yes", "no")
    named = np.array([["none", "no"], ["yes", "both"]])[yes_cut.astype(int), no_cut.astype(int)]
    columns = {
        **{"margin": margin, "p_yes": p_yes, "predicted": predicted},
        **{"correct": predicted == base.label.values, "cut": named},
    }
    return base.drop_vars("p_either").assign({name: ("item", values) for name, values in columns.items()})


def _null(null: Callable | Prompt | None, convention: str | None) -> Any:
    """The null image, or the one that goes without saying."""
    grey = published(convention)
    return null if null is not None else NULL if grey else images.diffusion(500)


def _beta(beta: float | None, usual: float, convention: str | None) -> float:
    """The cut, or the one that goes without saying."""
    if published(convention) and beta:
        raise ValueError(f"beta={beta} with convention={convention!r}, which has no cut; leave one of them out.")
    return (0.0 if published(convention) else usual) if beta is None else beta


def _check_weights(alpha: float, beta: float) -> None:
    if not 0 <= number("alpha", alpha) < math.inf:
        raise ValueError(f"alpha={alpha} takes nothing off; give a number from 0, for instance 1.")
    if not 0 <= number("beta", beta) <= 1:
        raise ValueError(f"beta={beta} is no share of the largest probability; give one from 0 (no cut) to 1.")
