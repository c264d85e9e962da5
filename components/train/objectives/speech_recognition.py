"""Transcripts of speech, by Whisper and its like (AutoModelForSpeechSeq2Seq)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal, digest, sounds, transcribing
from components.shared.encoded import Encoded
from components.shared.errors import TuneyardError
from components.shared.tasks import Task
from components.train.config import TrainConfig
from components.train.objectives.augmentation import Augmented
from components.train.objectives.base import base_settings
from components.train.objectives.media_config import SpeechRecognitionObjective
from components.train.objectives.sound_augmenting import augmented, masked
from components.train.ranks import Ranks


@dataclass(frozen=True)
class Spoken:
    """Where a recording is, what must be written of it, and what tells its augmentation from others'."""

    path: str
    text: Encoded
    id: str

    def __len__(self) -> int:
        return len(self.text)


class SpeechRecognition(Augmented):
    """Cross-entropy on the tokens of the transcript and its end (Radford et al. 2022, arXiv:2212.04356)."""

    task: Task = "speech-recognition"

    def __init__(self, folder: Path, config: TrainConfig, rows: Sequence[Mapping[str, Any]]) -> None:
        assert isinstance(config.objective, SpeechRecognitionObjective)
        self._augment, self._batch = config.objective.augment, config.per_device_batch_size
        self.tokenizer = sounds.open_processor(folder)  # text and sound are prepared by one object
        self._set_language(config.objective.language)
        sounds.refuse_long(rows, self.tokenizer, "train")
        self.model = _open(folder, config.dropout)
        self._probe = sounds.probe(self.tokenizer)

    def _set_language(self, language: str | None) -> None:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        tokenizer = self.tokenizer.tokenizer
        if language is None:
            return
        try:
            tokenizer.set_prefix_tokens(language=language, task="transcribe", predict_timestamps=False)
            # The tokenizer counts to where the token should be, and a base may have fewer languages.
            named = tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens)[1]
            code = language.lower()
            unknown = named not in (f"<|{code}|>", f"<|{TO_LANGUAGE_CODE.get(code)}|>")
        except (ValueError, IndexError):
            unknown = True
        if unknown:
            raise TuneyardError(
                f"train.objective.language {language!r} is none that the base model knows",
                "write it as Whisper does (chinese, english; zh, en), or drop it for a base of one language",
            )

    def usable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """All rows of eval, which must fit the window as those of train."""
        sounds.refuse_long(rows, self.tokenizer, "eval")
        return list(rows)

    def encode(self, example: Mapping[str, Any]) -> Spoken:
        """See Objective; its length is that of the transcript, the recording is read when it is needed."""
        text = transcribing.encode(self.tokenizer.tokenizer, example["text"])
        return Spoken(example["audio"], text, example["id"])

    def shorten(self, encoded: Spoken, max_length: int) -> Spoken | None:
        """A transcript is never cut."""
        return None

    def terms(self, encoded: Spoken) -> int:
        """Tokens of the transcript, its end among them."""
        return len(encoded.text.answer)

    def summed_loss(self, batch: Sequence[Spoken], label_smoothing: float) -> Any:
        """See Objective."""
        import torch

        heard = torch.tensor(self.heard(batch), device=causal.device())
        logits, targets = transcribing.transcript_logits(self.model, heard, [e.text for e in batch])
        return torch.nn.functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=label_smoothing
        )

    def heard(self, batch: Sequence[Spoken]) -> Any:
        """Features [recordings, bands, frames]; of changed recordings while the model is in training mode."""
        import numpy as np

        extractor = self.tokenizer.feature_extractor
        sound = [sounds.read(e.path, extractor) for e in batch]
        if not self.model.training:
            return sounds.features(self.tokenizer, sound)
        seeds = [int(digest.of_value([self._draw, e.id])[:15], 16) for e in batch]
        draws = [np.random.default_rng(seed) for seed in seeds]
        longest, rate = extractor.n_samples, extractor.sampling_rate
        changed = [augmented(s, rate, longest, self._augment, d) for s, d in zip(sound, draws, strict=True)]
        found = sounds.features(self.tokenizer, changed)
        frames = rate / extractor.hop_length
        return np.stack([masked(f, self._augment, frames, d) for f, d in zip(found, draws, strict=True)])

    def judged_loss(self, encoded: Sequence[Any], batches: Iterable[Sequence[int]], ranks: Ranks) -> float:
        """See Objective; in batches of as many recordings as in training: each is as long as the window."""
        every = [i for batch in batches for i in batch]
        cut = [every[a : a + self._batch] for a in range(0, len(every), self._batch)]
        return super().judged_loss(encoded, cut, ranks)

    def card_facts(self) -> dict[str, Any]:
        """What evaluation holds the saved processor against."""
        return {"preprocess_probe": self._probe}


def _open(folder: Path, dropout: float | None) -> Any:
    from transformers import AutoModelForSpeechSeq2Seq

    model = AutoModelForSpeechSeq2Seq.from_pretrained(
        folder,
        config=base_settings(folder, dropout),
        dtype="float32",
        local_files_only=True,
        use_safetensors=True,
    )
    # SpecAugment of its own would draw anew for each micro-batch.
    model.config.apply_spec_augment = False
    return model.to(causal.device())
