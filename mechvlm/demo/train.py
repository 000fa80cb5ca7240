"""Trains the demo model from nothing: `python -m mechvlm.demo.train --out DIR`, about an hour on two CPU cores.

First the tower learns to see, as CLIP's does before it becomes part of LLaVA: each image token, after the projector,
must resemble the words for the digit and the colour in its cell. Then all parts learn to answer, with many yes/no and
counting questions; without the warm-up and the counting of attributes, yes/no questions stay at chance for a very long
time. Every kind of question stays in the mix to the end, because what is left out is forgotten.

All batches follow from the seed and the step, so an interrupted run continues where it stopped, as if nothing had been.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from mechvlm.demo import build
from mechvlm.demo.packing import IGNORE, Batch, draw, layout, prefix, vocabulary
from mechvlm.demo.world import COLOURS, DIGITS

SEED = 7
EXISTS = {"exists_digit": 1.0, "exists_colour": 0.6, "exists_pair": 1.2}
COUNT = {"count_digit": 1.0, "count_colour": 1.0, "count_pair": 0.8, "count_all": 0.2}
WHICH = {"digit_at": 1.0, "colour_at": 0.7, "colour_of": 1.0, "digit_of": 0.7}
QUESTIONS = (*[EXISTS] * 5, *[COUNT] * 3, *[WHICH] * 3)
CAPTIONS = ({"caption": 1.0}, *[EXISTS] * 4, *[COUNT] * 2, *[WHICH] * 1)
# For the end: more questions that need a digit and its colour together, which are learned last.
BIND_EXISTS = {"exists_digit": 0.8, "exists_colour": 0.4, "exists_pair": 2.0}
BIND_COUNT = {"count_digit": 0.8, "count_colour": 0.8, "count_pair": 1.6, "count_all": 0.2}
BIND_WHICH = {"digit_at": 0.6, "colour_at": 0.5, "colour_of": 1.3, "digit_of": 1.0}
BINDING = (*[BIND_EXISTS] * 5, *[BIND_COUNT] * 3, *[BIND_WHICH] * 3)
EVAL = tuple({kind: 1.0} for kind in (*EXISTS, *COUNT, *WHICH, "caption"))


@dataclass(frozen=True)
class Phase:
    """A stretch of training: the learning rate falls (or stays) linearly, and `layouts` of slots take turns."""

    name: str
    steps: int
    scenes: int
    rate: tuple[float, float]
    layouts: tuple[tuple[Mapping[str, float], ...], ...]
    naming: float  # weight of the loss that ties image tokens to words
    answering: float = 1.0
    gentle: int = 150  # steps in which the learning rate rises from zero


SCHEDULE = (
    Phase("see", 1600, 64, (1.5e-3, 3e-4), ((),), naming=1.0, answering=0.0),
    Phase("answer", 1000, 32, (1e-3, 1e-3), (QUESTIONS, QUESTIONS, CAPTIONS), naming=0.3),
    Phase("settle", 400, 32, (1e-3, 2e-3 / 3), (QUESTIONS, QUESTIONS, CAPTIONS), naming=0.3, gentle=1),
    Phase("bind", 1000, 32, (2e-3 / 3, 0.0), (BINDING, BINDING, CAPTIONS), naming=0.3, gentle=1),
)


def phase_at(step: int, schedule: Sequence[Phase] = SCHEDULE) -> tuple[Phase, int]:
    """The phase a step belongs to, and how many steps of it have passed."""
    for phase in schedule:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise ValueError(f"the schedule ends {step + 1} steps earlier")


def rate_at(step: int) -> float:
    """The learning rate of a step."""
    phase, passed = phase_at(step)
    first, last = phase.rate
    return (first + (last - first) * passed / phase.steps) * min(1.0, (passed + 1) / phase.gentle)


class Steps(Dataset):
    """The batch of every step, drawn when asked for."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, step: int) -> Batch:
        phase, passed = phase_at(step)
        return draw(SEED * 1_000_003 + step, phase.scenes, phase.layouts[passed % len(phase.layouts)])


def features(model: LlavaForConditionalGeneration, batch: Batch) -> Float[Tensor, "scene image_token d_model"]:
    """What the decoder gets to see of each image."""
    return torch.stack(list(model.model.get_image_features(batch.pixels).pooler_output))


def naming_loss(model: LlavaForConditionalGeneration, batch: Batch, seen: Tensor) -> Tensor:
    """How badly image tokens resemble the embeddings of the digit and the colour in their cell (or of "none")."""
    words = model.get_input_embeddings().weight
    seen = F.rms_norm(seen, seen.shape[-1:]).flatten(0, 1)
    loss = torch.zeros((), device=seen.device)
    for names, targets in ((DIGITS, batch.digits), (COLOURS, batch.colours)):
        rows = torch.tensor([vocabulary()[name] for name in (*names, "none")], device=seen.device)
        loss = loss + F.cross_entropy(seen @ F.normalize(words[rows], dim=-1).T, targets.flatten())
    return loss


def answers(model: LlavaForConditionalGeneration, batch: Batch, seen: Tensor) -> Float[Tensor, "answer word"]:
    """The logits at every position of a packed batch that has a target."""
    text = model.get_input_embeddings()(batch.tokens)
    start = len(prefix()) - seen.shape[1]
    embeds = torch.cat([text[:, :start], seen, text[:, len(prefix()) :]], 1)
    positions, mask = (part.to(seen.device) for part in layout(batch.slots))
    out = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    return model.lm_head(out.last_hidden_state[batch.targets != IGNORE])


def answering_loss(model: LlavaForConditionalGeneration, batch: Batch, seen: Tensor) -> Tensor:
    """The weighted mean surprise at the right answers."""
    asked = batch.targets != IGNORE
    losses = F.cross_entropy(answers(model, batch, seen), batch.targets[asked], reduction="none")
    return (losses * batch.weights[asked]).sum() / batch.weights[asked].sum()


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, scenes: int = 200, split: str = "validation") -> dict[str, float]:
    """The share of right answers by kind of question, on scenes of handwriting kept out of training.

    A caption counts by its words, each given the right ones before it.
    """
    device = next(model.parameters()).device
    right: dict[str, list[bool]] = defaultdict(list)
    whole = draw(0, scenes, EVAL, split, 0.5)
    batch = whole.to(device)
    seen = features(model, batch)
    for names, targets in (("see_digit", batch.digits), ("see_colour", batch.colours)):
        words = [*(DIGITS if names == "see_digit" else COLOURS), "none"]
        rows = model.get_input_embeddings().weight[[vocabulary()[word] for word in words]]
        found = (seen @ F.normalize(rows, dim=-1).T).argmax(-1)
        right[names] = (found == targets)[targets < len(words) - 1].tolist()
    hits = torch.zeros_like(batch.targets, dtype=torch.bool)
    hits[batch.targets != IGNORE] = answers(model, batch, seen).argmax(-1) == batch.targets[batch.targets != IGNORE]
    for row, turns in enumerate(whole.turns):
        begin = len(prefix())
        for turn, room in zip(turns, whole.slots, strict=True):
            asked = batch.targets[row, begin : begin + room] != IGNORE
            hit = hits[row, begin : begin + room][asked].tolist()
            right[turn.kind] += hit if turn.kind == "caption" else hit[:1]
            begin += room
    return {kind: sum(found) / len(found) for kind, found in right.items()}


def save(model: LlavaForConditionalGeneration, directory: Path) -> None:
    """Writes model and processor in half precision, as any checkpoint directory."""
    half = build.model().half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(directory)
    build.processor().save_pretrained(directory)


def _start(model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer, state: Path) -> tuple[int, float]:
    if not state.exists():
        return 0, 0.0
    kept = torch.load(state, weights_only=True)  # optimizer states are nested, which safetensors does not hold
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    return kept["step"], kept["seconds"]


def _keep(
    model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer, out: Path, step: int, seconds: float
) -> None:
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    torch.save(kept, out / "state.new")
    (out / "state.new").replace(out / "state.pt")
    save(model, out / "model")
    found = {kind: round(share, 3) for kind, share in accuracy(model).items()}
    phase = phase_at(step - 1)[0].name
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": step, "phase": phase, "seconds": round(seconds), **found}) + "\n")


def advance(model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> float:
    """One step of training; returns the loss."""
    phase, _ = phase_at(step)
    if step and phase.answering and not phase_at(step - 1)[0].answering:  # words known by sight can be said
        model.lm_head.weight.data.copy_(model.get_input_embeddings().weight.data)
    for group in optimizer.param_groups:
        group["lr"] = rate_at(step)
    seen = features(model, batch)
    loss = phase.naming * naming_loss(model, batch, seen)
    if phase.answering:
        loss = loss + phase.answering * answering_loss(model, batch, seen)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def main(
    out: Annotated[Path, typer.Option(help="Directory for the model, the state to resume from, and the log.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads for the model.")] = 2,
    workers: Annotated[int, typer.Option(help="Processes that draw scenes ahead; 0 draws them in between.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Stop early, after so many steps.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop early, after so many minutes.")] = math.inf,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
) -> None:
    """Trains the demo model, or continues where an earlier run into the same directory stopped."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    model = build.model().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    first, seconds = _start(model, optimizer, out / "state.pt")
    whole = sum(phase.steps for phase in SCHEDULE)
    last = min(whole, steps or whole)
    loader = DataLoader(Steps(last), batch_size=None, sampler=range(first, last), num_workers=workers)
    began, bar = time.monotonic(), tqdm(loader, initial=first, total=last, smoothing=0.02)
    for step, batch in enumerate(bar, first):
        loss = advance(model, optimizer, batch.to(torch.device(device)), step)
        bar.set_postfix_str(f"{phase_at(step)[0].name} loss {loss:.3f}")
        spent = time.monotonic() - began
        if (step + 1) % every == 0 or step + 1 == last or spent > 60 * minutes:
            _keep(model, optimizer, out, step + 1, seconds + spent)
        if spent > 60 * minutes:
            break


if __name__ == "__main__":
    typer.run(main)
