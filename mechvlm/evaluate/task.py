"""What is evaluated: a model, questions about pictures, edits, a template, and how answers are read.

>>> text_of("vcd")
'{question} Please answer this question with one word.'
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mechvlm.edits import Edit
from mechvlm.evaluate.files import Item
from mechvlm.evaluate.finished import Answer
from mechvlm.evaluate.parsers import Parser, Scoring
from mechvlm.evaluate.pictures import picture_of
from mechvlm.plan import check_edit, listed_edits
from mechvlm.prompt import Prompt
from mechvlm.shared import shared_logits
from mechvlm.sites import told, whole
from mechvlm.vlm import VLM

TEMPLATES = {
    "plain": "{question}",
    "viar": "{question}\nAnswer with yes or no.",
    "vcd": "{question} Please answer this question with one word.",
    "lmms-eval": "{question}\nAnswer the question using a single word or phrase.",
    "viar-2026": "USER: <image>\n{question}\nAnswer with yes or no.\nASSISTANT:",
}
"""What published evaluations ask, by name; the last is VIAR's whole prompt for LLaVA, verbatim."""

EditsOf = Callable[[Prompt], Sequence[Edit]]


@dataclass(frozen=True)
class Task:
    """What is to be evaluated, and how."""

    vlm: VLM
    items: list[Item]
    images: Any
    edits: EditsOf
    alike: bool  # whether every prompt gets the same edits
    template: str
    scoring: Scoring
    parser: Parser | None
    size: int | None
    longest: int

    def prompt(self, item: Item, picture: Any = None) -> Prompt:
        """The question of an item, in its template and about its picture."""
        own = self.vlm.arch.row.mark
        marks = {"<image>", self.vlm.processor.image_token if own is None else own} - {""}
        about = picture_of(item, self.images) if picture is None else picture
        raw = any(mark in self.template for mark in marks)
        return self.vlm.prompt(about, self.template.replace("{question}", item.question), raw)

    def answers(self, items: Sequence[Item]) -> tuple[list[Answer], str]:
        """What the model says to questions about one picture, and how they were run."""
        picture = picture_of(items[0], self.images)
        prompts = [self.prompt(item, picture) for item in items]
        shared = shared_logits(self.vlm, prompts, self.first_edits)
        margins, either = self.scoring(shared.logits.float().cpu())
        texts = [""] * len(prompts) if self.parser is None else list(self.generated(prompts))
        return list(zip(margins.tolist(), either.tolist(), texts, strict=True)), shared.engine

    def planned(self, prompt: Prompt) -> list[Edit]:
        """The edits at a prompt, which are refused here and not by a run where they cannot be."""
        edits = self.edits_at(prompt)
        self.vlm.plan([prompt], edits=edits, steps=1 if self.parser is None else self.longest)
        return edits

    def edits_at(self, prompt: Prompt) -> list[Edit]:
        """The edits at a prompt, as a list, whatever the function returned."""
        return listed_edits("edits", self.edits(prompt))

    def first_edits(self, prompt: Prompt) -> list[Edit]:
        """The edits that act before the first token; where words are generated, others come after it."""
        edits = self.edits_at(prompt)
        return edits if self.parser is None else [edit for edit in edits if check_edit(edit).when != "decode"]

    def generated(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        """What the model answers in words, greedily."""
        size = len(prompts) if self.alike else 1
        for start in range(0, len(prompts), size):
            some = list(prompts[start : start + size])
            said = self.vlm.generate(some, self.edits_at(some[0]), self.longest, do_sample=False, num_beams=1)
            yield from said.text or ()


def text_of(template: str) -> str:
    """A template by its name, or as it was given.

    Raises:
        TypeError: for what is no text.
        ValueError: for one without a place for the question.
    """
    if not isinstance(template, str):
        raise TypeError(f"template={told(template)} is no text; give one with {{question}} in it, or a name.")
    text = TEMPLATES.get(template, template)
    if "{question}" not in text:
        raise ValueError(
            f"the template {template!r} has no {{question}}; write it where the question is to stand, or choose from "
            f"{', '.join(TEMPLATES)}."
        )
    return text


def at_least_one(name: str, number: Any) -> int | None:
    """A number of things that run together or are made, from 1; None as it is.

    Raises:
        TypeError, ValueError: for what is no such number.
    """
    if isinstance(number, bool):
        raise TypeError(f"{name}={number} is not a number; give 1 or more.")
    size = None if number is None else whole(name, number)
    if size is not None and size < 1:
        raise ValueError(f"{name}={size} makes nothing; give 1 or more.")
    return size
