"""What a run is to do: reads and edits sorted by site, and refused early where they cannot be.

Rule this module guards: whatever can be known to be wrong before the model runs is said before it runs, in one
sentence: a layer or head that is not there, a position out of range, an image that is not in the run, an edit that
cannot reach the answer or could never act.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mechvlm.edits import Edit
from mechvlm.layout import Layout
from mechvlm.prompt import Prompt
from mechvlm.readings import Entropy, Lazy, Mass, Reading, Rows, Top, Visible
from mechvlm.shapes import Shape
from mechvlm.sites import CROSS_KINDS, PATTERN_KINDS, Site, as_site, told

PIXELS = ("pixels", None, "vision")


@dataclass
class Plan:
    """Reads and edits, sorted by site; made by `make_plan`.

    Attributes:
        reads: the reading function of each site that is read; None for the whole tensor.
        edits: the edits of each site, in the order they act, each with its number and its rows (None: all).
        grads: the same for the edits of gradients.
        labels: how to name each edit, by number.
        gradient: whether gradients are taken.
        start: where they begin in the vision tower.
        deepstack: how many text layers image features are added behind.
        budget: how many bytes the pieces of attention that readings and edits make may take at once.
    """

    layout: Layout
    reads: dict[tuple, Callable | None] = field(default_factory=dict)
    edits: dict[tuple, list[tuple[int, Sequence[int] | None, Edit]]] = field(default_factory=dict)
    grads: dict[tuple, list[tuple[int, Sequence[int] | None, Edit]]] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    gradient: bool = False
    start: tuple = ("embed", None, "vision")
    deepstack: int = 0
    budget: int = 2**28

    def wanted(self) -> dict[tuple, set[str]]:
        """The kinds that have to be visited, by (tower, layer)."""
        sites = {*self.reads, *self.edits, *self.grads}
        if self.gradient:
            sites |= {("embed", None, "text"), ("image_features", None, "text")}
            sites |= {("deepstack", layer, "text") for layer in range(self.deepstack)}
            if self.sees_vision():
                sites.add(self.start)
        if self.layout.shared > 1:
            sites.add(("image_features", None, "text"))
        found: dict[tuple, set[str]] = {}
        for kind, layer, tower in sites:
            found.setdefault((tower, layer), set()).add(kind)
        return found

    def sees_vision(self) -> bool:
        """Whether anything before the image features is read or edited."""
        return any(tower != "text" for _, _, tower in (*self.reads, *self.edits, *self.grads))

    def pictured(self) -> bool:
        """Whether anything on the picture's way to the language model is read or edited."""
        kinds = {kind for kind, _, _ in (*self.reads, *self.edits)}
        return self.sees_vision() or bool(kinds & {"image_features", "deepstack"})

    def active(self, site: tuple, step: int) -> list[tuple[int, Sequence[int] | None, Edit]]:
        """The edits of a site that act in this pass: 0 is the prompt's, later ones are decode steps."""
        skip = "decode" if step == 0 else "prompt"
        return [entry for entry in self.edits.get(site, ()) if entry[2].when != skip]


def key_of(site: Site) -> tuple:
    """A site as the tuple it travels as."""
    return (site.kind, site.layer, site.tower)


def name_of(site: tuple) -> str:
    """A site's name, from the tuple it travels as."""
    return str(Site(*site))


def make_plan(
    prompts: Sequence[Prompt],
    shape: Shape,
    read: Iterable[Site | str] | Mapping = (),
    edits: Sequence[Edit] = (),
    variants: Sequence[Sequence[Edit]] | None = None,
    gradient: bool = False,
    steps: int = 1,
    budget: int = 2**28,
) -> Plan:
    """Sort reads and edits by site, and refuse what cannot be.

    Args:
        steps: passes of the model; more than one in a generation.
        budget: as in `Plan`.

    Raises:
        ValueError, TypeError: with one sentence for each thing that can be wrong.
    """
    if isinstance(read, Site | str) or not isinstance(read, Iterable):
        raise TypeError(f"read={told(read)} is not a list; write read=[site, ...] or read={{site: function}}.")
    edits = listed_edits("edits", edits)
    variants = None if variants is None else [listed_edits("a variant", row) for row in variants]
    read = dict(read.items()) if isinstance(read, Mapping) else dict.fromkeys(read)
    # The gradient of what rows share would be the sum of theirs.
    alone = gradient and any(as_site(site).tower != "text" for site in read)
    layout = layout_of(prompts, shape, variants, alone)
    plan = Plan(layout, gradient=gradient, deepstack=shape.deepstack, budget=budget)
    if not shape.embeds_vision:
        plan.start = ("resid_pre", 0, "vision")
    for site, reading in read.items():
        where = as_site(site)
        check_site(where, prompts, shape, "read")
        check_reading(where, reading, prompts, steps, gradient)
        plan.reads[key_of(where)] = reading
    listed: list[tuple[Sequence[int] | None, Edit]] = [(None, edit) for edit in edits]
    listed += [([row], edit) for row, edits_of_row in enumerate(variants or ()) for edit in edits_of_row]
    for number, (rows, edit) in enumerate(listed):
        check_reach(check_edit(edit), prompts, shape, gradient, steps)
        sorted_by_site = plan.edits if edit.on == "value" else plan.grads
        sorted_by_site.setdefault(key_of(edit.site), []).append((number, rows, edit))
        plan.labels.append(str(edit))
    if PIXELS in {*plan.reads, *plan.edits, *plan.grads}:
        plan.start = PIXELS  # and nothing behind them is cut off
    return plan


def layout_of(
    prompts: Sequence[Prompt], shape: Shape, variants: Sequence[Sequence[Edit]] | None, alone: bool = False
) -> Layout:
    """How the batch of a run is made up.

    Args:
        alone: whether each row needs its own computation of the image features.
    """
    longest, packed = max(len(prompt) for prompt in prompts), "vision" in shape.packed
    chosen = list(prompts) if variants is None else [prompts[0]] * len(variants)
    shared = 1
    if variants is not None:
        apart = any(check_edit(edit).site.tower != "text" for edits in variants for edit in edits)
        shared = 1 if alone or apart or not shape.shares or not prompts[0].images else len(variants)
    return Layout(
        tuple(longest - len(prompt) for prompt in chosen),
        tuple(prompt.features for prompt in chosen),
        tuple(sum(positions if packed else rows for rows, positions in prompt.vision) for prompt in chosen),
        tuple(prompt.queries for prompt in chosen),
        packed,
        shared,
        longest,
        tuple(tuple(prompt.encoding["pixel_values"].shape) if prompt.images else (0,) for prompt in chosen),
    )


def listed_edits(what: str, edits: object) -> list:
    """Edits as a list; a single one is refused."""
    if not isinstance(edits, Iterable):
        raise TypeError(f"{what} is {edits if isinstance(edits, Edit) else told(edits)}; it must be a list of edits.")
    return list(edits)


def check_edit(edit: object) -> Edit:
    """An edit as it is; anything else is refused."""
    if not isinstance(edit, Edit):
        raise TypeError(
            f"{told(edit)} is not an edit; write mv.Edit(site, function), or use a builder such as mv.ablate_heads. "
            "edits is a list of them, and variants a list of such lists, one for each row."
        )
    return edit


def check_site(site: Site, prompts: Sequence[Prompt], shape: Shape, verb: str) -> None:
    """Refuse a layer that the model has not, or an image site in a run without an image."""
    if site.tower not in shape.layers:
        raise ValueError(f"this model has no {site.tower} tower, so there is no {site} to {verb}.")
    if site.layer is not None and site.layer >= shape.layers[site.tower]:
        raise ValueError(
            f"the {site.tower} tower has {shape.layers[site.tower]} layers, counted from 0, so there is no {site} to "
            f"{verb}."
        )
    if site.layer is not None and site.kind not in shape.kinds[site.tower][site.layer]:
        raise ValueError(
            f"there is no {site}: layer {site.layer} of this model's {site.tower} tower has "
            f"{', '.join(shape.kinds[site.tower][site.layer])}."
        )
    if site == Site("embed", tower="vision") and not shape.embeds_vision:
        raise ValueError(f"no module of this model makes one vector a square, so there is no {site} to {verb}.")
    # A layer that attends to the image is left out of a run without one.
    crossing = site.layer is not None and bool(set(CROSS_KINDS) & set(shape.kinds[site.tower][site.layer]))
    of_image = site.tower != "text" or site.kind in ("image_features", "deepstack") or crossing
    if of_image and not all(prompt.images for prompt in prompts):
        raise ValueError(
            f"the prompt holds no image, so there is no {site} to {verb}; make it with vlm.prompt(image, text)."
        )


def length_at(site: Site, prompt: Prompt, steps: int = 1) -> int:
    """How many positions a prompt has at a site; a generation makes the last position's logits only."""
    if site.kind == "logits" and steps > 1:
        return 1
    if site.kind == "pixels":
        return prompt.encoding["pixel_values"].shape[1]  # which a patch must have as well
    if site.tower == "vision":
        lengths = [positions for _, positions in prompt.vision]
        return sum(lengths) if prompt.shape and "vision" in prompt.shape.packed else max(lengths, default=0)
    if site.tower == "qformer":
        return len(prompt.image) if site.kind in CROSS_KINDS else prompt.queries
    if site.kind in ("image_features", "deepstack"):
        # Images of different lengths stand in one sequence.
        return sum(prompt.features) if len(set(prompt.features)) > 1 else max(prompt.features, default=0)
    return len(prompt)


def keys_at(site: Site, prompt: Prompt) -> int:
    """How many keys a prompt has at a site of attention."""
    if site.kind not in CROSS_KINDS:
        return length_at(site, prompt)
    return sum(prompt.features) if site.tower == "text" else sum(positions for _, positions in prompt.vision)


def check_range(what: str, site: Site, positions: Iterable[int], lengths: Iterable[int]) -> None:
    """Refuse a position that one of the prompts has not, by how many each of them has."""
    for length in lengths:
        beyond = [position for position in positions if not -length <= position < length]
        if beyond:
            raise ValueError(
                f"position {beyond[0]} is out of range at {site}, where this prompt has {length} positions, counted "
                f"from 0 ({what})."
            )


def check_reading(site: Site, reading: object, prompts: Sequence[Prompt], steps: int, gradient: bool = False) -> None:
    """Refuse a reading that is no function, or asks for rows that are not there."""
    if reading is not None and not isinstance(reading, Reading) and not callable(reading):
        raise TypeError(
            f"the reading of {site} is {told(reading)}; give a function of its tensor, or list the site alone."
        )
    if isinstance(reading, Reading):
        check_rows(site, reading, prompts, steps, gradient)


NAMES = {Rows: "rows", Mass: "mass", Entropy: "entropy", Top: "top_keys", Lazy: "lazy", Visible: "visible"}
"""How the readings of attention are called where they are made."""


def check_rows(site: Site, reading: Reading, prompts: Sequence[Prompt], steps: int, gradient: bool) -> None:
    """Refuse a reading of attention where there is none, of a gradient it has none of, or of positions out of range."""
    name = NAMES[type(reading)]
    either = isinstance(reading, Rows | Visible)
    if site.kind not in PATTERN_KINDS or not (either or site.kind.endswith("pattern")):
        fitting = "scores or pattern" if isinstance(reading, Rows) else "pattern"
        raise ValueError(f"{name}() reads {fitting}, not {site}.")
    if gradient and isinstance(reading, Entropy | Top):
        raise ValueError(f"{name}() reads a pattern and no gradient; read it in a run without grad_of=.")
    if steps > 1 and reading.queries not in (None, (-1,)):
        raise ValueError("a step of a generation has one query, the newest position; read rows([-1]) there.")
    queries, all_keys = ([one(site, prompt) for prompt in prompts] for one in (length_at, keys_at))
    check_range("a query to read", site, reading.queries or (), queries)
    spans: dict[str, Sequence[int]] = dict(reading.spans) if isinstance(reading, Mass) else {}
    for span, keys in spans.items():
        check_range(f"a key of span {span!r}", site, keys, all_keys)
    if isinstance(reading, Rows | Entropy | Top):
        check_range("a key to read", site, reading.keys or (), all_keys)


def check_reach(edit: Edit, prompts: Sequence[Prompt], shape: Shape, gradient: bool, steps: int) -> None:
    """Refuse an edit that is out of range, cannot reach the answer, or could never act."""
    site = edit.site
    check_site(site, prompts, shape, "edit")
    if site.kind == "pixels" and edit.positions:
        raise ValueError(f"{edit} names positions, and {site} has none; edit all of it, by mv.Edit.")
    lengths = [length_at(site, prompt, steps) for prompt in prompts]
    check_range(str(edit), site, edit.positions, lengths)
    if edit.bias is not None:
        check_range(str(edit), site, edit.bias.keys, [keys_at(site, prompt) for prompt in prompts])
    check_sight(edit, shape)
    for head in edit.heads:
        count = shape.kv_heads[site.tower] if site.kind in ("k", "v") else shape.heads[site.tower]
        if not -count <= head < count:
            raise ValueError(f"the {site.tower} tower has {count} heads a layer, so there is no head {head} ({edit}).")
    if site.tower == "vision" and site.layer is not None and site.layer >= shape.live["vision"]:
        raise ValueError(
            f"an edit of {site} cannot reach the answer: this model takes its image features before layer {site.layer} "
            "of the vision tower."
        )
    if edit.length is not None and set(lengths) != {edit.length}:
        raise ValueError(
            f"{edit} holds {edit.length} positions and this run has {min(lengths)} there, so positions cannot be "
            "matched; make the second prompt with prompt.with_image, which keeps them."
        )
    if edit.on == "grad" and not gradient:
        raise ValueError(f"{edit} edits a gradient, and this run computes none; pass grad_of= a metric.")
    if edit.when == "decode" and steps < 2:
        raise ValueError(f"{edit} acts in decode steps, and this run has none; use vlm.generate with 2 tokens or more.")
    late = steps > 1 and edit.positions and edit.when != "prompt" and edit.bias is None
    if late and site.kind not in ("k", "v") and edit.rows != (-1,):
        raise ValueError(
            f"{edit} names positions of the prompt, and a decode step has only the newest one; say when='prompt'."
        )
    if steps > 1 and site.kind in ("k", "v") and edit.when == "prompt":
        raise ValueError(
            f"{edit} would be lost after the first step, since later steps read keys and values from the cache; use "
            "when='always', which edits what every step reads."
        )


def check_sight(edit: Edit, shape: Shape) -> None:
    """Refuse a bias from queries that stand before all its keys: a causal model does not look ahead."""
    bias = edit.bias
    if bias is None or bias.cross or shape.ahead or edit.site.tower != "text" or bias.queries is None:
        return
    if min(bias.keys) > max(bias.queries):
        raise ValueError(
            f"{edit} would change nothing: its first key, {min(bias.keys)}, stands after its last query, "
            f"{max(bias.queries)}, and no position looks ahead."
        )
