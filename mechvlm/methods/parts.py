"""The parts of VIAR's study: each a measurement that is made of the plan and of the parts before it.

Rule this module guards: every evaluation is of the plan's own questions, asked in the plan's own words, and which
layers are biased was decided by one part, `zone`, that says how.

>>> list(PARTS)[:4]
['profile', 'zone', 'heads', 'collapse']
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.evaluate import pope, stats
from mechvlm.evaluate.files import Item
from mechvlm.evaluate.verdicts import SENTENCES
from mechvlm.experiments.bends import u_shape
from mechvlm.experiments.collapse import language_prior_collapse
from mechvlm.experiments.layer_profile import layer_profile
from mechvlm.experiments.neglect import neglect_heads
from mechvlm.experiments.visual_gradient import gradient_by_layer
from mechvlm.experiments.zones import find_zone
from mechvlm.methods.asked import prompts_of
from mechvlm.methods.bands import bias_layers, layer_sets
from mechvlm.methods.bias import head_pairs, viar_bias
from mechvlm.methods.contrast_pope import vcd_pope
from mechvlm.methods.depth import depth_correlation, item_attention
from mechvlm.methods.dose import bias_doses
from mechvlm.methods.published import ADAPTIVE_TABLE, ZONE
from mechvlm.metrics import logit_difference
from mechvlm.prompt import Prompt
from mechvlm.vlm import VLM

Made = Mapping[str, xr.Dataset]
"""Parts that are finished, by their names."""
NULLS = ("black", "noise", "swap")
PARSER, NEW_TOKENS, SPOKEN = "official", 8, 36
"""How generated answers are read, how long they may be, and to how many questions they are given."""
WHEN = ("prompt", "decode", "always")
FORMULAS = ("paper", "code")


@dataclass(frozen=True)
class Plan:
    """What a study is of: a model, its questions, and how it is asked."""

    vlm: VLM
    items: list[Item]
    images: Any
    source: str
    template: str
    zone: tuple[int, ...] | None
    amount: float
    amounts: tuple[float, ...]
    pictures: int
    few: int
    controls: int
    resamples: int
    convention: str | None
    seed: int

    @property
    def asked(self) -> dict[str, Any]:
        """How every question is put, and which tokens answer it."""
        return {"images": self.images, "template": self.template, "tokens": "lower-case" if self.convention else None}

    def prompts(self) -> list[Prompt]:
        """The first question about each of the first pictures, for what is measured without answers."""
        return prompts_of(self.vlm, self.items, self.pictures, self.images, template=self.template)

    def evaluated(self, edits: Any = (), items: Sequence[Item] | None = None, **more: Any) -> xr.Dataset:
        """The answers to the plan's questions, or to some of them."""
        found = pope(self.vlm, list(self.items if items is None else items), edits=edits, **self.asked, **more)
        return found.assign_attrs(questions=self.source)

    def bias(self, layers: Sequence[int], **settings: Any) -> Callable[[Prompt], Any]:
        """The intervention, as a function from a prompt to its edits."""
        return viar_bias(self.vlm, self.amount, layers=list(layers), convention=self.convention, **settings)


def profile(plan: Plan, _: Made) -> xr.Dataset:
    """How much text rows look at the picture, layer by layer."""
    prompts = plan.prompts()
    clusters = [item.image for item in first_items(plan.items)][: len(prompts)]
    return layer_profile(plan.vlm, prompts, clusters, convention=plan.convention)


def zone(plan: Plan, made: Made) -> xr.Dataset:
    """Whether there is a band of neglect, how the curve is bent, and which layers are therefore biased."""
    values, clusters = curve_of(plan, made["profile"]), made["profile"].cluster.values.tolist()
    rule = "shoulders" if plan.zone is None else plan.zone
    found = find_zone(values, clusters, rule=rule, seed=plan.seed)
    bent = u_shape(values, clusters, seed=plan.seed)
    layers, why = layers_of(plan, found)
    about = {"layers": ", ".join(map(str, layers)), "layers_from": why, "quantity": str(values.quantity.item())}
    named = {f"u_{name}": one for name, one in bent.data_vars.items()}
    return found.drop_vars("quantity", errors="ignore").assign(named).assign_attrs(about)


def layers_of(plan: Plan, found: xr.Dataset) -> tuple[list[int], str]:
    """Which layers are biased, and in words why these: found, or stated."""
    depth = plan.vlm.shape.layers["text"]
    if plan.zone is not None:
        return list(plan.zone), "as asked for"
    if plan.convention and depth > max(ZONE):
        return list(ZONE), "the published layers"
    if bool(found.found):
        return list(range(int(found.start), int(found.stop))), "the zone that was found"
    if np.isfinite(float(found.chosen_start)):
        why = "the lowest band, which is no zone by the test"
        return list(range(int(found.chosen_start), int(found.chosen_stop))), why
    first, last = min(ZONE) * depth // len(ADAPTIVE_TABLE), (max(ZONE) + 1) * depth // len(ADAPTIVE_TABLE)
    why = "no zone was found, and no band to choose; these stand where the published 8 to 16 stand among 32"
    return list(range(first, max(last, first + 1))), why


def zone_of(made: Made) -> list[int]:
    """The layers that are biased."""
    return [int(layer) for layer in str(made["zone"].attrs["layers"]).split(", ")]


def curve_of(plan: Plan, profiled: xr.Dataset) -> xr.DataArray:
    """What a zone is looked for in: attention mass, and under the published convention the share of densities."""
    return profiled.vis_l.sel(quantity="density_share" if plan.convention else "mass")


def heads(plan: Plan, made: Made) -> xr.Dataset:
    """Which heads look at the picture far less, or far more, than heads do."""
    return neglect_heads(made["profile"], layers=zone_of(made), seed=plan.seed)


def collapse(plan: Plan, _: Made) -> xr.Dataset:
    """How alike layers work with the picture and without one."""
    prompts = plan.prompts()
    clusters = [item.image for item in first_items(plan.items)][: len(prompts)]
    if plan.convention:
        return language_prior_collapse(plan.vlm, prompts, clusters=clusters, convention=plan.convention)
    return language_prior_collapse(plan.vlm, prompts, NULLS, clusters)


def gradients(plan: Plan, _: Made) -> xr.Dataset:
    """How fast the answer's gradient at the picture falls."""
    prompts = plan.prompts()
    clusters = [item.image for item in first_items(plan.items)][: len(prompts)]
    metric = None if plan.convention else logit_difference("yes", "no")
    return gradient_by_layer(plan.vlm, prompts, metric, clusters, convention=plan.convention)


def base(plan: Plan, _: Made) -> xr.Dataset:
    """What the model answers as it is."""
    return plan.evaluated()


def samples(plan: Plan, made: Made) -> xr.Dataset:
    """Whether attention to the picture goes with being right, within each answer."""
    given = {"images": plan.images, "template": plan.template, "convention": plan.convention}
    attention = item_attention(plan.vlm, plan.items, **given)
    right = made["base"].correct.values.astype(bool)
    paid = xr.Dataset({"attention": attention.drop_vars("item")}, attrs=attention.attrs)
    if right.all() or not right.any():
        said = f"all {len(right)} answers are {'right' if right.all() else 'wrong'}, so nothing can go with being right"
        return paid.assign_attrs(nothing=said)
    found = depth_correlation(made["base"], attention, zone_of(made), seed=plan.seed, convention=plan.convention)
    return found.assign(paid.data_vars).assign_attrs({**attention.attrs, **found.attrs})


def bias(plan: Plan, made: Made) -> xr.Dataset:
    """What the model answers with the bias."""
    return plan.evaluated(plan.bias(zone_of(made)))


def adaptive(plan: Plan, made: Made) -> xr.Dataset:
    """The same with an amount for each layer, by the paper's formula and by the code's."""
    shares: Any = made["profile"]["mean"].sel(quantity="density_share").values
    shares = None if plan.convention and len(shares) == len(ADAPTIVE_TABLE) else shares
    found = {
        formula: plan.evaluated(plan.bias(zone_of(made), adaptive=formula, profile=shares)) for formula in FORMULAS
    }
    return side_by_side(found)


def head_bias(plan: Plan, made: Made) -> xr.Dataset:
    """The same in the heads of neglect alone, in whatever layer they are."""
    pairs = head_pairs(made["heads"])
    if not pairs:
        return made["base"].assign_attrs(heads="none: no head is far enough below the mean")
    within = sorted({layer for layer, _ in pairs})
    edits = viar_bias(plan.vlm, plan.amount, heads=pairs, convention=plan.convention, layers=within)
    return plan.evaluated(edits).assign_attrs(heads=", ".join(f"{layer}.{head}" for layer, head in pairs))


def when(plan: Plan, made: Made) -> xr.Dataset:
    """Answers in words, with the bias in the pass over the prompt, while the answer is written, or in both."""
    items, layers = plan.items[:SPOKEN], zone_of(made)
    spoken: dict[str, Any] = {"parser": PARSER, "max_new_tokens": NEW_TOKENS, "items": items}
    found = {"none": plan.evaluated(**spoken)}
    return side_by_side(found | {at: plan.evaluated(plan.bias(layers, when=at), **spoken) for at in WHEN})


def doses(plan: Plan, made: Made) -> xr.Dataset:
    """The bias at several amounts, each beside a moved threshold."""
    some = plan.items[: plan.few]
    more = {"convention": plan.convention, "resamples": plan.resamples, **plan.asked}
    return bias_doses(plan.vlm, some, plan.amounts, zone_of(made), **more).assign_attrs(questions=plan.source)


def layers(plan: Plan, made: Made) -> xr.Dataset:
    """The bias in other layers, each set beside as many random ones."""
    more = {"convention": plan.convention, "resamples": plan.resamples, "seed": plan.seed, **plan.asked}
    sets = layer_sets(plan.vlm, zone_of(made))
    found = bias_layers(plan.vlm, plan.items[: plan.few], sets, plan.amount, plan.controls, **more)
    return found.assign_attrs(questions=plan.source, items=len(plan.items[: plan.few]))


def contrast(plan: Plan, made: Made) -> xr.Dataset:
    """Visual contrastive decoding, without the bias and with it in both branches."""
    some, more = plan.items[: plan.few], {"convention": plan.convention, **plan.asked}
    alone = vcd_pope(plan.vlm, some, **more)
    both = vcd_pope(plan.vlm, some, edits=plan.bias(zone_of(made)), **more)
    return side_by_side({"VCD": alone, "VIAR + VCD": both}).assign_attrs(questions=plan.source)


def statistics(plan: Plan, made: Made) -> xr.Dataset:
    """Every edit against the model as it is, and against its threshold moved to the same share of yes."""
    edited = {"VIAR": made["bias"], "heads of neglect": made["head_bias"]}
    edited |= {f"adaptive, {one}": made["adaptive"].sel(edit=one) for one in FORMULAS}
    edited |= {str(one): made["contrast"].sel(edit=one) for one in made["contrast"].edit.values}
    found = []
    for one in edited.values():
        same = made["base"].isel(item=slice(0, one.sizes["item"]))
        compared = stats.compare(same, one, resamples=plan.resamples, seed=plan.seed)
        said = {name: compared.attrs[name] for name in SENTENCES}
        found.append(compared.assign({**said, "n_items": compared.attrs["items"]}))
    named = xr.Variable("edit", list(edited))
    together = xr.concat(found, named, coords="minimal", compat="override", combine_attrs="drop")
    kept = ("images", "level", "resamples", "seed", "duplicates", "interval", "between")
    about = {name: found[0].attrs[name] for name in kept}
    return together.assign_attrs({**made["base"].attrs, **about, "amount": plan.amount})


def side_by_side(found: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Evaluations of the same questions, over `edit`; each is one again with `.sel(edit=name)`."""
    named, first = xr.Variable("edit", list(found)), next(iter(found.values()))
    together = xr.concat(list(found.values()), named, coords="minimal", compat="override", combine_attrs="drop")
    edits = " | ".join(f"{name}: {one.attrs['edits']}" for name, one in found.items())
    return together.assign_attrs({**first.attrs, "edits": edits})


def first_items(items: Sequence[Item]) -> list[Item]:
    """The first question about each picture."""
    return list({item.image: item for item in reversed(items)}.values())[::-1]


PARTS: dict[str, tuple[Callable[[Plan, Made], xr.Dataset], tuple[str, ...]]] = {
    "profile": (profile, ()),
    "zone": (zone, ("profile",)),
    "heads": (heads, ("profile", "zone")),
    "collapse": (collapse, ()),
    "gradients": (gradients, ()),
    "base": (base, ()),
    "samples": (samples, ("base", "zone")),
    "bias": (bias, ("base", "zone")),
    "adaptive": (adaptive, ("profile", "zone", "base")),
    "head_bias": (head_bias, ("heads", "base")),
    "when": (when, ("zone",)),
    "doses": (doses, ("zone",)),
    "layers": (layers, ("zone",)),
    "contrast": (contrast, ("zone", "base")),
    "statistics": (statistics, ("base", "bias", "adaptive", "head_bias", "contrast")),
}
"""Each part, with those that it is made of, in the order in which they are made."""
