"""`mechvlm audit`: which findings of VIAR a model shows as they were published, and which when they are corrected.

It writes a page, the numbers behind it (netCDF, and the findings as CSV), and `record.json`, from which
`mechvlm audit --rerun record.json` makes the same numbers again.

    mechvlm audit demo
    mechvlm audit llava-hf/llava-1.5-7b-hf --file POPE/output/coco --images val2014 --split adversarial --items 100
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from mechvlm.commands.pope_command import (
    Images,
    Model,
    Out,
    Questions,
    Rerun,
    Splits,
    Template,
    checked,
    files_of,
    place,
    same_as,
)
from mechvlm.commands.records import RECORD, recorded, rerun_folder
from mechvlm.commands.shell import Device, Dtype, loaded, one_sentence, writable

ITEMS = 60
Items = Annotated[int, typer.Option(help="How many questions, spread evenly over the pictures.")]
Zone = Annotated[str | None, typer.Option(help="Layers to be called the zone, such as 8-16. [default: found]")]
Mistral = Annotated[bool, typer.Option("--mistral", help="Also with one image token counted, as for Mistral.")]
Resamples = Annotated[int, typer.Option(help="Of pictures, for intervals.")]
Seed = Annotated[int, typer.Option(help="Of all draws.")]


@dataclass(frozen=True)
class Asked:
    """What a command was asked to do, as text and numbers that a record can hold."""

    model: str
    questions: list[str] = field(default_factory=lambda: ["demo"])
    images: str | None = None
    split: list[str] = field(default_factory=list)
    items: int = ITEMS
    template: str = "plain"
    zone: str | None = None
    mistral: bool = False
    resamples: int = 1000
    seed: int = 0
    device: str | None = None
    dtype: str | None = None


def audit_command(
    model: Model = None,
    questions: Questions = None,
    images: Images = None,
    split: Splits = None,
    items: Items = ITEMS,
    template: Template = "plain",
    zone: Zone = None,
    mistral: Mistral = False,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    rerun: Rerun = None,
    out: Out = None,
) -> None:
    """Say which findings of VIAR a model shows, as they were published and corrected, and write a page about it."""
    given = dict(locals())
    with one_sentence():
        if rerun is not None:
            before = recorded(rerun, "audit", Asked)
            asked = replace(Asked(**before["asked"]), device=device or before["asked"]["device"])
            folder = rerun_folder(audit_command, given, rerun, out)
        else:
            before, folder = {}, out or Path("mechvlm-audit")
            asked = Asked(
                model=checked(model),
                questions=files_of(model, questions),
                images=None if images is None else place(images),
                split=split or [],
                items=items,
                template=template,
                zone=zone,
                mistral=mistral,
                resamples=resamples,
                seed=seed,
                device=device,
                dtype=dtype,
            )
        path = written(asked, writable(folder), before)
    typer.echo(str(path))


def written(asked: Asked, folder: Path, before: dict[str, Any]) -> Path:
    """Run what was asked, write all of it, and say where the page is.

    Raises:
        ValueError: for what cannot be run, or is not as it was in the record of an earlier run.
    """
    from mechvlm.evaluate import read_pope
    from mechvlm.evaluate.evaluation import content_of, sha256
    from mechvlm.evaluate.pictures import looked_at, picture_of
    from mechvlm.evaluate.task import text_of
    from mechvlm.fingerprints import fingerprint, weights_print
    from mechvlm.methods.audit import audit
    from mechvlm.report.audit import audit_page

    layers, template = layers_of(asked.zone), text_of(asked.template)
    questions = "demo" if asked.questions == ["demo"] else list(asked.questions)
    items = spread(read_pope(questions, asked.split or None), asked.items)
    pictures = sha256(looked_at(items, asked.images))
    vlm = loaded(asked.model, asked.device, asked.dtype)
    now = {
        "questions_sha256": content_of(items),
        "pictures_sha256": pictures,
        "weights": fingerprint(weights_print(vlm)),
    }
    if before:
        same_as(before, now)
    raw = "<image>" in template
    prompts = [
        vlm.prompt(picture_of(item, asked.images), template.replace("{question}", item.question), raw) for item in items
    ]
    how: dict[str, Any] = {"mistral": asked.mistral, "resamples": asked.resamples, "seed": asked.seed}
    found = audit(vlm, prompts, [item.image for item in items], zone=layers, **how)
    record = record_of(asked, found["findings"], now, before)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return audit_page(found, folder, {"template": template, "command": record["command"], "made": record["made"]})


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many questions, one about each picture, then a second about each; every picture begins with another one.

    Raises:
        ValueError: for no questions at all.
    """
    if count < 1:
        raise ValueError(f"--items {count} asks nothing; give for instance --items {ITEMS}.")
    by_picture: dict[str, list[Any]] = {}
    for item in items:
        if item.duplicate_of == item.number:
            by_picture.setdefault(item.image, []).append(item)
    longest = max(map(len, by_picture.values()))
    rounds = [
        own[(turn + number) % len(own)]
        for turn in range(longest)
        for number, own in enumerate(by_picture.values())
        if turn < len(own)
    ]
    return rounds[:count]


def layers_of(text: str | None) -> list[int] | None:
    """Layers that a text names, such as 8-16.

    Raises:
        ValueError: for any other text.
    """
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last if dash else first).isdecimal()):
        raise ValueError(f"--zone {text} names no layers; write --zone 8-16.")
    return list(range(int(first), int(last if dash else first) + 1))


def record_of(asked: Asked, findings: Any, now: dict[str, str], before: dict[str, Any]) -> dict[str, Any]:
    """What suffices to run it again, and what came out; of an earlier run, what is not as it was."""
    own = {name: value if isinstance(value, int | float) else str(value) for name, value in findings.attrs.items()}
    differs = {name: value for name, value in before.get("audit", {}).items() if own.get(name) != value}
    return {
        **({"rerun_of": before["made"], "differs_from_it": differs} if before else {}),
        "command": command_of(asked),
        "asked": asdict(asked),
        **now,
        "verdicts": dict(zip(findings.finding.values.tolist(), findings.verdict.values.tolist(), strict=True)),
        "audit": own,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def command_of(asked: Asked) -> str:
    """The command line that asks for the same."""
    words = ["mechvlm", "audit", asked.model]
    for name, value in asdict(asked).items():
        given = value if isinstance(value, list) else [] if value in (None, False) else [value]
        for one in given if name != "model" else []:
            words += [f"--{name}", *([] if one is True else [str(one)])]
    return shlex.join(words)
