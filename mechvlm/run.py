"""What one forward pass, or one generation, showed.

>>> run = vlm.run(real, read=["text.3.pattern"])
>>> run["text.3.pattern"].shape, run.logits.shape
(torch.Size([1, 8, 49, 49]), torch.Size([1, 53]))
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.layout import Group, Layout
from mechvlm.lazy_attention import Attention
from mechvlm.plan import key_of
from mechvlm.shipping import SENT
from mechvlm.sites import Site, as_site

NO_GRADIENT = "has no gradient in this run; pass read=[..., {site}] and grad_of= a metric"

Kept = list[tuple[Group, Any]]
"""A reading, for each group of rows that have the same padding."""


@dataclass(frozen=True, repr=False)
class Readings(Mapping):
    """What was kept of each site that was read; indexed by a `Site` or its name."""

    kept: dict[tuple, Kept]
    layout: Layout
    what: str = "was not read in this run; pass read=[..., {site}]"

    def __getitem__(self, site: Site | str) -> Any:
        where = as_site(site)
        if key_of(where) not in self.kept:
            raise ValueError(f"{where} {self.what.format(site=repr(str(where)))}.")
        return joined(where, self.kept[key_of(where)], self.layout)

    def __contains__(self, site: object) -> bool:
        return isinstance(site, Site | str) and key_of(as_site(site)) in self.kept

    def __iter__(self) -> Any:
        return (Site(*key) for key in self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __repr__(self) -> str:
        return f"Readings({', '.join(str(site) for site in self) or 'none'})"

    def row(self, row: int) -> "Readings":
        """The readings of one row of the batch, as if it had run alone."""
        kept: dict[tuple, Kept] = {
            key: [((None, 0, None), of_row(key, groups, row, self.layout))] for key, groups in self.kept.items()
        }
        return Readings(kept, self.layout.of_row(row), self.what)


def by_step(saved: Mapping[tuple, list[Kept]], layout: Layout) -> list[Readings]:
    """What was kept in each step of a generation; a site that only the pass over the prompt has is in the first one."""
    return [
        Readings({site: steps[step] for site, steps in saved.items() if step < len(steps)}, layout)
        for step in range(max(map(len, saved.values()), default=0))
    ]


def joined(site: Site, groups: Kept, layout: Layout) -> Any:
    """The readings of all rows as one tensor, in the order of the rows.

    Raises:
        ValueError: where rows differ in length, so that no tensor holds them all.
    """
    if len(groups) == 1 and groups[0][0] == (None, 0, None):
        return groups[0][1]
    rows = [of_row(key_of(site), groups, row, layout) for row in range(len(layout.pads))]
    if all(isinstance(row, tuple) for row in rows):
        return tuple(alike(site, parts) for parts in zip(*rows, strict=True))
    return alike(site, rows)


def alike(site: Site, rows: Sequence[Any]) -> Tensor:
    """Rows of one shape as one tensor.

    Raises:
        ValueError: where their shapes differ, so that no tensor holds them all.
    """
    if all(isinstance(row, Tensor) and row.shape[1:] == rows[0].shape[1:] for row in rows):
        return torch.cat(list(rows))
    raise ValueError(
        f"the prompts differ in length, so {site} is not one tensor; take each row alone, run.rows[0][site], or read "
        "it with a function whose result has one shape."
    )


def of_row(key: tuple, groups: Kept, row: int, layout: Layout) -> Any:
    """One row's part of a reading, with a batch axis of one."""
    for group, value in groups:
        if isinstance(value, tuple) and value and all(isinstance(one, Tensor) for one in value):
            return tuple(
                of_row(key, [(at, held[part]) for at, held in groups], row, layout) for part in range(len(value))
            )
        if not isinstance(value, Tensor | Attention):
            if len(layout.pads) == 1:
                return value
            raise ValueError(f"the reading of {Site(*key)} is no tensor, so it cannot be split into rows.")
        if key[2] != "text" and layout.shared > 1:
            return value
        rows = layout.rows_of(key, group)
        if row not in rows:
            continue
        lengths, sequence = layout.extent(key) if layout.by_images(key) else ((1,) * len(layout.pads), False)
        if sequence:
            return value  # a stretch of one sequence is one row's
        counts = [lengths[one] for one in rows]
        if isinstance(value, Attention):
            return value.of_rows(slice(sum(counts[: rows.index(row)]), sum(counts[: rows.index(row) + 1])))
        if not value.ndim or value.shape[0] % sum(counts):
            raise ValueError(
                f"the reading of {Site(*key)} is {tuple(value.shape)} for {sum(counts)} rows, so it cannot be split; "
                "keep the batch axis first."
            )
        times, place = value.shape[0] // sum(counts), rows.index(row)
        return value[sum(counts[:place]) * times : sum(counts[: place + 1]) * times]
    raise ValueError(f"there is no row {row}; the batch has {len(layout.pads)}.")


@dataclass(frozen=True, repr=False)
class Run:
    """What one forward pass showed: `run[site]`, `run.grad[site]`, `run.logits`.

    Attributes:
        logits: of the last position, after all edits, `batch vocab`.
        grad: gradients of the metric's sum over rows, for each site read, where `grad_of` was given.
        values: all readings, as a mapping.
        metric: the metric of each row, where `grad_of` was given; or what `value` of `VLM.runs` returned.
        origin: the VLM that was run.
        reduced: what a function of the readings returned where the model ran; see `VLM.runs`.
    """

    logits: Float[Tensor, "batch vocab"]
    values: Readings
    grad: Readings
    metric: Float[Tensor, "batch ..."] | None = None
    origin: Any = None
    reduced: Any = None

    def __getitem__(self, site: Site | str) -> Any:
        return self.values[site]

    @property
    def rows(self) -> "list[Run]":
        """Each row alone, without the padding of the batch."""
        return [
            Run(
                self.logits[row : row + 1],
                self.values.row(row),
                self.grad.row(row),
                None if self.metric is None else self.metric[row : row + 1],
                self.origin,
            )
            for row in range(len(self.values.layout.pads))
        ]

    def to_activation_cache(self) -> Any:
        """This run as a `transformer_lens.ActivationCache`; `mechvlm.circuits.cache_sites(vlm)` says what to read.

        Raises:
            ValueError: for a reading that is not the whole tensor.
            ModuleNotFoundError: where TransformerLens is not installed.
        """
        from mechvlm.circuits import to_activation_cache  # circuits stand above: they take a run apart

        return to_activation_cache(self, self.origin)

    def __repr__(self) -> str:
        read = ", ".join(str(site) for site in self.values) or "nothing read"
        return f"Run({self.logits.shape[0]} rows; {read}{'; with gradients' if self.grad else ''})"


class Sent:
    """What a `Run` is where a model runs elsewhere: what it read and its gradients, by the name of the site."""

    def __init__(self, logits: Tensor, values: dict[str, Any], grad: dict[str, Any]) -> None:
        self.logits, self.values = logits, values
        self.grad = Sent(logits, grad, {}) if grad else None

    def __getitem__(self, site: Any) -> Any:
        return self.values[str(site)]


def sent(run: Run) -> tuple:
    """A run as it is sent with a function that holds it."""
    values, grad = ({str(site): held[site] for site in held} for held in (run.values, run.grad))
    return Sent, (run.logits, values, grad)


SENT[Run] = sent


@dataclass(frozen=True, repr=False)
class Generation:
    """What a generation said.

    Attributes:
        text: the generated text, one string per row (one string where one prompt was given); None without a processor.
        tokens: generated token ids, `batch step`, the prompt left out.
        steps: the readings of each step; step 0 is the pass over the prompt. Under beam search the rows of a step are
            the beams alive in it, before they are put in order, and not the steps of the text that won.
    """

    text: str | list[str] | None
    tokens: Tensor
    steps: list[Readings] = field(default_factory=list)

    def __getitem__(self, site: Site | str) -> list[Any]:
        """What was read of a site, step by step; the vision tower runs in the first one only."""
        where = as_site(site)
        found = [step[where] for step in self.steps if key_of(where) in step.kept]
        if not found:
            raise ValueError(f"{where} was not read in this generation; pass read_each_step=[..., {str(where)!r}].")
        return found

    def __repr__(self) -> str:
        return f"Generation({self.text!r}, {self.tokens.shape[-1]} tokens)"


def texts_of(processor: Any, tokens: Tensor, alone: bool) -> str | list[str] | None:
    """The words of generated tokens, where there is a processor to tell them.

    Args:
        alone: whether one prompt was given, and not a list; one text then comes as it is.
    """
    if processor is None:
        return None
    said = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return said[0] if alone and len(said) == 1 else said
