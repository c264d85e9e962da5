"""Settings of the objectives over images and speech; see config.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from components.shared.settings import Settings


class ImageAugmentation(Settings):
    """What is done to each training image anew in every update; nothing to those that judge the model.

    Args:
        rotate_degrees: turned by at most so much, either way.
        crop: share (0-1) of each side that a cut-out may leave out; what is left is stretched to the whole.
        colour_jitter: share (0-1) by which brightness, contrast and saturation each move at most.
        flip: mirrored every second time: left and right, or that and upside down; `none` where a mirror image
            means something else, as in writing.
    """

    rotate_degrees: float = Field(0.0, ge=0, le=180)
    crop: float = Field(0.0, ge=0, lt=1)
    colour_jitter: float = Field(0.0, ge=0, lt=1)
    flip: Literal["none", "horizontal", "both"] = "none"


class ImageClassificationObjective(Settings):
    """One label out of several for an image. Images are prepared as the base says, and so for good.

    Norms over a batch keep the base's statistics: with a batch's own the loss would depend on how an update
    is cut into micro-batches.

    Args:
        class_weights: see ClassificationObjective.
        augment: see ImageAugmentation.
    """

    kind: Literal["image-classification"]
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    augment: ImageAugmentation = ImageAugmentation()


class SpeechAugmentation(Settings):
    """What is done to each training recording anew in every update; nothing to those that judge the model.

    Args:
        noise_snr_db: white noise so far below the recording at the loudest, and up to 20 dB further; null for
            none.
        stretch: share (0-0.5) by which the tempo moves at most, either way, at the same pitch.
        mask_seconds: longest time that is made unheard (SpecAugment, arXiv:1904.08779).
        mask_bands: most bands of frequency that are.
    """

    noise_snr_db: float | None = None
    stretch: float = Field(0.0, ge=0, le=0.5)
    mask_seconds: float = Field(0.0, ge=0)
    mask_bands: int = Field(0, ge=0)


class SpeechRecognitionObjective(Settings):
    """A transcript of a recording; loss on its tokens and its end, none on language and task in front of it.

    train.max_length is in tokens of the transcript; recordings longer than the base hears at once (Whisper:
    30 seconds) stop the line.

    Args:
        language: as Whisper writes it (chinese or zh); null: what the base's tokenizer says.
        augment: see SpeechAugmentation.
    """

    kind: Literal["speech-recognition"]
    language: str | None = None
    augment: SpeechAugmentation = SpeechAugmentation()
