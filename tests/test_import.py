"""What importing and installing mechvlm brings: nothing heavy beyond nnsight, and every file of the package.

Time is measured by bench/import_time.py; here only what is imported is looked at, which is the same on every machine.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

# Heavy, and needed only by some functions; those import them when called. None of them comes with nnsight.
LATER = ("h5netcdf", "h5py", "pandas", "plotly", "scipy", "sklearn", "statsmodels", "tokenizers", "typer", "xarray")
LISTING = "import json, sys; import {module}; print(json.dumps(sorted(sys.modules)))"


def modules_after(module: str) -> set[str]:
    """What a fresh interpreter has imported after importing one module."""
    command = [sys.executable, "-c", LISTING.format(module=module)]
    return set(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@pytest.fixture(scope="module")
def nnsight() -> set[str]:
    return modules_after("nnsight")


@pytest.fixture(scope="module")
def mechvlm() -> set[str]:
    return modules_after("mechvlm")


def test_nothing_heavy_is_imported(mechvlm: set[str]) -> None:
    assert not mechvlm & set(LATER)


def test_no_model_of_transformers_is_imported(nnsight: set[str], mechvlm: set[str]) -> None:
    """nnsight imports transformers' light top; its models and processors, seconds of work, come with the first load."""
    assert not {name for name in mechvlm - nnsight if name.startswith("transformers.")}


def test_the_list_is_not_made_up(nnsight: set[str]) -> None:
    assert not nnsight & set(LATER), "nnsight imports these itself now, so that they cost mechvlm nothing"


def test_the_installed_package_is_this_checkout() -> None:
    """Every file of mechvlm/, data too, was installed as it is here; else the other tests would test something else."""
    import mechvlm

    checkout, installed = Path(__file__).parents[1] / "mechvlm", Path(mechvlm.__file__).parent
    files = [p for p in checkout.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    copies = {p: installed / p.relative_to(checkout) for p in files}
    stale = [str(p) for p, copy in copies.items() if not copy.exists() or p.read_bytes() != copy.read_bytes()]
    assert not stale, 'the installed mechvlm is another; run: pip install -c constraints.txt -e ".[test]"'
    assert checkout / "py.typed" in files


def test_shapes_in_signatures_are_enforced() -> None:
    """The hook that pyproject.toml asks for is on, in the package as it was installed."""
    from mechvlm.attention import pattern

    with pytest.raises(TypeCheckError, match="batch head query key"):
        pattern(torch.ones(3))
