"""What is known of jobs, on disk: one JSON file a job, and beside it what the server sent, until a script has it.

Rule this module guards: a job is written down before anybody waits for it, and no file holds a key.

The folder is what the environment variable `MECHVLM_JOBS` names, else `mechvlm/jobs` in the user's folder for caches.
"""

import json
import os
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path

NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")
"""What a job may be called, since a file is called after it."""

ENDED = ("ERROR", "COLLECTED")
"""States from which nothing is to be had any more."""

PAST: set[Path] = set()
"""Files of jobs that this process has seen in such a state, which they never leave."""

MONTH = timedelta(days=30)
"""For how long such a job is listed."""


def now() -> str:
    """The time, in UTC, to the millisecond."""
    return before(timedelta())


def before(span: timedelta) -> str:
    """The time that it was so long ago, as `now` writes it; earlier times come first by the alphabet."""
    return (datetime.now(UTC).replace(tzinfo=None) - span).isoformat(" ", "milliseconds")


@dataclass
class Job:
    """One job, as it is written down.

    Attributes:
        id: what the server calls it.
        host: the server's address.
        model_key: nnsight's name of the model there.
        fingerprint: what the job asks for, as its sender tells it; "" where a job is not to be found again by it.
        state: SENDING, then the server's words (RECEIVED, QUEUED, RUNNING, COMPLETED, ERROR ...), then COLLECTED.
        description: what the server said with it; for an error its whole traceback.
        sent, changed: times in UTC.
        compress: whether what is sent and what comes back is compressed.
        asked: the user's line that asked for it.
    """

    id: str
    host: str
    model_key: str
    fingerprint: str = ""
    state: str = "SENDING"
    description: str = ""
    sent: str = field(default_factory=now)
    changed: str = ""
    compress: bool = True
    asked: str = ""

    @property
    def model(self) -> str:
        """The checkpoint's name."""
        return repository(self.model_key)

    @property
    def age(self) -> float:
        """Seconds since it was sent."""
        return (datetime.fromisoformat(now()) - datetime.fromisoformat(self.sent)).total_seconds()


def repository(model_key: str) -> str:
    """The checkpoint that nnsight's key of a model names; the key itself where it is of another form."""
    try:
        return str(json.loads(model_key.partition(":")[2])["repo_id"])
    except (ValueError, KeyError, TypeError):
        return model_key


def folder() -> Path:
    """Where jobs are written down; it is made where it is not there, for its owner alone."""
    given = os.environ.get("MECHVLM_JOBS")
    place = Path(given).expanduser() if given else caches() / "mechvlm" / "jobs"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    return place


def caches() -> Path:
    """The user's folder for caches."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser()
    fallback = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or fallback).expanduser()


def write(job: Job, state: str | None = None, description: str | None = None) -> None:
    """Write a job down, in a new state if one is given."""
    job.state = job.state if state is None else state
    job.description = job.description if description is None else description
    job.changed = now()
    put(folder() / f"{job.id}.json", json.dumps(asdict(job), indent=1).encode())


def put(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    half = path.with_name(f"{path.name}.{os.getpid()}.half")
    half.write_bytes(content)
    half.replace(path)


def read(name: str) -> Job | None:
    """The job of a name; None where none is written down."""
    path = folder() / f"{name}.json"
    if not NAME.fullmatch(name) or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return Job(**{one.name: found[one.name] for one in fields(Job) if one.name in found})
    except FileNotFoundError:
        return None  # another process has removed it meanwhile
    except (ValueError, TypeError):
        return None  # of no use to anybody; `forget` removes it


def listed() -> list[Job]:
    """All jobs that are written down, those sent first first."""
    found = [read(path.stem) for path in folder().glob("*.json")]
    return sorted((job for job in found if job is not None), key=lambda job: (job.sent, job.id))


def open_job(fingerprint: str, host: str, model_key: str) -> Job | None:
    """The newest job that asks a model of a server for the same thing, and whose result nobody has collected."""
    if not fingerprint:
        return None
    same = [job for job in begun() if (job.fingerprint, job.host, job.model_key) == (fingerprint, host, model_key)]
    return max(same, key=lambda job: (job.sent, job.id), default=None)


def begun() -> list[Job]:
    """The jobs from which something is to be had. Files of others are read once by a process, and go after a month."""
    found = []
    for path in folder().glob("*.json"):
        job = None if path in PAST else read(path.stem)
        if job is not None and job.state not in ENDED:
            found.append(job)
        elif job is not None:
            PAST.add(path)
            if job.sent < before(MONTH):
                strike(job.id)
    return found


def keep(job: Job, content: bytes) -> None:
    """Keep a result as the server sent it."""
    put(folder() / f"{job.id}.result", content)


def kept(job: Job) -> bytes | None:
    """The result that is kept; None where none is."""
    try:
        return (folder() / f"{job.id}.result").read_bytes()
    except FileNotFoundError:
        return None


def size(job: Job) -> int:
    """How many bytes of a result are kept."""
    path = folder() / f"{job.id}.result"
    return path.stat().st_size if path.is_file() else 0


def lose(job: Job) -> None:
    """Remove a result that is of no use; the job stays written down."""
    (folder() / f"{job.id}.result").unlink(missing_ok=True)


def collected(job: Job) -> None:
    """Note that a script has the result, which is no longer kept."""
    write(job, "COLLECTED", "")
    lose(job)


def strike(name: str) -> None:
    """Remove all that is written down of a job."""
    for ending in ("json", "result"):
        (folder() / f"{name}.{ending}").unlink(missing_ok=True)
