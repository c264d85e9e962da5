"""What the OpenAI-compatible routes accept. A field that would be ignored is refused instead."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Fields that clients send with the value that asks for nothing: taken as absent. Another value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


class StreamOptions(BaseModel):
    """Options of a streamed answer.

    Args:
        include_usage: whether a last chunk carries the token counts.
    """

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Sampling(BaseModel):
    """What both kinds of completion share.

    Args:
        model: name of a registered model.
        max_tokens: longest answer; None: what the context has left, up to causal.DEFAULT_MAX_TOKENS.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        stop: up to four strings that end the answer.
        seed: the same seed gives the same answer of the same model version.
        stream: answer as server-sent events.
        stream_options: only beside stream.
        n: one answer.
        user: not used; clients send it for their own records.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: list[str] = Field(default_factory=list, max_length=4)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # OpenAI's newer name for the same field.
        if data.get("max_tokens") is None and "max_completion_tokens" in data:
            data = {**data, "max_tokens": data["max_completion_tokens"]}
            del data["max_completion_tokens"]
        return {k: v for k, v in data.items() if v is not None and not (k in _NEUTRAL and v in _NEUTRAL[k])}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class TextPart(BaseModel):
    """Text as a part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation; parts are joined."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)


class CompletionRequest(Sampling):
    """POST /v1/completions; the prompt is not put into a template."""

    prompt: str = Field(min_length=1)

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value
