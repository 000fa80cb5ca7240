"""What attribution costs: all patches estimated at once, all edges, and one exact patch, in forward passes.

A random LLaVA, 512 wide, of about 60 million parameters with 12 layers, under SDPA in float32, at 600 and 2,400
positions (1 and 4 pictures). Source and target differ in words and pictures; the metric is a difference of two logits.
Calls are run in turn with the raw forward pass; a ratio is the median of the pairs. Peak memory is how far a call
raises the process's resident memory above what the raw forward does. "plain torch" is attribution patching with hooks
on the Hugging Face model: two forward passes and one backward pass, whose products are asserted equal to mechvlm's to
1e-5 of the largest. Where TransformerLens is installed, its attribution patching of heads and MLPs, which is handed the
picture, is timed too, and asserted equal in the same way.

    python bench/attribution.py [--lengths 600 2400] [--layers 12] [--pairs 5] [--threads 2] [--device cuda]
        [--shape 7b --dtype bfloat16] [--calls AtP EAP TransformerLens]
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
import wide
from attention import encoding, most, paired, sharp_model
from overhead import HEADS, IMAGE

import mechvlm as mv
from mechvlm import bridge

TOLERANCE = 1e-5
NINE = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


def difference(logits: torch.Tensor) -> torch.Tensor:
    """The metric: one word's logit less another's."""
    return logits[:, 5] - logits[:, 7]


class Setting:
    """A model, two prompts of one length, and what is called."""

    def __init__(self, hf: Any, given: list[dict[str, torch.Tensor]], device: str) -> None:
        self.vlm, self.given, self.cuda = mv.VLM(hf), given, device == "cuda"
        self.source, self.target = (self.vlm.prompt(encoding=one) for one in given)

    def raw(self) -> torch.Tensor:
        """The model's own forward pass."""
        with torch.no_grad():
            return self.vlm.hf(**self.given[1], use_cache=False, logits_to_keep=1).logits[:, -1]

    def patching(self, **more: Any) -> Any:
        """Attribution patching."""
        return mv.attribution_patching(self.vlm, self.source, self.target, difference, **more)

    def edges(self, **more: Any) -> Any:
        """Edge attribution."""
        return mv.edge_attribution(self.vlm, self.source, self.target, difference, **more)

    def plain(self) -> dict[str, torch.Tensor]:
        """Attribution patching of attention's and MLP's outputs, with hooks in plain torch: `layer position`."""
        held: dict[tuple, torch.Tensor] = {}
        hooks = []
        for index, layer in enumerate(self.vlm.hf.model.language_model.layers):
            for name, part in (("attn_out", layer.self_attn), ("mlp_out", layer.mlp)):

                def keep(_module: Any, _given: Any, out: Any, key: tuple = (name, index)) -> None:
                    held[key] = out[0] if isinstance(out, tuple) else out

                hooks.append(part.register_forward_hook(keep))
        try:
            with torch.no_grad():
                self.vlm.hf(**self.given[0], use_cache=False, logits_to_keep=1)
            before = dict(held)
            with torch.enable_grad():
                pixels = self.given[1]["pixel_values"].clone().requires_grad_(True)
                given = {**self.given[1], "pixel_values": pixels}
                value = difference(self.vlm.hf(**given, use_cache=False, logits_to_keep=1).logits[:, -1])
                gradients = torch.autograd.grad(value.sum(), list(held.values()))
        finally:
            for hook in hooks:
                hook.remove()
        found: dict[str, list[torch.Tensor]] = {"attn_out": [], "mlp_out": []}
        for key, gradient in zip(held, gradients, strict=True):
            found[key[0]].append(((before[key] - held[key].detach()) * gradient).sum(-1)[0])
        return {name: torch.stack(those) for name, those in found.items()}


class Lens:
    """The same model in TransformerLens, and attribution patching there."""

    def __init__(self, at: Setting) -> None:
        self.at, self.model = at, bridge.bridged(at.vlm).model
        self.model.original_model.requires_grad_(True)  # it takes gradients at the embeddings' hook
        self.model.register_forward_pre_hook(self.shown, with_kwargs=True)

    def shown(self, _model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A call with what belongs to the tokens beside them."""
        (one,) = [given for given in self.at.given if torch.equal(given["input_ids"], args[0])]
        return args, {**kwargs, **{name: x for name, x in one.items() if name != "input_ids"}}

    def scores(self) -> dict[Any, float]:
        """Its scores, by its nodes."""
        from transformer_lens.tools.analysis.attribution_patching import attribution_patch

        ends = [given["input_ids"] for given in self.at.given]
        return attribution_patch(self.model, *ends, lambda logits: difference(logits[:, -1])[0]).node_scores

    def apart(self) -> float:
        """The largest difference from mechvlm's, over the largest score."""
        own, gaps, largest = self.at.patching(kinds=["z", "mlp_out"]), [0.0], 0.0
        for node, score in self.scores().items():
            if node.kind != "embed":
                kind, place = ("mlp_out", ()) if node.head is None else ("z", (node.head,))
                gaps.append(abs(score - own[kind].values[node.layer, node.position, *place]))
                largest = max(largest, abs(score))
        return float(max(gaps) / largest)


def calls(at: Setting) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    both = {"kinds": ["attn_out", "mlp_out"]}
    return {
        "AtP, plain torch, attn_out and mlp_out": at.plain,
        "AtP, attn_out and mlp_out": partial(at.patching, **both),
        "AtP, four kinds (default)": at.patching,
        "AtP, all nine kinds": partial(at.patching, kinds=NINE),
        "AtP with softmax made anew (qk), q and k": partial(at.patching, kinds=["q", "k"], method="qk"),
        "AtP* (qk and a pass a layer), nine kinds": partial(at.patching, kinds=NINE, method="atp*"),
        "node IG, 5 points, four kinds": partial(at.patching, method="ig"),
        "EAP, all edges": partial(at.edges, method="eap"),
        "EAP, all edges by span": partial(at.edges, method="eap", spans="each"),
        "EAP-IG, 5 points": partial(at.edges, method="eap-ig", steps=5),
    }


def equal(at: Setting) -> float:
    """The largest difference from plain torch, over the largest estimate."""
    own, plain = at.patching(kinds=["attn_out", "mlp_out"]), at.plain()
    gaps = []
    for name, theirs in plain.items():
        expected = theirs.double().cpu().numpy()
        gaps.append(np.abs(own[name].values - expected).max() / np.abs(expected).max())
    return float(max(gaps))


def settings(arguments: argparse.Namespace) -> list[Setting]:
    """The models and prompts to time."""
    if arguments.shape:
        made = wide.llava(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
        given = [{name: x.to(arguments.device) for name, x in made.encoding(seed).items()} for seed in (0, 1)]
        return [Setting(made.model, given, arguments.device)]
    hf, found = sharp_model(arguments.device, arguments.layers), []
    for length in arguments.lengths:
        first = encoding(length, arguments.device)
        draw = torch.Generator().manual_seed(1)
        words = torch.randint(40, 8000, first["input_ids"].shape, generator=draw).to(arguments.device)
        pixels = torch.randn(first["pixel_values"].shape, generator=draw).to(arguments.device)
        ids = torch.where(first["input_ids"] == IMAGE, first["input_ids"], words)
        found.append(Setting(hf, [{**first, "input_ids": ids, "pixel_values": pixels}, first], arguments.device))
    return found


def beside(at: Setting, pairs: int) -> None:
    """TransformerLens's time for heads and MLPs over mechvlm's, once both are found to say the same."""
    lens = Lens(at)
    gap = lens.apart()
    assert gap < TOLERANCE, f"TransformerLens's scores differ by {gap:.1e} of the largest"
    own = partial(at.patching, kinds=["z", "mlp_out"])
    ratio = paired(own, lens.scores, pairs, at.cuda)
    said = f"TransformerLens's heads and MLPs, over mechvlm's (largest difference {gap:.1e})"
    print(f"| {len(at.target)} | {said} | {ratio:.1f} times mechvlm's | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[600, 2400])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=list(wide.SIZES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--calls", nargs="+", default=[""], help="only calls whose names hold one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {HEADS} heads, {arguments.device}")
    print("| positions | call | time / forward | peak memory over the forward's, MiB |\n|--:|---|--:|--:|", flush=True)
    for at in settings(arguments):
        gap = equal(at)
        if arguments.dtype == "float32":
            assert gap < TOLERANCE, f"attribution patching differs from plain torch by {gap:.1e} of the largest"
        plain = most(at.raw, at.cuda)
        for name, call in calls(at).items():
            if any(part in name for part in arguments.calls):
                risen = most(call, at.cuda) - plain
                ratio = paired(at.raw, call, arguments.pairs, at.cuda)
                print(f"| {len(at.target)} | {name} | {ratio:.2f} | {risen:+.0f} |", flush=True)
        print(f"| {len(at.target)} | largest difference from plain torch, over the largest | {gap:.1e} | |", flush=True)
        if bridge.installed() and any(part in "TransformerLens" for part in arguments.calls):
            beside(at, arguments.pairs)


if __name__ == "__main__":
    main()
