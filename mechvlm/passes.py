"""One forward pass of a model, or all of a generation's, walked in an nnsight trace.

Rule this module guards: with `mechvlm.rerun` it is the only one that opens traces.

>>> plan = vlm.plan([real])
>>> forward(vlm, Visit(plan), vlm.batch([real], plan))
Run(1 rows; nothing read)
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mechvlm import batch as batches
from mechvlm.metrics import Metric
from mechvlm.run import NO_GRADIENT, Readings, Run
from mechvlm.seam import attending
from mechvlm.visit import Visit
from mechvlm.walk import at, walk


def forward(
    vlm: Any,
    visit: Visit,
    batch: dict[str, Tensor],
    metric: Metric | None = None,
    ends: Sequence[int] = (-1,),
    more: Iterable[tuple] = (),
) -> Run:
    """One forward pass.

    Args:
        visit: what is done at each site.
        metric: what gradients are taken of, if any.
        ends: the position of each row whose logits are wanted, counted from the end.
        more: sites to visit beside those of the visit's plan.
    """
    plan, model, arch = visit.plan, vlm.model, vlm.arch
    wanted, pictures = plan.wanted(), "pixel_values" in batch
    for kind, layer, tower in more:
        wanted.setdefault((tower, layer), set()).add(kind)
    whole = ("logits", None, "text") in {*plan.reads, *plan.edits, *plan.grads}
    keep = {"logits_to_keep": 0 if whole else -min(ends)} if arch.row.keeps else {}
    shown: dict[str, Tensor] = {}
    with torch.set_grad_enabled(metric is not None):
        with model.trace(**batch, use_cache=False, **keep):
            walk(model, arch, wanted, visit.touch, attending(visit), pictures)
            shown["logits"] = visit.logits(at(model, arch.unembed), ends, vlm.shape.logit_cap)
        if metric is not None:
            values = batches.scored(metric, shown["logits"])
            visit.gradients(values)
    batches.check_fired(visit)
    batches.check_finite(shown["logits"])
    return Run(
        shown["logits"].detach(),
        Readings({site: steps[0] for site, steps in visit.saved.items()}, plan.layout),
        Readings(visit.grads, plan.layout, NO_GRADIENT),
        None if metric is None else values.detach(),
        vlm,
    )


def steps(vlm: Any, visit: Visit, answer: Callable, batch: dict[str, Tensor], **settings: Any) -> None:
    """The passes of a generation, the one over the prompt first."""
    model, arch, wanted = vlm.model, vlm.arch, visit.plan.wanted()
    pictures, callback = "pixel_values" in batch, attending(visit)
    with warnings.catch_warnings(), torch.no_grad():
        # The loop has no end of its own: it is cut where generation stops, and nnsight says so.
        warnings.filterwarnings("ignore", message="(?s).*was never reached")
        with model.trace(**batch, **settings, fn=answer) as tracer:
            for step in tracer.iter[:]:
                visit.step = step
                walk(model, arch, wanted, visit.touch, callback, pictures and step == 0)
                # Something has to be read in every step, or the loop would not end.
                visit.logits(at(model, arch.unembed), [-1])
