"""What objectives share whose model answers prompts while it learns: answers, what they earn, the base."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal, chat, examples, generation, packed, rewards
from components.shared.causal import Encoded
from components.shared.loss import token_cross_entropy
from components.shared.tasks import Task
from components.train.adapters import switch
from components.train.objectives.base import Arithmetic, base_settings
from components.train.objectives.config import GrpoObjective, PpoObjective, RlooObjective
from components.train.objectives.noting import Noting

# (messages asked, answers, whether each ended) -> rewards
Judge = Callable[[Sequence[Sequence[Mapping[str, str]]], Sequence[str], Sequence[bool]], list[float]]
GREEDY, SAMPLED = 0.0, 1.0
# Prompts that are answered together.
_TOGETHER = 64


@dataclass(frozen=True)
class Prompt:
    """What is asked, as messages and token ids, the tokens of room its answer has, and the data's answer."""

    messages: list[dict[str, str]]
    prompt: list[int]
    room: int
    reference: str | None = None

    def __len__(self) -> int:
        return len(self.prompt) + self.room


@dataclass(frozen=True)
class Said:
    """Answers of the model to prompts, as sequences, and what they earned."""

    sequences: list[Encoded]
    ended: list[bool]
    rewards: list[float]


def judge_of(folder: Path) -> Judge:
    """The reward model of a folder as a function.

    Raises:
        TuneyardError: it is no reward model.
    """
    model, tokenizer, card = rewards.load(folder)
    model.requires_grad_(False)

    def judge(
        asked: Sequence[Sequence[Mapping[str, str]]], answers: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        sequences = [
            rewards.encode(tokenizer, messages, answer, card.max_length_tokens, done)
            for messages, answer, done in zip(asked, answers, ended, strict=True)
        ]
        return rewards.of_answers(model, tokenizer, sequences)

    return judge


class Answering(Noting):
    """The model answers prompts, and answers that earned more become likelier.

    Everything is computed without dropout: with it the ratio of new to old probability would be noise.

    Attributes:
        answers_each: how many answers are drawn to each prompt of a step.
    """

    task: Task = "causal-lm"
    judged_measures = ("reward", "kl_nats", "answer_tokens")
    answers_each = 1
    # The loss is of e to the difference of two log-probabilities, each rounded: Gemma's moved by up to 1.7%.
    rounding = 2.0

    def __init__(
        self,
        folder: Path,
        precision: causal.Precision,
        settings: PpoObjective | GrpoObjective | RlooObjective,
        base_inside: bool,
    ) -> None:
        """Open the model.

        Args:
            folder: of the base model.
            precision: the weights are held in.
            settings: of the objective.
            base_inside: whether the base is the model with its adapter switched off; else a copy is kept.
        """
        super().__init__()
        self._asked = settings
        self.model, self.tokenizer = causal.open_folder(folder, precision, base_settings(folder, 0.0))
        self._base_inside = base_inside
        self._base: Any = None
        self._round: dict[str, float] = {}

    @abstractmethod
    def _rewards_of(
        self, prompts: Sequence[Prompt], answers: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        """What answers to these prompts earn."""

    @abstractmethod
    def _rollouts(self, prompts: Sequence[Prompt], arithmetic: Arithmetic) -> list[Any]:
        """Answers drawn to these prompts, `answers_each` to each, and what is to be learned of them."""

    @abstractmethod
    def _learned_loss(self, said: Sequence[Any]) -> Any:
        """The loss summed over the terms of such answers."""

    def encode(self, example: Mapping[str, Any]) -> Prompt:
        """See Objective."""
        messages = examples.asked(example)
        ids = chat.prompt_ids(self.tokenizer, messages)
        return Prompt(messages, ids, self._asked.max_new_tokens, example.get("completion"))

    def shorten(self, encoded: Prompt, max_length: int) -> Prompt | None:
        """Cut the prompt from its left, but for the first token; the answer keeps its room."""
        room = max_length - encoded.room
        if room < 1:
            return None
        ids = causal.cut_prompt(encoded.prompt, room, self.tokenizer.bos_token_id)
        return Prompt(encoded.messages, ids, encoded.room, encoded.reference)

    def prepare(self, encoded: Sequence[Prompt], arithmetic: Arithmetic) -> None:
        """Keep the base, unless the model will hold it under its adapter."""
        if not self._base_inside:
            self._base = copy.deepcopy(self.model).eval().requires_grad_(False)

    def turns(
        self, batches: Sequence[Sequence[Prompt]], arithmetic: Arithmetic
    ) -> Iterator[Sequence[Sequence[Any]]]:
        """Answer the prompts of a step, then go over the answers as often as the settings say."""
        import torch

        found = self._rollouts([prompt for batch in batches for prompt in batch], arithmetic)
        size, together = -(-len(found) // self._asked.minibatches), max(map(len, batches))
        for _ in range(self._asked.rollout_epochs):
            order = torch.randperm(len(found)).tolist()
            for start in range(0, len(order), size):
                chosen = sorted(order[start : start + size], key=lambda i: len(found[i]))
                yield [
                    [found[i] for i in chosen[at : at + together]] for at in range(0, len(chosen), together)
                ]

    def _say(self, prompts: Sequence[Prompt], temperature: float) -> Said:
        """Answer the prompts and have the answers judged."""
        self.model.eval()
        with packed.unpacked(self.model):
            answers = generation.generate(
                self.model,
                [prompt.prompt for prompt in prompts],
                chat.end_ids(self.tokenizer),
                self._asked.max_new_tokens,
                min(len(prompts), _TOGETHER),
                temperature=temperature,
            )
        texts = [self.tokenizer.decode(a.tokens, skip_special_tokens=True).strip() for a in answers]
        ended = [answer.ended for answer in answers]
        sequences = [
            Encoded(prompt.prompt, answer.chosen) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return Said(sequences, ended, self._rewards_of(prompts, texts, ended))

    def _earned(self, said: Said) -> list[float]:
        """The rewards of drawn answers, less what a missing end costs."""
        return [
            reward - (0.0 if ended else self._asked.missing_end_penalty)
            for reward, ended in zip(said.rewards, said.ended, strict=True)
        ]

    def _states(self, sequences: Sequence[Encoded], model: Any) -> tuple[Any, Any, list[int]]:
        """States before each answer token [tokens, width], their log-probabilities, tokens of each answer."""
        _, head, cap = causal.body_and_head(model)
        states, targets = causal.answer_states(model, sequences, self.tokenizer.pad_token_id)
        log_probs = -token_cross_entropy(states, head, cap, targets)
        return states, log_probs, [len(sequence.answer) for sequence in sequences]

    def _log_probs(self, sequences: Sequence[Encoded], model: Any = None) -> list[Any]:
        """Log-probability of each answer token, by answer."""
        _, log_probs, lengths = self._states(sequences, model or self.model)
        return list(log_probs.split(lengths))

    def _base_log_probs(self, sequences: Sequence[Encoded]) -> list[Any]:
        if self._base is not None:
            return self._log_probs(sequences, self._base)
        with switch.off(self.model):
            return self._log_probs(sequences)

    def _noted(self, said: Said, now: Sequence[Any], base: Sequence[Any]) -> dict[str, float]:
        """Figures of drawn answers for the history."""
        count = len(said.sequences)
        return {
            "reward": sum(said.rewards) / count,
            "kl_nats": sum(float((n - b).sum()) for n, b in zip(now, base, strict=True)) / count,
            "answer_tokens": sum(len(s.answer) for s in said.sequences) / count,
        }

    def summed_loss(self, batch: Sequence[Any], label_smoothing: float) -> Any:
        """See Objective: of answers their loss; of prompts, what their greedy answers cost."""
        self.model.eval()
        said = [each for each in batch if not isinstance(each, Prompt)]
        if said:
            return self._learned_loss(said)
        return self._cost(batch)

    def _cost(self, prompts: Sequence[Prompt]) -> Any:
        """The reward of greedy answers and what their distance from the base costs, the sign turned round."""
        import torch

        said = self._say(prompts, GREEDY)
        now, base = self._log_probs(said.sequences), self._base_log_probs(said.sequences)
        apart = sum(float((n - b).sum()) for n, b in zip(now, base, strict=True))
        self.note(
            reward=sum(said.rewards),
            kl_nats=apart,
            answer_tokens=float(sum(len(sequence.answer) for sequence in said.sequences)),
        )
        return torch.tensor(self._asked.kl_weight * apart - sum(said.rewards))

    def notes(self) -> dict[str, float]:
        """See Objective; and of the answers that were drawn for this step."""
        return {**super().notes(), **self._round}

    def template_probe(self) -> dict[str, Any] | None:
        """See Objective."""
        return chat.probe(self.tokenizer)
