"""Does the picture come too late? What later layers make of it, written into earlier layers.

Rule this module guards: a gain is beside that of the same patches put at other places, and its interval is over
pictures. The best of many pairs of layers is better here than it will be elsewhere.

>>> found = back_patching(vlm, [real, null], answers=["yes", "no"], sources=[4], destinations=[1, 2])
>>> found.accuracy.dims
('source', 'destination')
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.batch import check_prompts, metric_values
from mechvlm.edits import Edit
from mechvlm.experiments.accuracy import YES_NO
from mechvlm.experiments.examples import metric_of_each, prompt_coordinates, unit_of
from mechvlm.experiments.exchange import layers_of, patched_with, window_of
from mechvlm.experiments.kept import Kept, Leg, keep, legs_run, part_of, put_back
from mechvlm.experiments.knockout import clusters_of, interval
from mechvlm.experiments.margins import margin
from mechvlm.experiments.path_stages import positions_in
from mechvlm.experiments.record import metric_name, record, word_list
from mechvlm.experiments.sight import deepstack_layers
from mechvlm.experiments.sight import named as layers_named
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work
from mechvlm.sites import Site, told
from mechvlm.units import arrays, worked
from mechvlm.vlm import VLM

CONTROLS = {
    "permuted": "the same streams, put at the same positions in a random order",
    "other": "the streams of the next prompt about another picture, at its own positions",
}
Pair = tuple[int, int]


def back_patching(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    metric: Metric | Sequence[Metric] | None = None,
    answers: Sequence[str] | None = None,
    words: Sequence[str] = YES_NO,
    sources: Sequence[int] | None = None,
    destinations: Sequence[int] | None = None,
    positions: str | Sequence[int] | Callable[[Prompt], Sequence[int]] = "image",
    window: int = 1,
    control: str | None = "permuted",
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """What becomes of the answer when image tokens are, in an early layer, what a later layer makes of them.

    A prompt runs once. Then it runs again, once for each pair of layers: what leaves the later one (`resid_post`) at
    the image tokens takes the place of what leaves the earlier one there, and the pass goes on. Where that helps, what
    later layers know of the picture comes too late to be used.

    Args:
        metric: one for all prompts, or a list with one for each; or else
        answers: each prompt's right answer, one of `words`. The metric is then by how much its log-probability exceeds
            that of the likeliest other word, and an answer is right where that is above 0.
        sources, destinations: layers to take from and to write into; None means all. Pairs are those in which the
            source is later.
        positions: a span's name, a list, or a function from a prompt to its own.
        window: so many layers around the destination are written into, each from the layer as far from the source; 1
            and 3 were published. What lies outside the model is left out.
        control: "permuted" (the same streams in a random order of the positions, so that each is of another place),
            "other" (streams of the next prompt about another picture), or None. As many runs again.
        clusters: what prompts belong together, for the intervals; by default their pictures.
        level, seed: of the intervals, and of the random order.
        batch_size: patches in one forward pass; see `sweep`.
        out: a folder in which finished prompts are kept, and which several processes can share.

    Returns:
        Over axes prompt, source and destination, not a number where the source is no later layer: `metric`, and
        `control`, the control's. `clean`, over prompt, without a patch. Over source and destination: `mean`, `low` and
        `high` of metric minus clean, and `over_control`, `over_control_low`, `over_control_high`, of metric minus
        control. With answers also `right` and `right_clean`, 1.0 or 0.0, as `metric` and `clean`; `accuracy`, the mean
        of `right`; and `gain`, `gain_low`, `gain_high`, of right minus right_clean. Intervals are over clusters, and no
        number for one. The largest of many pairs is by chance too large: choose a pair on some prompts, and measure it
        on others.

    Raises:
        ValueError: for neither or both of metric and answers; layers of which none is later; another control; one
            position, whose order "permuted" cannot change; or positions that differ in number from those of the prompt
            that the control takes.
        TypeError: for what are no prompts.

    Example:
        >>> found = mv.back_patching(vlm, [real, null], answers=["yes", "no"], sources=[3, 5], destinations=[0, 1, 2])
        >>> mv.plot.heatmap(found.gain)

    Source:
        Nikankin et al. (2025), "Same Task, Different Circuits: Disentangling Modality-Specific Mechanisms in VLMs",
        section 5: windows of 1, 3 and 5, and accuracy over a closed set of words; its control are prompts of text
        alone. Biran et al. (2024), "Hopping Too Late", section 6, for language models.
    """
    asked = check_prompts(prompts, vlm.shape)
    metrics = _metrics(vlm, asked, metric, answers, words)
    pairs, _ = _pairs(vlm, sources, destinations), window_of(0, window, 1)  # which refuses a window of no layer
    groups, measures = clusters_of(asked, clusters), [vlm.metric(one) for one in metrics]
    at = [positions_in(prompt, positions) or tuple(range(len(prompt))) for prompt in asked]
    others = _others(asked, at, groups, control)
    how = dict[str, None]()

    def work(group: Sequence[int]) -> Work[xr.Dataset]:
        (number,) = group
        own = _Patched(vlm, asked[number], at[number], pairs, window)
        values, engine = yield from own.measured(measures[number], others[number], [seed, number], batch_size)
        how[engine] = None
        return values

    about = ["back_patching", measures, pairs, at, window, control, others, seed]
    units = [[number] for number in range(len(asked))]
    found = _summed(_tables(pairs, list(worked(vlm, asked, units, work, out, about)), asked), groups, level)
    found = found if answers is None else found.assign(_answered(found, groups, level))
    named = "; ".join(dict.fromkeys(map(metric_name, metrics))) if answers is None else "margin of the right answer"
    _label(found, named, unit_of(metrics) if answers is None else "nats")
    said = _about(vlm, positions, window, control, len(set(groups)), level)
    said |= {"engine": "; ".join(how) or f"read from {Path(str(out)).name}", "seed": seed}
    return found.assign_attrs({**record(vlm, asked), "metric": found.metric.attrs["long_name"], **said})


class _Patched:
    """Later streams of one prompt in its earlier layers.

    Args:
        at: the positions.
        pairs: source and destination.
    """

    def __init__(self, vlm: VLM, prompt: Prompt, at: Sequence[int], pairs: Sequence[Pair], window: int) -> None:
        self.vlm, self.prompt, self.at, self.pairs, self.window = vlm, prompt, at, pairs, window

    def around(self, source: int, destination: int) -> Iterator[Pair]:
        """The layers of a window, each destination with its source."""
        layers, gap = self.vlm.shape.layers["text"], source - destination
        for to in range(destination - self.window // 2, destination + (self.window + 1) // 2):
            if to >= 0 and to + gap < layers:
                yield to + gap, to

    def edits(self, kept: Kept, name: str, at: Sequence[int]) -> list[list[Edit]]:
        """The edits of each pair: some prompt's streams put at some positions."""
        sites = [[(Site("resid_post", s), Site("resid_post", d)) for s, d in self.around(*pair)] for pair in self.pairs]
        return [[put_back(kept, name, to, at, None, False, of) for of, to in some] for some in sites]

    def reading(self, kept: Kept, name: str, prompt: Prompt, at: Sequence[int]) -> dict[str, Any]:
        """The run that keeps a prompt's streams."""
        layers = sorted({layer for pair in self.pairs for layer, _ in self.around(*pair)})
        read = {Site("resid_post", layer): partial(part_of, positions=at, heads=None) for layer in layers}
        return {"prompt": prompt, "read": read, "reduce": keep(kept, [name])}

    def measured(
        self,
        measure: Metric,
        other: tuple[Prompt, Sequence[int]] | str | None,
        seed: Sequence[int],
        batch_size: int | None,
    ) -> Work[tuple[xr.Dataset, str]]:
        """The metric without a patch, with each pair's and with each pair's control, and how they were run.

        Args:
            other: whose streams are the control's, and at which positions; or "permuted".
        """
        kept, value = Kept(), partial(metric_values, measure)
        first = [{**self.reading(kept, "own", self.prompt, self.at), "value": value}]
        points = self.edits(kept, "own", self.at)
        if other == "permuted":
            points += self.edits(kept, "own", np.random.default_rng(seed).permutation(self.at).tolist())
        elif other is not None:
            assert not isinstance(other, str)
            first.append({**self.reading(kept, "other", *other), "value": value})
            points += self.edits(kept, "other", self.at)
        legs = [Leg([], points, [], Kept())]
        ends, (values,), engine = yield from legs_run(self.vlm, self.prompt, first, legs, measure, batch_size)
        own, control = values[: len(self.pairs)], values[len(self.pairs) :]
        return arrays(clean=ends[0][0], metric=own, control=control if other else np.full(len(own), np.nan)), engine


def _metrics(
    vlm: VLM, prompts: Sequence[Prompt], metric: Any, answers: Sequence[str] | None, words: Sequence[str]
) -> list[Metric]:
    """A metric for each prompt."""
    if (metric is None) == (answers is None):
        raise ValueError(
            "back_patching measures a metric, or whether answers are right; give one of metric= and answers=."
        )
    if answers is None:
        return metric_of_each(metric, prompts)
    return metric_of_each([margin(vlm, str(answer), words) for answer in word_list(answers, "answers")], prompts)


def _pairs(vlm: VLM, sources: Sequence[int] | None, destinations: Sequence[int] | None) -> list[Pair]:
    """All pairs of layers in which the source is later."""
    every = layers_of(vlm, "text", None)
    froms = every[1:] if sources is None else layers_of(vlm, "text", sources, "sources")
    tos = every[:-1] if destinations is None else layers_of(vlm, "text", destinations, "destinations")
    pairs = [(source, to) for source in froms for to in tos if source > to]
    if not pairs:
        raise ValueError(
            f"none of the sources {told(froms)} is a later layer than one of the destinations {told(tos)}; give later "
            "sources or earlier destinations."
        )
    return pairs


def _others(
    prompts: Sequence[Prompt], at: Sequence[Sequence[int]], groups: Sequence[Any], control: str | None
) -> list[Any]:
    """For each prompt what its control is made of."""
    if control is not None and control not in CONTROLS:
        raise ValueError(f"control={told(control)} is not known; choose from 'permuted', 'other', None.")
    alone = [number for number, held in enumerate(at) if len(set(held)) < 2]
    if control == "permuted" and alone:
        raise ValueError(
            f"prompt {alone[0]} is patched at one position, whose order cannot be random, so control='permuted' would "
            "be the patch itself; say control='other' or None."
        )
    if control != "other":
        return [control] * len(prompts)
    found: list[Any] = []
    for number in range(len(prompts)):
        ring = [*range(number + 1, len(prompts)), *range(number)]
        other = next((one for one in ring if groups[one] != groups[number]), None)
        if other is None:
            raise ValueError(
                "control='other' takes another picture's streams, and all prompts are about one; give more."
            )
        if len(at[other]) != len(at[number]):
            raise ValueError(
                f"prompt {number} is patched at {len(at[number])} positions and prompt {other}, its control, at "
                f"{len(at[other])}; give pictures with as many tokens, or control='permuted'."
            )
        found.append((prompts[other], at[other]))
    return found


def _tables(pairs: Sequence[Pair], found: Sequence[xr.Dataset], prompts: Sequence[Prompt]) -> xr.Dataset:
    """What was measured of each pair, over prompt, source and destination."""
    froms, tos = sorted({pair[0] for pair in pairs}), sorted({pair[1] for pair in pairs})
    rows, columns = [froms.index(pair[0]) for pair in pairs], [tos.index(pair[1]) for pair in pairs]
    coordinates = {**prompt_coordinates(prompts), "source": froms, "destination": tos}
    result = xr.Dataset(coords=coordinates)
    for name in ("metric", "control"):
        table = np.full((len(prompts), len(froms), len(tos)), np.nan)
        table[:, rows, columns] = np.stack([one[name].values for one in found])
        result[name] = (("prompt", "source", "destination"), table)
    result["clean"] = ("prompt", np.array([float(one.clean) for one in found]))
    return result


def _summed(found: xr.Dataset, groups: Sequence[Any], level: float) -> xr.Dataset:
    """With means over prompts and their intervals."""
    change = interval(found.metric - found.clean, groups, level)
    over = interval(found.metric - found.control, groups, level)
    names = {"mean": "over_control", "low": "over_control_low", "high": "over_control_high"}
    return found.assign(change.data_vars).assign(over.rename(names).data_vars)


def _answered(found: xr.Dataset, groups: Sequence[Any], level: float) -> dict[str, xr.DataArray]:
    """Which answers are right, where the metric is a margin."""
    right = (found.metric > 0).where(found.metric.notnull()).astype(float)
    clean = (found.clean > 0).astype(float)
    gained = interval(right - clean, groups, level)
    gain = {"gain": gained["mean"], "gain_low": gained["low"], "gain_high": gained["high"]}
    return {"right": right, "right_clean": clean, "accuracy": right.mean("prompt"), **gain}


def _label(found: xr.Dataset, name: str, unit: str) -> None:
    """Say of each variable what it is and in which unit."""
    changes = {"mean": "change of ", "low": "change of ", "high": "change of "}
    for key, one in found.data_vars.items():
        what = str(key).partition("_")[0]
        if what in ("right", "accuracy", "gain"):
            one.attrs = {"long_name": {"gain": "gain of accuracy"}.get(what, what), "units": "1"}
        else:
            over = f"{name} over the control's" if what == "over" else name
            one.attrs = {"long_name": changes.get(what, "") + over, "units": unit}


def _about(
    vlm: VLM, positions: Any, window: int, control: str | None, clusters: int, level: float
) -> dict[str, str | int | float]:
    """What a record has to say."""
    said: dict[str, str | int | float] = {
        "patched": "resid_post of a layer, from resid_post of a later one of the same run",
        "positions": positions if isinstance(positions, str) else "as given",
        "window": window,
        "control": "none" if control is None else CONTROLS[control],
        "level": level,
        "interval": f"bootstrap over {clusters} clusters of prompts",
        **patched_with(vlm, "back"),
    }
    if deepstack_layers(vlm):
        said["added_again"] = f"the picture's features behind {layers_named(deepstack_layers(vlm))}, from the patch on"
    return said
