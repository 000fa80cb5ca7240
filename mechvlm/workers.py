"""One model in each of several processes that Ray starts, on one machine or many: `mechvlm[ray]`.

A job is a function of a model, and every worker runs all of it. What it does with `out=` they divide by that folder,
unit by unit (`mechvlm.units`); so any experiment that takes `out=` is a job, and so is a function of yours with some of
them. `accelerate launch script.py` does the same with a whole script, and needs nothing of this module.

Rule this module guards: a worker that dies costs the unit that it was at. Another worker takes that, a new process
takes the worker's place, and what comes back is what one process would have found.

>>> with mv.workers.Pool("demo", workers=2) as pool:  # doctest: +SKIP
...     found = pool.run(mv.evaluate.pope, "demo", out="answers")
"""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from mechvlm.load import load
from mechvlm.processes import Process, here, seated
from mechvlm.sites import number, whole
from mechvlm.vlm import VLM

__all__ = ("Pool", "here")

Model = str | Path | Callable[[], VLM]
"""What a worker loads: as `mv.load` takes it, or a function that makes a model."""
FREED = 10.0
"""Seconds until what a closed pool held is surely there again."""


class Worker:
    """A process's model, and the jobs it does with it.

    Args:
        model, settings: as in `Pool`.
        seat: which of the workers it is.
        folder: where the script was started, to which paths are relative.
    """

    def __init__(self, model: Model, settings: dict[str, Any], seat: Process, folder: str) -> None:
        self.model, self.settings, self.seat = model, settings, seat
        self.vlm: VLM | None = None
        if Path(folder).is_dir():
            os.chdir(folder)

    def run(self, job: tuple[Callable[..., Any], tuple, dict[str, Any]]) -> Any:
        """What a function makes of the model, which is loaded for the first of them."""
        function, arguments, named = job
        if self.vlm is None:
            self.vlm = self.model() if callable(self.model) else load(self.model, **self.settings)
        with seated(self.seat):
            return function(self.vlm, *arguments, **named)


class Pool:
    """Some workers, each with a model of its own.

    Args:
        model: as `mv.load` takes it, or a function that makes a model; loaded once by each worker.
        workers: how many.
        gpus: how many GPUs each has to itself; by default one where Ray has any, else none.
        replacements: how many workers that died may be replaced, over the life of the pool.
        settings: further ones of `mv.load`.

    Raises:
        ValueError, TypeError: for numbers that cannot be, or more workers than Ray has room for; for a model that
            cannot be loaded, as `mv.load` says it.
        ModuleNotFoundError: where Ray is not installed.

    Example:
        >>> pool = mv.workers.Pool("llava-hf/llava-1.5-7b-hf", workers=8)  # doctest: +SKIP
        >>> found = pool.run(mv.evaluate.pope, "pope.json", "val2014", out="answers")  # doctest: +SKIP
        >>> pool.close()  # doctest: +SKIP
    """

    def __init__(
        self, model: Model, workers: int, gpus: float | None = None, replacements: int = 3, **settings: Any
    ) -> None:
        if whole("workers", workers) < 1 or whole("replacements", replacements) < 0:
            raise ValueError(
                f"workers={workers} with replacements={replacements} run nothing; give 1 or more workers, and 0 or "
                "more replacements."
            )
        if not installed():
            raise ModuleNotFoundError('Ray is not installed; pip install "mechvlm[ray]" brings it.')
        self.model, self.settings, self.left, self.died = model, settings, replacements, 0
        self.started, self.workers = begun(), list[Any]()
        with ExitStack() as failed:
            failed.callback(self.close)
            self.each = _room(workers, gpus)
            self.workers = [self._new(at, workers) for at in range(workers)]
            self.run(_nothing)
            failed.pop_all()

    def run(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What a function of a model finds, with as many models as there are workers.

        Args:
            function: its first argument is the worker's model: an experiment, or a function of yours, which makes its
                prompts from the model and may hold edits. Each worker calls it; what takes `out=` in it is shared.
            arguments, named: what else it is given; sent once. Folders must be seen by all workers.

        Returns:
            What the first worker to finish returned, which is what they all return.

        Raises:
            RuntimeError: where more workers died than may be replaced. What they finished is kept.

        Example:
            >>> def profile(vlm):
            ...     prompts = [vlm.prompt(one.image, "Is there a 7 in the image?") for one in mv.demo.scenes()[:20]]
            ...     return mv.attention_profile(vlm, prompts, out="profile")
            >>> found = pool.run(profile)  # doctest: +SKIP
        """
        import ray

        job = ray.put((function, arguments, named))
        running = {worker.run.remote(job): at for at, worker in enumerate(self.workers)}
        found: list[Any] = []
        while running:
            (done,), _ = ray.wait(list(running))
            at = running.pop(done)
            try:
                found.append(ray.get(done))
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                self._replace(at, error)
                running |= {} if found else {self.workers[at].run.remote(job): at}
            except ray.exceptions.RayTaskError as error:
                for other in running.values():  # would do the rest before it came upon the same
                    ray.kill(self.workers[other])
                    self.workers[other] = self._new(other, len(self.workers))
                raise error.cause from error
        return found[0]

    def close(self) -> None:
        """End the workers, and Ray where this pool started it."""
        import ray

        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        if self.started:
            ray.shutdown()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new(self, at: int, count: int) -> Any:
        """A worker's process; its model is loaded by its first job."""
        import ray

        seat = Process(at, count, 0, quiet=at > 0)
        made = ray.remote(Worker).options(**self.each)
        return made.remote(self.model, self.settings, seat, str(Path.cwd()))

    def _replace(self, at: int, error: Exception) -> None:
        """A new worker in the place of one that died."""
        self.died += 1
        if self.died > self.left:
            raise RuntimeError(
                f"{self.died} workers died and replacements={self.left} (the last: {first_line(error)}); what they "
                "finished is kept, so the same job with the same out= goes on from there."
            ) from error
        self.workers[at] = self._new(at, len(self.workers))


def installed() -> bool:
    """Whether Ray is there."""
    return find_spec("ray") is not None


def begun() -> bool:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS names; whether it was not running before."""
    import ray

    if ray.is_initialized():
        return False
    ray.init(include_dashboard=False, log_to_driver=True)
    return True


def _room(workers: int, gpus: float | None) -> dict[str, Any]:
    """What each worker is given of the cluster.

    Raises:
        ValueError: where there is not as much, so that some would wait for ever.
    """
    import ray

    there = ray.cluster_resources()
    each = (1.0 if there.get("GPU") else 0.0) if gpus is None else number("gpus", gpus)
    for what, one in (("GPU", each), ("CPU", 1.0)):
        if workers * one > there.get(what, 0.0):
            raise ValueError(
                f"workers={workers} ask for {workers * one:g} {what}s, and Ray has {there.get(what, 0.0):g}; give "
                f"fewer workers, or start Ray with more (ray.init(num_{what.lower()}s=...))."
            )
    for what, one in (("GPU", each), ("CPU", 1.0)):
        free = _free(what, workers * one)
        if workers * one > free + 1e-6:
            raise ValueError(
                f"workers={workers} ask for {workers * one:g} {what}s, and of Ray's only {free:g} are free; close what "
                "holds the others, such as another pool, or give fewer workers."
            )
    return {"num_cpus": 1, "num_gpus": each, "scheduling_strategy": "SPREAD"}


def _free(what: str, wanted: float) -> float:
    """How much of the cluster nobody holds; what was let go just now comes back after a moment."""
    import ray

    end = time.monotonic() + FREED
    while (free := float(ray.available_resources().get(what, 0.0))) < wanted and time.monotonic() < end:
        time.sleep(0.2)
    return free


def first_line(error: Exception) -> str:
    """The first line of what Ray says, to stand within another sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def _nothing(vlm: VLM) -> None:
    """The first job of a pool: what cannot be loaded is refused when the pool is made."""
