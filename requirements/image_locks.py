"""Pins what each image holds: the part of cpu.txt or gpu.txt that its code reaches, into images/ beside it.

    images/cpu.txt      the stages, with PyTorch's CPU build
    images/gpu.txt      the stages, with PyTorch's CUDA build and the `gpu` extra
    images/serving.txt  the model server
    images/build.txt    what installs them, and is in no image

An image's locks begin at what its modules import and go on through the lock's own `# via` lines: no resolver
is asked, so the versions are those that are developed and tested with. Images are Linux with Python 3.11, so
markers are settled here. The files lie in a folder of their own because a stage's digest is over the locks
beside this file, and these say nothing that those and the code do not say.

`make lock` runs it; by itself (`python requirements/image_locks.py`) it needs no network.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
TREE = HERE.parent
FOLDER = HERE / "images"
OURS = ("components", "serving")
ENTRY = re.compile(r"^([a-z0-9][a-z0-9.-]*)===?([^\s;]+)(?: ; (.*?))?(?= \\$)", re.MULTILINE)
VIA = re.compile(r"# via (.*)$", re.MULTILINE)
INSTALLERS = ("setuptools", "wheel")
# The pod's command is `python -m kfp.dsl.executor_main`, whatever the stage imports. MLflow's server, with
# accounts and on PostgreSQL, runs in the cpu image.
ALWAYS: dict[str, tuple[str, ...]] = {
    "cpu": ("kfp", "flask-wtf", "psycopg2-binary"),
    "gpu": ("kfp",),
    "serving": (),
}
# A training library, which the server imports for a bare adapter alone (compress merges what ships), and
# MLflow for a base that is named as a registered model.
NEVER: dict[str, tuple[str, ...]] = {"cpu": (), "gpu": (), "serving": ("peft", "mlflow", "sqlalchemy")}
LINUX = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.2",
    "python_version": "3.11",
    "sys_platform": "linux",
}


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, dotted; names imported from a package count as its modules too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reached(folders: Iterable[str], tree: Path = TREE) -> set[str]:
    """The top-level modules from elsewhere that these folders import, directly or through our modules."""
    waiting = [path for folder in folders for path in sorted((tree / folder).rglob("*.py"))]
    seen, found = set(waiting), set()
    while waiting:
        for module in imports_of(waiting.pop()):
            top = module.split(".")[0]
            if top not in OURS:
                found.add(top)
                continue
            path = tree.joinpath(*module.split(".")).with_suffix(".py")
            if path.is_file() and path not in seen:
                seen.add(path)
                waiting.append(path)
    return found


def declared(*extras: str, tree: Path = TREE) -> set[str]:
    """The distributions that pyproject.toml names."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(x for e in extras for x in project["optional-dependencies"][e])]
    return {re.split(r"[=<>~\[; ]", line)[0].lower().replace("_", "-") for line in lines}


def distributions(modules: Iterable[str]) -> set[str]:
    """The declared distributions that fill these modules; the one of a module's own name where it exists."""
    owners = metadata.packages_distributions()
    found = set()
    for module in modules:
        names = {owner.lower().replace("_", "-") for owner in owners.get(module, [])} & declared()
        own = module.replace("_", "-")
        found |= {own} if own in names else names
    return found


def pins(lock: str) -> dict[str, tuple[str, list[str], set[str]]]:
    """Name -> (`name==version`, its hashes, what asks for it), of the entries that hold on Linux."""
    from packaging.markers import Marker

    found: dict[str, tuple[str, list[str], set[str]]] = {}
    entries = list(ENTRY.finditer(lock))
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        text = lock[entry.start() : following.start() if following else len(lock)]
        if entry[3] and not Marker(entry[3]).evaluate(LINUX):
            continue
        via = VIA.search(text)
        asked_by = {re.split(r"[ \[(]", name)[0] for name in via[1].split(", ")} if via else set()
        found[entry[1]] = (entry[0].split(" ; ")[0], re.findall(r"sha256:[0-9a-f]{64}", text), asked_by)
    return found


def closure(graph: Mapping[str, tuple[str, list[str], set[str]]], roots: Iterable[str]) -> list[str]:
    """The roots and all that they ask for, by name.

    Raises:
        SystemExit: a root is not in the lock.
    """
    found = set(roots)
    missing = sorted(found - graph.keys())
    if missing:
        raise SystemExit(f"not in the lock: {', '.join(missing)}; run `make lock` first")
    while more := {name for name, (_, _, by) in graph.items() if name not in found and by & found}:
        found |= more
    return sorted(found)


def image_lock(image: str, tree: Path = TREE) -> str:
    """The text of an image's lock, `gpu`, `cpu` or `serving`, from the code and the full locks."""
    full = "gpu.txt" if image == "gpu" else "cpu.txt"
    text = (tree / "requirements" / full).read_text()
    graph = pins(text)
    roots = distributions(reached(["serving" if image == "serving" else "components"], tree))
    roots = (roots | set(ALWAYS[image])) - set(NEVER[image])
    if image == "gpu":
        # Both runtimes fill one folder; see lock.py.
        roots = (roots - {"onnxruntime"}) | (declared("gpu", tree=tree) - declared(tree=tree))
    names = closure(graph, roots)
    source = re.search(r"^# built from source: (.*)$", text, re.MULTILINE)
    built = [name for name in source[1].split() if name in names] if source else []
    about = f"# What the {image} image holds, as {full} pins it, for Linux and Python 3.11."
    return _text(about, {name: graph[name] for name in names}, built)


def build_lock(pip: str, tree: Path = TREE) -> str:
    """The text of build.txt.

    Args:
        pip: a lock that has pip's entry, which no other lock has.
        tree: the checkout.
    """
    graph = pins((tree / "requirements" / "cpu.txt").read_text())
    chosen = {name: graph[name] for name in INSTALLERS} | {"pip": pins(pip)["pip"]}
    return _text("# What installs the images' distributions; in no image.", chosen, [])


def _text(about: str, chosen: Mapping[str, tuple[str, list[str], set[str]]], built: list[str]) -> str:
    lines = [
        f"{about} Made by `make lock`; do not edit.",
        f"# built from source: {' '.join(built) or 'nothing'}",
    ]
    for name in sorted(chosen):
        pin, hashes, _ = chosen[name]
        lines.append(" \\\n".join([pin, *(f"    --hash={digest}" for digest in hashes)]))
    return "\n".join(lines) + "\n"


def main(pip: str | None = None) -> None:
    """Writes the images' locks; without `pip` (see build_lock) pip stays at the version it has."""
    FOLDER.mkdir(exist_ok=True)
    build = FOLDER / "build.txt"
    texts = {image: image_lock(image) for image in ALWAYS}
    texts["build"] = build_lock(pip or build.read_text())
    for name, text in texts.items():
        (FOLDER / f"{name}.txt").write_text(text)
        print(f"requirements/images/{name}.txt: {len(pins(text))} distributions")


if __name__ == "__main__":
    main()
