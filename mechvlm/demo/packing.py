"""Many questions about one image in one training row, each seeing exactly what it would see alone.

The image and the words before it are the same for every question of a scene, so a row holds them once, followed by a
slot for each turn. A mask lets a slot see the prefix and itself only, and positions start again in each slot, so each
turn is computed as if it had been asked alone (tests/test_demo_data.py checks it) at a fraction of the cost.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mechvlm.demo import build
from mechvlm.demo.handwriting import SIDE, paint, pool
from mechvlm.demo.questions import Turn, ask
from mechvlm.demo.world import CELLS, COLOURS, DIGITS, Scene, sample

LENGTHS = {"exists": 12, "count": 13, "digit": 9, "colour": 9, "caption": 36}  # longest turns less </s>, by first word
GRID = SIDE // build.PATCH
IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Scenes with their packed turns; `targets` and `weights` are those of the next token at each position."""

    pixels: Float[Tensor, "scene channel y x"]
    tokens: Int[Tensor, "scene pos"]
    targets: Int[Tensor, "scene pos"]
    weights: Float[Tensor, "scene pos"]
    digits: Int[Tensor, "scene image_token"]
    colours: Int[Tensor, "scene image_token"]
    slots: tuple[int, ...]
    scenes: tuple[Scene, ...] = ()
    turns: tuple[tuple[Turn, ...], ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device, without the records."""
        return Batch(
            pixels=self.pixels.to(device),
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            digits=self.digits.to(device),
            colours=self.colours.to(device),
            slots=self.slots,
        )


@cache
def vocabulary() -> dict[str, int]:
    """The number of each word."""
    return {word: i for i, word in enumerate(build.SPECIAL + build.WORDS)}


@cache
def prefix() -> tuple[int, ...]:
    """The tokens before the question: `<s> user : <image> ...`."""
    return (*(vocabulary()[word] for word in ("<s>", "user", ":")), *[vocabulary()["<image>"]] * GRID**2)


@cache
def _question(text: str) -> tuple[int, ...]:
    return tuple(build.processor().tokenizer(f"{text} ASSISTANT:", add_special_tokens=False)["input_ids"])


@cache
def layout(slots: tuple[int, ...]) -> tuple[Int[Tensor, "1 pos"], Bool[Tensor, "1 1 query key"]]:
    """The positions and the mask (True where attention is allowed) of rows with such slots."""
    start = len(prefix())
    positions = torch.cat([torch.arange(start), *(torch.arange(start, start + length) for length in slots)])
    owner = torch.tensor([-1] * start + [slot for slot, length in enumerate(slots) for _ in range(length)])
    causal = torch.ones(len(owner), len(owner)).tril().bool()
    return positions[None], (causal & ((owner[None] == -1) | (owner[None] == owner[:, None])))[None, None]


def pixel_values(images: UInt8[np.ndarray, "scene y x channel"]) -> Float[Tensor, "scene channel y x"]:
    """What the processor makes of 72 x 72 images, bit for bit."""
    scaled = (images * (1 / 255)).astype(np.float32)
    return torch.from_numpy(((scaled - np.float32(0.5)) / np.float32(0.5)).transpose(0, 3, 1, 2).copy())


def length(kind: str) -> int:
    """How many tokens a slot needs for questions of a kind."""
    return LENGTHS[kind.partition("_")[0]]


def pack(
    images: UInt8[np.ndarray, "scene y x channel"],
    scenes: Sequence[Scene],
    turns: Sequence[Sequence[Turn]],
    slots: tuple[int, ...],
) -> Batch:
    """Packs turns into slots of such lengths, the same in every row."""
    width = len(prefix()) + sum(slots)
    tokens, targets = np.zeros((len(scenes), width), int), np.full((len(scenes), width), IGNORE)
    weights = np.zeros((len(scenes), width), np.float32)
    tokens[:, : len(prefix())] = prefix()
    for row, row_turns in enumerate(turns):
        begin = len(prefix())
        for turn, room in zip(row_turns, slots, strict=True):
            question = _question(turn.question)
            answer = [*(vocabulary()[word] for word in turn.answer.split()), vocabulary()["</s>"]]
            full, first = [*question, *answer[:-1]], begin + len(question) - 1
            tokens[row, begin : begin + len(full)] = full
            targets[row, first : first + len(answer)] = answer
            weights[row, first : first + len(answer)] = 0.2 if len(answer) > 2 else [1.0, 0.1]
            begin += room
    digits, colours = _image_token_targets(scenes)
    return Batch(
        pixels=pixel_values(images),
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        digits=torch.from_numpy(digits),
        colours=torch.from_numpy(colours),
        slots=slots,
        scenes=tuple(scenes),
        turns=tuple(tuple(row) for row in turns),
    )


def _image_token_targets(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """The digit and the colour in the cell that each image token lies in; where there is none, one past the last."""
    found = np.tile(np.array([len(DIGITS), len(COLOURS)])[:, None, None], (1, len(scenes), CELLS))
    for row, scene in enumerate(scenes):
        for item in scene.items:
            found[:, row, item.cell] = item.digit, item.colour
    wide = found.reshape(2, len(scenes), 3, 3).repeat(GRID // 3, 2).repeat(GRID // 3, 3)
    digits, colours = wide.reshape(2, len(scenes), GRID**2)
    return digits, colours


def draw(
    seed: int, scenes: int, slots: Sequence[Mapping[str, float]], split: str = "train", warp: float = 1.0
) -> Batch:
    """Draws scenes with turns; each slot gives its mix of question kinds, as weights.

    Everything follows from `seed`, so a batch can be made anywhere, in any order, and again.
    """
    rng = random.Random(f"{split} {seed}")
    drawn = [sample(rng, pool(split)) for _ in range(scenes)]
    mixes = [(list(mix), list(mix.values())) for mix in slots]
    turns = [[ask(rng.choices(kinds, shares)[0], scene, rng) for kinds, shares in mixes] for scene in drawn]
    room = tuple(max(length(kind) for kind in mix) for mix in slots)
    return pack(paint(drawn, np.random.default_rng([seed, len(split)]), warp), drawn, turns, room)
