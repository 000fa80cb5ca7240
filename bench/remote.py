"""What a job costs: bytes sent and brought back, and time beside the same run here, on a server of this machine.

The server runs in an environment of its own, without mechvlm (`tests/loopback`). Models of several sizes are asked the
same things: what is sent must not grow with the model, and each of them should be one job.

    python bench/remote.py --widths 32 128 512 --demo
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import loopback
import tiny
import torch
from nnsight.schema.config import CONFIG

import mechvlm as mv

TASKS: dict[str, Callable[[mv.VLM, mv.Prompt], Any]] = {
    "run": lambda vlm, prompt: vlm.run(prompt, read=["text.2.z"]),
    "gradients": lambda vlm, prompt: vlm.run(prompt, read=["text.2.z"], grad_of=mv.logit_difference("yes", "no")),
    "profile": mv.attention_profile,
    "head sweep": lambda vlm, prompt: mv.ablate_each_head(vlm, prompt, mv.logit_difference("yes", "no")),
}


def seconds(task: Callable[[], Any], times: int = 5) -> float:
    """The shortest of some runs, after one to warm up."""
    task()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        task()
        taken.append(time.perf_counter() - start)
    return min(taken)


def models(widths: list[int], demo: bool) -> Iterator[tuple[str, mv.VLM, Any, str]]:
    """Models here, each with a picture and a question."""
    for width in widths:
        vlm = mv.VLM(tiny.model(width=width), tiny.processor(), name=f"width {width}")
        yield f"width {width}", vlm, tiny.picture(), "is there a dog ?"
    if demo:
        yield "demo", mv.load("demo"), mv.demo.scenes()[0].image, "Is there a 7 in the image?"


def main() -> None:
    """Times each task here and there, and prints what was sent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--widths", type=int, nargs="*", default=[32, 128, 512])
    parser.add_argument("--demo", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    CONFIG.APP.REMOTE_LOGGING = False
    heads = f"{'jobs':>4} {'sent, kB':>9} {'back, kB':>9} {'here':>7} {'there':>7}"
    print(f"{'model':>10} {'weights, kB':>12} {'task':>11} {heads}")
    with loopback.serve() as server:
        for name, here, picture, question in models(asked.widths, asked.demo):
            folder = server.deploy(here.hf, here.processor, name.replace(" ", "-"))
            there = mv.load(folder, remote=mv.remote.Server(server.url, pause=0.005, longest=0.02))
            held = sum(x.numel() * x.element_size() for x in here.hf.parameters()) / 1000
            for task, ask in TASKS.items():
                prompts = here.prompt(picture, question), there.prompt(picture, question)
                before = server.ask("/counts")["jobs"]
                ask(there, prompts[1])
                sent = list(server.ask("/counts")["requests"].values())[before:]
                blob, back = (sum(one[key] for one in sent) / 1000 for key in ("blob", "out"))
                local = seconds(lambda ask=ask, prompt=prompts[0], vlm=here: ask(vlm, prompt))  # type: ignore[misc]
                remote = seconds(lambda ask=ask, prompt=prompts[1], vlm=there: ask(vlm, prompt))  # type: ignore[misc]
                numbers = f"{len(sent):4d} {blob:9.1f} {back:9.1f} {local:5.3f} s {remote:5.3f} s"
                print(f"{name:>10} {held:12.0f} {task:>11} {numbers}", flush=True)


if __name__ == "__main__":
    main()
