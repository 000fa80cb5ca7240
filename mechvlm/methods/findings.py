"""What becomes of a published finding: its number as published and corrected, and a verdict by one rule.

Rule this module guards: no verdict is written by hand. It follows from three estimates and a test, by `verdict`, and
the sentence beside it from the same numbers.

>>> verdict(Estimate(0.2, 0.1, 0.3), Estimate(0.02, -0.01, 0.05), Estimate(0.18, 0.1, 0.25), True, False)
'does not survive'
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

RULE = (
    "Shown: the interval lies above 0; but where a finding has a test of its own, that test alone decides, wherever "
    "the interval lies. Such tests: a zone is found by its p-value; a U has a curvature above 0, foretells layers left "
    "out better than a line does, and is lowest between the first layer and the last; updates in the zone have to be "
    "more alike than elsewhere and, when corrected, more alike with a black picture than with another real one, which "
    "speaks against them where it is the more alike; a number that is 1 by what it was called (heads, a curve) is "
    "shown as published where anything was called so, and the spread of heads where it is above 0; when corrected the "
    "number, and the published spread as a share of the corrected one, have to be above 0.5, and are refuted below. "
    "Survives: shown as published and when corrected, with an interval that does not end below a tenth of the "
    "published number; in part, where the corrected number is below half of the published one and the interval of "
    "their difference does not hold 0. Does not survive: shown as published, and when corrected either not shown, with "
    "an interval that ends below half of the published number or a test that speaks against it, or shown with an "
    "interval that ends below a tenth of it. Not decided: shown as published, not shown when corrected, and not ruled "
    "out by so few pictures. Not there: shown in neither way. Only corrected: shown only when corrected. Not made: "
    "there is no published number."
)
"""How verdicts are made, in words."""
CONCLUSIONS = {
    "survives": "it survives",
    "survives in part": "it survives, at less than half of its size",
    "does not survive": "it does not survive",
    "not decided": "so few pictures do not decide whether it survives",
    "not there": "this model does not show it either way",
    "only corrected": "it is there only when corrected",
    "not made": "it could not be made as published",
}
"""Every verdict, as the end of a sentence."""
CLAIMED = 0.5  # a number that is 1 if a name is right has to be above this, or below it to be refuted


class Estimate(NamedTuple):
    """A number with the ends of its interval, which are not numbers where there is none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "no number"
        ends = f" [{self.low:.3f}, {self.high:.3f}]" if np.isfinite(self.low + self.high) else ""
        return f"{self.value:.3f}{ends}"

    def by(self, up: str, down: str) -> str:
        """The number without its sign, after a word for the way it goes.

        Example:
            >>> Estimate(-0.5, -0.75, -0.25).by("rises by", "falls by")
            'falls by 0.500 [0.250, 0.750]'
        """
        falls = self.value < 0
        return f"{down} {Estimate(-self.value, -self.high, -self.low)}" if falls else f"{up} {self}"


@dataclass(frozen=True)
class Finding:
    """A published finding, its three numbers and what becomes of it.

    Attributes:
        name: in one word.
        claim: what was published, in general words.
        unit: of the numbers.
        published, corrected, difference: the numbers; the difference is published minus corrected, in the same draws.
        verdict: one of `CONCLUSIONS`.
        sentence: the numbers in words, and the conclusion.
    """

    name: str
    claim: str
    unit: str
    published: Estimate
    corrected: Estimate
    difference: Estimate
    verdict: str
    sentence: str


@dataclass(frozen=True)
class Draws:
    """Resamples of clusters, the same for everything that is compared; the first counts every cluster once.

    Attributes:
        weights: how often each prompt counts in each draw.
        level: of the intervals.
    """

    weights: Float[np.ndarray, "draw prompt"]
    level: float

    def means(self, values: Float[np.ndarray, "prompt ..."]) -> Float[np.ndarray, "draw ..."]:
        """Means over prompts in each draw; what is not a number is left out of its own mean."""
        there = np.isfinite(values)
        with np.errstate(invalid="ignore", divide="ignore"):
            sums = np.tensordot(self.weights, np.where(there, values, 0.0), 1)
            return sums / np.tensordot(self.weights, there.astype(float), 1)

    def estimate(self, drawn: Float[np.ndarray, " draw"]) -> Estimate:
        """A number of each draw as the first one's value, with the percentile interval of the others."""
        others = drawn[1:][np.isfinite(drawn[1:])]
        if not len(others):
            return Estimate(float(drawn[0]))
        low, high = np.quantile(others, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Estimate(float(drawn[0]), float(low), float(high))


def draws_of(clusters: Sequence[Any], resamples: int, seed: int, level: float) -> Draws:
    """Draws of whole clusters with replacement, as many as there are.

    Args:
        clusters: what each prompt belongs to.

    Example:
        >>> draws_of(["a", "a", "b"], 2, 0, 0.95).weights.shape
        (3, 3)
    """
    numbers = {name: at for at, name in enumerate(dict.fromkeys(clusters))}
    total, member = len(numbers), np.array([numbers[one] for one in clusters])
    drawn = np.random.default_rng(seed).multinomial(total, np.full(total, 1 / total), resamples)
    return Draws(np.vstack([np.ones(total), drawn])[:, member].astype(float), level)


def verdict(
    published: Estimate,
    corrected: Estimate,
    difference: Estimate,
    shown: bool,
    still: bool,
    against: bool = False,
) -> str:
    """What becomes of a finding, by `RULE`.

    Args:
        shown: whether the published numbers show it.
        still: whether the corrected ones do.
        against: whether the corrected test speaks against it, and not only fails to show it.

    Example:
        >>> one, none = Estimate(1.0, 0.9, 1.1), Estimate(0.0, -0.1, 0.1)
        >>> verdict(one, one, none, True, True), verdict(none, none, none, False, False)
        ('survives', 'not there')
    """
    if not np.isfinite(published.value):
        return "not made"
    if not shown:
        return "only corrected" if still else "not there"
    if still and corrected.high >= published.value / 10:
        apart = difference.low > 0 or difference.high < 0
        return "survives in part" if apart and corrected.value < published.value / 2 else "survives"
    return "does not survive" if against or corrected.high < published.value / 2 else "not decided"


def above(one: Estimate, zero: float = 0.0) -> bool:
    """Whether an interval lies above a number.

    Example:
        >>> above(Estimate(0.3, 0.1, 0.5)), above(Estimate(0.3)), above(Estimate(0.3, 0.1, 0.5), 0.2)
        (True, False, False)
    """
    return bool(one.low > zero)


def finding(
    name: str,
    claim: str,
    unit: str,
    three: tuple[Estimate, Estimate, Estimate],
    shown: bool,
    still: bool,
    said: str,
    against: bool = False,
) -> Finding:
    """A finding with its verdict, and the conclusion at the end of its sentence.

    Args:
        three: published, corrected, and the difference.
        said: the numbers in words, without a stop at the end.

    Example:
        >>> three = Estimate(1.0, 0.9, 1.1), Estimate(0.9, 0.8, 1.0), Estimate(0.1, -0.1, 0.3)
        >>> finding("drop", "the last layer looks away", "fraction", three, True, True, "1.0 is now 0.9").sentence
        '1.0 is now 0.9: it survives.'
    """
    what = verdict(*three, shown, still, against)
    return Finding(name, claim, unit, *three, what, f"{said}: {CONCLUSIONS[what]}.")


def claimed(
    name: str, claim: str, unit: str, draws: Draws, share: Float[np.ndarray, " draw"], said: str, there: bool = True
) -> Finding:
    """A finding whose published number is 1 by what it was called: held above one half, refuted below it.

    Args:
        share: what the number really is, in each draw.
        there: whether anything was called so.
    """
    really, apart = draws.estimate(share), draws.estimate(1 - share)
    still, against = above(really, CLAIMED), bool(really.high < CLAIMED)
    return finding(name, claim, unit, (Estimate(1.0), really, apart), there, still, said, against)


def table(findings: Sequence[Finding]) -> xr.Dataset:
    """Findings as a dataset that netCDF can hold.

    Returns:
        Over finding: `claim`, `unit`, `verdict` and `sentence`; over finding and end ("value", "low", "high"):
        `published`, `corrected` and `difference`. `attrs["rule"]` is how verdicts are made.
    """
    names = ("published", "corrected", "difference")
    texts = ("claim", "unit", "verdict", "sentence")
    columns: dict[str, list[Any]] = {name: [vars(one)[name] for one in findings] for name in (*names, *texts)}
    found: dict[str, Any] = {name: (("finding", "end"), np.array(columns[name], dtype=float)) for name in names}
    found |= {name: ("finding", np.array(columns[name], dtype=str)) for name in texts}
    where = {"finding": [one.name for one in findings], "end": ["value", "low", "high"]}
    return xr.Dataset(found, where, {"rule": RULE})


def audit_table(findings: xr.Dataset) -> pd.DataFrame:
    """Findings as a table to read: a row each, with its verdict, and numbers with their intervals as text.

    Args:
        findings: what `audit` returns under this name.

    Example:
        >>> asked = [vlm.prompt(one.image, "Is there a 7 in the image?") for one in mv.demo.scenes()[:4]]
        >>> found = mv.methods.viar.audit(vlm, asked, resamples=50)
        >>> list(mv.methods.viar.audit_table(found["findings"]))
        ['verdict', 'published', 'corrected', 'difference', 'unit']
    """
    columns: dict[str, Any] = {"verdict": findings.verdict.values}
    for way in ("published", "corrected", "difference"):
        rows = findings[way].transpose("finding", "end").values.tolist()
        columns[way] = [str(Estimate(*row)).replace("no number", "–") for row in rows]
    return pd.DataFrame({**columns, "unit": findings.unit.values}, pd.Index(findings.finding.values, name="finding"))
