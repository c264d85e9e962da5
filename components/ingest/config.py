"""Settings of the ingest stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from components.shared import examples
from components.shared.settings import Settings


class Normalise(Settings):
    """How text is normalised. Fields that change are kept as they were under `original`.

    Args:
        unicode: Unicode normal form; NFC never changes what a reader sees.
        newlines: CR LF and CR become LF.
        controls: control and zero-width characters and byte order marks are removed.
        trim: white space at both ends is removed.
    """

    unicode: Literal["NFC", "NFKC", "none"] = "NFC"
    newlines: bool = True
    controls: bool = True
    trim: bool = True


class Winner(Settings):
    """Pairs as judges write them down: two answers, and a column that says which one won.

    A row whose column says something else (a tie, both bad) is no preference: it goes to quarantine as
    `no_winner`, for which validate.budget may forgive a share.

    Args:
        column: that says who won.
        answers: what it says -> the column of the answer that has then won; two of them.
    """

    column: str
    answers: dict[str, str] = Field(min_length=2, max_length=2)


class Domain(Settings):
    """Domain text that is trained on before the task: a pipeline file says it in `train.first`.

    Args:
        source: as that of IngestConfig; a Hugging Face data set is read at `ingest.revision` too.
        columns: `text` -> column of the source, where it has another name.
    """

    source: str
    columns: dict[Literal["text"], str] = Field(default_factory=dict)


class IngestConfig(Settings):
    """What to read and how to see it as examples.

    Args:
        source: s3:// prefix, local path or glob, or Hugging Face data set id (its train split, where there is
            one). Of pictures a folder or prefix: with a folder for each class, or with a list (JSONL, CSV,
            Parquet) whose rows name files below its own folder or hold their bytes.
        test_source: the source's own test split, if any; a pipeline file says `split.test_source`.
        domain: see Domain; null for none.
        format: dataset type; inferred from `columns` or the objective when absent.
        columns: field -> column of the source. Absent fields are read from a column of their own name; null
            leaves an optional field out.
        winner: how `chosen` and `rejected` are found in a corpus that has two answers and a verdict.
        keep: further columns to carry along under `extra` (group_by, stratify_by).
        revision: of a Hugging Face data set.
        normalise: see Normalise.
    """

    source: str
    test_source: str | None = None
    domain: Domain | None = None
    format: examples.DatasetType = "prompt-completion"
    columns: dict[str, str | None] = Field(default_factory=dict)
    winner: Winner | None = None
    keep: list[str] = Field(default_factory=list)
    revision: str = "main"
    normalise: Normalise = Normalise()

    def external_uris(self) -> list[str]:
        """The corpus, its test split, and domain text."""
        domain = self.domain.source if self.domain else None
        return [uri for uri in (self.source, self.test_source, domain) if uri]

    def of_domain(self) -> IngestConfig:
        """The settings by which domain text is read."""
        assert self.domain is not None
        return IngestConfig(
            source=self.domain.source,
            columns={"text": self.domain.columns.get("text", "text")},
            format="language-modeling",
            revision=self.revision,
            normalise=self.normalise,
        )

    @model_validator(mode="after")
    def _files_in_sight(self) -> IngestConfig:
        """A list of files is named by its folder: what is in the files decides whether a stage runs again."""
        lists = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")
        narrow = [u for u in self.external_uris() if u.endswith(lists) or any(c in u for c in "*?[")]
        if narrow and examples.media_field(self.format):
            raise ValueError(
                f"source: {self.format} data needs the folder that its files lie in (it is {narrow[0]!r})"
            )
        return self

    @model_validator(mode="after")
    def _known_fields(self) -> IngestConfig:
        known = examples.fields(self.format)
        unknown = sorted(set(self.columns) - set(known))
        if unknown:
            raise ValueError(
                f"columns: {unknown} are no fields of {self.format}; its fields are {list(known)}"
            )
        if self.winner and self.format != "preference":
            raise ValueError(f"winner: belongs to preference data (the format is {self.format})")
        named = sorted({"chosen", "rejected"} & set(self.columns))
        if self.winner and named:
            raise ValueError(f"columns: {named} are what winner finds; drop them, or drop winner")
        needed = [f for f in examples.REQUIRED[self.format] if self.columns.get(f, f) is None]
        if needed:
            raise ValueError(f"columns: {self.format} cannot do without {needed}; name their columns")
        return self
