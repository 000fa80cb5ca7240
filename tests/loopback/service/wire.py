"""HTTP: nnsight 0.8.1's paths, and some of our own (`/deploy`, `/fail`, `/counts`, `/absent`)."""

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nnsight.ndif import get_local_env
from nnsight.schema.request import RequestModel
from nnsight.schema.response import Status

from .guard import SERVED
from .runs import Job, Runs, absent

SAFE_ID = re.compile(r"[0-9a-zA-Z-]{1,64}")
ENDED = {Status.COMPLETED, Status.ERROR}
MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""What a websocket's key is hashed with (RFC 6455, section 1.3)."""


class Wire(ThreadingHTTPServer):
    """The server: its jobs, and how many bytes went in and out for each."""

    daemon_threads = True

    def __init__(self, port: int, runs: Runs) -> None:
        super().__init__(("127.0.0.1", port), Answers)
        self.runs, self.faults = runs, runs.faults
        self.counts: dict[str, dict[str, int]] = {}
        self.sessions: dict[str, Job] = {}
        self.subscribed = threading.Condition()
        runs.at = f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    """One connection."""

    server: Wire
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: what is sent may hold what nobody else should read."""

    def give(self, content: bytes | str | dict, status: int = 200, kind: str = "application/json") -> None:
        """Answer with JSON, or with bytes."""
        text = json.dumps(content) if isinstance(content, dict) else content
        body = text.encode() if isinstance(text, str) else text
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> None:
        """Close the connection without a word."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """`/response/{id}`, `/result/{id}`, `/status`, `/env`, `/whoami`, `/subscribe`, `/counts` and `/absent`."""
        path, _, name = self.path.lstrip("/").partition("/")
        simple = {"status": self.status, "env": self.env, "whoami": self.whoami, "counts": self.counted}
        if path in simple:
            self.give(simple[path]())
        elif path == "response":
            self.response(name)
        elif path == "result":
            self.result(name)
        elif path == "subscribe":
            self.subscribe()
        elif path == "absent":
            self.give({"absent": absent(name.split(",")), "path": sys.path, "served": sorted(SERVED)})
        else:
            self.give({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        """`/request`, `/deploy` and `/fail`."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/deploy":
            self.server.runs.deploy(Path(json.loads(body)["folder"]))
            return self.give({})
        if self.path == "/fail":
            self.server.faults.set(json.loads(body)["all"])
            return self.give({})
        return self.request_(body) if self.path == "/request" else self.give({"detail": "Not Found"}, 404)

    def request_(self, body: bytes) -> None:
        """Take a job."""
        faults = self.server.faults
        key = self.headers.get("ndif-api-key")
        if faults.once("lose"):
            return self.hang_up()
        if faults.key is not None and key != faults.key:
            return self.give({"detail": faults.detail.replace("{key}", str(key))}, faults.refuses)
        if faults.once("unavailable"):
            return self.give({"detail": "Service Unavailable"}, 503)
        parts = multipart(body, self.headers["Content-Type"])
        request = RequestModel.model_validate_json(parts["data"])
        if request.model_key not in {one["model_key"] for one in self.server.runs.deployed().values()}:
            return self.give({"detail": "Model is not deployed."}, 404)
        given = self.headers.get("ndif-request_id", "") if faults.named else ""
        job = Job(given if SAFE_ID.fullmatch(given) else str(uuid.uuid4()), request, parts["blob"])
        self.server.counts[job.id] = {"blob": len(job.blob), "in": len(body), "out": 0, "polls": 0}
        with self.server.subscribed:
            self.server.sessions[request.session_id] = job
            self.server.subscribed.notify_all()
        answer = self.server.runs.take(job)
        return self.hang_up() if faults.once("drop") else self.give(answer.model_dump_json())

    def response(self, name: str) -> None:
        """What was last said about a job."""
        faults = self.server.faults
        if faults.once("drop_polls"):
            return self.hang_up()
        if faults.once("unavailable"):
            return self.give({"detail": "Service Unavailable"}, 503)
        said = None if faults.once("late") else self.server.runs.last(name)
        if name in self.server.counts:
            self.server.counts[name]["polls"] += 1
        return self.give({"detail": "Not Found"}, 404) if said is None else self.give(said)

    def result(self, name: str) -> None:
        """A result, as it is kept."""
        kept = self.server.runs.results / f"{name}.result"
        if not SAFE_ID.fullmatch(name) or not kept.exists():
            return self.give({"detail": "Not Found"}, 404)
        content = kept.read_bytes()
        if name in self.server.counts:
            self.server.counts[name]["out"] += len(content)
        return self.give(content, kind="application/octet-stream")

    def status(self) -> dict:
        """What is deployed."""
        return {"deployments": self.server.runs.deployed()}

    def counted(self) -> dict:
        """How many jobs there were, and their bytes."""
        return {"jobs": len(self.server.counts), "requests": self.server.counts}

    def env(self) -> dict:
        """Which packages are here, or said to be."""
        found = get_local_env()
        return {**found, "packages": {**found["packages"], **self.server.faults.packages}}

    def whoami(self) -> dict:
        """Whose key was sent."""
        known = self.server.faults.key is not None and self.headers.get("ndif-api-key") == self.server.faults.key
        return {"email": "you@example.org" if known else None, "tags": []}

    def subscribe(self) -> None:
        """A websocket, for clients that wait on one: the session's name, then all that is said about its job."""
        accept = base64.b64encode(hashlib.sha1(self.headers["Sec-WebSocket-Key"].encode() + MAGIC).digest()).decode()
        self.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)):
            self.send_header(name, value)
        self.end_headers()
        session = str(uuid.uuid4())
        self.wfile.write(frame(json.dumps({"session_id": session})))
        with self.server.subscribed:
            self.server.subscribed.wait_for(lambda: session in self.server.sessions, timeout=60)
        job, told = self.server.sessions[session], 0
        while not told or job.said[told - 1].status not in ENDED:
            with job.heard:
                if len(job.said) == told:
                    job.heard.wait(timeout=60)
            for answer in job.said[told:]:
                self.wfile.write(frame(answer.model_dump_json()))
                told += 1
        self.close_connection = True


def multipart(body: bytes, kind: str) -> dict[str, bytes]:
    """The parts of a form by their names."""
    edge = b"--" + kind.partition("boundary=")[2].strip('"').encode()
    parts = {}
    for part in body.split(edge)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        named = re.search(rb'[; ]name="([^"]*)"', head)
        if named:
            parts[named[1].decode()] = content.removesuffix(b"\r\n")
    return parts


def frame(text: str) -> bytes:
    """A text message as a websocket's frame (RFC 6455, section 5.2)."""
    body = text.encode()
    short = len(body) < 126
    size = bytes([len(body)]) if short else b"\x7e" + struct.pack(">H", len(body))
    if len(body) >= 1 << 16:
        size = b"\x7f" + struct.pack(">Q", len(body))
    return b"\x81" + size + body
