"""The command line: `mechvlm report` looks at a question about a picture, `mechvlm check` at a model, `mechvlm pope`
at its answers to a benchmark, `mechvlm audit` at which published findings it shows.
at its answers to a benchmark, `mechvlm viar` at all that VIAR's study looks at.

Rule this module guards: what the package refuses is one sentence on standard error and exit code 2, no traceback.
The sentences are the package's own; nothing else is caught.

    mechvlm report
    mechvlm report --model llava-hf/llava-1.5-7b-hf --image dog.jpg --question "Is there a dog?" --device cuda
    mechvlm check llava-hf/llava-1.5-7b-hf
    mechvlm pope llava-hf/llava-1.5-7b-hf --questions POPE/output/coco --images val2014 --edit bias:2.0@8-16
    mechvlm audit llava-hf/llava-1.5-7b-hf --file POPE/output/coco --images val2014 --items 100
    mechvlm viar demo
"""

__all__ = ["app", "check_device", "main", "null_image"]

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from mechvlm.commands.audit_command import audit_command
from mechvlm.commands.pope_command import pope_command
from mechvlm.commands.shell import Device, Dtype, check_device, loaded, one_sentence, writable
from mechvlm.commands.viar_command import viar_command

DEMO_QUESTION = 0
CASES = 6
NULLS = "black, grey, white, mean, noise(seed), diffusion(t), blur(sigma), shuffle(seed) or swap(file)"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)
app.command("pope")(pope_command)
app.command("audit")(audit_command)
app.command("viar")(viar_command)


def main() -> None:
    """What the `mechvlm` command runs."""
    app()


def show_version(asked: bool) -> bool:
    """Say which version this is, and leave."""
    if asked:
        typer.echo(version("mechvlm"))
        raise typer.Exit
    return asked


Version = Annotated[
    bool, typer.Option("--version", callback=show_version, is_eager=True, help="Say which version this is.")
]


@app.callback()
def about(show: Version = False) -> None:  # noqa: ARG001  (its callback answers it)
    """Where, and why, does a vision-language model use the image, or ignore it?"""


@app.command()
def report(
    model: Annotated[
        str, typer.Option(help="A name on the Hugging Face hub, a checkpoint directory, or demo.")
    ] = "demo",
    image: Annotated[Path | None, typer.Option(help="A picture's file. [default: a scene that comes along]")] = None,
    question: Annotated[str | None, typer.Option(help="The question about it.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The question is the whole prompt, with <image> in it.")] = False,
    null: Annotated[str, typer.Option(help=f"The null image: {NULLS}.")] = "black",
    answers: Annotated[str, typer.Option(help="Answers to follow, the first against the second.")] = "yes,no",
    layer: Annotated[int | None, typer.Option(help="Whose attention is drawn over the picture, from 0.")] = None,
    head: Annotated[int | None, typer.Option(help="Whose attention is drawn over the picture, from 0.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("mechvlm-report"),
) -> None:
    """Look at one question about one picture from all sides, and write report.html with its numbers."""
    with one_sentence():
        words = [word.strip() for word in answers.split(",") if word.strip()]
        make_null, folder = null_image(null), writable(out)
        if image is not None and question is None:
            raise ValueError("--image was given without --question; say what to ask about the picture.")
        vlm = loaded(model, device, dtype)
        from mechvlm.report import report as write  # plotly and xarray: a second to import

        prompt, more = asked(vlm, image, question, raw, make_null)
        page = write(vlm, prompt, prompt.with_image(make_null), folder, words, layer, head, make_null.__name__, more)
    typer.echo(str(page))


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A name on the Hugging Face hub, a checkpoint directory, or demo.")],
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Run the laws that every reading and edit rests on, on a model; exit code 1 if one does not hold."""
    with one_sentence():
        table = loaded(model, device, dtype).check()
    if (table.verdict != "holds").any():
        raise typer.Exit(1)


def null_image(text: str) -> Callable:
    """The null image that a text names, such as black, noise(3) or swap(other.png).

    Raises:
        ValueError: for any other text.
    """
    from mechvlm import images

    plain = {"black": images.black, "grey": images.grey, "white": images.white, "mean": images.mean}
    makers: dict[str, Callable] = {
        "noise": lambda given: images.noise(int(given or 0)),
        "diffusion": lambda given: images.diffusion(int(given or 500)),
        "blur": lambda given: images.blur(float(given or 8)),
        "shuffle": lambda given: images.shuffle(int(given or 0)),
        "swap": images.swap,
    }
    named = re.fullmatch(r"(\w+)(?:\((.*)\))?", text.strip())
    if named and named[1] in plain and named[2] is None:
        return plain[named[1]]
    if named and named[1] in makers:
        number = re.fullmatch(r"-?\d+(\.\d+)?", named[2] or "0")
        if named[1] == "swap" and named[2]:
            return images.swap(named[2])
        if number and named[1] != "swap" and (named[1] == "blur" or not number[1]):
            return makers[named[1]](named[2])
    raise ValueError(f"no null image is called {text!r}; choose {NULLS}.")


def asked(vlm: Any, image: Path | None, question: str | None, raw: bool, null: Callable) -> tuple[Any, list]:
    """The prompt to look at, and for bundled scenes some more questions."""
    if image is not None:
        return vlm.prompt(image, question, raw), []
    from mechvlm import demo
    from mechvlm.report import Case

    scenes = {scene.file.name: scene.image for scene in demo.scenes()}
    questions = demo.pope("adversarial")
    first = questions[DEMO_QUESTION]
    prompt = vlm.prompt(scenes[first.image], first.text if question is None else question, raw)
    if question is not None:
        return prompt, []
    some = [questions[6 * (1 + number) + number % 6] for number in range(CASES)]
    prompts = [(vlm.prompt(scenes[one.image], one.text), one.label) for one in some]
    return prompt, [Case(one, one.with_image(null), label) for one, label in prompts]
