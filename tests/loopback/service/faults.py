"""What can be made to go wrong: set by `POST /fail`, with a JSON object of these names."""

import threading
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class Faults:
    """What goes wrong now.

    Attributes:
        key: the only key that is taken; None takes any, and none.
        detail: what a refused key is answered with; "{key}" in it becomes the key that was sent.
        refuses: HTTP's number for a key that is not taken.
        named: whether a job is called as its sender asks, as it was up to February 2026; it is named anew today.
        deployed: whether the models are.
        packages: versions that `/env` gives instead of the true ones.
        queue: seconds that a job stays queued.
        hang: jobs are taken, and never finish.
        drop: how many of the next submissions are taken, and not answered.
        lose: how many of the next submissions are neither taken nor answered.
        drop_polls: how many of the next questions about a job are not answered.
        unavailable: how many of the next submissions and questions get a 503.
        late: how many of the next questions are answered as if nothing were known yet.
        forget: jobs are no longer known.
        description: every job ends in an error of this description.
    """

    key: str | None = None
    detail: str = "Missing or invalid API key. Please visit https://login.ndif.us/ to create a new one."
    refuses: int = 401
    named: bool = True
    deployed: bool = True
    packages: dict[str, str] = field(default_factory=dict)
    queue: float = 0.0
    hang: bool = False
    drop: int = 0
    lose: int = 0
    drop_polls: int = 0
    unavailable: int = 0
    late: int = 0
    forget: bool = False
    description: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def set(self, given: dict[str, Any]) -> None:
        """Take what is given, and set right all that is not."""
        unknown = set(given) - {one.name for one in fields(self)}
        if unknown:
            raise ValueError(f"there are no faults {sorted(unknown)}")
        vars(self).update(vars(Faults(**given)))

    def once(self, name: str) -> bool:
        """Whether a counted fault is to happen now; it then happens once less often."""
        with self.lock:
            left = vars(self)[name]
            vars(self)[name] = max(left - 1, 0)
            return left > 0
