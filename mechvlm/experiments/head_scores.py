"""What a head looks at, as numbers: masses on spans, the position before, and what followed a word the last time.

Rule this module guards: each number has beside it what even attention would give over the keys that the model lets the
same queries see, and neither needs a map of all queries by all keys.

>>> look = partial(looked, [real.last, real.question], [("image", real.image)], real.question)
>>> vlm.run(real, read={"text.3.pattern": mv.lazy(look)})["text.3.pattern"].shape
torch.Size([1, 9, 3])
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.attention import Piece
from mechvlm.batch import TEXT_LIKE
from mechvlm.experiments.sweep import numbers
from mechvlm.lazy_attention import Attention
from mechvlm.prompt import Prompt, locate
from mechvlm.readings import lazy
from mechvlm.rounds import Work, unsaid
from mechvlm.sites import Site
from mechvlm.vlm import VLM


def looked(
    rows: Sequence[Sequence[int]],
    spans: Sequence[tuple[str, Sequence[int]]],
    before: Sequence[int],
    attention: Attention,
) -> Float[Tensor, "batch heads number"]:
    """What groups of queries pay to spans, and what queries pay to the position before, each on average.

    The last of the heads is none: it is even attention.

    Args:
        rows: the groups; what each pays to each span comes in this order, spans running fastest.
        before: the queries of the last number.
    """
    found = []
    for one in (attention, attention.sight()):
        masses = [one.mass(dict(spans), queries).mean(2) for queries in rows]
        found.append(torch.cat([*masses, at_distance(one, 1, before)], -1).float())
    return torch.cat([found[0], found[1].expand(len(found[0]), -1, -1)], 1)


def repeated(distance: int, queries: Sequence[int], attention: Attention) -> Float[Tensor, "batch heads 1"]:
    """What queries pay to the position so far before them, on average; the last of the heads is even attention."""
    own, even = (at_distance(one, distance, queries).float() for one in (attention, attention.sight()))
    return torch.cat([own, even.expand(len(own), -1, -1)], 1)


def at_distance(attention: Attention, distance: int, queries: Sequence[int]) -> Float[Tensor, "batch head 1"]:
    """What queries pay to the position so far before each, averaged over them."""
    chosen = attention.asked(queries)

    def of(piece: Piece) -> Tensor:
        wanted = chosen[piece.rows] - distance - piece.keys.start
        width = piece.pattern.shape[-1]
        there = ((wanted >= 0) & (wanted < width)).to(piece.pattern.device)
        index = wanted.clamp(0, width - 1).to(piece.pattern.device)
        shape = (*piece.pattern.shape[:3], 1)
        return piece.pattern.gather(-1, index[:, None].expand(shape)) * there[:, None]

    return attention.collected(of, queries, 1).mean(2)


def scored(
    vlm: VLM,
    prompt: Prompt,
    spans: Sequence[tuple[str, Sequence[int]]],
    layers: Sequence[int],
    words: Sequence[int],
) -> Work[dict[str, Float[np.ndarray, "layer heads"]]]:
    """The scores of one prompt, by name; the last of the heads is even attention.

    Args:
        spans: named; what the last position pays to them, and what those of the question do on average.
        layers: whose words attend to each other.
        words: token ids that are written twice, one after the other, behind the prompt and, where the model takes a
            text alone, by themselves.
    """
    rows = {"last": [len(prompt) - 1], **({"question": prompt.question} if prompt.question else {})}
    before = [at for at in range(1, len(prompt)) if at not in set(prompt.image)]
    names = [[*(f"{span}->{row}" for row in rows for span, _ in spans), "previous"]]
    asked: list[tuple[Prompt, Any]] = [(prompt, partial(looked, list(rows.values()), list(spans), before))]
    for name, text in (("induction", behind(vlm, prompt, words)), ("induction in text", alone(vlm, prompt, words))):
        if text is not None:
            again = list(range(len(text) - len(words), len(text) - 1))
            names.append([name])
            asked.append((text, partial(repeated, len(words) - 1, again)))
    sites = [Site("pattern", layer) for layer in layers]
    runs = yield [{"prompt": one, "read": dict.fromkeys(sites, lazy(look)), "value": unsaid} for one, look in asked]
    found: dict[str, np.ndarray] = {}
    for own, run in zip(names, runs, strict=True):
        table = np.stack([numbers(run[site][0]) for site in sites])
        found |= {name: table[..., at] for at, name in enumerate(own)}
    return found


def behind(vlm: VLM, prompt: Prompt, words: Sequence[int]) -> Prompt:
    """A prompt with some words written twice behind it.

    Example:
        >>> len(behind(vlm, real, [7, 8])) - len(real)
        4
    """
    more, held = len(words) * 2, dict(prompt.encoding)
    for name in [name for name in held if name in TEXT_LIKE]:
        held[name] = torch.cat([held[name], *[held[name][:, -1:]] * more], 1)
    held["input_ids"][0, -more:] = torch.tensor([*words, *words])
    return _read_forward(vlm, held, more, prompt)


def alone(vlm: VLM, prompt: Prompt, words: Sequence[int]) -> Prompt | None:
    """Some words written twice and nothing else; None for a model with a Q-Former, which takes no text alone.

    Args:
        prompt: one of the model's, whose first word begins this one.

    Example:
        >>> len(alone(vlm, real, [7, 8]))
        5
    """
    if "qformer" in vlm.shape.layers:
        return None
    start = prompt.encoding["input_ids"][:, :1] if prompt.bos else torch.zeros(1, 0, dtype=torch.long)
    ids = torch.cat([start, torch.tensor([[*words, *words]])], 1)
    kinds = {name for name in prompt.encoding if name in TEXT_LIKE} - {"cross_attention_mask"}
    held = {name: torch.zeros_like(ids) for name in kinds} | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return _read_forward(vlm, held, ids.shape[1], None)


def _read_forward(vlm: VLM, held: dict[str, Tensor], more: int, prompt: Prompt | None) -> Prompt:
    """A prompt whose last words see nothing behind them, whatever the model lets the words of a prompt see."""
    if vlm.shape.ahead == "prompt":
        held["token_type_ids"][:, -more:] = 1
    return locate(held, vlm.shape, [] if prompt is None else prompt.grids)
