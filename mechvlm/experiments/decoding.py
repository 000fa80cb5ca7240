"""What does the model write when a way of information is cut? Whole answers under knockout, and their likelihood.

>>> found = knockout_answers(vlm, real, edges=["image->last"], layers=[(0, 7)], max_new_tokens=2)
>>> found.text.dims
('edge', 'layer')
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from mechvlm.attention_edits import changing, cut_attention
from mechvlm.biases import Bias
from mechvlm.edits import WHENS, Edit
from mechvlm.experiments.edges import Edge, Edges, Window, check_among_words, edges_of, windows_of
from mechvlm.experiments.objects import object_tokens
from mechvlm.experiments.record import one_prompt, record
from mechvlm.experiments.sight import own_layers
from mechvlm.experiments.sweep import numbers, runs_of
from mechvlm.laws.runs import longer
from mechvlm.prompt import Prompt, locate
from mechvlm.run import Generation
from mechvlm.sites import Site
from mechvlm.vlm import VLM

CUT = {
    "always": "in the pass over the prompt, and for each generated token as it looks back at the same keys",
    "decode": "for each generated token as it looks back at the keys; the pass over the prompt, which says the first "
    "token, is as it was",
    "prompt": "in the pass over the prompt alone; generated tokens see all keys, as the cut pass left them",
}
"""What is cut, by `when`, for edges to the last position; others are cut in the pass over the prompt alone."""


def knockout_answers(
    vlm: VLM,
    prompt: Prompt,
    edges: Edges = None,
    objects: Any = None,
    window: int = 9,
    layers: Sequence[Any] | None = None,
    when: str = "always",
    max_new_tokens: int = 20,
    batch_size: int | None = None,
) -> xr.Dataset:
    """The greedy answer under each knockout, and how likely the uncut answer still is.

    A generated token stands where the last position stood, one further with each step: it answers. So an edge to the
    last position is also cut from every generated token, unless `when` says "prompt". Other edges end at positions of
    the prompt, whose keys and values later steps take from the cache as the cut pass left them. Keys are always
    positions of the prompt; generated tokens see each other.

    Args:
        edges, window, layers: as in `information_flow`; edges by default those from the image, the question and bos to
            the last position, and image->question unless `when` is "decode".
        objects: image tokens: a list of positions, a box as a tuple (in pixels: left, top, right, bottom), or a mask.
        when: "always"; "decode", generated tokens alone, so that the first token is the uncut one's; or "prompt".
        max_new_tokens: at most so many, in the uncut answer and in the others.
        batch_size: knockouts in one forward pass over prompt and uncut answer; see `sweep`.

    Returns:
        Over axes edge and layer: `text`; `same`, whether its tokens are the uncut answer's; `first_difference`, the
        first step with another token, counted from 0, or -1; `log_probability`, in nats, of the uncut answer under the
        knockout, by one pass over the prompt and that answer. Over step as well: `token_log_probability`, its parts.
        Over step: `token`, the uncut answer, the token that ends a text included, and `clean`, its log-probabilities.

    Raises:
        ValueError: for an edge whose queries are not generated where only generated tokens are cut, an uncut answer
            without a second token there, and as in `information_flow`.

    Example:
        >>> found = mv.knockout_answers(vlm, real, ["image->last"], layers=[(0, 3)], when="decode", max_new_tokens=3)
        >>> found.same.mean("edge")

    Source:
        Geva et al. (2023), section 5, for knockouts; their figures, as those of Zhang et al. (2025), are of the first
        token. Cuts in later steps are added here.
    """
    if when not in WHENS:
        raise ValueError(f"when={when!r} is not known; choose from {', '.join(map(repr, WHENS))}.")
    own = [] if objects is None else object_tokens(prompt, objects)
    ways = edges_of(one_prompt(prompt), edges or _default(prompt, own, when), own)
    check_among_words(vlm, prompt, ways)
    last, windows = len(prompt) - 1, windows_of(vlm, window, layers)
    idle = [name for name, (queries, _) in ways.items() if when == "decode" and last not in queries]
    if idle:
        raise ValueError(
            f"when='decode' cuts generated tokens alone, and {idle[0]!r} does not end at the last position, whose "
            "place they take; leave it out, or say when='always'."
        )
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
    clean = vlm.generate(prompt, **settings)
    if when == "decode" and clean.tokens.shape[1] < 2:
        raise ValueError(
            "the uncut answer is one token, so no generated token looks back at anything; say when='always', or allow "
            "more with max_new_tokens."
        )
    points = [Cut(vlm, edge, at, when, last) for edge in ways.values() for at in windows]
    bar = tqdm(points, unit="answer", leave=False, delay=1)
    made = [vlm.generate(prompt, point.in_steps(), **settings) for point in bar]
    likely = _likely(vlm, prompt, clean.tokens, points, batch_size)
    found = _dataset(vlm, clean.tokens[0], ways, windows, made, likely)
    return found.assign_attrs(record(vlm, [prompt], clean_text=_said(clean), when=when, cut=CUT[when]))


@dataclass(frozen=True)
class Cut:
    """One edge, cut in one window of layers."""

    vlm: VLM
    edge: Edge
    window: Window
    when: str
    last: int

    @property
    def layers(self) -> list[int]:
        """The layers of the window whose words attend to each other."""
        return [layer for layer in own_layers(self.vlm) if self.window.first <= layer <= self.window.last]

    def in_steps(self) -> list[Edit]:
        """The edits for a generation, step by step."""
        queries, keys = self.edge
        if self.when == "decode":
            return [cut_attention(layer, keys, when="decode") for layer in self.layers]
        if self.when == "prompt" or self.last not in queries:
            return [cut_attention(layer, keys, queries, when="prompt") for layer in self.layers]
        # -1 is the newest position of each pass: the prompt's last one first, then each generated one.
        change = Bias(tuple(keys), float("-inf"), (-1, *queries))
        return [changing(change, "cut attention", layer, "text", "auto", "always") for layer in self.layers]

    def at_once(self, generated: int) -> list[Edit]:
        """The edits for a pass over the prompt and so many generated tokens behind it."""
        queries, keys = self.edge
        answering = self.when != "prompt" and self.last in queries
        behind = range(self.last + 1, self.last + 1 + generated) if answering else ()
        looking = [*(() if self.when == "decode" else queries), *behind]
        return [cut_attention(layer, keys, looking) for layer in self.layers]


def first_difference(tokens: Tensor, others: Tensor) -> int:
    """The first place where two texts differ, or one of them ends; -1 where they are the same.

    Example:
        >>> first_difference(torch.tensor([1, 2, 3]), torch.tensor([1, 2]))
        2
    """
    shared = min(len(tokens), len(others))
    unlike = (tokens[:shared] != others[:shared]).nonzero()[:, 0].tolist()
    return unlike[0] if unlike else -1 if len(tokens) == len(others) else shared


def _default(prompt: Prompt, objects: Sequence[int], when: str) -> list[str]:
    """The edges that are cut where none are given."""
    wanted = ["image->last", "question->last", "bos->last", *(["object->last", "rest->last"] if objects else [])]
    there = {*prompt.spans, "object", "rest"}
    wanted = ["image->question", *wanted] if when != "decode" else wanted
    return [name for name in wanted if set(name.split("->")) <= there]


def _said(made: Generation) -> str:
    """A generated text; the ids of its tokens where there is no processor."""
    return " ".join(map(str, made.tokens[0].tolist())) if made.text is None else str(made.text)


def _likely(vlm: VLM, prompt: Prompt, tokens: Tensor, points: Sequence[Cut], batch_size: int | None) -> np.ndarray:
    """The log-probability of each token of an answer, without a cut and under each: `cut step`."""
    ids = torch.cat([prompt.encoding["input_ids"], tokens[:, :-1].cpu()], 1)
    whole, count = locate(longer(vlm, prompt, ids), vlm.shape, prompt.grids), tokens.shape[1]
    start, last = len(prompt) - 1, Site("resid_post", vlm.shape.layers["text"] - 1)

    def said(h: Tensor) -> Tensor:  # batch pos d_model
        rows = vlm.unembed(h[:, start : start + count])  # of the answer alone, and not of all positions
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(-1)
        return rows.gather(-1, tokens.to(rows.device)[:, :, None].expand(len(rows), -1, 1))[..., 0]

    variants = [[], *(point.at_once(count - 1) for point in points)]
    runs = runs_of(vlm, whole, variants, {last: said}, batch_size)
    return numbers(torch.cat([run[last] for run in runs]))


def _dataset(
    vlm: VLM,
    clean: Tensor,
    ways: Mapping[str, Edge],
    windows: Sequence[Window],
    made: Sequence[Generation],
    likely: np.ndarray,
) -> xr.Dataset:
    """Texts and log-probabilities over edge and layer."""
    sizes, axes, nats = (len(ways), len(windows)), ["edge", "layer"], {"units": "nats"}
    differs = np.array([first_difference(one.tokens[0], clean) for one in made]).reshape(sizes)
    return xr.Dataset(
        {
            "text": (axes, np.array([_said(one) for one in made]).reshape(sizes)),
            "same": (axes, differs < 0),
            "first_difference": (axes, differs),
            "log_probability": (axes, likely[1:].sum(1).reshape(sizes), nats),
            "token_log_probability": ([*axes, "step"], likely[1:].reshape(*sizes, -1), nats),
            "clean": (["step"], likely[0], nats),
            "token": (["step"], [vlm.word(int(token)) for token in clean]),
        },
        coords={
            "edge": list(ways),
            "layer": [at.name for at in windows],
            "first": ("layer", [at.first for at in windows]),
            "last": ("layer", [at.last for at in windows]),
            "step": np.arange(likely.shape[1]),
        },
    )
