"""A folder of links that holds what nnsight needs to run a model, and nothing else that is installed here.

Made from the requirements that the packages themselves state, in a tenth of a second.
"""

from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

SERVICE = Path(__file__).parent / "service"
WANTED = ("nnsight", "transformers", "einops", "pillow", "torchvision")
"""What a server has: nnsight and what it requires, einops and pillow, and torchvision where it is installed."""

ABSENT = ("mechvlm", "jaxtyping", "beartype", "xarray", "plotly", "pandas", "scipy", "statsmodels", "pytest")
"""What must not be importable there, so that what is shipped is all that is needed."""


def furnish(folder: Path) -> None:
    """Fill a folder with links to the packages of a server, their metadata, and the service itself."""
    folder.mkdir()
    for found in closure(WANTED):
        for entry in tops(found):
            link = folder / entry
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(entry))).resolve())
    (folder / SERVICE.name).symlink_to(SERVICE)


def closure(names: tuple[str, ...]) -> list[Distribution]:
    """The distributions of these names, and of all that they require; what is not installed is left out."""
    found: dict[str, Distribution] = {}
    asked: set[str] = set()
    left = list(names)
    while left:
        name = left.pop().lower().replace("_", "-").replace(".", "-")
        if name in asked:
            continue
        asked.add(name)
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        wanted = [Requirement(line) for line in found[name].requires or []]
        left += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return list(found.values())


def tops(found: Distribution) -> set[str]:
    """The files and folders that a distribution has in site-packages."""
    lines = (found.read_text("RECORD") or "").splitlines()
    entries = {line.split(",")[0].split("/")[0] for line in lines}
    return {entry for entry in entries if entry not in {"..", "__pycache__"} and not entry.endswith(".pth")}
