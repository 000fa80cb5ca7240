"""A server on this machine that speaks nnsight 0.8.1's wire protocol, in an environment of its own without mechvlm.

>>> with loopback.serve() as server:  # or the fixture `server`, one for all tests of a process
...     folder = server.deploy(tiny.model(), tiny.processor())
...     model = loopback.client(folder)
...     with model.session(remote=server.url):
...         ...
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

from loopback.environment import furnish

PATIENCE = 120.0
"""Seconds until a server that has not begun to answer is given up; it takes the time of importing torch."""

START = "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module('service', run_name='__main__')"


@dataclass
class Server:
    """A server in a process of its own; `stop` and `start` keep its port, and what it had finished."""

    folder: Path
    options: Sequence[str] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is reached."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settled = self.folder / "port"
        settled.unlink(missing_ok=True)
        kept, log = self.folder / "results", self.folder / "log"
        kept.mkdir(exist_ok=True)
        arguments = [f"--port={self.port}", f"--results={kept}", f"--settled={settled}", *self.options]
        command = [sys.executable, "-I", "-S", "-c", START, str(self.folder / "site-packages")]
        env = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as lines:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=lines,
                stderr=lines,
                cwd=self.folder,
                env=env,
            )
        end = time.monotonic() + PATIENCE
        while not settled.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the loopback server did not start:\n{log.read_text()}")
            time.sleep(0.02)
        self.port = int(settled.read_text())

    def stop(self) -> None:
        """Kill it, as a machine that loses its power would be."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self.process = None

    def ask(self, path: str, **given: Any) -> Any:
        """The JSON that a path answers with; what is given is posted as JSON."""
        body = json.dumps(given).encode() if given else None
        with urlopen(Request(self.url + path, data=body)) as answer:
            return json.loads(answer.read())

    def deploy(self, model: Any, processor: Any, name: str = "tiny") -> Path:
        """Save a model, and deploy it; the folder is what it is loaded by."""
        folder = self.folder / "models" / name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        self.ask("/deploy", folder=str(folder))
        return folder

    def fail(self, **how: Any) -> None:
        """Set what goes wrong from now on (`service.faults`); nothing given sets all right again."""
        self.ask("/fail", all=how)


@contextmanager
def serve(options: Sequence[str] = ()) -> Iterator[Server]:
    """A running server, which is gone when the block ends.

    Args:
        options: of its command line: `--default-dtype=bfloat16` is what the code that NDIF published in February 2026
            ran jobs under; `--weightless` keeps weights from shipped code (`service.runner`).
    """
    with TemporaryDirectory() as folder:
        furnish(Path(folder) / "site-packages")
        server = Server(Path(folder), options)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def client(folder: Path, processor: Any = None) -> Any:
    """The nnsight model of a checkpoint folder without its weights, whose key the server knows."""
    from nnsight.modeling import huggingface
    from nnsight.modeling.transformers import TransformersModel
    from transformers import AutoProcessor

    huggingface._ID_CACHE[str(folder)] = str(folder)  # else the key of a model is asked of the hub
    given = processor or AutoProcessor.from_pretrained(folder)
    return TransformersModel(str(folder), task="image-text-to-text", processor=given)
