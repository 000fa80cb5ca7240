"""Questions per second: several about each picture on shared keys and values, and one by one through the plain model.

A random LLaVA with 576 image tokens is asked 6 questions about each picture. As in POPE, the words before and behind
the picture are the same for all, and what differs is a word or two in the middle of the question; questions differ in
length. The plain loop calls the Hugging Face model once for each; `mechvlm` is `shared_logits`, which
`mv.evaluate.pope` calls for each picture; `batched` is one padded batch of `vlm.run` for each picture, which shows what
rows alone gain; TransformerLens's is its forward pass with the picture given, one question at a time, where it is
installed. All take turns in rounds, on encodings made beforehand; ratios are medians of rounds, with quartiles.

In float32, answers are asserted the same as the plain loop's, and probabilities equal to 1e-5. In other types the
largest difference is shown, and how far the plain loop is from itself when each question has two rows. `--bias` adds an
attention bias in all layers, in the plain loop by a forward pre-hook on each layer that edits its mask.

    python bench/pope.py [--rounds 5] [--images 6] [--threads 2] [--bias 2.0]
    python bench/pope.py --shape 7b --device cuda --dtype bfloat16
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from wide import SIZES, WORDS, Encoding, llava, pixels

import mechvlm as mv
from mechvlm import bridge
from mechvlm.shared import shared_logits

YES, NO, EACH, TOLERANCE = 7, 9, 6, 1e-5
BEFORE, BETWEEN, BEHIND = 5, 4, 18
"""Words before the picture; from there to the word that differs; and behind it."""


@dataclass
class Asked:
    """A model and the questions about each picture: encodings for the plain loop, prompts for mechvlm."""

    hf: Any
    vlm: mv.VLM
    encodings: list[list[Encoding]]
    bias: float
    prompts: list[list[mv.Prompt]] = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = [[self.vlm.prompt(encoding=one) for one in some] for some in self.encodings]

    def edits(self, prompt: mv.Prompt) -> list[mv.Edit]:
        """The bias on the picture's columns in every layer; none for 0."""
        layers = range(self.vlm.shape.layers["text"]) if self.bias else []
        return [mv.bias_attention(layer, prompt.image, self.bias) for layer in layers]


def questions(seed: int, dtype: torch.dtype, device: str, size: Any) -> list[Encoding]:
    """Encodings of the questions about one picture."""
    draw = torch.Generator().manual_seed(0)  # the same words around what is asked for
    around = torch.randint(WORDS, 200, (1, BEFORE + BETWEEN + BEHIND), generator=draw)
    before, between, behind = around.split([BEFORE, BETWEEN, BEHIND], 1)
    picture = pixels(seed, 1, 3, size.pixels, size.pixels).to(device, dtype)
    found = []
    for number in range(EACH):
        own = torch.randint(WORDS, 200, (1, 1 + number % 3), generator=torch.Generator().manual_seed(7 * seed + number))
        ids = torch.cat([before, torch.full((1, size.image), 31), between, own, behind], 1).to(device)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture})
    return found


def plain(at: Asked, rows: int = 1) -> torch.Tensor:
    """One forward pass of the Hugging Face model for each question."""
    found, hooks = [], [biased(at, layer) for layer in at.hf.model.language_model.layers] if at.bias else []
    for encoding in (one for some in at.encodings for one in some):
        call = {name: torch.cat([x] * rows) for name, x in encoding.items()}
        with torch.no_grad():
            found.append(at.hf(**call, use_cache=False, logits_to_keep=1).logits[0, -1])
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def biased(at: Asked, layer: Any) -> Any:
    """A hook that adds the bias to the picture's columns of a layer's mask."""

    def before(module: Any, args: tuple, named: dict) -> tuple:
        del module
        image = len(at.prompts[0][0].image)
        length, low = args[0].shape[1], torch.finfo(args[0].dtype).min
        mask = torch.full((length, length), low, dtype=args[0].dtype, device=args[0].device).triu(1)
        columns = mask[:, BEFORE : BEFORE + image]
        columns += at.bias * (columns == 0)
        return args, {**named, "attention_mask": mask[None, None].expand(args[0].shape[0], -1, -1, -1)}

    return layer.register_forward_pre_hook(before, with_kwargs=True)


def ours(at: Asked) -> torch.Tensor:
    """Questions on the keys and values of what stands before them."""
    found = [shared_logits(at.vlm, some, at.edits) for some in at.prompts]
    assert all("keys and values" in one.engine for one in found), found[0].engine
    return torch.cat([one.logits for one in found])


def batched(at: Asked) -> torch.Tensor:
    """One padded batch for each picture."""
    return torch.cat([at.vlm.run(some, edits=at.edits(some[0])).logits for some in at.prompts])


def lens_loop(at: Asked, lens: Any) -> torch.Tensor:
    """TransformerLens's forward pass for each question."""
    asked = [prompt for some in at.prompts for prompt in some]
    return torch.stack([bridge.forward(lens.model, prompt, {}, lens.dtype)[0, -1] for prompt in asked])


def yes(logits: torch.Tensor) -> np.ndarray:
    """The probability of yes among yes and no."""
    return torch.sigmoid(logits[:, YES].double() - logits[:, NO].double()).cpu().numpy()


def timed(loops: dict[str, Callable[[], torch.Tensor]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each loop in each round, and what each found; loops take turns."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    found: dict[str, Any] = {}
    names = list(loops)
    for turn in range(rounds + 1):
        for name in (names * 2)[turn % len(names) :][: len(names)]:
            start = time.perf_counter()
            found[name] = yes(loops[name]())  # numbers on the CPU, so a GPU has finished
            if turn:  # what a first pass allocates is nobody's time
                times[name].append(time.perf_counter() - start)
    return times, found


def ratio(theirs: Sequence[float], own: Sequence[float]) -> str:
    """Times over times, round by round: the median and the quartiles."""
    ratios = [one / other for one, other in zip(theirs, own, strict=True)]
    if len(ratios) == 1:
        return f"**{ratios[0]:.2f}** (one round)"
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"**{median:.2f}** ({low:.2f} to {high:.2f})"


def check(found: dict[str, np.ndarray], exact: bool) -> None:
    """Refuse answers that differ from the plain loop's; in other types than float32, show by how much."""
    right = found["plain"]
    assert right.std() > 1e-3, "all questions get the same answer, so agreement would say nothing"
    for name, own in found.items():
        gap = float(np.abs(own - right).max())
        assert not exact or gap <= TOLERANCE, f"{name} differs from the plain loop by {gap:.1e}"
        same = (own > 0.5) == (right > 0.5)
        assert not exact or same.all(), f"{name} answers {(~same).sum()} questions otherwise"
        if name != "plain":
            print(f"{name}: probabilities differ by at most {gap:.1e}, {same.sum()} of {len(same)} answers the same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SIZES), default="pope")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bias", type=float, default=0.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--no-lens", dest="lens", action="store_false", help="leave TransformerLens out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = SIZES[options.shape]
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[options.dtype]
    made = llava(options.shape, options.device, dtype)
    some = [questions(seed, dtype, options.device, size) for seed in range(options.images)]
    at = Asked(made.model, mv.VLM(made.model), some, options.bias)
    loops: dict[str, Callable[[], torch.Tensor]] = {
        "plain": lambda: plain(at),
        "mechvlm": lambda: ours(at),
        "batched": lambda: batched(at),
    }
    if options.lens and not options.bias and bridge.installed():
        lens = bridge.bridged(at.vlm)
        loops["TransformerLens"] = lambda: lens_loop(at, lens)
    times, found = timed(loops, options.rounds)
    print(f"{sum(weight.numel() for weight in at.hf.parameters()) / 1e6:.0f} M parameters, {size.image} image tokens;")
    print(f"{dtype}, {at.vlm.device}; torch {torch.__version__}, transformers {transformers.__version__}", end="; ")
    print(
        f"{options.threads} threads, {options.rounds} rounds, {options.images} pictures x {EACH}, bias {options.bias}"
    )
    exact = dtype == torch.float32
    check(found, exact)
    if not exact:
        print(f"plain loop of two rows: by {float(np.abs(yes(plain(at, rows=2)) - found['plain']).max()):.1e}")
    print("\n| loop | questions per second | time / mechvlm's |\n|---|--:|--:|")
    for name, seconds in times.items():
        rate = options.images * EACH / statistics.median(seconds)
        print(f"| {name} | {rate:.2f} | {'1' if name == 'mechvlm' else ratio(seconds, times['mechvlm'])} |")


if __name__ == "__main__":
    main()
