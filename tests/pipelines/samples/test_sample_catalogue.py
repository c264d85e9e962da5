"""The committed catalogue is sound, and a URI finds the samples that it needs and no others."""

from __future__ import annotations

import io
import json
import re
import wave
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from components.shared import sounds
from components.shared.errors import TuneyardError
from components.shared.s3 import is_data_object
from pipelines.samples import catalogue, recordings
from pipelines.samples.catalogue import Gguf, OrangeTab, covering, load
from pipelines.samples.making import files_of

SAMPLES = load()
PACKAGES = [package for sample in SAMPLES for package in sample.packages]


def test_the_promised_samples_are_there() -> None:
    assert {sample.uri for sample in SAMPLES} == {
        "s3://corpora/legal/consultation/",
        "s3://corpora/legal/statute/",
        "s3://corpora/entities/thefts/",
        "s3://corpora/general/preferences/",
        "s3://corpora/finance/reuters-r8/",
        "s3://models/gemma-3-270m/",
        "s3://models/all-minilm-l6-v2/",
        "s3://corpora/images/digits/",
        "s3://models/resnet-small-untrained/",
        "s3://corpora/speech/digits/",
        "s3://models/whisper-small-untrained/",
    }


def test_no_sample_lies_inside_another() -> None:
    nested = [(a.uri, b.uri) for a in SAMPLES for b in SAMPLES if a is not b and b.uri.startswith(a.uri)]
    assert nested == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_wheel_is_for_every_machine_and_of_its_own_name(package: catalogue.Package) -> None:
    assert package.file == f"{package.name.replace('-', '_')}-{package.version}-py3-none-any.whl"
    assert package.members, "a wheel without members would be fetched for nothing"


def test_one_wheel_has_one_pin() -> None:
    pins = {package.file: {p.sha256 for p in PACKAGES if p.file == package.file} for package in PACKAGES}
    assert {file: len(digests) for file, digests in pins.items()} == dict.fromkeys(pins, 1)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.uri)
def test_object_names_are_ascii_unique_inside_the_prefix_and_seen_by_readers(
    sample: catalogue.Sample,
) -> None:
    names = [name for package in sample.packages for name in package.members.values()]
    assert len(names) == len(set(names))
    for name in names:
        path = PurePosixPath(name)
        assert name.isascii() and not path.is_absolute() and ".." not in path.parts and is_data_object(name)
        # No third-party code, and no format that runs code when it is read, gets into the store.
        assert path.suffix not in {".py", ".pyc", ".bin", ".pt", ".pkl", ".pickle", ".ckpt"}


def test_conversions_name_what_they_read() -> None:
    for sample in SAMPLES:
        names = {name for package in sample.packages for name in package.members.values()}
        if isinstance(sample.convert, OrangeTab):
            assert set(sample.convert.rows) == names
        if isinstance(sample.convert, Gguf):
            assert len([name for name in names if ".gguf.part" in name]) == 4


@pytest.mark.slow  # PyTorch is imported three times
@pytest.mark.parametrize(
    "uri", ["s3://corpora/images/digits/", "s3://models/resnet-small-untrained/"], ids=["digits", "resnet"]
)
def test_what_is_made_here_is_made_the_same_twice(uri: str, tmp_path: Path) -> None:
    (sample,) = covering(uri)
    found = []
    for attempt in ("one", "two"):
        (tmp_path / attempt).mkdir()
        out = files_of(sample, [], tmp_path / attempt)
        files = sorted(path for path in out.rglob("*") if path.is_file())
        assert sum(path.stat().st_size for path in files) == sample.size
        found.append({path.relative_to(out).as_posix(): path.read_bytes() for path in files})
    assert found[0] == found[1]
    wrong = sample.convert.model_copy(update={"images": 1796} if "digits" in uri else {"parameters": 7})
    with pytest.raises(TuneyardError, match=r"came out|ended with code"):
        (tmp_path / "three").mkdir()
        files_of(sample.model_copy(update={"convert": wrong}), [], tmp_path / "three")


@pytest.mark.slow  # PyTorch is imported twice
def test_a_whisper_is_made_the_same_twice_and_hears(tmp_path: Path) -> None:
    (sample,) = covering("s3://models/whisper-small-untrained/")
    found = []
    for attempt in ("one", "two"):
        (tmp_path / attempt).mkdir()
        found.append(files_of(sample, [], tmp_path / attempt))
    assert sum(path.stat().st_size for path in found[0].iterdir()) == sample.size
    one, two = ((out / "model.safetensors").read_bytes() for out in found)
    assert one == two
    assert sounds.window_seconds(sounds.open_processor(found[0])) == 2.0


def test_recorded_digits_are_joined_as_their_transcripts_say(put_wheel, shelf: Path, tmp_path: Path) -> None:
    words = {n: bytes([200] * (400 + n)) for n in range(10)}
    content = {}
    for n, body in words.items():
        stream = io.BytesIO()
        with wave.open(stream, "wb") as file:
            file.setparams((1, 1, 8000, len(body), "NONE", ""))
            file.writeframes(body)
        content[f"data/{n}.wav"] = stream.getvalue()
    package = put_wheel("digits", content, {name: name.removeprefix("data/") for name in content})
    (sample,) = covering("s3://corpora/speech/digits/")
    by = sample.convert.model_copy(update={"recordings": 40})
    few = sample.model_copy(update={"packages": (package,), "convert": by})
    out = files_of(few, [shelf / package.file], tmp_path)
    rows = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and {len(row["text"].split()) for row in rows} == {1, 2}
    for row in rows:
        samples, rate, _ = sounds.decode(out / row["audio"])
        # Louder than any noise of the line for as long as its words are.
        expected = sum(400 + recordings._NAMES.index(word) for word in row["text"].split())
        assert rate == 8000 and abs(int((samples > 0.03).sum()) - expected) <= 0.2 * expected


def test_a_sample_without_packages_is_one_that_is_made_here() -> None:
    facts = SAMPLES[0].model_dump() | {"packages": []}
    with pytest.raises(ValidationError, match="needs packages"):
        catalogue.Sample.model_validate(facts)


def test_readme_table_is_the_catalogue() -> None:
    readme = (catalogue.HERE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(s3://[^`]+)` \| (.+?) \| (.+?) \| ([\d.]+) MiB \|", readme, re.MULTILINE)
    assert rows == [(s.uri, s.what, s.licence, f"{s.size / 2**20:.1f}") for s in SAMPLES]


def test_a_typo_in_a_catalogue_is_an_error() -> None:
    facts = SAMPLES[0].model_dump()
    with pytest.raises(ValidationError, match="licence_"):
        catalogue.Sample.model_validate(facts | {"licence_": "MIT"})


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("s3://corpora/legal", ["legal/consultation", "legal/statute"]),
        ("s3://corpora/legal/", ["legal/consultation", "legal/statute"]),
        ("s3://corpora/legal/statute/3-2.jsonl", ["legal/statute"]),
        ("s3://corpora/finance/reuters-r8/test", ["finance/reuters-r8"]),
        ("s3://corpora/lega", []),
        ("s3://models/gemma-3-270m-it", []),
        ("corpora/legal", []),
        ("./legal.jsonl", []),
        ("google/gemma-3-270m", []),
        ("", []),
    ],
)
def test_covering(uri: str, found: list[str]) -> None:
    assert [sample.uri for sample in covering(uri)] == [f"s3://corpora/{name}/" for name in found]


@given(st.sampled_from(SAMPLES), st.data())
def test_covering_goes_by_whole_segments(sample: catalogue.Sample, data: st.DataObject) -> None:
    segments = sample.uri.removesuffix("/").split("/")
    # From `s3://bucket` (three segments) to the whole prefix, then perhaps something below it.
    kept = data.draw(st.integers(3, len(segments)))
    uri = "/".join(segments[:kept])
    assert sample in covering(uri)
    assert sample in covering(uri + "/")
    letters = data.draw(st.text("abcxyz019-", min_size=1, max_size=5))
    assert sample not in covering(uri + letters), "a longer name is another name"
    assert sample in covering(f"{sample.uri}{letters}")


def test_recipe_follows_pins_and_conversion_but_not_the_words_for_people() -> None:
    sample = next(s for s in SAMPLES if isinstance(s.convert, OrangeTab))
    other_pin = sample.packages[0].model_copy(update={"sha256": "0" * 64})
    assert sample.model_copy(update={"packages": (other_pin,)}).recipe != sample.recipe
    assert (
        sample.model_copy(update={"convert": sample.convert.model_copy(update={"labels": 7})}).recipe
        != sample.recipe
    )
    assert sample.model_copy(update={"what": "other words"}).recipe == sample.recipe
