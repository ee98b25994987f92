"""The rooms of the project: which package may import which (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import house
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
OWN = ("megatron_profit", "checkpoint_conversion")

# Room -> the rooms and packages that it may import besides itself. A room comes before the one that holds it,
# and after the ones that it imports: so no circle can be written down.
_TRAINING = "megatron_profit.training"
_LIBRARIES = (
    "megatron",
    "megatron_profit.objectives",
    "megatron_profit.ops",
    "megatron_profit.data",
)
_BELOW_DATA = ("checkpoint_conversion.errors", "checkpoint_conversion.engine")
ALLOWED: dict[str, tuple[str, ...]] = {
    "checkpoint_conversion.errors": (),
    "checkpoint_conversion.progress": (),
    "checkpoint_conversion.in_transformers": ("checkpoint_conversion.errors",),
    "checkpoint_conversion.engine": (
        *("checkpoint_conversion.errors", "checkpoint_conversion.progress"),
    ),
    "megatron_profit.objectives": (),
    "megatron_profit.ops": ("megatron_profit.objectives",),
    "megatron_profit.flags": (),
    "megatron_profit.parent_death": (),
    "megatron_profit.yaml_names": (),
    "megatron_profit.data.errors": ("checkpoint_conversion.errors",),
    "megatron_profit.data.files": (*_BELOW_DATA, "megatron_profit.data.errors"),
    "megatron_profit.data.report": ("checkpoint_conversion.errors", "megatron_profit.data.errors"),
    "megatron_profit.data.chat": ("megatron_profit.data.errors", "megatron_profit.data.files"),
    "megatron_profit.data.render": (
        *("megatron_profit.data.errors", "megatron_profit.data.files"),
        *("megatron_profit.data.report", "megatron_profit.data.chat"),
    ),
    "megatron_profit.data.store": (
        *(*_BELOW_DATA, "megatron_profit.data.errors", "megatron_profit.data.files"),
        *("megatron_profit.data.report", "megatron_profit.data.chat"),
        *("megatron_profit.data.render", "megatron_profit.parent_death"),
    ),
    "megatron_profit.data.sequences": ("megatron_profit.data.store",),
    "megatron_profit.data": (),
    "megatron_profit.token_report": _LIBRARIES[1:],
    "checkpoint_conversion.families": ("checkpoint_conversion.errors",),
    "checkpoint_conversion.pickles": ("checkpoint_conversion.engine",),
    "checkpoint_conversion.hf": (
        *("checkpoint_conversion.errors", "checkpoint_conversion.progress"),
        "checkpoint_conversion.engine",
        *("checkpoint_conversion.families", "checkpoint_conversion.pickles"),
    ),
    "checkpoint_conversion.model_card": (
        *("checkpoint_conversion.errors", "checkpoint_conversion.engine"),
        "checkpoint_conversion.hf",
    ),
    "checkpoint_conversion.torch_dist": (
        *("checkpoint_conversion.errors", "checkpoint_conversion.engine"),
        *("checkpoint_conversion.families", "checkpoint_conversion.pickles"),
        "checkpoint_conversion.hf",
    ),
    "checkpoint_conversion.adapters": (
        *("checkpoint_conversion.errors", "checkpoint_conversion.engine"),
        *("checkpoint_conversion.families", "checkpoint_conversion.hf"),
        *("checkpoint_conversion.torch_dist", "checkpoint_conversion.in_transformers"),
    ),
    "megatron_profit.evaluation": (
        *("checkpoint_conversion.errors", "checkpoint_conversion.engine"),
        *("checkpoint_conversion.families", "checkpoint_conversion.hf", "megatron_profit.data"),
        *("megatron_profit.token_report", "checkpoint_conversion.in_transformers"),
        "megatron_profit.flags",
        *("megatron_profit.parent_death", "megatron_profit.yaml_names"),
    ),
    "checkpoint_conversion": (),
    "megatron_profit.publish": (
        *("checkpoint_conversion.errors", "checkpoint_conversion.model_card"),
        "megatron_profit.flags",
    ),
    "megatron_profit.estimates": (
        *("checkpoint_conversion.adapters", "checkpoint_conversion.progress"),
        *("checkpoint_conversion.families", "megatron_profit.flags", "megatron_profit.ops"),
    ),
    "megatron_profit.models.lora": ("megatron", "checkpoint_conversion"),
    "megatron_profit.models": ("megatron",),
    "megatron_profit.megatron_patches": (
        *("megatron", "checkpoint_conversion", "megatron_profit.parent_death"),
    ),
    f"{_TRAINING}.process": (
        *("megatron", "checkpoint_conversion.errors", "checkpoint_conversion.engine"),
        *("megatron_profit.megatron_patches", "megatron_profit.parent_death"),
    ),
    f"{_TRAINING}.step": (
        *(*_LIBRARIES[:3], "megatron_profit.flags", "megatron_profit.models"),
        "checkpoint_conversion.errors",
    ),
    f"{_TRAINING}.monitoring": (
        *(*_LIBRARIES, "checkpoint_conversion.errors", "checkpoint_conversion.engine"),
        *("megatron_profit.flags", "megatron_profit.token_report", "megatron_profit.evaluation"),
        *("megatron_profit.megatron_patches", f"{_TRAINING}.process", f"{_TRAINING}.step"),
        "megatron_profit.parent_death",
    ),
    f"{_TRAINING}.checkpoints": (
        *("megatron_profit.estimates", "megatron_profit.evaluation"),
        *("megatron", "checkpoint_conversion", "megatron_profit.megatron_patches"),
        *("megatron_profit.flags", "megatron_profit.objectives", "megatron_profit.models"),
        *(f"{_TRAINING}.process", f"{_TRAINING}.monitoring"),
    ),
    f"{_TRAINING}.statistics": (
        *(*_LIBRARIES, "checkpoint_conversion", "megatron_profit.megatron_patches"),
        *("megatron_profit.flags", "megatron_profit.models"),
        *(f"{_TRAINING}.process", f"{_TRAINING}.step"),
        f"{_TRAINING}.checkpoints",
    ),
    f"{_TRAINING}.arguments": (
        "megatron_profit.evaluation",
        *(*_LIBRARIES, "checkpoint_conversion", "megatron_profit.megatron_patches"),
        *("megatron_profit.flags", "megatron_profit.publish"),
        *(f"{_TRAINING}.step", f"{_TRAINING}.monitoring"),
        *(f"{_TRAINING}.checkpoints", f"{_TRAINING}.statistics"),
    ),
    f"{_TRAINING}.plan": (
        "megatron_profit.evaluation",
        *(*_LIBRARIES, "checkpoint_conversion", "megatron_profit.megatron_patches"),
        *("megatron_profit.flags", f"{_TRAINING}.process", f"{_TRAINING}.checkpoints"),
        f"{_TRAINING}.arguments",
    ),
    _TRAINING: (
        "megatron_profit.evaluation",
        *(*_LIBRARIES, "checkpoint_conversion", "megatron_profit.megatron_patches"),
        *("megatron_profit.flags", "megatron_profit.models"),
    ),
    "megatron_profit.recipe": (
        *("checkpoint_conversion", "megatron_profit.objectives", f"{_TRAINING}.arguments"),
        *("megatron_profit.data", "megatron_profit.evaluation", "megatron_profit.flags"),
        "megatron_profit.yaml_names",
    ),
    "megatron_profit.sft": (
        *("checkpoint_conversion.errors", "megatron_profit.flags", "megatron_profit.recipe"),
        *("megatron_profit.megatron_patches", _TRAINING),
    ),
    "megatron_profit.launch": (
        "megatron_profit.flags",
        *("checkpoint_conversion", "megatron_profit.data", "megatron_profit.estimates"),
        *("megatron_profit.recipe", "megatron_profit.sft", _TRAINING),
    ),
    "megatron_profit.commands": ("megatron", "megatron_profit", "checkpoint_conversion"),
    "megatron_profit.doctor": (
        *("checkpoint_conversion", "megatron_profit.commands", "megatron_profit.data"),
        *("megatron_profit.launch", "megatron_profit.recipe", _TRAINING),
    ),
    "megatron_profit.logits": ("megatron_profit.sft", "megatron_profit.commands"),
    "megatron_profit.__main__": ("megatron_profit.commands",),
}


def modules() -> Iterator[tuple[str, Path]]:
    for package in OWN:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            yield ".".join(parts), file


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the direction"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(("module", "file"), list(modules()), ids=lambda value: str(value)[-60:])
def test_imports_go_in_one_direction(module, file):
    room = next((room for room in ALLOWED if within(module, room)), None)
    if room is None:
        assert module.removesuffix(".__init__") == "megatron_profit", (
            f"{module} is in no known room"
        )
        return
    for name in imports(file):
        top = name.split(".")[0]
        if top in (*OWN, "megatron") and name not in OWN and not within(name, room):
            assert any(within(name, allowed) for allowed in ALLOWED[room]), (
                f"{module} imports {name}; {room} may import {ALLOWED[room] or 'neither'}"
            )


def test_rooms_come_after_those_that_they_import():
    seen: list[str] = []
    for room, allowed in ALLOWED.items():
        for other in allowed:
            known = other == "megatron" or any(within(earlier, other) for earlier in seen)
            assert known, f"{room} may import {other}, which comes later"
        seen.append(room)


def test_the_picture_of_training_shows_its_imports():
    """Each arrow of the picture in docs/architecture.md is an import, and each import an arrow."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = page.split("flowchart TD\n")[1].split("```")[0]
    drawn = {
        (tail, head)
        for line in picture.splitlines()
        for tail, heads in re.findall(r"(\w+)(?:\[.*?\])? --> (.+)", line)
        for head in re.findall(r"(\w+)(?:\[.*?\])?", re.sub(r"\[.*?\]", "", heads))
    }
    files = {str(file.relative_to(REPOSITORY)): file.read_text("utf-8") for _, file in modules()}
    assert drawn == house.arrows(files)


def test_megatron_and_torch_are_changed_in_one_place_only():
    """Assignments to attributes of imported upstream modules belong into `megatron_patches`."""
    for module, file in modules():
        if within(module, "megatron_profit.megatron_patches"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(target, ast.Attribute) and isinstance(root, ast.Name):
                    assert root.id not in ("torch", "megatron", "mpu"), f"{file}:{node.lineno}"
