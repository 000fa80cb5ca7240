"""Jobs on other machines: what is known of them, what can run there, and how a result is collected later.

>>> mv.remote.status()  # doctest: +SKIP
>>> mv.remote.jobs()  # doctest: +SKIP
>>> mv.remote.resume("0b9f4c1e-...")  # doctest: +SKIP
"""

import json
from typing import TYPE_CHECKING, Any

from nnsight.ndif import get_local_env

from mechvlm import failures, ledger, places
from mechvlm.archs import ARCHS
from mechvlm.failures import JobError
from mechvlm.hosts import Host, Refused, Server, Unreachable, api_key
from mechvlm.jobs import unpacked, wait
from mechvlm.ledger import Job
from mechvlm.refusals import REFUSED

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["JobError", "Server", "compare", "forget", "jobs", "resume", "status", "traffic"]


def resume(job_id: str, timeout: float | None = None) -> Any:
    """What a job returned, waited for if it is not finished.

    The result stays on disk until the script that sent the job has it too, or `forget`.

    Args:
        timeout: seconds to wait; None as long as it takes.

    Returns:
        What ran there returned, as plain data. The script that sent the job makes runs and results of it, and has it at
        once when it is started again. Of a job that mechvlm did not send, what it saved, by name.

    Raises:
        ValueError: for a job that is not written down.
        JobError: where it failed, is not finished in time, or is no longer known to the server.
    """
    job = found(job_id)
    if job.state == "ERROR":
        raise failures.failed(job)
    if job.state == "COLLECTED":
        raise ValueError(
            f"a script has collected job {job_id!r} ({job.changed}); run that script again to have it anew."
        )
    saved = unpacked(job, wait(job, Host(job.host), Server(job.host, timeout)))
    return places.unpacked(saved["found"]["answer"]) if places.of_ours(saved) else saved


def found(job_id: str) -> Job:
    """The job of an id.

    Raises:
        ValueError: where none is written down.
    """
    job = ledger.read(str(job_id))
    if job is None:
        raise ValueError(
            f"there is no job {job_id!r} in {str(ledger.folder())!r}; mv.remote.jobs() lists those that are known, and "
            "the environment variable MECHVLM_JOBS names another folder."
        )
    return job


def jobs() -> "pd.DataFrame":
    """The jobs that are written down, a row each: by which line, where, in which state, and bytes of a kept result.

    States are those of the last question; `resume` asks anew.
    """
    import pandas as pd

    columns = ["job", "asked", "model", "host", "state", "description", "sent", "changed", "kept"]
    rows = [
        {
            **vars(job),
            "job": job.id,
            "model": job.model,
            "description": job.description.strip().rpartition("\n")[2],
            "kept": ledger.size(job),
        }
        for job in ledger.listed()
    ]
    return pd.DataFrame(rows, columns=columns)


def traffic(vlm: Any) -> "pd.DataFrame":
    """The bytes of each job that a model has had so far: what was sent, and what was brought back.

    Both compressed, as they travel; of a model loaded with remote="local", as they would. A job that an earlier process
    sent has 0 bytes sent.

    Example:
        >>> mv.remote.traffic(vlm).sum()
        sent    0
        back    0
        dtype: int64
    """
    import pandas as pd

    jobs = vlm.place.traffic if vlm.place.remote else ()
    return pd.DataFrame([*jobs], columns=["sent", "back"]).rename_axis("job").astype(int)


def forget(job_id: str) -> None:
    """Remove what is written down of a job, and its result; on the server it goes on.

    Raises:
        ValueError: for a job that is not written down.
    """
    ledger.strike(found(job_id).id)


def status(host: str | None = None) -> "pd.DataFrame":
    """The models that a server runs now, a row each, and whether mechvlm reads them.

    Args:
        host: its address; None for the one that nnsight is configured for, which is NDIF's unless changed.

    Returns:
        Columns model, revision, task, level (HOT: on its GPUs; WARM: in its memory), state, type and reads: "yes",
        "no, ..." with the reason, or "not known" where the server does not tell the model's type.

    Raises:
        JobError: where the server does not answer.
    """
    import pandas as pd

    columns = ["model", "revision", "task", "level", "state", "type", "reads"]
    once = {str(one.get("model_key") or one["repo_id"]): one for one in asked(host, "deployments")}
    return pd.DataFrame([described(one) for one in once.values()], columns=columns)


def described(one: dict[str, Any]) -> dict[str, str]:
    """A row of `status`, of what a server says of one model."""
    try:
        kind = str(json.loads(one.get("config") or "{}").get("model_type", ""))
    except ValueError:
        kind = ""
    task = str(one.get("task") or "")
    return {
        "model": str(one["repo_id"]),
        "revision": str(one.get("revision") or "main"),
        "task": task,
        "level": str(one["deployment_level"]),
        "state": str(one.get("application_state", "")),
        "type": kind,
        "reads": readable(kind, task),
    }


def readable(kind: str, task: str) -> str:
    """Whether mechvlm reads models of a type that are deployed for a task."""
    if task and task != "image-text-to-text":
        return f"no, it is deployed for {task}, and not for image-text-to-text"
    if kind in ARCHS:
        return "yes"
    if kind in REFUSED:
        return f"no, {REFUSED[kind]}"
    return f"no, {kind} is no model of pictures and words that it knows" if kind else "not known"


def compare(host: str | None = None) -> "pd.DataFrame":
    """The packages of a server beside those of this machine: `here`, `there`, and whether nnsight calls one critical.

    Args:
        host: as in `status`.

    Raises:
        JobError: where the server does not answer.
    """
    import pandas as pd
    from nnsight.ndif import EnvComparison

    there = asked(host, "env")
    packages = EnvComparison(get_local_env(), there).packages
    names = sorted(packages, key=lambda name: (not packages[name]["critical"], name))
    columns = {"local": "here", "remote": "there", "match": "same", "critical": "critical"}
    rows = [{"package": name, **{new: packages[name][old] for old, new in columns.items()}} for name in names]
    return pd.DataFrame(rows, columns=["package", *columns.values()])


def asked(host: str | None, what: str) -> Any:
    """What a server says of its models or of its packages.

    Raises:
        JobError: where it does not answer, or refuses.
    """
    one = Host(host)
    try:
        return one.deployments() if what == "deployments" else one.get("/env")
    except Unreachable as why:
        raise failures.silent(one.url, str(why)) from None
    except Refused as why:
        raise failures.refused(one.url, why.status, why.detail, bool(api_key())) from None
