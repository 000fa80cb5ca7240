"""Jobs: what is asked of a model, run one after another, and what became of it, kept on disk."""

import importlib.util
import io
import json
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zstandard
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc

from .faults import Faults
from .guard import Unpickler, stand


@dataclass
class Job:
    """One request: what was sent, and what has been said about it so far."""

    id: str
    request: RequestModel
    blob: bytes
    received: float = field(default_factory=time.monotonic)
    said: list[ResponseModel] = field(default_factory=list)
    heard: threading.Condition = field(default_factory=threading.Condition)


class Runs:
    """The models that are deployed, and the jobs that wait for them."""

    def __init__(self, results: Path, faults: Faults, dtype: torch.dtype) -> None:
        self.results, self.faults, self.dtype = results, faults, dtype
        listed = results / "deployed"
        self.models = [Path(line) for line in listed.read_text().splitlines()] if listed.exists() else []
        self.jobs: dict[str, Job] = {}
        self.loaded: dict[str, Any] = {}
        self.waiting: queue.Queue[Job] = queue.Queue()
        self.at = "http://127.0.0.1:0"
        stand()
        threading.Thread(target=self.work, daemon=True).start()

    def deploy(self, folder: Path) -> None:
        """Deploy the model of a folder, and again after a restart."""
        self.models = [*dict.fromkeys([*self.models, folder])]
        self.loaded.pop(key_of(folder), None)
        (self.results / "deployed").write_text("\n".join(str(one) for one in self.models))

    def deployed(self) -> dict[str, dict[str, Any]]:
        """What `/status` says of each model."""
        shared = {"revision": None, "task": "image-text-to-text", "trust_remote_code": False}
        running = {"deployment_level": "HOT", "application_state": "RUNNING"}
        folders = self.models if self.faults.deployed else []
        return {
            f"ModelActor:{key_of(one)}": {
                "repo_id": str(one),
                "model_key": key_of(one),
                "config": (one / "config.json").read_text(),
                **shared,
                **running,
            }
            for one in folders
        }

    def take(self, job: Job) -> ResponseModel:
        """Put a job into the queue, or refuse it."""
        self.jobs[job.id] = job
        answer = self.say(job, Status.RECEIVED, "Your job has been received and is waiting to be queued.")
        if not self.faults.hang:
            self.waiting.put(job)
        return answer

    def say(self, job: Job, status: Status, description: str, data: Any = None) -> ResponseModel:
        """Note what is to be told about a job."""
        answer = ResponseModel(id=job.id, status=status, description=description, data=data)
        half = self.results / f"{job.id}.half"
        half.write_text(answer.model_dump_json())
        half.rename(half.with_suffix(".json"))  # nobody reads half of it
        with job.heard:
            job.said.append(answer)
            job.heard.notify_all()
        return answer

    def last(self, name: str) -> str | None:
        """What was last said about a job, as JSON, from before a restart too; None where it is not known."""
        said = self.results / f"{Path(name).name}.json"
        if self.faults.forget or not said.exists():
            return None
        return said.read_text()

    def work(self) -> None:
        """Run jobs, one after another, as long as the process lives."""
        while True:
            job = self.waiting.get()
            while time.monotonic() - job.received < self.faults.queue:
                self.say(job, Status.QUEUED, f"Moved to position {self.waiting.qsize() + 1} in Queue.")
                time.sleep(0.05)
            self.say(job, Status.DISPATCHED, "Your job has been sent to the model deployment.")
            if self.faults.description:
                self.say(job, Status.ERROR, self.faults.description)
                continue
            try:
                saved = self.run(job)
            except Exception as error:  # whatever shipped code raises is its sender's to know
                self.say(job, Status.ERROR, f"{traceback.format_exc()}\n{error}")
                continue
            content = packed(saved, job.request.compress)
            (self.results / f"{job.id}.result").write_bytes(content)
            self.say(job, Status.COMPLETED, "Your job has been completed.", data=f"{self.at}/result/{job.id}")

    def run(self, job: Job) -> dict[str, Any]:
        """What a job saved, by name."""
        model = self.model(job.request.model_key)
        SOURCES.clear()  # nnsight never looks at a file again, and the next request may come from it, changed
        BLOCKS.clear()
        known = model._remoteable_persistent_objects()
        tracer = RequestModel.deserialize(job.blob, known, job.request.compress, unpickler=Unpickler)
        model._remoteable_set_env(job.request.env)
        self.say(job, Status.RUNNING, "Your job has started running.")
        return under(self.dtype, lambda: executed(tracer))

    def model(self, key: str) -> Any:
        """The model of a key, loaded when it is first asked for."""
        if key not in self.loaded:
            model = TransformersModel.from_model_key(key, dispatch=True)
            model._module.requires_grad_(False)
            self.loaded[key] = model
        return self.loaded[key]


def key_of(folder: Path) -> str:
    """The key under which clients ask for the model of a folder."""
    named = {"repo_id": str(folder), "revision": None, "task": "image-text-to-text"}
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(named)}"


def executed(tracer: Any) -> dict[str, Any]:
    """Run a tracer's block; the values that it saved, by name."""
    frame = tracer.info.frame
    inc()
    try:
        tracer.execute(tracer.info.code)
        return {name: value for name, value in frame.f_locals.items() if id(value) in _saves()}
    finally:
        dec()


def under(dtype: torch.dtype, function: Callable[[], Any]) -> Any:
    """What a function returns, with another default type of numbers while it runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return function()
    finally:
        torch.set_default_dtype(before)


def packed(saved: dict[str, Any], compress: bool) -> bytes:
    """A result as it is sent."""
    with io.BytesIO() as file:
        torch.save(saved, file)
        content = file.getvalue()
    return zstandard.ZstdCompressor(level=6).compress(content) if compress else content


def absent(names: list[str]) -> dict[str, bool]:
    """Whether each of some packages cannot be imported here."""
    return {name: importlib.util.find_spec(name) is None for name in names}
