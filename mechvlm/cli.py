"""The command line: `mechvlm report` looks at a question about a picture, `mechvlm check` at a model.

Rule this module guards: what the package refuses is one sentence on standard error and exit code 2, no traceback.
The sentences are the package's own; nothing else is caught.

    mechvlm report
    mechvlm report --model llava-hf/llava-1.5-7b-hf --image dog.jpg --question "Is there a dog?" --device cuda
    mechvlm check llava-hf/llava-1.5-7b-hf
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

DEMO_QUESTION = 0
CASES = 6
NULLS = "black, grey, white, mean, noise(seed), diffusion(t), blur(sigma), shuffle(seed) or swap(file)"
DTYPES = ("auto", "float32", "bfloat16", "float16")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


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
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: cuda where there is one]")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = None,
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
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: cuda where there is one]")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = None,
) -> None:
    """Run the laws that every reading and edit rests on, on a model; exit code 1 if one does not hold."""
    with one_sentence():
        table = loaded(model, device, dtype).check()
    if (table.verdict != "holds").any():
        raise typer.Exit(1)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn the errors that a user's words can cause into their sentence, and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        refuse(" ".join(str(error).split()))


def refuse(sentence: str) -> NoReturn:
    """Say what is wrong on standard error, and leave."""
    typer.echo(f"mechvlm: {sentence}", err=True)
    raise typer.Exit(2)


def loaded(model: str, device: str | None, dtype: str | None) -> Any:
    """The model, loaded without transformers' own remarks.

    Raises:
        ValueError: for a model, device or type that is not there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"no dtype is called {dtype!r}; choose from {', '.join(DTYPES)}.")
    import torch  # seconds to import, as the rest

    check_device(device, torch.cuda.device_count(), torch.backends.mps.is_available())
    from huggingface_hub import logging as hub_logging
    from transformers import logging

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if model == "demo" or Path(model).is_dir():
        logging.disable_progress_bar()
    from mechvlm.load import load

    return load(model, device=device, dtype=dtype)


def check_device(device: str | None, count: int, mps: bool = False) -> None:
    """Refuse a device that is not there.

    Args:
        count: how many CUDA devices there are.
        mps: whether there is Apple's.
    """
    if device == "mps" and not mps:
        raise ValueError("device 'mps' was asked for, and this machine has no MPS; write --device cpu.")
    if device is None or device in ("cpu", "mps"):
        return
    named = re.fullmatch(r"cuda(?::(\d+))?", device)
    if not named:
        raise ValueError(f"no device is called {device!r}; write cpu, cuda or cuda:1.")
    if not count:
        raise ValueError(f"device {device!r} was asked for, and this machine has no CUDA; write --device cpu.")
    if int(named[1] or 0) >= count:
        raise ValueError(f"device {device!r} was asked for, and this machine has {count} CUDA devices, counted from 0.")


def writable(out: Path) -> Path:
    """The folder to write into, made where there is none.

    Raises:
        ValueError: where it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        trial = out / ".mechvlm"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(
            f"the folder '{out}' cannot be written ({error.strerror}); choose another with --out."
        ) from None
    return out


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
