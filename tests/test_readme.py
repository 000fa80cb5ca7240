"""What the README promises is what happens: CI runs its commands, its code runs, its table is the package's."""

import json
import linecache
import re
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REPORT = "pip install -c constraints.txt . && mechvlm report"
TEST = 'pip install -c constraints.txt ".[test]" && pytest'
DEMO = ROOT / "mechvlm" / "demo" / "model"


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_two_commands_are_in_the_readme() -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert commands[:2] == [REPORT, TEST]


def test_ci_runs_the_test_command() -> None:
    """Word for word, and in its order, each part in a line of its own so that CI can say which failed."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line in TEST.split(" && ")] == TEST.split(" && ")


@pytest.mark.skipif(not DEMO.exists(), reason="runs once mechvlm/demo/model, the trained demo model, is in the package")
def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two blocks, with the demo model for the published one and some picture for the dog's."""
    code, lengths, *_ = blocks("python")
    published = 'mv.load("llava-hf/llava-1.5-7b-hf")'
    assert published in code
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (72, 72), "navy").save("dog.jpg")
    names: dict[str, Any] = {}
    exec(compile(code.replace(published, 'mv.load("demo")'), "README.md", "exec"), names)
    assert isinstance(names["answer"], str)
    assert (tmp_path / "heads.html").stat().st_size > 0
    exec(compile(lengths, "README.md", "exec"), names)
    vlm, real = names["vlm"], names["real"]
    for edits in ("more", "none", "fold"):
        assert not vlm.run(real).logits.equal(vlm.run(real, edits=names[edits]).logits)


def lines_of(heading: str, **more: Any) -> dict[str, Any]:
    """What the lines of a section's table give, by their code; `more` are names beside those of the first table."""
    import mechvlm as mv

    vlm = mv.load("demo")
    real = vlm.prompt(mv.demo.scenes()[0].image, "Is there a 7 in the image?")
    names = {"mv": mv, "vlm": vlm, "real": real, "null": real.with_image(mv.images.black), **more}
    names["yes"] = mv.logit_difference("yes", "no")
    part = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for name, code in re.findall(r"`(\w+) = ([^`]+)`", part):
        names[name] = eval(code.replace('"demo", split="adversarial"', "some"), names)
    return {code: eval(code, names) for code in re.findall(r"^\| .* \| `(.+)` \|$", part, flags=re.MULTILINE)}


def test_every_line_of_the_second_table_runs() -> None:
    found = lines_of("More of it")
    assert len(found) == 12 and {type(one).__name__ for one in found.values()} == {"Dataset", "Figure"}, found


def test_every_line_of_the_table_of_causes_runs() -> None:
    found = lines_of("Causes")
    assert len(found) == 11
    engines = {code.split("(")[0]: one.attrs.get("engine", "none") for code, one in found.items()}
    assert engines.pop("mv.knockout_answers") == "none"  # which generates, and is no sweep
    assert all(engine.startswith("rerun from the edited layer") for engine in engines.values()), engines


@pytest.mark.skipif(find_spec("transformer_lens") is None, reason="takes seconds; runs in the second environment")
def test_every_line_of_the_table_of_attribution_runs() -> None:
    found = lines_of("Attribution and circuits")
    assert len(found) == 12 and {type(one).__name__ for one in found.values()} == {"Dataset"}, found


def test_every_line_of_the_table_of_evaluations_runs() -> None:
    """On two pictures of the demo's benchmark; all of them take ten seconds each time."""
    import mechvlm as mv

    found = lines_of("Evaluation", some=mv.evaluate.read_pope("demo", "adversarial")[:12])
    assert [type(one).__name__ for one in found.values()] == ["Dataset", "Dataset", "DataFrame"]


def test_the_code_for_a_model_elsewhere_runs() -> None:
    import mechvlm as mv

    code = next(block for block in blocks("python") if "remote=" in block)
    names: dict[str, Any] = {"mv": mv}
    cell = "<README's code>"
    linecache.cache[cell] = (len(code), None, code.splitlines(keepends=True), cell)  # functions are sent by their lines
    exec(compile(code, cell, "exec"), names)
    vlm, asked = mv.load("demo"), names["asked"]
    pattern = vlm.run(asked, read=["text.3.pattern"])["text.3.pattern"]
    assert names["looks"]["text.3.pattern"].equal(pattern[:, :, -1, asked.image].sum(-1))
    (sent, back), *more = names["bytes_of_each_job"].values
    assert not more and back < 4000 < sent < 200_000  # the demo's weights are more than a megabyte


def test_the_code_is_short() -> None:
    code, *_ = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12


@pytest.mark.transformer_lens
@pytest.mark.skipif(find_spec("transformer_lens") is None, reason="TransformerLens is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what TransformerLens imports
def test_the_code_for_transformer_lens_runs() -> None:
    import mechvlm as mv

    *_, code = blocks("python")
    vlm = mv.load("demo")
    names: dict[str, Any] = {
        "mv": mv,
        "vlm": vlm,
        "real": vlm.prompt(mv.demo.scenes()[0].image, "Is there a 7 in the image?"),
    }
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["copies"]) == vlm.shape.d_head["text"]


def script() -> Any:
    """scripts/architectures.py, which writes the tables."""
    spec = spec_from_file_location("architectures", ROOT / "scripts" / "architectures.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_architectures_is_what_the_laws_found() -> None:
    """tests/test_architectures.py compares what was written down with what they find now."""
    from mechvlm.archs import ARCHS

    architectures = script()
    found = json.loads(architectures.FILE.read_text())
    assert architectures.readme_table(found["models"]) in README, "stale: python scripts/architectures.py --tables"
    assert architectures.page(found["models"], found["made"]) == (ROOT / "docs" / "architectures.md").read_text()
    assert {one["architecture"] for one in found["models"].values()} == set(ARCHS)
    assert "**no**" not in README


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]
