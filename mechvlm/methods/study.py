"""VIAR's whole study of a model, part by part; what is finished is kept, and a study that was stopped goes on.

Rule this module guards: parts in a folder are never taken for another study's. What is returned is what the files hold.

>>> found = study(vlm, items=24, parts=["zone"], pictures=4)
>>> list(found.parts)
['profile', 'zone']
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xarray as xr
from tqdm import tqdm

from mechvlm.evaluate import read_pope
from mechvlm.evaluate.evaluation import content_of, sha256, sources
from mechvlm.evaluate.files import Item
from mechvlm.evaluate.pictures import looked_at
from mechvlm.experiments.published import published
from mechvlm.experiments.record import chosen_layers
from mechvlm.fingerprints import fingerprint, weights_print
from mechvlm.finished import SUFFIX, opened
from mechvlm.methods.dose import AMOUNTS
from mechvlm.methods.parts import PARTS, Made, Plan
from mechvlm.methods.sentences import finding
from mechvlm.sites import listed, number, told, whole
from mechvlm.vlm import VLM

COUNTS = ("pictures", "few", "controls", "resamples")
LEAST = {"zone": 4, "collapse": 2}
"""Pictures that parts cannot do without: a zone is tested on halves, and a picture is compared with another one."""
ANOTHER = (
    "holds another study: the model, the questions, the pictures or the settings are not the same; give another "
    "folder, or empty this one."
)
"""What is wrong with a folder, after its name."""


class OtherStudy(ValueError):
    """A folder that holds the parts of another study.

    Example:
        >>> issubclass(OtherStudy, ValueError)
        True
    """


@dataclass(frozen=True, repr=False)
class Studied:
    """What a study found.

    Attributes:
        parts: the results by the names of their parts, those that were needed among them.
        asked: which parts were asked for.
        about: the settings, and what the numbers came from, as plain text and numbers.
    """

    parts: Made
    asked: Sequence[str]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> xr.Dataset:
        return self.parts[name]

    @property
    def findings(self) -> dict[str, str]:
        """What came out of each part that was asked for, in a sentence made of its numbers."""
        return {name: finding(name, self.parts) for name in self.asked}

    def __repr__(self) -> str:
        return f"Studied({', '.join(self.parts)})"


def study(
    vlm: VLM,
    questions: Any = "demo",
    images: Any = None,
    split: str | Sequence[str] | None = "adversarial",
    convention: str | None = None,
    zone: Sequence[int] | None = None,
    amount: float = 2.0,
    amounts: Sequence[float] = AMOUNTS,
    parts: Sequence[str] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    items: int | None = None,
    pictures: int = 50,
    few: int = 300,
    controls: int = 20,
    template: str | None = None,
    resamples: int = 2000,
) -> Studied:
    """Everything that VIAR's study does, with one model: where it looks, and what a bias there changes.

    The parts, in their order: `profile`, attention to the picture by layer; `zone`, whether there is a band of neglect,
    and how the curve is bent; `heads`; `collapse`, real against null pictures; `gradients`; `base`, the answers;
    `samples`, attention against being right; `bias`, the answers with the bias; `adaptive`, with amounts by layer;
    `head_bias`, in the heads of neglect; `when`, in the prompt or while answering, by generated text; `doses`;
    `layers`, beside random ones; `contrast`, visual contrastive decoding with the bias and without; `statistics`, every
    edit against the model and against a moved threshold.

    Args:
        questions, images, split: as in `mv.evaluate.pope`. VIAR's "random" split was the adversarial one.
        convention: None, or "viar-2026" for all that was published otherwise than it should be: positions, quantities,
            tokens, prompt, and the contrast without a cut.
        zone: layers to bias, one after the other. None takes the zone that is found; where none is, the lowest band;
            and where there is none either, the layers in the place of the published ones. Which it was is in
            `found["zone"].attrs["layers_from"]`.
        amount: of the bias, added to scores.
        amounts: those of `doses`.
        parts: which are wanted; None: all. What they need is made as well.
        out: a folder, which gets each part as netCDF as soon as it is finished, and from which they are taken when the
            same study is started again. Another study's folder is refused.
        seed: of all draws.
        items: how many questions, the first; None: all.
        pictures: how many of them attention, null pictures and gradients are measured on, at one question each.
        few: how many questions `doses`, `layers` and `contrast` are asked, the first; generated answers are to 36.
        controls: sets of random layers.
        template: as in `mv.evaluate.pope`; by default the model's own chat template, and under the convention the whole
            published prompt, which is LLaVA-1.5's: give "plain" for other models, which it may confuse.
        resamples: draws of pictures for intervals of evaluations.

    Returns:
        The parts as datasets, and `findings`, a sentence for each with its numbers.

    Raises:
        ValueError: for parts, layers or numbers that are not there; too few pictures for a part; a folder that holds
            another study (`OtherStudy`); or what the parts refuse, such as a model that sees the picture by
            cross-attention.
        TypeError: for a folder that is no path.

    Example:
        >>> found = mv.methods.viar.study(vlm, items=24, parts=["profile"], pictures=2)
        >>> found["profile"].sizes["prompt"]
        2

    Source:
        VIAR, "Vision-Informed Attention Rebalancing" (2026), as a whole.
    """
    wanted, folder = _wanted(parts), None if out is None else _folder(out)
    counts: dict[str, Any] = dict(zip(COUNTS, (pictures, few, controls, resamples), strict=True))
    for name, count in {**counts, "items": 1 if items is None else items}.items():
        if whole(name, count) < (0 if name == "controls" else 1):
            raise ValueError(f"{name}={count} is too few; give 1 or more.")
    given: dict[str, Any] = {"vlm": vlm, "images": images, "source": sources(questions), "zone": _zone(vlm, zone)}
    plan = Plan(
        **{**given, **counts, "convention": convention, "seed": seed},
        items=read_pope(read_pope(questions, split)[:items]),
        template=template or ("viar-2026" if published(convention) else "{question}"),
        amount=number("amount", amount),
        amounts=tuple(number("amount", one) for one in amounts),
    )
    needed = [name for name in PARTS if name in _needed(wanted)]
    _enough(plan, needed)
    about, made = _about(plan), dict[str, xr.Dataset]()
    with tqdm(needed, unit="part", desc="viar") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            made[name] = _part(name, plan, made, about["fingerprint"], folder)
    return Studied(made, wanted, about)


def _wanted(parts: Sequence[str] | None) -> list[str]:
    """The parts that are asked for, in their order."""
    given = list(PARTS) if parts is None else listed([parts] if isinstance(parts, str) else parts)
    wrong = [name for name in given or () if name not in PARTS]
    if wrong or not given:
        raise ValueError(f"parts={told(parts)} are no parts of the study; choose from {', '.join(PARTS)}.")
    return [name for name in PARTS if name in given]


def _needed(wanted: Sequence[str]) -> set[str]:
    """Parts with all that they are made of."""
    found = set(wanted)
    for name in reversed(PARTS):
        if name in found:
            found |= set(PARTS[name][1])
    return found


def _enough(plan: Plan, needed: Sequence[str]) -> None:
    """Refuses pictures that are too few for a part, before any other part has run."""
    there = len({item.image for item in plan.items})
    for name in needed:
        least = LEAST.get(name, 1) if name != "collapse" or not plan.convention else 1
        if there < least:
            raise ValueError(
                f"the part '{name}' needs {least} pictures, and the {len(plan.items)} questions are about {there}; ask "
                "more questions with items (--items), or all."
            )
        if plan.pictures < least:
            raise ValueError(f"pictures={plan.pictures} is too few for the part '{name}'; give {least} or more.")


def _zone(vlm: VLM, zone: Sequence[int] | None) -> tuple[int, ...] | None:
    """The layers that were asked for."""
    if zone is None:
        return None
    chosen, depth = chosen_layers(vlm, zone), vlm.shape.layers["text"]
    if chosen != list(range(chosen[0], chosen[0] + len(chosen))) or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise ValueError(f"zone={told(zone)} must be layers of 0 to {depth - 1}, one after the other.")
    return tuple(chosen)


def _about(plan: Plan) -> dict[str, Any]:
    """What the study is, as text and numbers; its fingerprint among them."""
    settings: dict[str, Any] = {
        **{name: vars(plan)[name] for name in (*COUNTS, "template", "amount", "seed")},
        "convention": plan.convention or "corrected",
        "zone": "found" if plan.zone is None else ", ".join(map(str, plan.zone)),
        "amounts": ", ".join(f"{one:g}" for one in plan.amounts),
        "items": len(plan.items),
    }
    content = _content(plan.vlm, plan.items, plan.images)
    how = [str(plan.vlm.dtype), plan.vlm.attention, list(plan.vlm.edits)]
    return {**settings, **content, "questions": plan.source, "fingerprint": fingerprint(settings, content, how)}


def _content(vlm: VLM, items: Sequence[Item], images: Any) -> dict[str, str]:
    """What questions, pictures and weights are, as hashes."""
    return {
        "questions_sha256": content_of(items),
        "pictures_sha256": sha256(looked_at(items, images)),
        "weights": fingerprint(weights_print(vlm)),
    }


def sameness(
    vlm: VLM, questions: Any, images: Any = None, split: str | None = "adversarial", items: int | None = None
) -> dict[str, str]:
    """What a study has to find as it was to be made again: hashes of its questions, its pictures and the weights.

    Args:
        questions, images, split, items: as in `study`.

    Example:
        >>> list(sameness(vlm, "demo", items=6))
        ['questions_sha256', 'pictures_sha256', 'weights']
    """
    return _content(vlm, read_pope(read_pope(questions, split)[:items]), images)


def _part(name: str, plan: Plan, made: Made, print_of: str, folder: Path | None) -> xr.Dataset:
    """One part: from its file where it is finished, else made now, and kept."""
    path = None if folder is None else folder / f"{name}{SUFFIX}"
    if path is not None and path.exists():
        return _kept(path, print_of)
    start = time.perf_counter()
    found = PARTS[name][0](plan, made)
    found = found.assign_attrs(part=name, study=print_of, part_seconds=round(time.perf_counter() - start, 2))
    if path is None:
        return found
    unfinished = path.with_name(f"{name}-{uuid.uuid4().hex[:12]}.unfinished")
    found.to_netcdf(unfinished, engine="h5netcdf")
    unfinished.replace(path)
    return _kept(path, print_of)


def _kept(path: Path, print_of: str) -> xr.Dataset:
    """A finished part from its file."""
    with opened(path, "a study") as kept:
        if kept.attrs.get("study") != print_of:
            raise OtherStudy(f"out={str(path.parent)!r} {ANOTHER}")
        return kept.load()


def _folder(out: str | Path) -> Path:
    """The folder to keep parts in."""
    if not isinstance(out, str | Path):
        raise TypeError(f"out={told(out)} is not a folder; give its path, or None to keep nothing on disk.")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={str(folder)!r} is a file; give a folder, in which each part is a file.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
