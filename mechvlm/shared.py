"""Several questions about one picture: what stands before they differ is computed once, and each is a row on it.

Questions about a picture have the picture before them, which is most of a prompt. One of them is run whole; of it the
keys and values of all positions up to the first word that differs are kept, and every question is run from there on.

Rules this module guards:

* Exact: only where the prompts, and what is edited in them, are the same up to that word, and where no position before
  it sees what stands behind it. Edits are given all positions of their own prompt, as in a run of it alone.
* Tried each time: the question that was run whole is run as a row as well, and must give the same logits.

>>> asked = [real, real.with_text("Is there a red 3 in the image?")]
>>> shared_logits(vlm, asked).engine
'2 questions on the keys and values of 42 positions before them'
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.batch import check_prompts
from mechvlm.between import Reaching
from mechvlm.edits import Edit
from mechvlm.fingerprints import fingerprint
from mechvlm.plan import listed_edits
from mechvlm.points import rows_for
from mechvlm.prompt import Prompt
from mechvlm.reach import BY_TOKEN, Reach, whole_from
from mechvlm.rerun import rerun
from mechvlm.start import ALONG, MASK, Start, start_of, tried
from mechvlm.vlm import VLM
from mechvlm.walk import at

BY_WORD = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids", "cross_attention_mask")
"""What an encoding holds that has an entry for each position."""
BEHIND = "what an edit does to earlier positions depends on what stands behind them"
EditsOf = Sequence[Edit] | Callable[[Prompt], Sequence[Edit]]
"""Edits of any prompt: the same for each, or a function from a prompt to its own."""


@dataclass(frozen=True)
class Shared:
    """What several questions about one picture are answered.

    Attributes:
        logits: of each prompt's last position.
        engine: how they were run, in words.
    """

    logits: Float[Tensor, "prompt vocab"]
    engine: str


class Apart(Exception):  # noqa: N818 - answered within this module
    """Why prompts are run one by one, in words."""


def shared_logits(vlm: VLM, prompts: Sequence[Prompt], edits: EditsOf | Any = (), share: bool = True) -> Shared:
    """The last position's logits of several prompts, with what they begin with computed once.

    Args:
        edits: made in every prompt's run, after the model's own; a function makes each prompt's own.
        share: False makes each prompt a row of a full pass. So it is in any case where the beginning cannot be shared
            exactly; `engine` says why.

    Returns:
        The logits that `vlm.run` gives for each prompt alone, to rounding.

    Raises:
        ValueError, TypeError: as `vlm.run` does.

    Example:
        >>> asked = [real, real.with_text("Is there a red 3 in the image?")]
        >>> shared_logits(vlm, asked).logits.shape[0]
        2
    """
    asked = check_prompts(prompts, vlm.shape)
    same = [] if callable(edits) else listed_edits("edits", edits)
    own = [listed_edits("edits", edits(prompt)) if callable(edits) else same for prompt in asked]
    for prompt, its in zip(asked, own, strict=True):
        vlm.plan([prompt], edits=its)  # what cannot be is said before anything runs
    try:
        if not share or vlm.place.remote:
            raise Apart("the model runs elsewhere" if vlm.place.remote else "it was asked for")
        return on_one_prefix(vlm, asked, own)
    except Apart as why:
        return Shared(whole(vlm, asked, own), f"full passes, since {why}")


def on_one_prefix(vlm: VLM, prompts: Sequence[Prompt], edits: Sequence[list[Edit]]) -> Shared:
    """Prompts as rows on what they begin with.

    Raises:
        Apart: where it cannot be done.
    """
    common = common_positions(prompts)
    base = max(range(len(prompts)), key=lambda number: len(prompts[number]))
    groups = alike(prompts, edits, common)
    sites = {site for its in edits for site in tried(its)}
    start = start_of(vlm.with_edits(edits[base]), prompts[base], sites)
    first = beginning(start, vlm, prompts, edits, common)
    words = at(vlm.hf, str(vlm.arch.text.embed))
    check_words(start, words, first)
    logits = torch.empty(len(prompts), start.logits.shape[-1], dtype=start.logits.dtype, device=start.logits.device)
    for members in groups:
        for some in in_pieces(members, prompts, first):
            logits[some] = on_start(start, words, [prompts[n] for n in some], edits[some[0]], first, vlm)
    gap, scale = float((logits[base] - start.logits[0]).abs().max()), float(start.logits.abs().max())
    if gap > (0.03 if start.logits.dtype.itemsize == 2 else 2e-5) * scale:
        raise Apart(f"layers called by themselves answer otherwise than the model, by {gap:.2g}")
    return Shared(logits, f"{len(prompts)} questions on the keys and values of {first} positions before them")


def on_start(
    start: Start, words: Any, prompts: Sequence[Prompt], edits: list[Edit], first: int, vlm: VLM
) -> Float[Tensor, "batch vocab"]:
    """Some prompts with the same edits as rows of one batch.

    Raises:
        Apart: where what is edited before them is not what was edited in the start.
    """
    longest = max(prompts, key=len)
    own = of_words(start, vlm.with_edits(edits), longest)
    for site in start.sites:
        end = None if site[0] in BY_TOKEN else first
        if not torch.equal(own.after(site)[:, :end], start.after(site)[:, :end]):
            raise Apart(BEHIND)
    streams, ends = entering(start, words, prompts, first)
    count = len(prompts)
    try:
        return rerun(own, [[]] * count, [Reach(0, first)] * count, streams=streams, ends=ends)
    except Reaching:
        raise Apart(BEHIND) from None


def in_pieces(members: list[int], prompts: Sequence[Prompt], first: int) -> Iterable[list[int]]:
    """Rows in batches that are no larger than a run of two prompts, which is where packing them ends as well."""
    longest = max(len(prompts[member]) for member in members)
    size = max(1, (2 * longest - first) // (longest - first))
    return (members[at : at + size] for at in range(0, len(members), size))


def common_positions(prompts: Sequence[Prompt]) -> int:
    """How many positions prompts begin with that are the same in all, the picture among them.

    Raises:
        Apart: for one prompt, or prompts about other pictures.
    """
    if len(prompts) < 2:
        raise Apart("there is one question")
    if not prompts[0].images:
        raise Apart("there is no picture")
    for other in prompts[1:]:
        for name in {*prompts[0].encoding, *other.encoding} - {*BY_WORD}:
            one, two = prompts[0].encoding.get(name), other.encoding.get(name)
            if one is None or two is None or one.shape != two.shape or not torch.equal(one, two):
                raise Apart("the pictures differ, or how they are read differs with the question")
    ids = [prompt.encoding["input_ids"][0].tolist() for prompt in prompts]
    same = [len(set(column)) == 1 for column in zip(*ids, strict=False)]
    common = same.index(False) if False in same else len(same)
    common = min(common, min(map(len, prompts)) - 1)
    behind = 1 + max(at for prompt in prompts for at in (*prompt.image, *prompt.separators))
    if common < behind:
        raise Apart("words before the picture differ")
    if any(not bool((prompt.encoding.get("attention_mask", torch.ones(1)) == 1).all()) for prompt in prompts):
        raise Apart("some positions are hidden")
    return common


def entering(
    start: Start, words: Any, prompts: Sequence[Prompt], first: int
) -> tuple[Float[Tensor, "batch pos d_model"], list[int] | None]:
    """What enters the first layer in rows of words, filled up behind, and where each ends; None where all end alike."""
    longest = max(map(len, prompts))
    ids = torch.stack(
        [
            torch.nn.functional.pad(
                prompt.encoding["input_ids"][0, first:], (0, longest - len(prompt)), mode="constant"
            )
            for prompt in prompts
        ]
    )
    with torch.no_grad():
        streams = words(ids.to(start.logits.device)).to(start.logits.dtype)
    apart = len({len(prompt) for prompt in prompts}) > 1
    return streams, [len(prompt) - 1 for prompt in prompts] if apart else None


def alike(prompts: Sequence[Prompt], edits: Sequence[list[Edit]], common: int) -> list[list[int]]:
    """Prompts with the same edits, which are rows of one batch; of one length, where edits may tell positions apart.

    Raises:
        Apart: where edits of what the prompts begin with differ.
    """
    before = [[within(edit, len(prompt), common) for edit in its] for prompt, its in zip(prompts, edits, strict=True)]
    if len({fingerprint(signs) for signs in before}) > 1:
        raise Apart("what is edited before the questions differ is not the same in all")
    found: dict[tuple[int, str], list[int]] = {}
    for number, prompt in enumerate(prompts):
        length = 0 if all(map(treats_alike, edits[number])) else len(prompt)
        found.setdefault((length, fingerprint(edits[number])), []).append(number)
    return list(found.values())


def treats_alike(edit: Edit) -> bool:
    """Whether what an edit does to one position is the same whatever stands behind it."""
    if edit.bias is None:
        return edit.site.tower != "text" or edit.site.kind in ("image_features", "deepstack")
    return edit.site.tower != "text" or min((*edit.bias.keys, *(edit.bias.queries or ()))) >= 0


def within(edit: Edit, length: int, common: int) -> object:
    """What an edit does to the positions that prompts begin with; None where it leaves them alone."""
    if edit.site.tower != "text":
        return edit
    positions = edit.positions if edit.bias is None else edit.bias.queries
    here = None if not positions else [one % length for one in positions]
    if here and min(here) >= common:
        return None
    before = None if here is None else [one for one in here if one < common]
    if edit.bias is None or edit.bias.cross:
        return [edit, before]
    keys = [key % length for key in edit.bias.keys if key % length < common]
    if not keys:
        return None
    return [edit.site, edit.when, edit.way, fingerprint(replace(edit.bias, queries=None, keys=(0,))), before, keys]


def beginning(start: Start, vlm: VLM, prompts: Sequence[Prompt], edits: Sequence[list[Edit]], common: int) -> int:
    """The position from which on prompts are run by themselves.

    Raises:
        Apart: where there is none behind the picture.
    """
    if start.hindrance:
        raise Apart(start.hindrance)
    every = [edit for its in (vlm.edits, *edits) for edit in its]
    if any(edit.site.tower == "text" and edit.site.kind in ("embed", "logits") for edit in every):
        raise Apart("words or logits themselves are edited")
    first = start.cut(common)
    for prompt, its in zip(prompts, edits, strict=True):
        own = of_words(start, vlm.with_edits(its), prompt)
        for edit in own.vlm.edits:
            first = own.cut(min(first, whole_from(own, edit, 0, first)))
    if first <= max(start.prompt.image):
        raise Apart("what stands before the questions sees them, or an edit needs to see both")
    return first


def check_words(start: Start, words: Any, first: int) -> None:
    """Refuse models in which words enter the first layer with something added.

    Raises:
        Apart: for such a model.
    """
    ids = start.prompt.encoding["input_ids"][:, first:]
    entering = start.sites[("resid_pre", 0, "text")][:, first:]
    with torch.no_grad():
        own = words(ids.to(entering.device)).to(entering)
    if own.shape != entering.shape or not torch.equal(own, entering):
        raise Apart("words enter the first layer of this model with something added")


def of_words(start: Start, vlm: VLM, prompt: Prompt) -> Start:
    """The start of another prompt, as far as what was kept is the same; what stands behind is not."""
    length = len(prompt)
    sites = {site: x if site[0] in BY_TOKEN else x[:, :length] for site, x in start.sites.items()}
    given = [shortened(named, length) for named in start.given]
    cuts = tuple(cut for cut in start.cuts if cut < length)
    return Start(vlm, prompt, vlm.plan([prompt]), sites, given, start.logits, cuts, start.hindrance)


def shortened(named: Mapping[str, Any], length: int) -> dict[str, Any]:
    """What a layer is handed for so many first positions."""
    found = dict(named)
    for name, axis in ALONG.items():
        value = found.get(name)
        if isinstance(value, tuple):
            found[name] = tuple(x.narrow(axis, 0, length) for x in value)
        elif isinstance(value, Tensor):
            part = value.narrow(axis, 0, length)
            found[name] = part[..., :length] if name == MASK else part
    return found


def whole(vlm: VLM, prompts: Sequence[Prompt], edits: Sequence[list[Edit]]) -> Float[Tensor, "prompt vocab"]:
    """Prompts as rows of full passes, without padding: those of one length and with the same edits together."""
    found: dict[int, Tensor] = {}
    groups = list(in_batches(prompts, edits))
    asked = ({"prompt": [prompts[member] for member in some], "edits": edits[some[0]]} for some in groups)
    for members, run in zip(groups, vlm.runs(asked), strict=True):
        found |= dict(zip(members, run.logits, strict=True))
    return torch.stack([found[number] for number in range(len(prompts))])


def in_batches(prompts: Sequence[Prompt], edits: Sequence[list[Edit]]) -> Iterable[list[int]]:
    """The numbers of prompts that can run together, as many as fit."""
    groups: dict[tuple, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault((len(prompt), fingerprint(edits[number])), []).append(number)
    for members in groups.values():
        size = rows_for(prompts[members[0]])
        yield from (members[at : at + size] for at in range(0, len(members), size))
