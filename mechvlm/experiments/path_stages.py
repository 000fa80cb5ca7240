"""Path patching in runs: senders and receivers by name, what is frozen, what is read of the first stage.

Rule this module guards: what a receiver takes in is recorded in a pass in which nothing before it is free but the
sender. Where several receivers cannot be recorded in one pass, there are several.

>>> [len(stage.readings) for stage in stages_of(vlm, ["a3.h5<q>", "a3.kv1<v>", "m4"])]
[2, 1]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mechvlm.edits import Edit
from mechvlm.experiments.kept import Kept, keep, part_of, put_back, put_features
from mechvlm.experiments.sight import cross_layers, head_site
from mechvlm.experiments.sweep import asked_of, values_of_axis
from mechvlm.nodes import Node, feeds, readers, writers
from mechvlm.plan import check_range
from mechvlm.prompt import Prompt
from mechvlm.rounds import unsaid
from mechvlm.sites import Site, places
from mechvlm.vlm import VLM

FREEZE = (("heads", "mlps"), ("heads",))


@dataclass(frozen=True)
class Reading:
    """What of a site a set of receivers is.

    Attributes:
        heads: None where there are none.
        anywhere: whether it is recorded at all positions, and not only at those at which a sender is patched, beside
            which it may change as well, or be changed by other receivers.
    """

    site: Site
    heads: tuple[int, ...] | None
    anywhere: bool = False


@dataclass(frozen=True)
class Stage:
    """One pass of the first stage: what it reads, and how far all but the sender is frozen.

    Attributes:
        heads, mlps: the layers before this one are frozen.
    """

    readings: tuple[Reading, ...]
    heads: int
    mlps: int


def reader_of(name: str) -> Node:
    """The node of a receiver; "a3.h5<z>", what a head takes in, reads "z".

    Example:
        >>> reader_of("a3.h5<z>").reads, reader_of("a3.kv1<v>").reads
        ('z', 'v')
    """
    if not name.endswith("<z>"):
        return Node.parse(name)
    node = Node.parse(name.removesuffix("<z>"))
    return Node(node.kind, node.layer, node.head, "z")


def stream_of(name: str) -> str:
    """The reader that stands where a receiver does, by a name that `mechvlm.nodes` knows."""
    return name.removesuffix("<z>") + "<q>" if name.endswith("<z>") else name


def positions_in(prompt: Prompt, given: Any) -> tuple[int, ...] | None:
    """Positions of a prompt as they were given, as a function of the prompt says, or those of a span; None for all.

    Raises:
        ValueError: for a span that the prompt has not, or a position out of range.

    Example:
        >>> positions_in(real, "last"), positions_in(real, lambda prompt: prompt.image[:2])
        ((48,), (3, 4))
    """
    chosen = given(prompt) if callable(given) else given
    if chosen is None:
        return None
    if isinstance(chosen, str):
        if chosen not in prompt.spans:
            raise ValueError(
                f"the prompt has no span {chosen!r}; choose from {', '.join(prompt.spans)}, or give a list."
            )
        return tuple(prompt.spans[chosen])
    found = places("positions", chosen, all_by_none=True)
    check_range("positions", Site("resid_pre", 0), found, [len(prompt)])
    return found


def _sizes(vlm: VLM) -> str:
    """How many layers and heads there are to name."""
    layers, heads, kv_heads = (sizes["text"] for sizes in (vlm.shape.layers, vlm.shape.heads, vlm.shape.kv_heads))
    return f"which has {layers} layers of {heads} heads and {kv_heads} key-value heads"


def checked_receivers(vlm: VLM, receivers: Any) -> list[str]:
    """Names of receivers as a list.

    Raises:
        ValueError: for none, for one that the model has not, or for "logits" beside others.
        TypeError: for what is no name and no list of names.
    """
    names = [receivers] if isinstance(receivers, str) else values_of_axis("receivers", receivers)
    known = {*readers(vlm.shape)}
    for layer in range(vlm.shape.layers["text"]):
        known |= {f"a{layer}.h{head}<z>" for head in range(vlm.shape.heads["text"])}
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        told = f"{wrong[0]!r} is no receiver" if wrong else "receivers is empty, and so has no receiver"
        raise ValueError(
            f"{told} of this model, {_sizes(vlm)}; write 'logits', or a list of names such as 'a1.h0<q>', 'a1.kv0<k>', "
            "'a1.kv0<v>', 'a1.h0<z>' and 'm1'."
        )
    if "logits" in names and names[1:]:
        raise ValueError(
            "'logits' takes in the final stream, over which nothing of other receivers is seen; give it by itself, or "
            "as a set of its own."
        )
    return names


def senders_of(vlm: VLM, senders: Any, receivers: Sequence[Sequence[str]]) -> list[str]:
    """The senders that were given, or every head and MLP that stands before a receiver.

    Raises:
        ValueError: for a name that is no writer of this model, or one that no receiver reads.
        TypeError: for what is no list of names.
    """
    known = writers(vlm.shape)
    reads = [stream_of(name) for names in receivers for name in names]
    read = {name for name in known if any(feeds(vlm.shape, name, one) for one in reads)}
    if senders is None:
        found = [name for name in known if name in read and Node.parse(name).kind in ("attention", "mlp")]
        if not found:
            raise ValueError(
                f"no head and no MLP stands before {', '.join(reads)}; give senders=['embed', 'image'], or a later "
                "receiver."
            )
        return found
    given = [senders] if isinstance(senders, str) else values_of_axis("senders", senders)
    wrong = [name for name in given if name not in known]
    if wrong or not given:
        told = f"{wrong[0]!r} is no sender" if wrong else "senders is empty, and so has no sender"
        raise ValueError(
            f"{told} of this model, {_sizes(vlm)}; write for instance 'a0.h1', 'm0', 'image' or 'embed', or None for "
            "every head and MLP before a receiver."
        )
    late = [name for name in given if name not in read]
    if late:
        raise ValueError(
            f"no path leads from {late[0]} to {', '.join(reads)}, which it does not stand before; give senders that "
            "do, or later receivers."
        )
    return given


def sender_edits(vlm: VLM, kept: Kept, name: str, prompt: Prompt, positions: Sequence[int] | None) -> list[Edit]:
    """What puts a sender's output of the run patched from into another; see `kept`, where it is under "given".

    Raises:
        ValueError: where the sender writes nothing at these positions.
    """
    node = Node.parse(name)
    if node.kind == "attention":
        assert node.layer is not None and node.head is not None
        return [put_back(kept, "given", head_site(vlm, node.layer), positions, [node.head])]
    if node.kind == "mlp":
        return [put_back(kept, "given", Site("mlp_out", node.layer), positions)]
    image = {position: token for token, position in enumerate(prompt.image)}
    asked = range(len(prompt)) if positions is None else positions
    own = [position for position in asked if (position in image) != (node.kind == "embed")]
    if not own:
        which = "which are all image tokens" if node.kind == "embed" else "of which none is an image token"
        raise ValueError(
            f"nothing of {name!r} is at the positions that are patched, {which}; give others, or leave it out of the "
            "senders."
        )
    if node.kind == "deepstack":
        return [put_features(kept, "given", Site("deepstack", node.layer), [image[position] for position in own])]
    return [put_back(kept, "given", Site("resid_pre", 0), own)]


def sender_sites(vlm: VLM, names: Sequence[str]) -> list[Site]:
    """What is read of the run patched from."""
    found = []
    for node in map(Node.parse, names):
        if node.kind == "attention":
            assert node.layer is not None
            found.append(head_site(vlm, node.layer))
        elif node.kind in ("mlp", "deepstack"):
            found.append(Site("mlp_out" if node.kind == "mlp" else "deepstack", node.layer))
        else:
            found.append(Site("resid_pre", 0))
    return list(dict.fromkeys(found))


def frozen_sites(vlm: VLM, prompt: Prompt, freeze: Sequence[str], heads: int, mlps: int) -> list[Site]:
    """What is kept as it was in the run patched into: heads before one layer and, if asked for, MLPs before another."""
    skipped = [] if prompt.images else cross_layers(vlm)
    found = [head_site(vlm, layer) for layer in range(heads) if layer not in skipped]
    if "mlps" in freeze:
        found += [Site("mlp_out", layer) for layer in range(mlps) if layer not in skipped]
    return found


def frozen_edits(vlm: VLM, kept: Kept, prompt: Prompt, freeze: Sequence[str], heads: int, mlps: int) -> list[Edit]:
    """What keeps it so; see `kept`, where it is under "taken"."""
    return [put_back(kept, "taken", site) for site in frozen_sites(vlm, prompt, freeze, heads, mlps)]


def stages_of(vlm: VLM, receivers: Sequence[str]) -> list[Stage]:
    """The passes in which receivers are recorded.

    Queries, keys and values are read and go on to nothing, since all heads are frozen; so one pass is enough for them.
    What a head takes in, and what an MLP makes, is frozen where it is not the last that is read.

    Example:
        >>> [(stage.heads, stage.mlps) for stage in stages_of(vlm, ["a3.h5<q>", "a2.kv1<v>", "m4"])]
        [(3, 3), (5, 4)]
    """
    nodes = [reader_of(name) for name in receivers]
    read, apart = dict[Site, list[int]](), dict[Site, list[int]]()
    for node in nodes:
        assert node.layer is not None
        if node.kind == "mlp":
            apart[Site("mlp_out", node.layer)] = []
        elif node.head is None:  # its keys are the picture's, so what all heads take in says what the queries were
            apart[head_site(vlm, node.layer)] = list(range(vlm.shape.heads["text"]))
        elif node.reads == "z":
            apart.setdefault(head_site(vlm, node.layer), []).append(node.head)
        else:
            read.setdefault(Site(node.reads, node.layer), []).append(node.head)
    # Where one receiver stands behind another, it is held to its record at every position.
    several = len({(node.layer, node.kind) for node in nodes}) > 1
    stages = []
    if read:
        end = max(int(site.layer or 0) for site in read)
        stages.append(Stage(tuple(Reading(site, tuple(heads), several) for site, heads in read.items()), end, end))
    for site, some in apart.items():
        layer = int(site.layer or 0)
        reading = Reading(site, tuple(some) or None, several or site.kind == "z")
        stages.append(Stage((reading,), layer + (site.kind == "mlp_out"), layer))
    return stages


def recording(
    vlm: VLM,
    kept: Kept,
    record: Kept,
    prompt: Prompt,
    stage: Stage,
    senders: Mapping[str, Sequence[Edit]],
    positions: Sequence[int] | None,
    freeze: Sequence[str],
    batch_size: int | None,
) -> list[dict[str, Any]]:
    """What a pass of the first stage asks for: each row is a sender, and what receivers take in is kept in `record`."""
    by = vlm.with_edits(frozen_edits(vlm, kept, prompt, freeze, stage.heads, stage.mlps))
    read = {
        one.site: partial(part_of, positions=None if one.anywhere else positions, heads=one.heads)
        for one in stage.readings
    }
    asked, names = asked_of(prompt, list(senders.values()), read, batch_size, value=unsaid), list(senders)
    found = []
    for one in asked:
        rows, names = names[: len(one["variants"])], names[len(one["variants"]) :]
        found.append({**one, "by": by, "reduce": keep(record, rows)})
    return found


def received(record: Kept, sender: str, stages: Sequence[Stage], positions: Sequence[int] | None) -> list[Edit]:
    """What puts into each receiver what it took in of a sender."""
    return [
        put_back(record, sender, one.site, None if one.anywhere else positions, one.heads, whole=False)
        for stage in stages
        for one in stage.readings
    ]
