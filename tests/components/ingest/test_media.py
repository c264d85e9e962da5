"""Rows that name files: the files travel with the examples, and a bad one is named with its reason."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from components.ingest.config import IngestConfig
from components.ingest.ingest import examples_of, ingest
from components.shared import images, media
from components.shared.manifest import Manifest, describe
from components.shared.media import BadMedia
from components.shared.stage import Artifact, Context
from components.split.config import SplitConfig
from components.split.split import split


def png(seed, mode="RGB", size=(12, 10), form="PNG", **how):
    channels = {"RGB": 3, "L": None, "RGBA": 4}[mode]
    shape = (size[1], size[0]) if channels is None else (size[1], size[0], channels)
    body = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels).save(body, form, **how)
    return body.getvalue()


@pytest.fixture
def take(tmp_path):
    def go(source, **settings):
        config = IngestConfig(source=str(source), format="labelled-image", **settings)
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        result = ingest(config, {}, Context("r", "p", "ingest", "k", None, out, out))
        quarantine = [json.loads(line) for line in (out / "quarantine/quarantine.jsonl").open()]
        return (
            result,
            [json.loads(line) for line in (out / "examples/examples.jsonl").open()],
            quarantine,
            out,
        )

    return go


def folder_of(tmp_path, files):
    root = tmp_path / "corpus"
    for name, body in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return root


def test_a_folder_for_each_class(take, tmp_path):
    """Equal bytes are stored once; equal pixels in another format are known to be alike."""
    lossless = Image.open(io.BytesIO(png(1)))
    bmp = io.BytesIO()
    lossless.save(bmp, "BMP")
    files = {"cat/1.png": png(1), "cat/copy.png": png(1), "cat/same.bmp": bmp.getvalue(), "dog/2.png": png(2)}
    root = folder_of(tmp_path, {**files, "dog/notes.txt": b"no picture"})
    result, kept, quarantine, out = take(root)
    assert quarantine == [] and [row["label"] for row in kept] == ["cat", "cat", "cat", "dog"]
    assert result.summary["read"] == 4
    assert len({row["image"] for row in kept}) == 3 and len({row["pixels"] for row in kept}) == 2
    assert len({row["id"] for row in kept}) == 2
    for row in kept:
        stored = (out / "examples" / row["image"]).read_bytes()
        assert stored == (root / row["origin"]["file"].removeprefix(f"{root}/")).read_bytes()
        assert (row["width"], row["height"], row["channels"]) == (12, 10, 3) and row["spread"] > 1
    assert sorted(p.name for p in (out / "examples/media").rglob("*.*")) == sorted(
        row["image"].split("/")[-1] for row in {r["image"]: r for r in kept}.values()
    )


def test_a_list_names_files_below_its_folder(take, tmp_path):
    root = folder_of(tmp_path, {"images/a.png": png(1), "images/b.jpg": png(2, form="JPEG")})
    (root / "list.csv").write_text("file,kind\nimages/a.png,x\n./images/b.jpg,y\n")
    _, kept, quarantine, _ = take(root, columns={"image": "file", "label": "kind"})
    assert quarantine == [] and [row["label"] for row in kept] == ["x", "y"]
    assert [row["origin"]["line"] for row in kept] == [2, 3]
    assert kept[1]["image"].endswith(".jpg")


def test_a_parquet_file_holds_the_bytes(take, tmp_path):
    import polars

    rows = [{"image": {"bytes": png(n), "path": f"{n}.png"}, "label": "ab"[n % 2]} for n in range(4)]
    (tmp_path / "corpus").mkdir()
    polars.DataFrame(rows).write_parquet(tmp_path / "corpus" / "data.parquet")
    _, kept, quarantine, out = take(tmp_path / "corpus")
    assert quarantine == [] and len({row["image"] for row in kept}) == 4
    assert (out / "examples" / kept[2]["image"]).read_bytes() == png(2)


def test_every_bad_file_is_named_with_its_reason(take, tmp_path):
    whole, jpeg = png(5, size=(64, 64)), png(6, size=(64, 64), form="JPEG")
    frames = io.BytesIO()
    shown = [Image.open(io.BytesIO(png(n))) for n in (1, 2)]
    shown[0].save(frames, "TIFF", save_all=True, append_images=shown[1:])
    # A header that claims 60,000 x 60,000 pixels, in some hundred bytes.
    claims = whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:]
    claims = claims[:29] + zlib.crc32(claims[12:29]).to_bytes(4, "big") + claims[33:]
    bad = {
        "empty.png": (b"", "empty_file"),
        "torn.png": (whole[: len(whole) // 2], "torn_file"),
        "torn.jpg": (jpeg[: len(jpeg) // 2], "torn_file"),
        "page.png": (b"<html>not found</html>", "unknown_format"),
        "film.tif": (frames.getvalue(), "several_frames"),
        "bomb.png": (claims, "too_large"),
    }
    root = folder_of(tmp_path, {"good.png": whole, **{name: body for name, (body, _) in bad.items()}})
    rows = [{"image": name, "label": "a"} for name in ("good.png", *bad)]
    rows += [{"image": "gone.png", "label": "a"}, {"image": "../secret.png", "label": "a"}]
    rows += [
        {"image": str(root / "good.png"), "label": "a"},
        {"image": None, "label": "a"},
        {"image": 7, "label": "a"},
    ]
    rows += [{"label": "a"}, {"image": "good.png", "label": " "}]
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "secret.png").write_bytes(whole)
    result, kept, quarantine, _ = take(root)
    assert len(kept) == 1
    expected = [reason for _, reason in bad.values()]
    expected += ["missing_file", "outside_folder", "outside_folder", "missing_field", "wrong_type"]
    assert [row["reason"] for row in quarantine] == [*expected, "missing_field", "empty_field"]
    assert [row["line"] for row in quarantine] == list(range(2, len(rows) + 1))
    assert all(name in row["detail"] for name, row in zip(bad, quarantine, strict=False))
    assert result.summary["by_reason"]["torn_file"] == 2


def test_a_picture_in_no_class_folder_has_no_label(take, tmp_path):
    _, kept, quarantine, _ = take(folder_of(tmp_path, {"stray.png": png(1), "cat/1.png": png(2)}))
    assert len(kept) == 1 and quarantine[0]["reason"] == "missing_field"
    assert quarantine[0]["file"].endswith("stray.png")


def test_pictures_are_seen_as_people_see_them():
    """Sixteen bits are scaled and not cut, transparent is white, EXIF's turn is made."""
    deep = np.array([[0, 32768], [65535, 256]], dtype=np.uint16)
    body = io.BytesIO()
    Image.fromarray(deep).save(body, "PNG")
    image, suffix, channels = images.decode(body.getvalue())
    assert np.asarray(image)[..., 0].tolist() == [[0, 128], [255, 1]] and (suffix, channels) == (".png", 1)
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(clear, "PNG")
    assert np.asarray(images.decode(clear.getvalue())[0]).tolist() == [[[255] * 3] * 2] * 2
    lying = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (40, 20)).save(lying, "JPEG", exif=exif)
    assert images.decode(lying.getvalue())[0].size == (20, 40)
    with pytest.raises(BadMedia, match="without a range"):
        numbers = io.BytesIO()
        Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(numbers, "TIFF")
        images.decode(numbers.getvalue())


def test_a_list_alone_is_refused_since_its_files_would_not_be_watched():
    for source in ("./list.jsonl", "./*/list.csv", "s3://corpora/x/list.parquet"):
        with pytest.raises(ValidationError, match="needs the folder"):
            IngestConfig(source=source, format="labelled-image")
    assert IngestConfig(source="./digits.v2", format="labelled-image").source == "./digits.v2"


def test_equal_pictures_stay_on_one_side_whatever_their_labels(take, tmp_path):
    names = [f"{label}/{n}.png" for label in ("cat", "dog") for n in range(60)]
    root = folder_of(tmp_path, {name: png(int(name[4:-4])) for name in names})
    result, kept, _, out = take(root)
    folder = out / "examples"
    manifest = Manifest("dataset", describe(folder), result.metadata["examples"])
    context = Context("r", "p", "split", "k", None, tmp_path / "sides", tmp_path)
    split(SplitConfig(stratify_by="label"), {"examples": Artifact(manifest, folder)}, context)
    sides = {side: list(media.read(context.out / side)) for side in ("train", "eval", "test")}
    pixels = {side: {row["pixels"] for row in rows} for side, rows in sides.items()}
    assert sum(map(len, sides.values())) == len(kept) == 120
    assert not pixels["train"] & pixels["eval"] and not (pixels["train"] | pixels["eval"]) & pixels["test"]
    for row in (row for rows in sides.values() for row in rows):
        image, _, channels = images.decode(Path(row["image"]))
        assert images.measured(image, channels)["pixels"] == row["pixels"]


def test_what_a_dry_run_reads_has_paths_of_this_machine(tmp_path):
    root = folder_of(tmp_path, {"cat/1.png": png(1), "dog/2.png": b""})
    config = IngestConfig(source=str(root), format="labelled-image")
    (row,) = examples_of(config, None, tmp_path / "scratch")
    assert row["image"].startswith(str(tmp_path / "scratch")) and images.decode(Path(row["image"]))
