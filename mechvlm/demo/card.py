"""Measures the shipped model and writes the figures into its card: `python -m mechvlm.demo.card`.

The benchmark is answered one question at a time with the processor and the model as anyone loads them: the answer is
the likeliest of all words after the prompt. The same questions are then asked with every image replaced by one that
shows nothing, or something else, which is what tells looking from guessing.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from mechvlm import images
from mechvlm.demo import HERE, SPLITS, path, pope, scenes
from mechvlm.demo.build import PATCH
from mechvlm.demo.train import accuracy

BEGIN, END = "<!-- figures: python -m mechvlm.demo.card -->", "<!-- end of figures -->"
PROMPT = "USER: <image>\n{} ASSISTANT:"
ASKED_FOR = ("digit", "colour", "digit in a colour")
SCENE = "nothing: the scene itself"
Null = Callable[[int, list[Image.Image]], Image.Image]


NULLS: dict[str, Null] = {
    SCENE: lambda number, pictures: pictures[number],
    "black": lambda number, pictures: images.black(pictures[number]),
    "grey 128": lambda number, pictures: images.grey(pictures[number]),
    "white": lambda number, pictures: images.white(pictures[number]),
    "its mean colour": lambda number, pictures: images.mean(pictures[number]),
    "noise": lambda number, pictures: images.noise(seed=number)(pictures[number]),
    "blur of 12 pixels": lambda number, pictures: images.blur(PATCH)(pictures[number]),
    "its shuffled squares of 12": lambda number, pictures: images.shuffle(seed=number, grid=(6, 6))(pictures[number]),
    "another scene": lambda number, pictures: images.swap(pictures[(number + 1) % len(pictures)])(pictures[number]),
}


@torch.no_grad()
def answer(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: Sequence[tuple[Image.Image, str]]
) -> list[tuple[str, str]]:
    """The likeliest word after each question about its image, and the likelier one of yes and no."""
    pair = processor.tokenizer.convert_tokens_to_ids(["no", "yes"])
    said: list[tuple[str, str]] = []
    for begin in range(0, len(asked), 60):
        shown = [picture for picture, _ in asked[begin : begin + 60]]
        prompts = [PROMPT.format(text) for _, text in asked[begin : begin + 60]]
        encoded = processor(text=prompts, images=shown, padding=True, return_tensors="pt")
        logits = model(**encoded, logits_to_keep=1).logits[:, -1]
        free = processor.tokenizer.convert_ids_to_tokens(logits.argmax(-1))
        said += zip(free, (("no", "yes")[choice] for choice in logits[:, pair].argmax(-1)), strict=True)
    return said


def _kind(text: str) -> str:
    words = text.split()
    return "colour" if "anything" in words else "digit" if words[3].isdigit() else "digit in a colour"


def _row(name: str, values: Sequence[float]) -> str:
    return f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", f"|:--{'|--:' * (len(head) - 1)}|", *rows])


def benchmark(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> tuple[list[str], list[str]]:  # rows of two tables
    """The benchmark's figures for each null image, and for the scenes themselves by what is asked for."""
    pictures = [picture.image for picture in scenes()]
    numbers = {picture.file.name: number for number, picture in enumerate(scenes())}
    asked = {split: [(numbers[line.image], line.text) for line in pope(split)] for split in SPLITS}
    labels = {split: [line.label for line in pope(split)] for split in SPLITS}
    distinct = sorted({question for split in SPLITS for question in asked[split]})
    rows, by_kind = [], defaultdict(list)
    for name, null in tqdm(NULLS.items()):
        shown = [null(number, pictures) for number in range(len(pictures))]
        said = dict(zip(distinct, answer(model, processor, [(shown[n], text) for n, text in distinct]), strict=True))
        shares = []
        for split in SPLITS:
            free, forced = zip(*(said[question] for question in asked[split]), strict=True)
            right = [one == other for one, other in zip(free, labels[split], strict=True)]
            shares += [float(np.mean(right)), free.count("yes") / len(free)]
            shares += [float(np.mean([one == other for one, other in zip(forced, labels[split], strict=True)]))]
            for (_, text), hit in zip(asked[split], right, strict=True):
                by_kind[name, split, _kind(text)].append(hit)
        rows.append(_row(name, shares))
    kinds = [_row(kind, [float(np.mean(by_kind[SCENE, split, kind])) for split in SPLITS]) for kind in ASKED_FOR]
    return rows, kinds


def measure(directory: Path) -> str:
    """The tables of the card, for the model in a directory."""
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    rows, kinds = benchmark(model, AutoProcessor.from_pretrained(directory))
    fresh = accuracy(model, 1000, "benchmark")
    parts = [
        "Benchmark questions answered right, answered with yes, and answered right if only yes and no may be said\n"
        "(`y/n`), in %, when the image is replaced by:",
        _table(["image", *(f"{split}: {what}" for split in SPLITS for what in ("right", "yes", "y/n"))], rows),
        "Benchmark questions answered right, in %, by what is asked for (300 questions each):",
        _table(["asked for", *SPLITS], kinds),
        "Answered right, in %, on 1,000 further scenes of the benchmark's handwriting, by kind of question.\n"
        "`see` is the digit or colour whose word an image token on a digit resembles most; `caption` counts words:",
        _table(["kind", "right"], [_row(f"`{kind}`", [share]) for kind, share in fresh.items()]),
    ]
    return "\n\n".join(parts)


def main(
    model: Annotated[Path | None, typer.Option(help="Model directory; by default the one that ships.")] = None,
    write: Annotated[bool, typer.Option(help="Write the figures into the card.")] = True,
) -> None:
    """Measures the model and writes the figures into README.md beside this file."""
    figures = measure(model or path())
    typer.echo(figures)
    if write:
        card = HERE / "README.md"
        text = card.read_text()
        before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        card.write_text(f"{before}\n{figures}\n{after}")


if __name__ == "__main__":
    typer.run(main)
