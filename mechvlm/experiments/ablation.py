"""Which heads does the answer need? Every head of the language model taken out, one at a time.

>>> ablate_each_head(vlm, real, mv.logit_difference("yes", "no")).stack(at=["layer", "head"]).idxmin("at").item()
(0, 7)
"""

from collections.abc import Sequence
from dataclasses import replace

import xarray as xr
from torch import Tensor

from mechvlm.edits import Edit, ablate_heads
from mechvlm.experiments.means import replacements
from mechvlm.experiments.record import metric_unit, one_prompt, record
from mechvlm.experiments.sight import check_layers_run, head_site
from mechvlm.experiments.sweep import sweeping, valued
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.rounds import both
from mechvlm.sites import places
from mechvlm.vlm import VLM


def ablate_each_head(
    vlm: VLM,
    prompt: Prompt,
    metric: Metric,
    positions: Sequence[int] | None = None,
    to: Prompt | Sequence[Tensor] | None = None,
    batch_size: int | None = None,
) -> xr.DataArray:
    """How a metric changes when each head alone is taken out of the run.

    In layers that attend to the picture instead of the text (Mllama's) it is the heads of their cross-attention
    (`cross_z`) that are taken out.

    Args:
        positions: where heads are taken out; None means everywhere, `prompt.last` only where the answer is made.
        to: what takes the place of a head's output `z`. None: zero. Another prompt, with the same positions: what the
            head said there (resample-ablation). One tensor for each layer, `head d_head` or `pos head d_head`: for
            instance means over a dataset (mean-ablation).
        batch_size: heads in one forward pass; see `sweep`.

    Returns:
        The metric with the head ablated minus the metric without, in the metric's unit, over axes layer and head. Of a
        logit difference, negative means that the head argues for the first word.

    Raises:
        ValueError, TypeError: for positions that are not there, or a `to` that does not fit.

    Example:
        >>> mv.plot.heatmap(mv.ablate_each_head(vlm, real, mv.logit_difference("yes", "no"), to=null))

    Source:
        Michel et al. (2019), "Are Sixteen Heads Really Better than One?", section 3.2. Zero is a value that a head
        never says; Wang et al. (2023), "Interpretability in the Wild", appendix, prefer means or resampling.
    """
    check_layers_run(vlm, one_prompt(prompt), range(vlm.shape.layers["text"]))
    given = list(replacements(vlm, prompt, to, ["z"]).values())
    at = None if positions is None else places("positions", positions, all_by_none=True)

    def ablation(layer: int, head: int) -> list[Edit]:
        edit = replace(ablate_heads(layer, [head], to=given[layer]), site=head_site(vlm, layer))
        return [edit if at is None else at_positions(edit, at)]

    layers, heads = range(vlm.shape.layers["text"]), range(vlm.shape.heads["text"])
    swept = sweeping(vlm, prompt, ablation, metric, batch_size, layer=layers, head=heads)
    ablated, clean = both(vlm, swept, valued(vlm, prompt, metric))
    how = "zero" if to is None else "another prompt's output" if isinstance(to, Prompt) else "given values"
    where = "all" if at is None else ", ".join(map(str, at))
    attrs = record(vlm, [prompt], metric, clean=clean, ablated_to=how, positions=where)
    sign = {"value": "metric with the head ablated minus metric without", "long_name": "effect of ablation"}
    return (ablated - clean).rename("effect").assign_attrs({**attrs, **sign, "units": metric_unit(metric)})


def at_positions(edit: Edit, positions: Sequence[int]) -> Edit:
    """An edit of an activation that has a position axis, held to some positions of it.

    Example:
        >>> at_positions(mv.ablate_heads(3, [5]), real.last)
    """
    chosen = places("positions", positions, all_by_none=True)

    def held(x: Tensor) -> Tensor:  # batch pos ...
        new = edit.fn(x.clone())
        x[:, list(chosen)] = new[:, list(chosen)]
        return x

    label = f"{edit.label}, at {len(chosen)} positions"
    return replace(edit, fn=held, when="prompt", positions=chosen, label=label)
