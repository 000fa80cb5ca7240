"""Asks a model the questions of POPE, with edits or without, and keeps what it says to each.

Rule this module guards: every item's answer is that of its own forward pass. What is asked twice runs once, questions
about one picture run together, and neither changes a number.

>>> found = pope(vlm, read_pope("demo", "adversarial")[:12])
>>> int(found.correct.sum())
12
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from mechvlm.edits import Edit, name_of
from mechvlm.evaluate.edit_texts import EditTexts, no_texts
from mechvlm.evaluate.files import Item, read_pope
from mechvlm.evaluate.finished import Answer, Finished
from mechvlm.evaluate.lines import is_paths, paths_of
from mechvlm.evaluate.parsers import Parser, chances, parser_of, scoring_of
from mechvlm.evaluate.pictures import looked_at
from mechvlm.evaluate.task import EditsOf, Task, at_least_one, text_of
from mechvlm.experiments.record import record
from mechvlm.fingerprints import fingerprint, weights_print
from mechvlm.plan import listed_edits
from mechvlm.sites import told
from mechvlm.units import check_shared, progress, taken
from mechvlm.vlm import VLM

IDLE = (
    *("do_sample", "num_beams", "max_new_tokens", "max_length", "transformers_version", "_from_model_config"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "pad_token_id", "bos_token_id"),
)
"""Settings of generation that change no greedy answer to one prompt, or that `Task.generated` overrules."""


def pope(
    vlm: VLM,
    questions: Any,
    images: Any = None,
    edits: Sequence[Edit] | EditsOf = (),
    split: str | Sequence[str] | None = None,
    template: str = "{question}",
    joined: str = "logsumexp",
    parser: str | Parser | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    tokens: Any = None,
    max_new_tokens: int = 16,
) -> xr.Dataset:
    """Ask a model questions of yes or no about pictures, and keep what it says to each.

    Questions about one picture run together, and a question that is asked twice runs once; every answer is that of its
    own forward pass all the same. The files, and all pictures, are looked through before the model runs.

    Args:
        questions: what `read_pope` takes: POPE's files, rows as in `lmms-lab/POPE`, or "demo".
        images: the pictures: a folder, a mapping from names to pictures, or a function from a name to one. None where
            they come with the questions.
        edits: what to change in every run: a list, or a function from a prompt to a list, since positions differ.
        split: one split, or some; None takes all that are there.
        template: a name in `TEMPLATES`, or a text with {question} in it, which goes into the model's chat template;
            one with <image> in it is the whole prompt, verbatim. It moves the share of yes by as much as most methods.
        joined: how a word's spellings are joined: "logsumexp" adds their probabilities, "max" takes the likeliest.
        parser: None predicts by the first token's logits: yes where they favour it, strictly. Otherwise the model
            answers in words, greedily, and a rule says what they mean: a name in `PARSERS`, or a function of the answer
            and the label that returns "yes", "no" or "other".
        batch_size: at most so many questions together; by default all about a picture.
        out: a folder, in which the answers about each finished picture are kept; the same evaluation, started again,
            goes on from there. Another one is refused.
        tokens: which tokens mean yes and no; None for all single-token spellings. See `scoring_of`.
        max_new_tokens: of a generated answer.

    Returns:
        Over items, beside what the questions say and `duplicate_of`: `margin`, log P(yes) - log P(no) of the first
        token, in nats; `p_yes`, P(yes) / (P(yes) + P(no)), and `p_either`, P(yes) + P(no), from 0 to 1; `predicted`;
        `correct`; and with a parser `answer`, the words. `attrs` are the record: all that is needed to do it again.

    Raises:
        ValueError: for what is wrong with a file's line or a picture, before the model runs; an unknown name; a
            template without a question; edits that never act; or a folder that holds another evaluation.
        TypeError: for arguments that cannot be.

    Example:
        >>> biased = lambda prompt: [mv.bias_attention(layer, prompt.image, 2.0) for layer in range(2, 5)]
        >>> found = mv.evaluate.pope(vlm, mv.evaluate.read_pope("demo", "random")[:12], edits=biased)
        >>> found.p_yes.sizes
        Frozen({'item': 12})

    Source:
        Li et al. (2023), "Evaluating Object Hallucination in Large Vision-Language Models" (POPE).
    """
    if vlm.processor is None:
        raise ValueError("this model was given no processor, so no question can be put to it; give mv.VLM one.")
    items = read_pope(questions, split)
    same = [] if callable(edits) else listed_edits("edits", no_texts(edits))
    task = Task(
        vlm,
        items,
        images,
        edits if callable(edits) else lambda prompt: same,  # noqa: ARG005
        not callable(edits),
        text_of(template),
        scoring_of(vlm, joined, tokens),
        parser_of(parser),
        at_least_one("batch_size", batch_size),
        at_least_one("max_new_tokens", max_new_tokens) or 0,
    )
    hashes = looked_at(items, images)
    about: dict[str, Any] = {
        **record_of(task, hashes),
        "questions": sources(questions),
        "split": ", ".join(dict.fromkeys(item.split for item in items)),
        "edits_given": edits_text(edits),
        "parser": parser if isinstance(parser, str) else "none" if parser is None else name_of(parser),
    }
    kept = None if out is None else Finished(out, task_print(task, about, edits if callable(edits) else same))
    answers, run = answered(task, kept)
    return dataset(task, answers, {**about, **run})


def answered(task: Task, kept: Finished | None) -> tuple[dict[int, Answer], dict[str, Any]]:
    """Every item's answer by its number: what is finished, here or elsewhere, and what runs now; and how it was run."""
    units = units_of(task)
    check_shared(kept, len(units))
    found = {} if kept is None else kept.answers()
    engines, computed = Counter[str]() if kept is None else kept.engines, 0

    def left() -> list[int]:
        bar.update(len(found if kept is None else kept.answers()) - bar.n)
        return [at for at, items in enumerate(units) if any(item.number not in found for item in items)]

    with progress(sum(map(len, units)), "question", len(found), "pope") as bar:
        for number in taken(kept, len(units), left):
            some = [item for item in units[number] if item.number not in found]
            answers, engine = task.answers(some)
            new = dict(zip([item.number for item in some], answers, strict=True))
            computed += len(new)
            if kept is None:
                engines[engine] += 1
                found |= new
                bar.update(len(new))
            else:
                kept.add(new, engine)
    said = {"answers_computed": computed, "answers_kept": len(found) - computed}
    return found, {"engine": engines_text(engines), **said}


def units_of(task: Task) -> list[list[Item]]:
    """What runs together: the questions about one picture that are not asked twice, or so many of them."""
    about: dict[str, list[Item]] = {}
    for item in task.items:
        if item.duplicate_of == item.number:
            about.setdefault(item.image, []).append(item)
    sizes = [(items, task.size or len(items)) for items in about.values()]
    return [items[start : start + size] for items, size in sizes for start in range(0, len(items), size)]


def engines_text(engines: Mapping[str, int]) -> str:
    """How batches were run, the most frequent ways first."""
    said = [f"{times} x {engine}" for engine, times in sorted(engines.items(), key=lambda pair: (-pair[1], pair[0]))]
    return "; ".join(said[:5]) + (f"; {len(said) - 5} more ways" if len(said) > 5 else "") or "kept from before"


def dataset(task: Task, answers: Mapping[int, Answer], about: Mapping[str, Any]) -> xr.Dataset:
    """The evaluation: what was asked, what was said, and whether it is right."""
    items = task.items
    margins, either, texts = zip(*(answers[item.duplicate_of] for item in items), strict=True)
    if task.parser is None:
        predicted = ["yes" if margin > 0 else "no" for margin in margins]
    else:
        predicted = [said(task.parser, text, item.label) for text, item in zip(texts, items, strict=True)]
    columns = {
        "p_yes": chances(torch.tensor(margins, dtype=torch.float64)).numpy(),
        "margin": np.array(margins),
        "p_either": np.array(either),
        "predicted": np.array(predicted),
        "correct": np.array([right == item.label for right, item in zip(predicted, items, strict=True)]),
        **({} if task.parser is None else {"answer": np.array(texts)}),
    }
    ids = [item.question_id for item in items]
    coords = {
        "item": [item.number for item in items],
        "question_id": ids if all(isinstance(one, int) for one in ids) else list(map(str, ids)),
        **{name: [vars(item)[name] for item in items] for name in ("image", "question", "label", "split")},
        "duplicate_of": [item.duplicate_of for item in items],
    }
    along = {name: ("item", np.array(values)) for name, values in coords.items()}
    return xr.Dataset({name: ("item", values) for name, values in columns.items()}, along, dict(about))


def said(parser: Parser, answer: str, label: str) -> str:
    """What a rule makes of an answer.

    Raises:
        ValueError: for a rule that returns another word.
    """
    found = parser(answer, label)
    if found not in ("yes", "no", "other"):
        raise ValueError(f"the parser returned {told(found)} for {answer!r}; it must return 'yes', 'no' or 'other'.")
    return found


def record_of(task: Task, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a result has to say to be done again: METHODS of mechvlm call it the evaluation record."""
    vlm, prompt = task.vlm, task.prompt(task.items[0])
    return {
        **record(vlm, [prompt], value="P(yes) / (P(yes) + P(no)) of the first token of the answer"),
        "edits": "; ".join(map(str, [*vlm.edits, *task.planned(prompt)])) or "none",
        "template": task.template,
        "scoring": str(task.scoring),
        "tokens_yes": " ".join(map(vlm.word, task.scoring.yes)),
        "tokens_no": " ".join(map(vlm.word, task.scoring.no)),
        "decoding": "none: the first token's logits" if task.parser is None else greedy(task),
        "seed": "none: nothing is drawn",
        "preprocessing": json.dumps(vlm.processor.image_processor.to_dict(), sort_keys=True, default=str),
        "questions_sha256": content_of(task.items),
        "pictures_sha256": sha256(hashes),
    }


def greedy(task: Task) -> str:
    """How words are generated: with the likeliest token each time, of what the checkpoint's own settings leave."""
    config = task.vlm.hf.generation_config
    own = {} if config is None else config.to_diff_dict()
    acting = {name: value for name, value in own.items() if name not in IDLE and value is not None}
    told_own = "; ".join(f"{name} {json.dumps(value, default=str)}" for name, value in sorted(acting.items()))
    settings = f"; the checkpoint's own settings: {told_own}" if acting else ""
    return f"greedy, at most {task.longest} new tokens{settings}"


def content_of(items: Sequence[Item]) -> str:
    """A hash of what questions say, whatever file they stand in."""
    return sha256([[item.question_id, item.image, item.question, item.label, item.split] for item in items])


def sha256(thing: Any) -> str:
    """A hash of lists, mappings, texts and numbers."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()


def sources(questions: Any) -> str:
    """What was read, in a line: the names and hashes of files, or what else it was."""
    if questions == "demo" or not is_paths(questions):
        return "demo" if isinstance(questions, str) else f"a {type(questions).__name__}"
    files = [f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths_of(questions)]
    return "; ".join(files)


def edits_text(edits: Any) -> str:
    """How the edits were given: by a text, by a function's name, or as a list."""
    if isinstance(edits, EditTexts):
        return str(edits)
    return f"the function {name_of(edits)}" if callable(edits) else "a list" if edits else "none"


def task_print(task: Task, about: Mapping[str, Any], given: Any) -> str:
    """What an evaluation is: the model, the questions and pictures, the edits, and how it is scored."""
    same = {name: value for name, value in about.items() if name not in ("device", "questions", "edits_given")}
    return fingerprint(same, weights_print(task.vlm), list(task.vlm.edits), given, task.scoring, task.parser)
