"""What the documentation says is true: commands parse, code runs, links lead somewhere."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_options import every_objective

from checkpoint_conversion import families
from checkpoint_conversion.families import FAMILIES, Family
from megatron_profit.data import DataOptions
from megatron_profit.estimates.published import published_config
from megatron_profit.objectives import (
    COMPUTED_STATISTICS,
    EXTERNAL_STATISTICS,
    TokenStatistics,
    objective_names,
    objective_options,
)
from megatron_profit.training.arguments.derive import derive

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    text = "\n".join(block for page in PAGES for block in blocks(page, "bash"))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_training_commands_are_accepted():
    found = [command for command in commands() if "megatron_profit.sft" in command]
    assert found
    for command in found:
        world_size = int(command[command.index("--nproc-per-node") + 1])
        flags = command[command.index("megatron_profit.sft") + 1 :]
        settings = derive(flags, "cuda", world_size, published_config("Qwen3-14B"))
        DataOptions.from_flags(settings.values)
        assert settings.values["padded_vocab_size"] == 151936, "no padding is needed"


def test_every_target_of_make_exists():
    """`test_documented_commands.py` reads the other commands."""
    makefile = (REPOSITORY / "Makefile").read_text()
    for command in (command for command in commands() if command[0] == "make"):
        assert f"\n{command[1]}:" in makefile, command


def anchors(page: Path) -> set[str]:
    """Return the names that a page's headings have in a link."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(
        r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")
    ):
        if not target.startswith("http"):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} links to {target}#{anchor}"


def test_every_page_is_in_the_readmes_table():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| [a-z][^|]* \| \[docs/(\w+\.md)\]\(docs/\1(?:#[\w-]+)?\) \|$", readme, re.MULTILINE
    )
    assert {*rows} == {page.name for page in (REPOSITORY / "docs").glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_begins_with_its_answer_and_has_an_example(page):
    text = page.read_text(encoding="utf-8")
    title, answer, *_ = text.split("\n\n")
    assert re.fullmatch("# .+", title)
    assert re.match(r"[A-Z*`]", answer), f"{page.name} begins with {answer!r}, not with a sentence"
    assert len(answer.split()) <= 90, f"{page.name} needs long for its answer"
    assert "```" in text or "\n    " in text or "or example" in text, f"{page.name} has no example"


@pytest.mark.parametrize("name", objective_names())
def test_every_objective_has_a_row_with_its_options(name):
    page = (REPOSITORY / "docs" / "objectives.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    # The row of ProFit describes the threshold that others share.
    described = row + (page if "threshold" in row else "")
    for option in objective_options(name):
        assert "--" + option.name.replace("_", "-") in described, option.name


def test_every_metric_of_an_objective_is_described():
    page = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    half = torch.full((2,), 0.5)
    known = dict.fromkeys((*COMPUTED_STATISTICS, *EXTERNAL_STATISTICS), half)
    statistics = TokenStatistics(half.log(), **{**known, "selected": half > 0})
    for objective in every_objective():
        for metric in objective.metrics(statistics):
            assert f"`{metric}`" in page, metric


def modules_of_families() -> dict[str, list[str]]:
    """Return the architectures that each module of a family defines."""
    found = {}
    for module in pkgutil.iter_modules(families.__path__):
        values = vars(importlib.import_module(f"{families.__name__}.{module.name}")).values()
        flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
        found[module.name] = [n for v in flat if isinstance(v, Family) for n in v.architectures]
    return {name: names for name, names in found.items() if names}


def test_every_family_has_a_row():
    """The row names the module of the family."""
    page = (REPOSITORY / "docs" / "conversion.md").read_text(encoding="utf-8")
    modules = modules_of_families()
    defined = {name for names in modules.values() for name in names}
    assert defined == {name for family in FAMILIES for name in family.architectures}
    assert not [module for module in modules if f"[`{module}.py`](" not in page]


def names_of_example(page: str) -> dict[str, Any]:
    """Run the example of the operation on a page, and return the names that it defines."""
    path = REPOSITORY / "docs" / f"{page}.md"
    (code,) = (block for block in blocks(path, "python") if "linear_objective(" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_example_without_megatron_runs():
    names = names_of_example("objectives")
    assert names["output"].weight.tolist() == [1.0, 0.0]
    assert names["hidden"].grad.shape == (6, 16)
    assert (names["hidden"].grad[1] == 0).all(), "an unsupervised row gets no gradient"


def test_the_example_of_statistics_runs():
    names = names_of_example("kernel")
    assert names["of_answer"].item() == pytest.approx(2 * names["of_all"].item())
    assert names["loss"].shape == (4,)
