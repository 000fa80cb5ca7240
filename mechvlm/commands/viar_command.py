"""`mechvlm viar`: VIAR's whole study of a model, or some of its parts, one command for each result.

It writes each part as netCDF as soon as it is finished, a page with every figure, and `record.json`, from which
`mechvlm viar --rerun record.json` makes the same numbers again. Run once more with the same folder, it goes on where it
was stopped.

    mechvlm viar demo
    mechvlm viar demo zone --out zone
    mechvlm viar llava-hf/llava-1.5-7b-hf --file POPE/output/coco --images val2014 --parts bias,statistics --layers 8-16
"""

import json
import re
import shlex
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from mechvlm.commands.pope_command import Model, Questions, Rerun, checked, files_of, place, same_as
from mechvlm.commands.records import RECORD, recorded, rerun_folder
from mechvlm.commands.shell import Device, Dtype, loaded, one_sentence, writable

SPLIT = "adversarial"
PARTS = "profile, zone, heads, collapse, gradients, base, samples, bias, adaptive, head_bias, when, doses, layers, "
PARTS += "contrast, statistics"
COUNTS = ("items", "pictures", "few", "controls", "resamples", "seed")


@dataclass(frozen=True)
class Asked:
    """What a command was asked to do, as text and numbers that a record can hold."""

    model: str
    questions: list[str] = field(default_factory=lambda: ["demo"])
    images: str | None = None
    split: str = SPLIT
    parts: list[str] = field(default_factory=list)
    convention: str | None = None
    layers: str | None = None
    amount: float = 2.0
    items: int | None = None
    pictures: int = 50
    few: int = 300
    controls: int = 20
    resamples: int = 2000
    seed: int = 0
    template: str | None = None
    device: str | None = None
    dtype: str | None = None


Part = Annotated[list[str] | None, typer.Argument(help=f"Which parts: {PARTS}. [default: all]")]
PartList = Annotated[str | None, typer.Option("--parts", help="The same with commas, such as profile,zone.")]
Pictures = Annotated[Path | None, typer.Option("--images", help="The folder of the pictures.")]
Split = Annotated[str, typer.Option(help="The split to ask, or all.")]
Layers = Annotated[str | None, typer.Option(help="Layers to bias, such as 8-16. [default: the zone that is found]")]
Amount = Annotated[float, typer.Option(help="Of the bias on the scores of image tokens.")]
Convention = Annotated[str | None, typer.Option(help="viar-2026 for what was published. [default: corrected]")]
Items = Annotated[int | None, typer.Option(help="How many questions, the first. [default: all]")]
Measured = Annotated[int, typer.Option("--pictures", help="On how many attention and gradients are measured.")]
Few = Annotated[int, typer.Option(help="How many questions doses, layers and contrast are asked.")]
Controls = Annotated[int, typer.Option(help="How many sets of random layers.")]
Resamples = Annotated[int, typer.Option(help="Draws of pictures for the intervals of evaluations.")]
Seed = Annotated[int, typer.Option(help="Of all draws.")]
TemplateName = Annotated[str | None, typer.Option("--template", help="plain, viar, ..., or a text with {question}.")]
Out = Annotated[
    Path | None,
    typer.Option(help="The folder to write into. [default: mechvlm-viar; of a rerun the record's folder and -rerun]"),
]


def viar_command(
    model: Model = None,
    part: Part = None,
    parts: PartList = None,
    questions: Questions = None,
    images: Pictures = None,
    split: Split = SPLIT,
    layers: Layers = None,
    amount: Amount = 2.0,
    convention: Convention = None,
    items: Items = None,
    pictures: Measured = 50,
    few: Few = 300,
    controls: Controls = 20,
    resamples: Resamples = 2000,
    seed: Seed = 0,
    template: TemplateName = None,
    device: Device = None,
    dtype: Dtype = None,
    rerun: Rerun = None,
    out: Out = None,
) -> None:
    """Do all that VIAR's study does with a model: where it looks, what a bias there changes, and if that is more."""
    given = dict(locals())
    with one_sentence():
        if rerun is not None:
            before = recorded(rerun, "viar", Asked)
            asked = replace(Asked(**before["asked"]), device=device or before["asked"]["device"])
            folder = rerun_folder(viar_command, given, rerun, out)
        else:
            before, folder = {}, out or Path("mechvlm-viar")
            options: dict[str, Any] = {
                **dict(zip(COUNTS, (items, pictures, few, controls, resamples, seed), strict=True)),
                **{"model": checked(model), "questions": files_of(model, questions), "parts": listed(part, parts)},
                **{"images": None if images is None else place(images), "split": split, "layers": layers},
                **{"amount": amount, "convention": convention, "template": template, "device": device, "dtype": dtype},
            }
            asked = Asked(**options)
        path = written(asked, writable(folder), before)
    typer.echo(str(path))


def listed(part: list[str] | None, parts: str | None) -> list[str]:
    """Parts from both ways to write them."""
    return [*(part or []), *(name.strip() for name in (parts or "").split(",") if name.strip())]


def layers_of(text: str | None) -> list[int] | None:
    """Layers from a text such as 8-16.

    Raises:
        ValueError: for a text that is none.

    Example:
        >>> layers_of("2-4")
        [2, 3, 4]
    """
    named = re.fullmatch(r"(\d+)(?:-(\d+))?", (text or "").strip())
    if text is None:
        return None
    if not named or int(named[2] or named[1]) < int(named[1]):
        raise ValueError(f"--layers {text} are no layers; write 8 or 8-16, counted from 0.")
    return list(range(int(named[1]), int(named[2] or named[1]) + 1))


def written(asked: Asked, folder: Path, before: dict[str, Any]) -> Path:
    """Run what was asked, write all of it, and say where the page is.

    Raises:
        ValueError: for what cannot be run, or is not as it was in the record of an earlier run.
    """
    from mechvlm.methods.study import ANOTHER, OtherStudy, sameness, study
    from mechvlm.report.viar_page import viar_page

    zone = layers_of(asked.layers)
    questions = "demo" if asked.questions == ["demo"] else list(asked.questions)
    vlm = loaded(asked.model, asked.device, asked.dtype)
    split = None if asked.split == "all" else asked.split
    if before:
        same_as(before, sameness(vlm, questions, asked.images, split, asked.items))
    counts: dict[str, Any] = {name: vars(asked)[name] for name in COUNTS}
    how: dict[str, Any] = {"convention": asked.convention, "template": asked.template, "zone": zone, **counts}
    more: dict[str, Any] = {"parts": asked.parts or None, "amount": asked.amount, "out": folder / "parts"}
    try:
        found = study(vlm, questions, asked.images, split, **how, **more)
    except OtherStudy:  # which names the folder inside the one that was given
        raise ValueError(f"the folder '{folder}' {ANOTHER}") from None
    record = record_of(asked, found, before)
    (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return viar_page(found, folder, {"command": record["command"], "made": record["made"]})


def record_of(asked: Asked, found: Any, before: dict[str, Any]) -> dict[str, Any]:
    """What suffices to run it again, and what came out; of an earlier run, what is not as it was."""
    first = next(iter(found.parts.values())).attrs
    past = before.get("model", {})
    same = ("model", "revision", "versions", "dtype", "device", "attention")
    told = {name: first[name] for name in same if name in first}
    differs = {name: past.get(name) for name in told if before and past.get(name) != told[name]}
    return {
        **({"rerun_of": before["made"], "differs_from_it": differs} if before else {}),
        "command": command_of(asked),
        "asked": asdict(asked),
        "model": told,
        **{name: value for name, value in found.about.items() if name != "fingerprint"},
        "seconds": {name: one.attrs["part_seconds"] for name, one in found.parts.items()},
        "findings": found.findings,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def command_of(asked: Asked) -> str:
    """The command line that asks for the same."""
    words = ["mechvlm", "viar", asked.model, *asked.parts]
    for name, value in asdict(asked).items():
        if name not in ("model", "parts") and value is not None:
            for one in value if isinstance(value, list) else [value]:
                words += ["--" + name, str(one)]
    return shlex.join(words)
