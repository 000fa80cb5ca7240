"""`mechvlm pope`: a model's answers to a benchmark of yes and no, with edits and without, and what the edits change.

It writes the answers (netCDF, and all together as CSV), the comparison, a page, and `record.json`, from which
`mechvlm pope --rerun record.json` computes the same numbers again, into a folder of their own. Run once more with the
same folder, it goes on where it was stopped.

    mechvlm pope demo --edit bias:2.0@2-4
    mechvlm pope --rerun mechvlm-pope/record.json --out again
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from mechvlm.commands.records import RECORD, recorded, rerun_folder
from mechvlm.commands.shell import Device, Dtype, loaded, one_sentence, writable

FOLDER = Path("mechvlm-pope")
COMPARED = ("versions", "device", "attention", "revision")
"""What a rerun says of its own surroundings where they are not the record's."""
SAME = {"questions_sha256": "questions", "pictures_sha256": "pictures", "weights": "model's weights"}
"""What a record must find as it was, and how a refusal calls it."""


@dataclass(frozen=True)
class Asked:
    """What a command was asked to do, as text and numbers that a record can hold."""

    model: str
    questions: list[str] = field(default_factory=lambda: ["demo"])
    images: str | None = None
    split: list[str] = field(default_factory=list)
    items: int | None = None
    edit: list[str] = field(default_factory=list)
    template: str = "plain"
    joined: str = "logsumexp"
    lower_case: bool = False
    parser: str | None = None
    max_new_tokens: int = 16
    batch_size: int | None = None
    device: str | None = None
    dtype: str | None = None


Model = Annotated[str | None, typer.Argument(help="A name on the Hugging Face hub, a checkpoint directory, or demo.")]
Questions = Annotated[
    list[str] | None,
    typer.Option("--questions", "--file", help="A POPE file or a folder of them; may be repeated. [default: demo's]"),
]
Images = Annotated[Path | None, typer.Option(help="The folder of the pictures.")]
Splits = Annotated[list[str] | None, typer.Option(help="A split to keep; may be repeated. [default: all]")]
FirstItems = Annotated[int | None, typer.Option("--items", min=1, help="Only the first so many questions.")]
Edits = Annotated[
    list[str] | None,
    typer.Option(help="bias:2.0@8-16, cut@4-7, ablate@3.5,4.1 or scale:2@3.5; all that are given act together."),
]
Template = Annotated[str, typer.Option(help="plain, viar, vcd, lmms-eval, viar-2026, or a text with {question}.")]
Joined = Annotated[str, typer.Option(help="How a word's spellings are joined: logsumexp or max.")]
LowerCase = Annotated[bool, typer.Option("--lower-case", help="Only the small-letter tokens, as VIAR.")]
ParserName = Annotated[
    str | None,
    typer.Option(help="Read generated text by official, opera, vcd, lmms-eval, viar or first-word. [default: logits]"),
]
Tokens = Annotated[int, typer.Option(help="Of a generated answer.")]
Batch = Annotated[int | None, typer.Option(help="At most so many questions together.")]
Rerun = Annotated[Path | None, typer.Option(help="The record.json of an earlier run, to be run again.")]
Out = Annotated[
    Path | None,
    typer.Option(help="The folder to write into. [default: mechvlm-pope; of a rerun the record's folder and -rerun]"),
]


def pope_command(
    model: Model = None,
    questions: Questions = None,
    images: Images = None,
    split: Splits = None,
    items: FirstItems = None,
    edit: Edits = None,
    template: Template = "plain",
    joined: Joined = "logsumexp",
    lower_case: LowerCase = False,
    parser: ParserName = None,
    max_new_tokens: Tokens = 16,
    batch_size: Batch = None,
    device: Device = None,
    dtype: Dtype = None,
    rerun: Rerun = None,
    out: Out = None,
) -> None:
    """Ask a model the questions of a POPE file, with edits and without, and write what the edits change."""
    given = dict(locals())
    with one_sentence():
        if rerun is not None:
            before = recorded(rerun, "pope", Asked, lacking)
            asked = Asked(**before["asked"])
            asked = replace(asked, device=device or asked.device)
            folder = rerun_folder(pope_command, given, rerun, out)
        else:
            before, folder = {}, out or FOLDER
            asked = Asked(
                model=checked(model),
                questions=files_of(model, questions),
                images=None if images is None else place(images),
                split=split or [],
                items=items,
                edit=edit or [],
                template=template,
                joined=joined,
                lower_case=lower_case,
                parser=parser,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                device=device,
                dtype=dtype,
            )
        path = written(asked, writable(folder), before)
    typer.echo(str(path))


def checked(model: str | None) -> str:
    """The model's name, or directory.

    Raises:
        ValueError: where there is none.
    """
    if model is None:
        raise ValueError("there is no model to ask; name one, such as demo, or give --rerun a record.json.")
    return place(model)


def files_of(model: str | None, questions: list[str] | None) -> list[str]:
    """Where the questions are; the demo model's own where none are given for it.

    Raises:
        ValueError: where there are none.
    """
    given = questions or (["demo"] if model == "demo" else [])
    if not given:
        raise ValueError("there are no questions; give --questions a POPE file, a folder of them, or demo.")
    return [place(one) for one in given]


def place(given: str | Path) -> str:
    """A path from wherever it is seen; a name that is no path as it is."""
    return str(given) if given == "demo" or not Path(given).exists() else str(Path(given).resolve())


def lacking(record: Mapping[str, Any]) -> str:
    """What a record of an evaluation does not say; nothing where it says all."""
    if not isinstance(record.get("pictures_sha256"), str):
        return "its 'pictures_sha256' is not a text"
    evaluations = record.get("evaluations")
    base = evaluations.get("base") if isinstance(evaluations, Mapping) else None
    missing = [name for name in COMPARED if not isinstance(base, Mapping) or name not in base]
    return f"it does not say its {missing[0]}" if missing else ""


def written(asked: Asked, folder: Path, before: dict[str, Any]) -> Path:
    """Run what was asked, write all of it, and say where the page is.

    Raises:
        ValueError: for what cannot be run, or is not as it was in the record of an earlier run.
    """
    from mechvlm.evaluate import edits_from, pope, read_pope
    from mechvlm.evaluate.evaluation import content_of, sha256
    from mechvlm.evaluate.parsers import parser_of
    from mechvlm.evaluate.pictures import looked_at
    from mechvlm.evaluate.task import text_of
    from mechvlm.fingerprints import fingerprint, weights_print
    from mechvlm.methods.asked import prompt_of
    from mechvlm.report.benchmark import benchmark_page

    edits, _, _ = edits_from(*asked.edit), text_of(asked.template), parser_of(asked.parser)  # before a model is loaded
    questions = "demo" if asked.questions == ["demo"] else list(asked.questions)
    items = read_pope(questions, asked.split or None)[: asked.items]
    asks = questions if asked.items is None else items
    vlm = loaded(asked.model, asked.device, asked.dtype)
    weights = fingerprint(weights_print(vlm))
    pictures = looked_at(items, asked.images) if before or asked.edit else {}
    if before:
        now = {"questions_sha256": content_of(items), "pictures_sha256": sha256(pictures), "weights": weights}
        same_as(before, now)
    if asked.edit:  # what cannot be is said before the model alone is asked for hours
        prompt = prompt_of(vlm, items[0], asked.images, asked.template)
        vlm.plan([prompt], edits=edits(prompt), steps=asked.max_new_tokens if asked.parser else 1)
    how: dict[str, Any] = {
        **{"images": asked.images, "split": asked.split or None, "template": asked.template, "joined": asked.joined},
        **{"parser": asked.parser, "batch_size": asked.batch_size, "max_new_tokens": asked.max_new_tokens},
        "tokens": "lower-case" if asked.lower_case else None,
    }
    found = {"base": pope(vlm, asks, edits=(), out=folder / "finished" / "base", **how)}
    if asked.edit:
        found["edited"] = pope(vlm, asks, edits=edits, out=folder / "finished" / "edited", **how)
    record = record_of(asked, found, weights, before)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return benchmark_page(found, folder, {"command": record["command"], "made": record["made"]})


def same_as(before: dict[str, Any], now: dict[str, str]) -> None:
    """Refuse what is not as an earlier run found it.

    Raises:
        ValueError: for other questions, pictures or weights.
    """
    for name, value in now.items():
        if before[name] != value:
            raise ValueError(
                f"the {SAME[name]} are not those of the record (sha256 {before[name][:12]}... there, {value[:12]}... "
                "here), so its numbers cannot come out again; give the same, or run without --rerun."
            )


def record_of(asked: Asked, found: dict[str, Any], weights: str, before: dict[str, Any]) -> dict[str, Any]:
    """What suffices to run it again, and what came out; of an earlier run, what is not as it was."""
    base = found["base"].attrs
    past = before.get("evaluations", {}).get("base", {})
    differs = {name: past[name] for name in COMPARED if before and past[name] != base[name]}
    return {
        **({"rerun_of": before["made"], "differs_from_it": differs} if before else {}),
        "command": command_of(asked),
        "asked": asdict(asked),
        "weights": weights,
        **{name: base[name] for name in ("questions_sha256", "pictures_sha256", "versions")},
        "accuracy": {name: float(one.correct.mean()) for name, one in found.items()},
        "yes_ratio": {name: float((one.predicted == "yes").mean()) for name, one in found.items()},
        **{name: {of: one.attrs[name] for of, one in found.items()} for name in ("answers_computed", "answers_kept")},
        "evaluations": {name: one.attrs for name, one in found.items()},
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def command_of(asked: Asked) -> str:
    """The command line that asks for the same."""
    words = ["mechvlm", "pope", asked.model]
    for name, value in asdict(asked).items():
        given = value if isinstance(value, list) else [] if value in (None, False) else [value]
        for one in given if name != "model" else []:
            words += ["--" + name.replace("_", "-"), *([] if one is True else [str(one)])]
    return shlex.join(words)
