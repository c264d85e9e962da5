"""Settings of the adapters: which weights move. `adapter: lora` is short for `adapter: {kind: lora}`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from components.shared.settings import Settings


class Adapter(Settings):
    """What every adapter has.

    Attributes:
        usual_rate: learning rate where a pipeline file names none.
        most: largest share (0-1) of the weights that may move, but for a classifier's new head.
        beside: whether it stays beside its base, since it cannot be merged into the base's weights.
        frozen: whether the base's own weights stay as they are, and so may be held in 16 bits.
        exact: whether `precision: auto` is float32 on any processor.
        base_inside: whether it can be switched off (see switch.py), so that the model holds its base.
    """

    usual_rate: ClassVar[float]
    most: ClassVar[float] = 1.0
    beside: ClassVar[bool] = False
    frozen: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    base_inside: ClassVar[bool] = False


class OwnWeights(Adapter):
    """Adapters that move the base's own weights.

    Args:
        layer_decay: each layer's learning rate as a share of that of the layer above it; 1 for one rate. 0.95
            is usual (discriminative fine-tuning, Howard and Ruder 2018, arXiv:1801.06146, section 3.2).
    """

    usual_rate: ClassVar[float] = 2e-5
    frozen: ClassVar[bool] = False
    layer_decay: float = Field(1.0, gt=0, le=1)


class FullAdapter(OwnWeights):
    """No adapter: every weight moves."""

    kind: Literal["full"]


class LastLayersAdapter(OwnWeights):
    """Only the topmost layers move.

    Args:
        layers: how many, counted from the head down.
        head: whether what is above the layers moves with them (the last norm, a classifier's head).
        embeddings: whether the embeddings move, and a projection that is tied to them.
    """

    kind: Literal["last_layers"]
    layers: int = Field(4, ge=0)
    head: bool = True
    embeddings: bool = False


class ProgressiveAdapter(OwnWeights):
    """Unfreezing from the head down, layer by layer (Howard and Ruder 2018, arXiv:1801.06146, section 3.3).

    The first updates move the head alone; the embeddings join last.

    Args:
        every_steps: optimizer updates from one layer to the next; not beside `until`.
        until: share (0-1) of the run after which everything moves, the layers evenly spread over it; 0.5
            where neither is given.
    """

    kind: Literal["progressive"]
    every_steps: int | None = Field(None, ge=1)
    until: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("every_steps") is None and raw.get("until") is None:
            return {**raw, "until": 0.5}
        return raw

    @model_validator(mode="after")
    def _one_pace(self) -> ProgressiveAdapter:
        if self.every_steps is not None and self.until is not None:
            raise ValueError(
                f"every_steps ({self.every_steps}) and until ({self.until}) cannot both be set; drop one"
            )
        return self


class LowRank(Adapter):
    """Low-rank adaptation: W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685).

    Args:
        rank: of A and B.
        alpha: scale; 2 x rank is a common choice.
        dropout: on the adapter's input, in training.
        targets: which linear layers it is added to: `all-linear` of the body, or ends of their names, such as
            [q_proj, v_proj].
        rslora: divide alpha by the root of the rank, so that a high rank learns as fast as a low one
            (Kalajdzievski 2023, arXiv:2312.03732).
        dora: learn the length of each row of the sum beside its direction (Liu et al. 2024,
            arXiv:2402.09353).
    """

    usual_rate: ClassVar[float] = 2e-4
    most: ClassVar[float] = 0.1
    base_inside: ClassVar[bool] = True
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False


class LoraAdapter(LowRank):
    """Low-rank adaptation of a base that is held as it is stored; see LowRank."""

    kind: Literal["lora"]


class QloraAdapter(LowRank):
    """Low-rank adaptation of a base whose layers are held in 4 bits (Dettmers et al. 2023, arXiv:2305.14314).

    The model that comes out is the unquantised base with the adapter; compress states how far that is from
    what was trained.
    """

    kind: Literal["qlora"]


class Ia3Adapter(Adapter):
    """Scales of keys, values and the feed-forward's inner activations (Liu et al. 2022, arXiv:2205.05638)."""

    usual_rate: ClassVar[float] = 3e-3
    most: ClassVar[float] = 0.1
    base_inside: ClassVar[bool] = True
    kind: Literal["ia3"]


class HoulsbyAdapter(Adapter):
    """Two bottlenecks in every layer, and its layer norms (Houlsby et al. 2019, arXiv:1902.00751).

    Args:
        size: neurons of a bottleneck.
    """

    usual_rate: ClassVar[float] = 3e-4
    most: ClassVar[float] = 0.05
    beside: ClassVar[bool] = True
    frozen: ClassVar[bool] = False
    kind: Literal["houlsby"]
    size: int = Field(64, ge=1)


class PfeifferAdapter(Adapter):
    """One bottleneck in every layer, behind the feed-forward (Pfeiffer et al. 2020, arXiv:2005.00247).

    Args:
        size: neurons of a bottleneck.
    """

    usual_rate: ClassVar[float] = 3e-4
    most: ClassVar[float] = 0.05
    beside: ClassVar[bool] = True
    kind: Literal["pfeiffer"]
    size: int = Field(48, ge=1)


class SoftPrompt(Adapter):
    """Learned vectors that the frozen model reads before the text.

    Args:
        tokens: how many virtual tokens.
    """

    most: ClassVar[float] = 0.01
    beside: ClassVar[bool] = True
    base_inside: ClassVar[bool] = True
    tokens: int = Field(20, ge=1)


class PrefixAdapter(SoftPrompt):
    """Keys and values before those of every layer, by a small network (Li and Liang 2021, arXiv:2101.00190).

    Args:
        projection: neurons of that network, which is dropped after training.
    """

    usual_rate: ClassVar[float] = 1e-3
    kind: Literal["prefix"]
    projection: int = Field(128, ge=1)


class PromptAdapter(SoftPrompt):
    """Word vectors before those of the text (Lester et al. 2021, arXiv:2104.08691).

    Their gradient has come down through every layer: in bfloat16 two ways to add up the same one were 39%
    apart on Gemma 3 270M (in float32 0.003%; of keys and values in every layer 0.3%), so it is computed in
    float32.
    """

    exact: ClassVar[bool] = True
    usual_rate: ClassVar[float] = 3e-2
    kind: Literal["prompt"]


class PTuningV2Adapter(SoftPrompt):
    """Keys and values before those of every layer, learned directly (Liu et al. 2021, arXiv:2110.07602)."""

    usual_rate: ClassVar[float] = 1e-2
    kind: Literal["p_tuning_v2"]


AdapterConfig = Annotated[
    FullAdapter
    | LastLayersAdapter
    | ProgressiveAdapter
    | LoraAdapter
    | QloraAdapter
    | Ia3Adapter
    | HoulsbyAdapter
    | PfeifferAdapter
    | PrefixAdapter
    | PromptAdapter
    | PTuningV2Adapter,
    Field(discriminator="kind"),
]

KINDS: dict[str, type[Adapter]] = {
    get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(get_args(AdapterConfig)[0])
}
