"""How a batch is made up, and which part of a tensor belongs to which of its rows.

Rule this module guards: whatever a tensor's first axis counts (texts, images, tiles of images, or nothing, where a
tower packs all images into one sequence), an edit or a reading sees its own row only, and its own positions.

>>> Layout((0, 2), ((16,), (16,)), (1, 1)).groups(("resid_pre", 0, "text"), None, 2)
[([0], 0, None), ([1], 2, None)]
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Group = tuple[list[int] | None, int, int | None]
"""Rows along the first axis that are treated alike (None: all of them), and where their own positions begin and end."""


@dataclass(frozen=True)
class Layout:
    """How a batch is made up: padding and images of each row.

    Attributes:
        pads: positions of left padding per row.
        tokens: for each row, how many vectors each of its images gives the language model.
        vision: for each row, how many rows along the first axis its images take in the vision tower's tensors; where
            that tower packs all images into one sequence, how many positions.
        queries: for each row, how many positions the Q-Former has.
        packed: whether the vision tower packs.
        shared: how many rows share the images of the first one, whose features are computed once; 1 if none do.
        length: positions of the batch, padding included.
        pixels: for each row, the shape of its own `pixel_values`, which stand behind one another along the first axis
            and, where others are longer along another, are filled up at the end.
    """

    pads: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    vision: tuple[int, ...]
    queries: tuple[int, ...] = ()
    packed: bool = False
    shared: int = 1
    length: int = 0
    pixels: tuple[tuple[int, ...], ...] = ()

    @property
    def images(self) -> tuple[int, ...]:
        """Images per row."""
        return tuple(len(row) for row in self.tokens)

    def groups(self, site: tuple, rows: Sequence[int] | None, batch: int) -> list[Group]:
        """What some rows of the batch have of a site, together where their own positions are the same."""
        chosen = range(len(self.pads)) if rows is None else rows
        tower = site[2]
        if len(self.pads) == 1 and self.by_images(site):
            return [(None, 0, None)]
        if tower != "text" and self.shared > 1:
            return [(None, 0, None)]
        if self.by_images(site):
            # Each row by itself: an edit sees its own images, and never another row's.
            lengths, sequence = self.extent(site)
            starts = [sum(lengths[:row]) for row in range(len(lengths) + 1)]
            if sequence:
                return [(None, starts[row], starts[row + 1]) for row in chosen]
            return [(list(range(starts[row], starts[row + 1])), 0, None) for row in chosen if lengths[row]]
        return self.alike(chosen, self.spans(site), 1 if tower == "qformer" else batch // len(self.pads))

    def spans(self, site: tuple) -> list[tuple[int, int | None]]:
        """Where each row's own positions begin and end, at a site of the texts or of the Q-Former."""
        if site[2] != "qformer":
            return [(pad, None) for pad in self.pads]
        # Its cross-attention is the queries' alone, which every row has as many of.
        return [(0, None if site[0].startswith("cross") else length) for length in self.queries]

    def by_images(self, site: tuple) -> bool:
        """Whether a tensor's first axis counts images, or parts of them, and not rows of the batch."""
        return site[2] == "vision" or site[0] in ("image_features", "deepstack")

    def rows_of(self, site: tuple, group: Group) -> list[int]:
        """The rows of the batch whose parts a group holds, in order."""
        every = list(range(len(self.pads)))
        if len(every) == 1 or (site[2] != "text" and self.shared > 1):
            return every
        if self.by_images(site):
            return [row for row in every if self.groups(site, [row], len(every)) == [group]]
        spans = self.spans(site)
        whole = group[0] is None
        return [row for row in every if whole or spans[row] == group[1:]]

    def of_row(self, row: int) -> "Layout":
        """The layout of one row, as if it had run alone."""
        queries = self.queries[row : row + 1]
        own = self.tokens[row : row + 1], self.vision[row : row + 1], queries
        return Layout((0,), *own, self.packed, pixels=self.pixels[row : row + 1])

    def alike(self, chosen: Sequence[int], spans: Sequence[tuple[int, int | None]], times: int) -> list[Group]:
        """Rows together where their own positions are the same.

        Args:
            times: how many rows of the tensor each row of the batch has: the beams of a generation.
        """
        groups: list[Group] = []
        for start, stop in dict.fromkeys(spans[row] for row in chosen):
            same = [row for row in chosen if spans[row] == (start, stop)]
            every = len(same) == len(spans)
            index = None if every else [row * times + i for row in same for i in range(times)]
            groups.append((index, start, None if every and len(set(spans)) == 1 else stop))
        return groups

    def extent(self, site: tuple) -> tuple[tuple[int, ...], bool]:
        """How much of a tensor that is not the text's each row has, and whether that is a stretch of one sequence."""
        if site[0] == "pixels":
            return tuple(shape[0] for shape in self.pixels), False
        if site[2] == "vision":
            return self.vision, self.packed
        flat = [length for row in self.tokens for length in row]
        if len(set(flat)) > 1:
            return tuple(sum(row) for row in self.tokens), True
        return self.images, False

    def by_image(self, x: Tensor) -> Tensor:
        """Image features as `image pos d_model`; where images differ in length, as one sequence, `1 pos d_model`."""
        lengths = {length for row in self.tokens for length in row}
        x = x.repeat(self.shared, 1) if self.shared > 1 else x
        return x.reshape(-1, lengths.pop(), x.shape[-1]) if len(lengths) == 1 else x[None]

    def own_shape(self, site: tuple, group: Group, part: Tensor) -> Tensor:
        """A row's pixels, or image features, in the shape that they have where it runs alone."""
        if site[0] == "pixels" and group[0] is not None:
            return part[(slice(None), *map(slice, self.pixels[self.rows_of(site, group)[0]][1:]))]
        if site[0] not in ("image_features", "deepstack") or group[2] is None:
            return part
        lengths = set(self.tokens[self.rows_of(site, group)[0]])
        return part.reshape(-1, lengths.pop(), part.shape[-1]) if len(lengths) == 1 else part
