"""Where does a bias act? An evaluation with several sets of layers biased, and with random layers in their place.

Rule this module guards: a set of layers is never compared with the unedited model alone. What as many random layers do
too is no effect of those layers.

>>> layer_sets(vlm, [3, 4])["before"], len(random_sets({3: 2.0, 4: 2.0}, range(8), controls=20, seed=0))
([0, 1, 2], 20)
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.evaluate import pope, stats
from mechvlm.evaluate.verdicts import no_threshold
from mechvlm.experiments.record import chosen_layers
from mechvlm.experiments.sight import own_layers
from mechvlm.methods.bias import check_layers, layer_amounts, named_layers, viar_bias
from mechvlm.methods.dose import MEANING, against, in_folder, table_of, told_of
from mechvlm.sites import number, told, whole
from mechvlm.vlm import VLM

TRIES = 50
"""Draws for each random set that is wanted; a set may come up again, or be the very one that is compared."""
ROUNDING = 1e-12


def bias_layers(
    vlm: VLM,
    questions: Any,
    layer_sets: Mapping[str, Sequence[int] | Mapping[int, float]],
    amount: float = 2.0,
    controls: int = 20,
    seed: int = 0,
    when: str = "always",
    convention: str | None = None,
    resamples: int = 2000,
    control: str = "layers",
    **asked: Any,
) -> xr.Dataset:
    """An evaluation with each of several sets of layers biased, and with as many other layers in their place.

    Args:
        questions: as in `mv.evaluate.pope`. What is asked twice counts once.
        layer_sets: names, with the layers of each, or with an amount for each layer (adaptive amounts, from
            `layer_amounts`). `layer_sets(vlm, zone)` makes the usual ones.
        amount: for the sets that say layers only.
        controls: how many distinct other sets each set is compared with, as large and biased by the same amounts; fewer
            where there are no more. They may share layers with the set, which is the harder comparison.
        seed: of the random layers.
        when, convention: as in `viar_edits`.
        resamples: draws of pictures for the intervals.
        control: "layers" compares with random layers, wherever they are; "bands" with other runs of neighbouring layers
            of the same length, which a zone is as well, and which alone say that it is where it is that matters.
        asked: as in `bias_doses`, `out` included, which gets a folder for each set and each control.

    Returns:
        Over set: `accuracy`, `f1`, `yes_ratio`, `brier`, `gain`, `matched` and `beyond`, as in `bias_doses`; over set
        and sample, not a number where there are fewer: `random_accuracy` and `random_beyond`. `p_value` and
        `p_value_beyond`: (1 + k) / (1 + n), of `n_controls` = n distinct control sets, k of which do as well; not a
        number without any, or where `beyond` of any is none. Its least value is 1 / (n + 1), which few layers make
        large: of 8 there are 6 bands of 2 beside the one that is compared. `n_layers`, `n_controls`; `seconds` for each
        set with its controls. The coordinate `layers` says which they are.

    Raises:
        ValueError: without sets, for an empty one, layers that are not there or are there twice, fewer than no
            controls, or bands for a set that is none; all before anything runs.
        TypeError: for sets without names.

    Example:
        >>> some = mv.evaluate.read_pope("demo", "adversarial")[:6]
        >>> found = mv.methods.viar.bias_layers(vlm, some, {"middle": [3, 4]}, controls=2, resamples=50)
        >>> found.p_value.values
        array([1.])

    Source:
        VIAR's table of layers (`layer_ablation_pope.json`), which had no random layers beside it.
    """
    sets = _sets(vlm, layer_sets, amount)
    if whole("controls", controls) < 0:
        raise ValueError(f"controls={controls} is no number of random sets; give 0 or more.")
    others = {name: _controls(amounts, own_layers(vlm), controls, seed, control) for name, amounts in sets.items()}
    done: dict[tuple, xr.Dataset] = {}

    def with_(amounts: dict[int, float]) -> xr.Dataset:
        key = tuple(sorted(amounts.items()))
        if key not in done:
            edits = viar_bias(vlm, amounts, when=when, convention=convention)
            done[key] = pope(vlm, questions, edits=edits, **in_folder(asked, _folder(amounts)))
        return done[key]

    base, columns, chance, seconds = pope(vlm, questions, **in_folder(asked, "unedited")), [], [], []
    for name, amounts in sets.items():
        start = time.perf_counter()
        columns.append(against(base, with_(amounts), resamples))
        chance.append([_point(base, with_(other)) for other in others[name]])
        seconds.append(time.perf_counter() - start)
    result = table_of(columns, "set") | _chance(columns, chance, controls)
    result["n_layers"] = ("set", [len(amounts) for amounts in sets.values()])
    result["seconds"] = ("set", seconds, {"long_name": "time", "units": "s"})
    coords = {"set": list(sets), "layers": ("set", [named_layers(amounts) for amounts in sets.values()])}
    about = {"amount": float(amount), "controls": controls, "control": control, "seed": seed, "when": when}
    about["edits"] = "; ".join(f"{name}: {_folder(amounts)}" for name, amounts in sets.items())
    return xr.Dataset(result, coords, {**base.attrs, **told_of(resamples, convention), **about})


def layer_sets(
    vlm: VLM, zone: Sequence[int], adaptive: Mapping[int, float] | None = None
) -> dict[str, Sequence[int] | Mapping[int, float]]:
    """The sets of layers that a zone is compared with: those before and behind it, the last one, and all.

    Args:
        zone: its layers, for instance those that `mv.find_zone` finds.
        adaptive: amounts by layer, from `layer_amounts`, as one more set.

    Raises:
        ValueError: for a zone without layers, or with one that is not there.

    Example:
        >>> layer_sets(vlm, [3, 4])["behind"]
        [5, 6, 7]
    """
    own, zone = own_layers(vlm), chosen_layers(vlm, zone)
    check_layers(vlm, zone)
    usual: dict[str, Any] = {
        "zone": zone,
        "before": [layer for layer in own if layer < min(zone)],
        "behind": [layer for layer in own if layer > max(zone)],
        "last": own[-1:],
        "all": own,
        "adaptive": adaptive,
    }
    return {name: layers for name, layers in usual.items() if layers}


def random_sets(
    amounts: Mapping[int, float], layers: Sequence[int], controls: int, seed: int
) -> list[dict[int, float]]:
    """Sets of random layers, as many as a set has and with its amounts, none of them the set itself or there twice.

    Sets that are alike but for their layers get the same random ones, so that few have to be run.

    Example:
        >>> random_sets({0: 2.0, 1: 2.0}, range(3), controls=5, seed=0)
        [{0: 2.0, 2: 2.0}, {1: 2.0, 2: 2.0}]
    """
    own, by = tuple(sorted(amounts.items())), np.array(sorted(amounts.values()))
    generator, found = np.random.default_rng([seed, len(by)]), dict[tuple, None]()
    for _ in range(TRIES * controls):
        drawn = generator.choice(np.array(layers), len(by), replace=False).tolist()
        one = tuple(sorted(zip(drawn, generator.permutation(by).tolist(), strict=True)))
        if len(found) < controls and one != own:
            found[one] = None
    return [dict(one) for one in sorted(found)]


def other_bands(
    amounts: Mapping[int, float], layers: Sequence[int], controls: int, seed: int
) -> list[dict[int, float]]:
    """Other runs of neighbouring layers, as long as a set's and with its amounts in their order.

    Raises:
        ValueError: for layers that are no neighbours.

    Example:
        >>> other_bands({1: 2.0, 2: 1.0}, range(5), controls=5, seed=0)
        [{0: 2.0, 1: 1.0}, {2: 2.0, 3: 1.0}, {3: 2.0, 4: 1.0}]
    """
    held, by = sorted(amounts), [amounts[layer] for layer in sorted(amounts)]
    bands = [list(layers[at : at + len(held)]) for at in range(len(layers) - len(held) + 1)]
    if held not in bands:
        raise ValueError(
            f"layers {named_layers(held)} are no band of neighbours, and control='bands' compares with such; choose "
            "control='layers'."
        )
    bands.remove(held)
    chosen = np.random.default_rng([seed, len(by)]).permutation(len(bands))[:controls]
    return [dict(zip(bands[at], by, strict=True)) for at in sorted(chosen.tolist())]


def _controls(
    amounts: Mapping[int, float], layers: Sequence[int], controls: int, seed: int, control: str
) -> list[dict[int, float]]:
    """The sets that one is compared with."""
    if control not in ("layers", "bands"):
        raise ValueError(f"control={told(control)} is not known; choose 'layers' or 'bands'.")
    return (random_sets if control == "layers" else other_bands)(amounts, layers, controls, seed)


def _folder(amounts: Mapping[int, float]) -> str:
    """Layers and amounts as the name of a folder."""
    each = set(amounts.values())
    by = f"{min(each):g}" if len(each) == 1 else ", ".join(f"{amounts[layer]:.6g}" for layer in sorted(amounts))
    return f"layers {named_layers(amounts)} by {by}"


def _sets(vlm: VLM, sets: Any, amount: float) -> dict[str, dict[int, float]]:
    """Each set's layers with their amounts."""
    if not isinstance(sets, Mapping):
        raise TypeError(f"layer_sets={told(sets)} are no sets with names; write for instance {{'zone': [8, 9]}}.")
    if not sets:
        raise ValueError("layer_sets holds no set; give at least one, for instance {'zone': [8, 9]}.")
    empty = [name for name, layers in sets.items() if not len(layers)]
    if empty:
        raise ValueError(f"the set {empty[0]!r} has no layers; give at least one, or leave the set out.")
    by, found = number("amount", amount), {}
    for name, layers in sets.items():
        chosen = chosen_layers(vlm, list(layers))
        check_layers(vlm, chosen)
        found[str(name)] = layer_amounts(vlm, layers if isinstance(layers, Mapping) else dict.fromkeys(chosen, by))
    return found


def _point(base: xr.Dataset, found: xr.Dataset) -> tuple[float, float]:
    """Accuracy, and that above the moved threshold; not a number where answers are not of a threshold."""
    once = stats.first_asked(base)
    base, found = base.isel(item=once), found.isel(item=once)
    accuracy, ratio = float(found.correct.mean()), float((found.predicted == "yes").mean())
    if no_threshold(base, found):
        return accuracy, float("nan")
    matched = stats.matched_baseline(base.margin.values, base.label.values, ratio, resamples=1)
    return accuracy, accuracy - float(matched["value"].sel(metric="accuracy"))


def _chance(
    columns: Sequence[Mapping[str, tuple[float, float, float]]], chance: Sequence[list[tuple[float, float]]], most: int
) -> dict[str, Any]:
    """What random layers do, and how often they do as well."""
    table, found = np.full((2, len(columns), most), np.nan), dict[str, Any]()
    for row, points in enumerate(chance):
        table[:, row, : len(points)] = np.array(points).reshape(-1, 2).T
    count = np.array([len(points) for points in chance])
    for at, (name, p_value) in enumerate((("accuracy", "p_value"), ("beyond", "p_value_beyond"))):
        own = np.array([column[name][0] for column in columns])
        as_well = (table[at] >= own[:, None] - ROUNDING).sum(1)
        found[f"random_{name}"] = (["set", "sample"], table[at], {"long_name": MEANING[name]})
        told_of_it = (count > 0) & np.isfinite(own) & (np.isfinite(table[at]).sum(1) == count)
        found[p_value] = ("set", np.where(told_of_it, (1 + as_well) / (1 + count), np.nan), {"long_name": "p-value"})
    return {**found, "n_controls": ("set", count)}
