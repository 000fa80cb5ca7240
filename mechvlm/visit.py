"""The callbacks that read and edit while a model is walked, and what they keep.

Three promises let edits and readings be ordinary functions of a tensor:

* a function sees its own rows only, without padding, so the positions it indexes are the prompt's own;
* what it returns replaces the activation only where it differs, so an edit that changes nothing leaves every bit;
* a reading is a copy: nothing that is done to it changes the model, and nothing larger is kept alive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.attention import capped
from mechvlm.edits import Edit
from mechvlm.layout import Group, Layout
from mechvlm.lazy_attention import Attention
from mechvlm.plan import Plan, name_of
from mechvlm.readings import Lazy, Mass, Rows, Visible
from mechvlm.sites import ATTENTION_KINDS

RESIDUAL_KINDS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "z", "cross_z", "q")
QUERY_AXES = {"scores": 2, "pattern": 2, "cross_scores": 2, "cross_pattern": 2, "k": None, "v": None}
KEY_AXES = {"scores": 3, "pattern": 3, "k": 1, "v": 1}
FEATURES = ("image_features", "deepstack")


def narrow(x: Tensor, site: tuple, group: Group) -> Tensor:
    """A tensor with one group's own positions only: without padding, and without other images packed beside them.

    Where a tensor has one query only (a decode step's, or the last logits) that is the newest position, and no padding.
    """
    _, start, stop = group
    if not start and stop is None:
        return x
    for axis, is_query in ((KEY_AXES.get(site[0]), False), (QUERY_AXES.get(site[0], 1), True)):
        if axis is not None and (x.shape[axis] > 1 or not is_query):
            x = x.narrow(axis, start, (x.shape[axis] if stop is None else stop) - start)
    return x


def parts(x: Tensor, site: tuple, rows: Sequence[int] | None, layout: Layout) -> list[tuple[Group, Tensor]]:
    """A tensor as its rows' own: one part for each group of rows that stand at the same positions."""
    found = []
    for group in layout.groups(site, rows, x.shape[0]):
        part = narrow(x if group[0] is None else x[group[0]], site, group)
        found.append((group, layout.own_shape(site, group, part)))
    return found


def put(x: Tensor, site: tuple, group: Group, new: Tensor, owned: bool = False) -> Tensor:
    """The tensor with one part replaced; the same one where it is `owned`, a copy that may be written into."""
    indices, start, stop = group
    if owned and indices is not None and not start and stop is None and site[0] != "pixels":
        x[indices] = new.reshape(x[indices].shape)
        return x
    if indices is None and not start and stop is None:
        # Kernels round by how a tensor lies in memory, so it goes on lying as it did.
        return new if new.stride() == x.stride() else torch.empty_like(x).copy_(new)
    rows = x if indices is None else x[indices]
    rows = rows.clone()
    place = narrow(rows, site, group)
    if site[0] == "pixels":
        place = place[tuple(map(slice, new.shape))]  # those of longer rows are filled up at the end
    place.copy_(new.reshape(place.shape))
    if indices is None:
        return rows
    return x.index_copy(0, torch.tensor(indices, device=x.device), rows)


def apply_edit(x: Tensor, site: tuple, entry: tuple, layout: Layout, gradient: bool, owned: bool = False) -> Tensor:
    """The tensor after one edit; the very same object where the edit changed nothing, or where it is `owned`."""
    _, rows, edit = entry
    for group, part in parts(x, site, rows, layout):
        given = part.clone()
        new = called(f"the edit of {name_of(site)}", edit.on_some, given)
        check_result(new, part, site, edit.on)
        unchanged = torch.equal(new, part) and (new is given or not gradient)
        if not unchanged:
            x = put(x, site, group, new, owned)
    return x


def apply_some(x: Tensor, site: tuple, edit: Edit, positions: Tensor, count: int) -> Tensor:
    """Some rows of scores or pattern after one edit that treats every query by itself; the same object if unchanged.

    Args:
        positions: of the queries, of so many in all.
    """
    if edit.bias is not None:
        new = edit.bias.at(x, positions, count)
        return x if torch.equal(new, x) and not x.requires_grad else new
    new = called(f"the edit of {name_of(site)}", lambda rows: edit.on_some(rows, positions, count), x.clone())
    check_result(new, x, site, edit.on)
    return x if torch.equal(new, x) and not x.requires_grad else new


def called(what: str, function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What a user's function makes of its own copy of a tensor; an error in it says where it was called."""
    given = x if what.startswith("the edit") else x.clone()
    try:
        return function(given)
    except torch.OutOfMemoryError:
        raise  # a sweep answers it with fewer rows
    except (IndexError, RuntimeError, TypeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        one_query = x.ndim > 2 and 1 in x.shape[1:3]
        hint = " A decode step has one query; when='prompt' leaves it alone." if one_query else ""
        raise ValueError(f"{what} failed on {written(x)}: {said}.{hint}") from error


def check_result(new: object, old: Tensor, site: tuple, on: str) -> None:
    """Refuse what an edit must not return.

    Raises:
        TypeError, ValueError: for anything but a tensor of the shape, type and device it was given, or for NaN.
    """
    what = f"the edit of {name_of(site)}" if on == "value" else f"the edit of the gradient at {name_of(site)}"
    if not isinstance(new, Tensor):
        raise TypeError(f"{what} returned {type(new).__name__}; an edit must return the tensor that goes on.")
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"{what} returned {written(new)} for {written(old)}; an edit must keep the shape and type of what it is "
            "given."
        )
    if new.device != old.device:
        raise ValueError(f"{what} returned a tensor on {new.device} for one on {old.device}; an edit must stay there.")
    if bool(new.isnan().any()) and not bool(old.isnan().any()):
        raise ValueError(f"{what} returned {int(new.isnan().sum())} values that are not a number (NaN).")


def written(x: Tensor) -> str:
    """A tensor's type and shape, as errors write them."""
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


class Visit:
    """What happens while one forward pass, or each step of a generation, is walked: the callbacks and what they keep.

    Attributes:
        saved: per site, the readings of each group of rows, one list for each step.
        fired: numbers of the edits that acted.
        graph: per site, the tensor in the autograd graph whose gradient is the site's.
        edited: per site, its gradient after the edits of it.
        held: where the memory of whole tensors that were kept begins.
        mask: the last mask that biases were added to, and what it was made of.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.step = 0
        self.saved: dict[tuple, list[list[tuple[Group, object]]]] = {}
        self.fired: set[int] = set()
        self.graph: dict[tuple, Any] = {}
        self.grads: dict[tuple, list[tuple[Group, object]]] = {}
        self.edited: dict[tuple, Tensor] = {}
        self.held: set[int] = set()
        self.mask: tuple | None = None
        self.last: Tensor | None = None

    def touch(self, site: tuple, x: Tensor) -> Tensor:
        """Edit a site's tensor, keep what is read of it, and return what the model goes on with."""
        if site[0] not in FEATURES:
            return self.offer(site, x)
        shown = self.plan.layout.by_image(x)
        new = self.offer(site, shown)
        same = new is shown and self.plan.layout.shared == 1 and not new.requires_grad
        return x if same else new.reshape(-1, x.shape[-1])

    def offer(self, site: tuple, x: Tensor) -> Tensor:
        """The same for a tensor with the axes of its site."""
        plan = self.plan
        if self.step and site[2] == "text" and site[0] in RESIDUAL_KINDS and x.shape[1] != 1:
            raise ValueError(
                f"step {self.step} of this generation has {x.shape[1]} positions at {name_of(site)}, where one new "
                "position is due; generate with a cache that grows by one, and one pass a step."
            )
        owned = False
        for entry in plan.active(site, self.step):
            before, x = x, apply_edit(x, site, entry, plan.layout, plan.gradient, owned)
            # What put one row in its place is a copy; what an edit of all rows returned may be its own.
            owned = owned if x is before else not plan.gradient and entry[1] is not None and len(plan.layout.pads) > 1
            self.fired.add(entry[0])
        if plan.gradient:
            x = self.track(site, x)
        if site in plan.reads and not isinstance(plan.reads[site], Lazy | Visible):  # kept where nothing is made
            self.keep(site, x)
        if site[0] == "logits":
            self.last = x
        return x

    def logits(self, unembed: Any, ends: Sequence[int], cap: float | None = None) -> Float[Tensor, "batch vocab"]:
        """The logits of one position of each row, counted from the end, as the walk left them.

        Args:
            cap: the model's logits are c tanh(x / c) of the unembedding's x.
        """
        found = unembed.output if self.last is None else self.last
        self.last = None
        chosen = (
            found[:, ends[0]] if len(set(ends)) == 1 else torch.stack([found[r, end] for r, end in enumerate(ends)])
        )
        return capped(chosen, cap)

    def gradients(self, metric: Float[Tensor, " batch"]) -> None:
        """Take the gradient of a metric's sum at every site that was read, and keep what the readings say of it."""
        reads = [site for site in self.plan.reads if site in self.graph]
        held = {site: self.graph[site] for site in {*reads, *self.plan.grads}}
        tensors = {site: kept.z if isinstance(kept, Attended) else kept for site, kept in held.items()}
        if not tensors:
            return  # only the metric's value was asked for
        # What no picture and no word has reached yet, such as a Q-Former's first pattern, is in no graph.
        asked = {site: tensor for site, tensor in tensors.items() if tensor.requires_grad}
        found = torch.autograd.grad(metric.sum(), list(asked.values()), allow_unused=True) if asked else ()
        reaching = dict(zip(asked, found, strict=True))
        for site, tensor in tensors.items():
            reached = reaching.get(site)
            if site not in self.plan.reads:
                continue
            # Autograd hands out a hooked tensor's gradient before or after the hook, as it happens; the edit's is kept.
            own = self.edited.get(site, reached)
            gradient = torch.zeros_like(tensor) if own is None else own
            self.grads[site] = gradient_readings(site, held[site], gradient, self)

    def track(self, site: tuple, x: Tensor) -> Tensor:
        """Make gradients start at the embeddings, remember the tensor, and hang the gradient's edits on it."""
        if site in (self.plan.start, ("embed", None, "text")) or (site[0] in FEATURES and not self.plan.sees_vision()):
            x = x.detach().requires_grad_(True)
        if not x.requires_grad:
            x = x.detach().requires_grad_(True)  # a Q-Former's queries, which nothing of the picture has reached yet
        entries = self.plan.grads.get(site, ())
        if entries or site[0] == "resid_pre":
            # The residual stream that leaves one layer enters the next: a node of its own keeps the two sites apart.
            x = x.view_as(x)
        for entry in entries:
            x.register_hook(self.gradient_edit(site, entry))
        self.graph[site] = x
        return x.view_as(x) if entries else x

    def gradient_edit(self, site: tuple, entry: tuple) -> Callable[[Tensor], Tensor]:
        """An edit of a gradient as the hook autograd calls."""
        # The graph holds its hooks, where no collector of cycles looks: a hook that held `self.graph` would keep the
        # activations of every run for good.
        fired, edited, layout = self.fired, self.edited, self.plan.layout

        def change(gradient: Tensor) -> Tensor:
            fired.add(entry[0])
            edited[site] = apply_edit(gradient.detach(), site, entry, layout, False)
            return edited[site]

        return change

    def keep(self, site: tuple, x: Tensor) -> None:
        """Keep a reading, evaluated here, per group of rows with the same padding."""
        self.keep_parts(site, parts(x.detach(), site, None, self.plan.layout))

    def keep_parts(self, site: tuple, own: list[tuple[Group, Tensor]]) -> None:
        """The same of the parts of each group."""
        read = self.plan.reads[site]
        self.saved.setdefault(site, []).append(
            [(group, reading_of(site, read, part, self.held)) for group, part in own]
        )


def reading_of(site: tuple, read: Callable | None, x: Tensor, held: set[int]) -> object:
    """What a reading says of a tensor; its own, so that nothing done to it changes the model or another reading.

    Args:
        held: where the memory of earlier readings begins. The residual stream that leaves one layer is the very tensor
            that enters the next, so the second reading of it is a copy; so is what a cache holds.
    """
    if read is not None:
        value = called(f"the reading of {name_of(site)}", read, x)
        return value.detach().clone() if isinstance(value, Tensor) else value
    place = x.untyped_storage().data_ptr()
    if site[0] in ATTENTION_KINDS or place in held or x.numel() * x.element_size() < x.untyped_storage().nbytes():
        return x.clone()
    held.add(place)
    return x


@dataclass
class Attended:
    """What a gradient of scores or pattern that were not made is computed from.

    Attributes:
        parts: the attention of each group of rows.
        z: what came of it, in the graph of gradients.
    """

    parts: list[tuple[Group, Attention]]
    z: Any = None


def gradient_readings(site: tuple, held: object, gradient: Tensor, visit: Visit) -> list[tuple[Group, object]]:
    """What a site's reading says of its gradient, for each group of rows.

    Args:
        held: the tensor whose gradient this is; or, for attention that was not made, what its own is computed from.
    """
    read = visit.plan.reads[site]
    if not isinstance(held, Attended):
        found = parts(gradient, site, None, visit.plan.layout)
        return [(group, reading_of(site, read, part, visit.held)) for group, part in found]
    kept: list[tuple[Group, object]] = []
    where = (f"{'cross_' if site[0].startswith('cross') else ''}z", *site[1:])
    for group, own in held.parts:
        part = narrow(gradient if group[0] is None else gradient[group[0]], where, group)
        known = replace(own, z_gradient=part)
        if isinstance(read, Rows | Mass | Lazy):
            kept.append((group, read.of_gradient(known, site[0])))
            continue
        whole = known.gradient_rows(scores=site[0].endswith("scores"))
        kept.append((group, reading_of(site, read, whole, visit.held)))
    return kept
