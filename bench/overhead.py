"""What a reading costs: all residuals and the last row's attention of all layers, against the raw forward pass.

A random LLaVA of about 60 million parameters reads 616 positions, 576 of them image tokens, under SDPA. The two are
run in pairs, one after the other in turn, so that a machine that slows down slows both; the ratio is the median of the
pairs. Logits are asserted equal bit for bit, and the rows equal to eager attention's. Peak memory is how far a call
raises the process's resident memory at most.

    python bench/overhead.py [--pairs 15] [--threads 2] [--device cuda]
"""

import argparse
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import mechvlm as mv

LAYERS, HEADS, IMAGE = 12, 8, 31


def model(positions: int = 2048, layers: int = LAYERS) -> LlavaForConditionalGeneration:
    """A LLaVA shape: 24 x 24 image tokens, decoder layers 512 wide, a small tower; and how long it may get."""
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=8000,
        max_position_embeddings=positions,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=576)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)


def encoding() -> dict[str, torch.Tensor]:
    """616 positions: 5 of prefix, 576 of image, 35 of question."""
    words = torch.randint(40, 8000, (1, 40), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([words[:, :5], torch.full((1, 576), IMAGE), words[:, 5:]], 1)
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def readings() -> dict[mv.Site, object]:
    """All residual streams, and the last row of all patterns."""
    residuals = [mv.Site(kind, layer) for layer in range(LAYERS) for kind in ("resid_pre", "resid_mid", "resid_post")]
    return {**dict.fromkeys(residuals), **{mv.Site("pattern", layer): mv.rows([-1]) for layer in range(LAYERS)}}


def timed(call: Callable, cuda: bool) -> float:
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(call: Callable) -> float:
    """MiB by which resident memory rises at most during a call (Linux: the high-water mark, reset before)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed goes back, so that it counts again
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    kept = call()
    risen = resident("VmHWM") - before
    del kept
    return risen


def resident(name: str) -> float:
    """A figure of this process's memory, in MiB."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cuda = options.device == "cuda"
    hf = model().to(options.device)
    vlm, given = mv.VLM(hf), {name: x.to(options.device) for name, x in encoding().items()}
    prompt, read = vlm.prompt(encoding=given), readings()

    def raw() -> torch.Tensor:
        with torch.no_grad():
            return hf(**given, use_cache=False, logits_to_keep=1).logits[:, -1]

    def reading() -> mv.Run:
        return vlm.run(prompt, read=read)

    def eager() -> Any:
        vlm.attention = "eager"
        with torch.no_grad():
            shown = hf(**given, use_cache=False, logits_to_keep=1, output_attentions=True, output_hidden_states=True)
        vlm.attention = "sdpa"
        return shown

    run, own = reading(), eager()
    assert torch.equal(run.logits, raw()), "reading changed the logits"
    gaps = [run[mv.Site("pattern", at)][:, :, 0] - own.attentions[at][:, :, -1] for at in range(LAYERS)]
    worst = max(gap.abs().max() for gap in gaps)
    assert worst <= 1e-6, f"rows differ from eager attention by {worst:.1e}"
    pairs = []
    for pair in range(options.pairs + 2):
        first, second = (raw, reading) if pair % 2 else (reading, raw)
        times = {first: timed(first, cuda), second: timed(second, cuda)}
        pairs.append((times[reading] / times[raw], times[raw], times[reading]))
    ratios = sorted(pairs[2:])
    low, middle, high = ratios[len(ratios) // 4], ratios[len(ratios) // 2], ratios[-1 - len(ratios) // 4]
    millions = sum(weight.numel() for weight in hf.parameters()) / 1e6
    print(f"{millions:.1f} M parameters, {len(prompt)} positions, {len(read)} sites")
    print(f"{options.threads} threads, {hf.device}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"raw forward {middle[1] * 1e3:.0f} ms, with the readings {middle[2] * 1e3:.0f} ms")
    print(f"ratio: median {middle[0]:.3f}, quartiles {low[0]:.3f} to {high[0]:.3f}, {options.pairs} pairs")
    print(f"largest difference of the rows from eager attention {worst:.1e}; logits equal bit for bit")
    if not cuda and Path("/proc/self/clear_refs").exists():
        del run, own
        plain, read_too, maps = peak(raw), peak(reading), peak(eager)
        print(f"peak memory: raw forward {plain:.0f} MiB; with the readings {read_too - plain:+.0f} MiB;")
        print(f"with eager output_attentions and output_hidden_states {maps - plain:+.0f} MiB")


if __name__ == "__main__":
    main()
