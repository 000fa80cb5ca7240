"""An evaluation by visual contrastive decoding: which word the contrast's first token is.

Rule this module guards: what the cut took is not said, spelling by spelling.

>>> some = mv.evaluate.read_pope("demo", "adversarial")[:2]
>>> vcd_pope(vlm, some, "black").predicted.values.tolist()
['yes', 'no']
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.edits import Edit
from mechvlm.evaluate import pope, read_pope
from mechvlm.evaluate.files import Item
from mechvlm.evaluate.parsers import Scoring, scoring_of
from mechvlm.evaluate.pictures import picture_of
from mechvlm.methods.asked import prompt_of
from mechvlm.methods.contrast import ALPHA, check_weights, contrast_logits, cut_of
from mechvlm.methods.nulled import PixelDiffusion, null_name, null_of, nulled
from mechvlm.methods.published import NULL
from mechvlm.prompt import Prompt
from mechvlm.shared import shared_logits
from mechvlm.vlm import VLM

BETA_POPE = 0.2


def vcd_pope(
    vlm: VLM,
    questions: Any,
    null: Any = None,
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
        null, alpha: as in `vcd_generate`; no prompt, since there are many.
        beta: the cut; 0.2 by default, as in the source's POPE scripts.
        convention: "viar-2026": grey instead of noise, and no cut.

    Returns:
        What `mv.evaluate.pope` returns, so that `mv.evaluate.stats.compare` takes it. Spellings that the cut took count
        for nothing: `margin` is of those that are left. Where a word has none left, `cut` says so ("yes", "no" or
        "both"; else "none"), and `margin` is that of the contrast before the cut, so that it is finite. `predicted` is
        then the word that is left, with a `p_yes` of 0 or 1; of both it is "other", as another word is likelier, with
        the `p_yes` of that margin. Such an evaluation has no threshold for `compare` to move (that of one it is
        compared with is), as `predicted` is not always the sign of `margin`. `margin_real` and `margin_null` are the
        branches' own.

    Raises:
        ValueError, TypeError: as `mv.evaluate.pope`, and for numbers out of range.

    Example:
        >>> some = mv.evaluate.read_pope("demo", "adversarial")[:6]
        >>> mv.methods.viar.vcd_pope(vlm, some, mv.images.black).correct.values.tolist()
        [True, True, True, True, True, True]

    Source:
        Leng et al. (2024), section 4; VIAR printed it as a comparison, without the cut.
    """
    beta = cut_of(beta, BETA_POPE, convention)
    check_weights(alpha, beta)
    null = null_of(null, NULL if convention else PixelDiffusion())
    items = read_pope(questions, split)
    _check_null(vlm, prompt_of(vlm, items[0], images, template), null, edits)
    base = pope(vlm, questions, images, edits, split, template, joined, batch_size=batch_size, tokens=tokens)
    scoring, answers = scoring_of(vlm, joined, tokens), dict[int, tuple[float, ...]]()
    for some in _by_picture(items):
        picture = picture_of(some[0], images)
        prompts = [prompt_of(vlm, item, None, template, picture) for item in some]
        others = [nulled(vlm, prompt, null) for prompt in prompts]
        real, other = (shared_logits(vlm, asked, edits).logits.float() for asked in (prompts, others))
        for row, item in enumerate(some):
            answers[item.number] = _scored(scoring, real[row : row + 1], other[row : row + 1], alpha, beta)
    rows = [answers[item.duplicate_of] for item in items]
    margin, yes_cut, no_cut, real_margin, null_margin = np.array(rows).T
    return (
        _evaluation(base, margin, yes_cut > 0, no_cut > 0)
        .assign(margin_real=("item", real_margin), margin_null=("item", null_margin))
        .assign_attrs(
            null=null_name(null),
            alpha=float(alpha),
            beta=float(beta),
            convention=convention or "corrected",
            decoding="the first token's logits, contrasted",
        )
    )


def _by_picture(items: Sequence[Item]) -> list[list[Item]]:
    """Items that are not there already, those about one picture together."""
    about: dict[str, list[Item]] = {}
    for item in items:
        if item.duplicate_of == item.number:
            about.setdefault(item.image, []).append(item)
    return list(about.values())


def _check_null(vlm: VLM, prompt: Prompt, null: Any, edits: Any) -> None:
    """Refuse, by the first question, what cannot be the other branch."""
    if isinstance(null, Prompt):
        raise TypeError("null is one prompt, and an evaluation asks many; give a null image, or the name of a null.")
    other = nulled(vlm, prompt, null)
    if callable(edits):
        edits(other)


def _scored(
    scoring: Scoring, real: Float[Tensor, "1 vocab"], null: Float[Tensor, "1 vocab"], alpha: float, beta: float
) -> tuple[float, ...]:
    """The margin of a contrast; whether yes, and no, were cut; and the margins of both branches."""
    left = contrast_logits(real, null, alpha, beta)
    cut = [bool((left[0, list(ids)] == -torch.inf).all()) for ids in (scoring.yes, scoring.no)]
    mixed = contrast_logits(real, null, alpha, 0.0) if any(cut) else left
    found = [scoring(one)[0].item() for one in (mixed, real, null)]
    return (found[0], *cut, *found[1:])


def _evaluation(base: xr.Dataset, margin: np.ndarray, yes_cut: np.ndarray, no_cut: np.ndarray) -> xr.Dataset:
    """An evaluation with other margins, and with words that were cut."""
    p_yes = torch.from_numpy(margin).sigmoid().numpy()
    alone = yes_cut != no_cut
    p_yes = np.where(alone, no_cut.astype(float), p_yes)
    predicted = np.where(np.where(alone, no_cut, margin > 0), "yes", "no").astype("<U5")
    predicted[yes_cut & no_cut] = "other"
    named = np.array([["none", "no"], ["yes", "both"]])[yes_cut.astype(int), no_cut.astype(int)]
    columns = {
        **{"margin": margin, "p_yes": p_yes, "predicted": predicted},
        **{"correct": predicted == base.label.values, "cut": named},
    }
    return base.drop_vars("p_either").assign({name: ("item", values) for name, values in columns.items()})
