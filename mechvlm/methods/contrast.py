"""Visual contrastive decoding: what the picture adds to the words, by taking off what a ruined picture says.

Rule this module guards: both branches keep their own cache and their own picture, both are given the chosen token, and
what is plausible is decided by the real branch's own logits.

>>> vcd_generate(vlm, real, max_new_tokens=3).text
'yes'
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.edits import Edit
from mechvlm.experiments.published import published
from mechvlm.experiments.record import one_prompt
from mechvlm.fingerprints import fingerprint
from mechvlm.methods.nulled import PixelDiffusion, null_name, null_of, nulled
from mechvlm.methods.published import NULL
from mechvlm.passes import said_by
from mechvlm.prompt import Prompt
from mechvlm.sites import number, told, whole
from mechvlm.vlm import VLM

ALPHA, BETA = 1.0, 0.1


def contrast_logits(
    real_logits: Float[Tensor, "*rows vocab"],
    null_logits: Float[Tensor, "*rows vocab"],
    alpha: float = ALPHA,
    beta: float = BETA,
) -> Float[Tensor, "*rows vocab"]:
    """The contrast of two branches' logits, with what is implausible cut off.

    `(1 + alpha) real - alpha null`, and minus infinity for every token whose real probability is below `beta` times
    that of the likeliest one. The likeliest real token is never cut. Where the null branch has minus infinity, nothing
    is taken off. With log-probabilities for logits (VIAR's `viar.py`, without a cut) a row changes by a constant, and
    what is said by nothing.

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
    check_weights(alpha, beta)
    for name, given in (("real_logits", real_logits), ("null_logits", null_logits)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} is {told(given)}, and must be a tensor; write torch.tensor(...).")
    if real_logits.shape != null_logits.shape:
        raise ValueError(
            f"the branches' logits are {tuple(real_logits.shape)} and {tuple(null_logits.shape)}; they must be of the "
            "same rows and the same vocabulary."
        )
    # As one difference: two large products of opposite sign would lose what they share, and minus infinity is kept.
    either = (real_logits == -torch.inf) | (null_logits == -torch.inf)
    apart = torch.where(either, 0.0, real_logits - null_logits)
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
        logits: what each token was chosen by, the contrast after the model's own processors of scores; minus infinity
            for what was cut.
        real, null: the two branches' raw logits at each step, both having been given the tokens chosen so far.
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
    null: Any = None,
    alpha: float = ALPHA,
    beta: float | None = None,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    seed: int = 0,
    temperature: float = 1.0,
    edits: Sequence[Edit] | Callable[[Prompt], Sequence[Edit]] = (),
    convention: str | None = None,
) -> Contrasted:
    """Let the model answer by visual contrastive decoding.

    The two branches are two rows of one generation, so that each has its own cache and keeps its own picture, and both
    go on with the chosen token. What the model's generation configuration does to scores (a repetition penalty,
    suppressed tokens) it does to the contrast, not to the branches.

    Args:
        null: a `PixelDiffusion`, with its step and seed; a null image, or the name of a null ("black", "no_image"); a
            whole prompt for the other branch (another instruction); None: `PixelDiffusion(500)`.
        alpha, beta: as in `contrast_logits`; beta is 0.1 by default. Gains were published against sampling, not against
            greedy decoding.
        max_new_tokens: at most so many.
        do_sample: draw tokens; by default the likeliest is taken. The model's other settings for sampling (top-p) are
            not used.
        seed: of the draws, from 0.
        temperature: what the contrasted logits are divided by before a draw, after the cut.
        edits: made in both branches, or a function from a prompt to them, which must give the same for both.
        convention: "viar-2026" is the comparison that VIAR printed: grey instead of noise, and no cut. It is given for
            one token only, since the published code went on without the picture.

    Raises:
        ValueError: for numbers out of range, what is no null, more than one token under the published convention, edits
            that differ between the branches, or where generation settings forbid all that the cut left.
        TypeError: for more than one prompt, or a seed that is no whole number.

    Example:
        >>> vcd_generate(vlm, real, mv.images.black, alpha=1.0, beta=0.2, max_new_tokens=3).text
        'yes'

    Source:
        Leng et al. (2024), section 3.3.
    """
    beta = cut_of(beta, BETA, convention)
    check_weights(alpha, beta)
    _check_steps(max_new_tokens, temperature, seed, convention)
    null = null_of(null, NULL if convention else PixelDiffusion())
    both = [one_prompt(prompt), nulled(vlm, prompt, null)]
    own = _same_edits(both, edits) if callable(edits) else edits
    mixer = partial(_mixing, alpha, beta, temperature, seed if do_sample else None)
    said, shows = said_by(vlm, both, own, max_new_tokens, (), {"do_sample": False, "num_beams": 1}, mixer)
    settings: dict[str, str | int | float] = {
        **vlm.provenance(prompt, own),
        "null": null_name(null),
        "decoding": f"sampled, temperature {temperature:g}, seed {seed}" if do_sample else "greedy",
        **{"alpha": float(alpha), "beta": float(beta), "convention": convention or "corrected"},
    }
    text = None if said.text is None else said.text[0]
    branches, contrast = shows["mixed"]
    return Contrasted(text, said.tokens[:1], contrast, branches[:, 0], branches[:, 1], settings)


def _mixing(alpha: float, beta: float, temperature: float, seed: int | None) -> "_Mixing":
    """What mixes two branches; without a seed the likeliest token is taken."""
    return _Mixing(alpha, beta, temperature, None if seed is None else torch.Generator().manual_seed(seed))


@dataclass
class _Mixing:
    """Two branches made one: their raw logits as the model leaves them, then the scores that a token is chosen by."""

    alpha: float
    beta: float
    temperature: float
    generator: torch.Generator | None
    branches: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def kept(self) -> tuple[Tensor, Tensor]:
        """Both branches' raw logits, `step 2 vocab`, and what each token was chosen by, `step vocab`."""
        return torch.stack(self.branches), torch.stack(self.scores)

    def mixed(self, _model: Any, _given: Any, output: Any) -> Any:
        """The model's output, both rows' last logits their contrast: a hook, before any processor of scores."""
        last = output.logits[:, -1].float()
        self.branches.append(last.detach().cpu().clone())
        mixed = contrast_logits(last[0], last[1], self.alpha, self.beta)
        output.logits = mixed.expand(2, 1, -1).clone()
        return output

    def __call__(self, _ids: Tensor, scores: Float[Tensor, "2 vocab"]) -> Float[Tensor, "2 vocab"]:
        """The first row's scores in both rows; where tokens are drawn, the one drawn stands alone."""
        mixed = scores[0]
        if bool((mixed == -torch.inf).all()):
            raise ValueError(
                "the model's generation settings forbid every token that the cut left; give a smaller beta, or change "
                "vlm.hf.generation_config."
            )
        self.scores.append(mixed.detach().cpu().clone())
        if self.generator is not None:
            likely = (self.scores[-1].double() / self.temperature).softmax(-1)
            drawn = int(torch.multinomial(likely, 1, generator=self.generator))
            mixed = torch.full_like(mixed, -torch.inf)
            mixed[drawn] = 0.0
        return mixed[None].expand(2, -1).clone()


def _same_edits(both: Sequence[Prompt], edits: Callable[[Prompt], Sequence[Edit]]) -> list[Edit]:
    """What a function makes of both branches' prompts."""
    real, other = (list(edits(one)) for one in both)
    if fingerprint(real) != fingerprint(other):
        raise ValueError(
            "the edits that the function gives for the two branches differ, and both are rows of one generation; give "
            "a null that leaves positions as they are, or a list of edits."
        )
    return real


def _check_steps(max_new_tokens: int, temperature: float, seed: int, convention: str | None) -> None:
    if convention and whole("max_new_tokens", max_new_tokens) != 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} with convention={convention!r}: the published code took the picture away "
            "after the first token, which is no contrast with it; give 1, or leave convention out."
        )
    if not number("temperature", temperature) > 0:
        raise ValueError(f"temperature={temperature} divides nothing; give a number above 0.")
    if whole("seed", seed) < 0:
        raise ValueError(f"seed={seed} is not a seed; give a whole number from 0.")


def cut_of(beta: float | None, usual: float, convention: str | None) -> float:
    """The cut, or the one that goes without saying."""
    if published(convention) and beta:
        raise ValueError(f"beta={beta} with convention={convention!r}, which has no cut; leave one of them out.")
    return (0.0 if published(convention) else usual) if beta is None else beta


def check_weights(alpha: float, beta: float) -> None:
    """Refuse a contrast's weights that are out of range."""
    if not 0 <= number("alpha", alpha) < math.inf:
        raise ValueError(f"alpha={alpha} takes nothing off; give a number from 0, for instance 1.")
    if not 0 <= number("beta", beta) <= 1:
        raise ValueError(f"beta={beta} is no share of the largest probability; give one from 0 (no cut) to 1.")
