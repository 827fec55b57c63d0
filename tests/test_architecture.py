"""Tests about the code itself: who may import whom, how long things may be, what may not be left lying about."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "ayder"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "service", "misc", "tools"}
REMINDERS = re.compile("|".join([r"\bTO" + "DO", r"\bFIX" + "ME", r"\b" + "X" * 3 + r"\b"]))
PUBLIC_INDEX = re.compile(r"--(extra-)?index-url|--find-links|\bfiles\.pythonhosted\b|/simple\b", re.IGNORECASE)

SHELLS = {
    f"ayder.{name}"
    for name in (
        "__main__",
        "broker",
        "config_report",
        "fetch",
        "launch",
        "local_cluster",
        "log_cleaner",
        "logs",
        "metrics",
        "node",
    )
}
PURE_RAFT = {"consensus", "frames", "handshake", "leader", "membership", "messages", "progress", "quorum", "raft_log", "wire"}
PURE_HTTP = {"auth", "errors", "exchange", "params", "parser", "responses", "routes"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def declares_only(node: Function) -> bool:
    """Whether a function is a line of a Protocol: a docstring, ``...`` or both."""
    return all(isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in node.body)


def test_the_import_contracts_hold() -> None:
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_layers_contract_is_exhaustive() -> None:
    """A new module has to choose its floor; without this it would have none."""
    layered = [contract for contract in contracts() if contract["type"] == "layers"]
    assert {container for contract in layered for container in contract["containers"]} >= {"ayder", "ayder.http"}
    assert all(contract["exhaustive"] for contract in layered)


def contracts() -> list[dict[str, Any]]:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    found: list[dict[str, Any]] = tool["contracts"]
    return found


def test_no_core_is_missing_from_the_contract_that_keeps_it_pure() -> None:
    """Outside these places no module waits or does I/O; a new one is listed in the contract or here."""
    (contract,) = [one for one in contracts() if one["name"].startswith("The cores do no I/O")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.name != "__init__.py"}
    shells = {
        module for module in modules if module.startswith(("ayder.http.", "ayder.raft.", "ayder.storage.")) or module in SHELLS
    }
    listed = set(contract["source_modules"])
    assert modules - shells - listed == set()
    assert {f"ayder.raft.{name}" for name in PURE_RAFT} & modules <= listed
    assert {f"ayder.http.{name}" for name in PURE_HTTP} & modules <= listed


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short_named_well_and_says_what_it_owns(path: pathlib.Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    assert not set(path.with_suffix("").relative_to(ROOT).parts) & BANNED_NAMES
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "a module opens with what it owns and what it must not know"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short(path: pathlib.Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lengths = {
        f"{node.name} (line {node.lineno})": (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions(tree)
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_an_async_function_may_block(path: pathlib.Path) -> None:
    """A function is async only if it may wait; one that never does would hide that it is atomic."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    waits = (ast.Await, ast.AsyncWith, ast.AsyncFor, ast.Yield)
    found = [node for node in functions(tree) if isinstance(node, ast.AsyncFunctionDef) and not declares_only(node)]
    idle = [node.name for node in found if not any(isinstance(part, waits) for part in ast.walk(node))]
    assert idle == []


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=name_of)
def test_no_reminder_is_left_behind(path: pathlib.Path) -> None:
    found = [line for line in path.read_text(encoding="utf-8").splitlines() if REMINDERS.search(line)]
    assert found == []


def test_there_are_no_empty_folders_of_modules() -> None:
    """A folder with modules has an ``__init__`` (mypy and the import contracts would pass it over otherwise)."""
    folders = {path.parent for path in MODULES}
    assert [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", ["runtime", "dev"])
def test_dependencies_are_pinned_with_hashes_and_name_no_index(name: str) -> None:
    text = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) > 10
    assert all(re.match(r"[A-Za-z0-9._-]+==\S+ ", entry) and "--hash=sha256:" in entry for entry in entries)
    assert not PUBLIC_INDEX.search(text)
    assert "://" not in text


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE))


def test_the_tests_run_with_the_versions_that_serve() -> None:
    runtime, dev = pins("runtime"), pins("dev")
    assert {name: dev.get(name) for name in runtime} == runtime


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.split(r"[<>=\[ ;]", text)[0] for text in project["dependencies"]}
    assert wanted <= set(pins("runtime"))
    wanted = {re.split(r"[<>=\[ ;]", text)[0] for extra in project["optional-dependencies"].values() for text in extra}
    assert wanted <= set(pins("dev"))


def test_every_setting_is_read_somewhere() -> None:
    """A setting that nothing reads is a promise nobody keeps."""
    from ayder.config import settings

    own = {"config_sections.py", "config_report.py", "legacy_environment.py"}
    text = "\n".join(path.read_text(encoding="utf-8") for path in MODULES if path.name not in own)
    unread = [f"{section}.{attribute.name}" for section, attribute in settings() if not re.search(rf"\.{attribute.name}\b", text)]
    assert set(unread) <= {"raft.heartbeat_interval_ms"}, "a node alone sends no heartbeats; every other setting is used"


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=name_of)
def test_links_between_pages_lead_somewhere(page: pathlib.Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
