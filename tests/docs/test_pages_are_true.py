"""The pages name what exists: modules, functions, settings, floors, headings of each other."""

from __future__ import annotations

import ast
import functools
import pathlib
import re
import tomllib
from typing import Any

import pytest

from ayder import legacy_environment
from ayder.config import settings
from ayder.errors import ErrorCode
from tests.docs.pages import DOCS, PACKAGE, ROOT, anchors, text_of, without_blocks

OWN = [
    *(DOCS / name for name in ("architecture.md", "http-api.md", "glossary.md", "raft.md", "migrating.md")),
    *sorted((DOCS / "adr").glob("*.md")),
]
MODULES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(DOCS))


@functools.cache
def names_in(module: str) -> frozenset[str]:
    """``function``, ``Class`` and ``Class.method`` of a module, and what it assigns at its top or in a class."""
    names: set[str] = set()

    def walk(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    walk(ast.parse(MODULES[module].read_text(encoding="utf-8")).body, "")
    return frozenset(names)


def test_the_table_of_files_is_the_package() -> None:
    table = text_of("architecture.md").partition("\n## Files\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([\w/]+\.py)` \| \S", table, re.MULTILINE)
    assert set(MODULES) - set(listed) == set(), "these need a line in the table of docs/architecture.md"
    assert set(listed) - set(MODULES) == set(), "these are gone: take their line from the table of docs/architecture.md"
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("page", OWN, ids=name_of)
def test_every_module_and_function_named_exists(page: pathlib.Path) -> None:
    named = re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", page.read_text(encoding="utf-8"))
    own = [(module, name) for module, name in named if not module.startswith("tests/")]
    assert [module for module, _ in own if module not in MODULES] == []
    assert [f"{module}:{name}" for module, name in own if name and name not in names_in(module)] == []
    assert [module for module, _ in named if module.startswith("tests/") and not (ROOT / module).exists()] == []


def test_the_floors_are_those_of_the_contracts() -> None:
    page = text_of("architecture.md").partition("\n## Floors\n")[2].partition("```\n")[2].partition("```")[0]
    shown = {
        container: [[name.strip() for name in floor.split("|")] for floor in floors.split("/")]
        for container, floors in re.findall(r"^(ayder\S*):((?:.*\n?)(?:^ .*\n?)*)", page, re.MULTILINE)
    }
    for container, layers in contracts().items():
        assert shown.pop(container) == layers, (
            f"the floors of {container} in docs/architecture.md are not those in pyproject.toml"
        )
    assert shown == {}


def test_the_pure_modules_are_those_of_the_contract() -> None:
    row = re.findall(r"^\| pure \|.*$", text_of("architecture.md"), re.MULTILINE)[0]
    listed = {f"ayder.{name.replace('/', '.')}" for name in re.findall(r"`([\w/]+)`", row)}
    tool: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = [one for one in tool["contracts"] if one["name"].startswith("The cores do no I/O")]
    assert listed == set(contract["source_modules"])


def contracts() -> dict[str, list[list[str]]]:
    """Container → floors from the top, without the places that are kept for modules that do not exist yet."""
    tool: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    found: dict[str, list[list[str]]] = {}
    for contract in tool["contracts"]:
        if contract["type"] == "layers":
            (container,) = contract["containers"]
            folder = ROOT.joinpath(*container.split("."))
            floors = [[name.strip(" ()") for name in re.split(r"[|:]", layer)] for layer in contract["layers"]]
            there = [
                [name for name in floor if (folder / name / "__init__.py").exists() or (folder / f"{name}.py").exists()]
                for floor in floors
            ]
            found[container] = [floor for floor in there if floor]
    return found


@pytest.mark.parametrize("page", OWN, ids=name_of)
def test_every_setting_named_exists(page: pathlib.Path) -> None:
    known = {f"{section}.{attribute.name}" for section, attribute in settings()}
    sections = "|".join(sorted({section for section, _ in settings()}))
    named = re.findall(rf"[`\[]((?:{sections})\.(?!py\b|md\b)\w+)", page.read_text(encoding="utf-8"))
    assert set(named) - known == set()


def test_every_setting_has_its_row() -> None:
    page = text_of("configuration.md")
    missing = []
    for section, attribute in settings():
        table = page.partition(f"\n## `[{section}]`\n")[2].partition("\n## ")[0]
        if f"\n| `{attribute.name}` |" not in table:
            missing.append(f"{section}.{attribute.name}")
    assert missing == []


@pytest.mark.parametrize("page", OWN, ids=name_of)
def test_links_lead_to_headings(page: pathlib.Path) -> None:
    broken = []
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", without_blocks(page.read_text(encoding="utf-8"))):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (heading and heading not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(f"{target}#{heading}")
    assert broken == []


def test_every_honoured_variable_of_the_predecessor_is_on_the_page() -> None:
    page = text_of("migrating.md")
    assert [name for name in sorted(legacy_environment.HONOURED) if f"`{name}`" not in page and f"`{name}=" not in page] == []


def test_error_codes_named_on_the_pages_exist() -> None:
    known = {code.wire for code in ErrorCode}
    page = text_of("migrating.md")
    assert set(re.findall(r"\b[45]\d\d `(\w+)`", page)) - known == set()


def test_the_decision_records_are_numbered_without_gaps_and_have_their_parts() -> None:
    records = sorted((DOCS / "adr").glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    parts = ["Context", "Decision", "Consequences", "What would make us change it"]
    assert {path.name: re.findall(r"^## (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) for path in records} == {
        path.name: parts for path in records
    }


def test_decisions_named_in_the_code_exist() -> None:
    named = {number for path in MODULES.values() for number in re.findall(r"ADR (\d{4})", path.read_text(encoding="utf-8"))}
    assert named
    assert named <= {path.name[:4] for path in (DOCS / "adr").glob("*.md")}
