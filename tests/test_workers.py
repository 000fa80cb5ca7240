"""Two processes on one folder, by accelerate and by Ray; one is killed in mid-run, and nothing is lost or different."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechvlm as mv
from mechvlm import workers

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="runs in the environment of .ci/run that has Ray")
needs_accelerate = pytest.mark.skipif(
    find_spec("accelerate") is None, reason="runs in the environment of .ci/run that has accelerate"
)

JOB = '''
import os, signal, sys, time
from pathlib import Path

import numpy as np

import mechvlm as mv

OUT, AMOUNT = Path(sys.argv[1]), 0.5


def job(vlm, out, dies):
    """An evaluation with edits and a profile; the second process kills itself at its second picture, once.

    Until then the first one stays at its first picture, however late the second may be.
    """
    from mechvlm.evaluate.task import Task
    from mechvlm.processes import here

    own, asked = Task.answers, []

    def dying(self, items):
        asked.append(items)
        if dies and here().number == 1 and len(asked) == 2 and not (out / "killed").exists():
            (out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while dies and here().number == 0 and not (out / "killed").exists():
            time.sleep(0.05)
        return own(self, items)

    Task.answers = dying
    edits = lambda prompt: [mv.bias_attention(2, prompt.image, AMOUNT)]
    found = mv.evaluate.pope(vlm, mv.evaluate.read_pope("demo", "adversarial")[:60], edits=edits, out=out / "pope")
    prompts = [vlm.prompt(one.image, "Is there a 7 in the image?") for one in mv.demo.scenes()[:12]]
    profile = mv.attention_profile(vlm, prompts, out=out / "profile")
    Task.answers = own
    return {"margin": found.margin.values, "mass": profile.mass.values, "computed": found.attrs["answers_computed"]}
'''

LAUNCHED = """
from mechvlm.processes import here

np.savez(OUT / f"found-{here().number}.npz", **job(mv.load("demo"), OUT, True))
"""

POOLED = """
import json

import ray


def dying(vlm):
    os.kill(os.getpid(), signal.SIGKILL)


def said(wrong):
    try:
        wrong()
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        return str(error)


if __name__ == "__main__":
    with mv.workers.Pool("demo", 2, replacements=1) as pool:
        np.savez(OUT / "found-0.npz", **pool.run(job, OUT, True))
        told = {"died": pool.died, "raised": said(lambda: pool.run(lambda vlm: job(vlm, OUT, 1 / 0)))}
        told["folder"] = said(lambda: pool.run(mv.evaluate.pope, mv.evaluate.read_pope("demo", "adversarial")[:12]))
        told["many"] = said(lambda: mv.workers.Pool("demo", 10_000))
        told["busy"] = said(lambda: mv.workers.Pool("demo", int(ray.cluster_resources()["CPU"]), gpus=0))
        told["again"] = pool.run(lambda vlm: vlm.name)
        told["dead"] = said(lambda: pool.run(dying))
    (OUT / "told.json").write_text(json.dumps(told))
"""


def started(folder: Path, script: str, *launcher: str) -> None:
    """Run a script behind a launcher, to its end."""
    path = folder / "script.py"
    path.write_text(JOB + script)
    shimmed = str(Path(__file__).parent / "shimmed")
    paths = [shimmed, str(Path(mv.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    words = [sys.executable, *launcher, str(path), str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@cache
def alone() -> dict[str, Any]:
    """What one process finds without a folder."""
    vlm, adversarial = mv.load("demo"), mv.evaluate.read_pope("demo", "adversarial")[:60]
    found = mv.evaluate.pope(vlm, adversarial, edits=lambda prompt: [mv.bias_attention(2, prompt.image, 0.5)])
    prompts = [vlm.prompt(one.image, "Is there a 7 in the image?") for one in mv.demo.scenes()[:12]]
    return {"margin": found.margin.values, "mass": mv.attention_profile(vlm, prompts).mass.values}


def check(folder: Path, count: int) -> None:
    """Assert that processes found what one finds, to the last bit, and that one of them was killed."""
    for number in range(count):
        found = np.load(folder / f"found-{number}.npz")
        for name, values in alone().items():
            np.testing.assert_array_equal(found[name], values, strict=True)
    assert (folder / "killed").exists()
    assert len(list((folder / "pope").glob("answers-*.nc"))) == 10  # pictures, each of them asked about once


@pytest.mark.slow
@needs_accelerate
def test_processes_that_accelerate_launches_find_what_one_finds(tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--max_restarts", "1"]
    started(tmp_path, LAUNCHED, *launch, "--main_process_port", "0")
    check(tmp_path, 2)


@pytest.mark.slow
@needs_ray
def test_workers_that_ray_starts_find_what_one_finds(tmp_path: Path) -> None:
    started(tmp_path, POOLED)
    check(tmp_path, 1)
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["died"], told["again"], told["raised"]) == (1, "demo", "division by zero")
    assert told["folder"].startswith("this is process ")
    assert told["many"].startswith("workers=10000 ask for 10000 ")
    assert told["many"].endswith("...)).") and "s, and Ray has " in told["many"]
    assert " are free; close what holds the others, such as another pool, or give fewer " in told["busy"]
    assert told["dead"].startswith("2 workers died and replacements=1 (the last: ")
    assert told["dead"].endswith(
        "); what they finished is kept, so the same job with the same out= goes on from there."
    )


@pytest.mark.parametrize(("count", "more"), [(0, {}), (2, {"replacements": -1})])
def test_a_pool_without_workers_is_refused(count: int, more: dict[str, int]) -> None:
    with pytest.raises(ValueError) as refused:
        workers.Pool("demo", count, **more)
    assert str(refused.value) == (
        f"workers={count} with replacements={more.get('replacements', 3)} run nothing; give 1 or more workers, and 0 "
        "or more replacements."
    )


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "installed", lambda: False)
    with pytest.raises(ModuleNotFoundError) as refused:
        workers.Pool("demo", 2)
    assert str(refused.value) == 'Ray is not installed; pip install "mechvlm[ray]" brings it.'


def test_a_worker_is_its_model_and_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray: what a worker's process does."""
    from mechvlm.processes import Process

    monkeypatch.chdir(tmp_path.parent)
    made = list[str]()

    def model() -> Any:
        made.append("model")
        return "a model"

    worker = workers.Worker(model, {}, Process(1, 2), str(tmp_path))
    seen = [
        worker.run((lambda vlm, at, name: (vlm, at, name, workers.here().number), (3,), {"name": "x"}))
        for _ in range(2)
    ]
    assert (seen, made) == ([("a model", 3, "x", 1)] * 2, ["model"])
    assert Path.cwd() == tmp_path
