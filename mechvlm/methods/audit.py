"""The audit of VIAR on a model: which published finding survives correct positions, true residuals and one unit.

Rule this module guards: both conventions see the same prompts and the same draws of pictures, so that a difference is
the convention's.

>>> asked = [vlm.prompt(one.image, "Is there a 7 in the image?") for one in mv.demo.scenes()[:4]]
>>> found = audit(vlm, asked, resamples=50)
>>> found["findings"].published.dims
('finding', 'end')
"""

from collections.abc import Sequence
from typing import Any

import xarray as xr

from mechvlm.batch import check_prompts
from mechvlm.experiments.collapse import language_prior_collapse
from mechvlm.experiments.conventions import called
from mechvlm.experiments.knockout import clusters_of
from mechvlm.experiments.layer_profile import layer_profile
from mechvlm.experiments.published import VIAR, lower_case_token
from mechvlm.experiments.visual_gradient import gradient_by_layer
from mechvlm.methods.audit_attention import (
    Profiles,
    by_quantity,
    drop_finding,
    head_findings,
    mistral_finding,
    sink_finding,
    u_shape_finding,
    zone_finding,
)
from mechvlm.methods.audit_causes import collapse_findings, gradient_findings
from mechvlm.methods.findings import Finding, draws_of, table
from mechvlm.metrics import Metric, logit_difference
from mechvlm.prompt import Prompt
from mechvlm.sites import number, told, whole, whole_numbers
from mechvlm.vlm import VLM

MISTRAL = "viar-2026-mistral"
LEAST = 4
"""Pictures that an audit takes, since zones are tested on halves."""


def audit(
    vlm: VLM,
    prompts: Sequence[Prompt],
    clusters: Sequence[Any] | None = None,
    metric: Metric | None = None,
    zone: Sequence[int] | None = None,
    mistral: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Which of VIAR's findings this model shows as they were published, and which when they are corrected.

    The published way takes columns 0 to N - 1 for the image, where N counts the image tokens, the last layer's state
    after the final norm, and the logit of a small "yes". Corrected are positions, residual updates and baselines.
    Numbers of both are in one unit, and intervals are bootstraps of whole pictures, the same draws for both.

    Args:
        prompts: about at least four pictures.
        clusters: what each prompt belongs to, for instance the file of its picture; by default its picture.
        metric: what corrected gradients are of; None: the logit of "yes" minus that of "no".
        zone: layers, one after the other, to be called the zone; None: those found in the published curve; if there
            are none, those found in the corrected one; and if there are none either, a quarter to half of the depth.
        mistral: whether to take the picture for one token at position 0, too, as was done for Mistral.
        level, resamples: of intervals.
        seed: of all draws.

    Returns:
        By name: "findings", over finding: `claim`, `unit`, `verdict`, `sentence`, and `published`, `corrected` and
        `difference` (also over end: "value", "low", "high"), where `attrs["rule"]` says how verdicts are made. And
        what they are made of: "profile" and "published_profile" (`layer_profile`; "mistral_profile" if asked for),
        "zone" and "published_zone" (`find_zone`), and over how ("published", "corrected") "u_shape", "heads"
        (`neglect_heads`) and "quantities" (a U and a zone in each of the four quantities that are published as one);
        "collapse" and "published_collapse" (`language_prior_collapse`), "gradients" and "published_gradients"
        (`gradient_by_layer`; the latter is missing where "yes" is no single token). All can be written as netCDF.

        Findings: u_shape (what a parabola rises from the middle to the ends), zone (how far it is below the lower
        neighbour), last_drop, neglect_heads and specialist_heads (the share of the published ones that remain),
        head_spread, collapse_zone, collapse_last, gradient_zone, gradient_picture, published_curve (the share of its
        variance over layers that is the image's) and mistral.

    Raises:
        ValueError: for prompts about fewer than four pictures or without one, a zone that is not there, a level that is
            no share, nothing to draw, a model of fewer than four layers, or one whose words see the picture by
            cross-attention.

    Example:
        >>> scenes = mv.demo.scenes()[:4]
        >>> asked = [vlm.prompt(one.image, "Is there a 7 in the image?") for one in scenes]
        >>> found = mv.methods.viar.audit(vlm, asked, [one.file.name for one in scenes], resamples=50)
        >>> found["findings"].verdict.dims
        ('finding',)

    Source:
        VIAR (github.com/aayambansal/VIAR), all of its analyses by layer. Corrections and verdicts are this package's.
    """
    asked = check_prompts(prompts, vlm.shape)
    groups = [str(one) for one in clusters_of(asked, clusters)]
    _check(vlm, asked, groups, zone, level, resamples)
    found = {
        "profile": layer_profile(vlm, asked, groups, level=level),
        "published_profile": layer_profile(vlm, asked, groups, VIAR, level),
    }
    draws = draws_of(groups, resamples, seed, level)
    profiles = Profiles(found["profile"], found["published_profile"], groups, draws, zone, seed)
    band, how = profiles.band
    found["published_zone"], found["zone"] = profiles.zones
    made, found["u_shape"] = u_shape_finding(profiles)
    heads, found["heads"] = head_findings(profiles)
    findings = [made, zone_finding(profiles), drop_finding(profiles), *heads, sink_finding(profiles)]
    found["quantities"] = by_quantity(profiles)
    if mistral:
        found["mistral_profile"] = layer_profile(vlm, asked, groups, MISTRAL, level)
        findings.append(mistral_finding(profiles, found["mistral_profile"]))
    causes, more = _causes(vlm, asked, groups, metric or logit_difference("yes", "no"), profiles)
    chosen = {"zone": ", ".join(map(str, band)), "zone_was": how, "level": level, "resamples": resamples, "seed": seed}
    about = {**found["profile"].attrs, **chosen, "prompts": len(asked), "clusters": len(set(groups))}
    result = table([*findings, *causes])
    return (
        {"findings": result.assign_attrs({**about, **result.attrs, "convention": f"none, and {VIAR}"})} | found | more
    )


def _causes(
    vlm: VLM, asked: Sequence[Prompt], groups: list[str], metric: Metric, profiles: Profiles
) -> tuple[list[Finding], dict[str, xr.Dataset]]:
    """The findings that are not of attention, and what they are made of."""
    (band, _), depth = profiles.band, vlm.shape.layers["text"]
    nulls, spans = ["black", "swap"] if _several(asked) else ["black"], ("bos", "prefix", "image", "text")
    found = {
        "collapse": language_prior_collapse(vlm, asked, nulls, groups, spans),
        "published_collapse": language_prior_collapse(vlm, asked, ["black"], groups, convention=VIAR),
    }
    last = min(band[-1], depth - 2)
    between = (min(band[0], last - 1), last)
    found["gradients"] = gradient_by_layer(vlm, asked, metric, groups, between=between)
    published, trouble = None, _no_yes(vlm)
    if not trouble:
        published = gradient_by_layer(vlm, asked, None, groups, between=between, convention=VIAR)
        found["published_gradients"] = published
    collapse = collapse_findings(found["collapse"], found["published_collapse"], profiles.draws, band)
    return [*collapse, *gradient_findings(found["gradients"], published, profiles.draws, trouble)], found


def _several(asked: Sequence[Prompt]) -> bool:
    """Whether prompts are about different pictures, so that they can be swapped."""
    return len({tuple(picture.tobytes() for picture in prompt.pictures) for prompt in asked}) > 1


def _no_yes(vlm: VLM) -> str:
    """Why the published gradient cannot be taken; nothing where it can."""
    try:
        lower_case_token(vlm, "yes")
    except ValueError as error:
        return str(error)
    return ""


def _check(
    vlm: VLM, asked: Sequence[Prompt], groups: list[str], zone: Sequence[int] | None, level: float, resamples: int
) -> None:
    """Refuses what would be found out only after hours."""
    for prompt in asked:
        called(prompt, VIAR)
    if len(set(groups)) < LEAST:
        raise ValueError(
            f"the prompts are about {len(set(groups))} pictures, and zones are tested on halves of them; give prompts "
            f"about at least {LEAST}."
        )
    if not 0 < number("level", level) < 1 or whole("resamples", resamples) < 1:
        raise ValueError(f"level={level} and resamples={resamples} give no interval; give for instance 0.95 and 1000.")
    depth = vlm.shape.layers["text"]
    band = [] if zone is None else list(whole_numbers("zone", zone))
    if zone is not None and (not band or band != list(range(max(1, band[0]), min(depth - 1, band[0] + len(band))))):
        raise ValueError(
            f"zone={told(zone)} must be layers between the first and the last of {depth}, one after the other, which "
            "have neighbours on both sides."
        )
