"""Proximal policy optimisation of a causal language model against a reward model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.shared import causal, chat, examples, generation, packed, rewards
from components.shared.causal import Encoded
from components.shared.loss import token_cross_entropy
from components.shared.tasks import Task
from components.train.objectives import advantages
from components.train.objectives.advantages import Rollout
from components.train.objectives.base import Arithmetic, base_settings
from components.train.objectives.config import PpoObjective
from components.train.objectives.noting import Noting

# (messages asked, answers, whether each ended) -> rewards
Judge = Callable[[Sequence[Sequence[Mapping[str, str]]], Sequence[str], Sequence[bool]], list[float]]
_GREEDY, _SAMPLED = 0.0, 1.0


@dataclass(frozen=True)
class Prompt:
    """What is asked, as messages and token ids, and how many tokens of room its answer has."""

    messages: list[dict[str, str]]
    prompt: list[int]
    room: int

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


class Ppo(Noting):
    """The model answers prompts, and answers that earned more than expected become likelier.

    Everything is computed without dropout: with it the ratio of new to old probability would be noise.
    """

    task: Task = "causal-lm"
    measures = ("policy_loss", "value_loss", "clipped_fraction")
    judged_measures = ("reward", "kl_nats", "answer_tokens")

    def __init__(
        self,
        folder: Path,
        precision: causal.Precision,
        settings: PpoObjective,
        judge: Judge,
        base_inside: bool,
    ) -> None:
        """Open the model.

        Args:
            folder: of the base model.
            precision: the weights are held in.
            settings: see PpoObjective.
            judge: gives rewards.
            base_inside: whether the base is the model with its adapter switched off; else a copy is kept.
        """
        super().__init__()
        self.settings = settings
        self.model, self.tokenizer = causal.open_folder(folder, precision, base_settings(folder, 0.0))
        self._judge, self._base_inside = judge, base_inside
        self._base: Any = None
        self._round: dict[str, float] = {}

    def encode(self, example: Mapping[str, Any]) -> Prompt:
        """See Objective."""
        messages = examples.asked(example)
        return Prompt(messages, chat.prompt_ids(self.tokenizer, messages), self.settings.max_new_tokens)

    def shorten(self, encoded: Prompt, max_length: int) -> Prompt | None:
        """Cut the prompt from its left, but for the first token; the answer keeps its room."""
        room = max_length - encoded.room
        if room < 1:
            return None
        ids = causal.cut_prompt(encoded.prompt, room, self.tokenizer.bos_token_id)
        return Prompt(encoded.messages, ids, encoded.room)

    def terms(self, encoded: Prompt | Rollout) -> int:
        """The tokens of an answer; a prompt that is judged is one."""
        return len(encoded.answer) if isinstance(encoded, Rollout) else 1

    def prepare(self, encoded: Sequence[Prompt], arithmetic: Arithmetic) -> None:
        """Keep the base, unless the model will hold it under its adapter."""
        if not self._base_inside:
            self._base = copy.deepcopy(self.model).eval().requires_grad_(False)

    def start(self) -> None:
        """Add the value head: the state before a token -> what will be earned from there; 0 at first."""
        import torch

        width = self.model.get_input_embeddings().embedding_dim
        head = torch.nn.Linear(width, 1, device=causal.device())
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        self.model.value_head = head

    def finish(self) -> None:
        """Take the value head off: only training needs it."""
        del self.model.value_head

    def rehearsed(self, examples: Sequence[Prompt]) -> Sequence[Rollout]:
        """Answers to these prompts, each token as good as the other.

        Whitened advantages sum to 0, and with them the loss at the start: nothing to compare with.
        """
        return [
            replace(found, advantages=found.advantages * 0 + 1, returns=found.values + 1)
            for found in self._rollouts(examples, nullcontext)
        ]

    def turns(
        self, batches: Sequence[Sequence[Prompt]], arithmetic: Arithmetic
    ) -> Iterator[Sequence[Sequence[Rollout]]]:
        """Answer the prompts of a step, then go over the answers as often as the settings say."""
        import torch

        found = self._rollouts([prompt for batch in batches for prompt in batch], arithmetic)
        size, together = -(-len(found) // self.settings.minibatches), max(map(len, batches))
        for _ in range(self.settings.rollout_epochs):
            order = torch.randperm(len(found)).tolist()
            for start in range(0, len(order), size):
                chosen = sorted(order[start : start + size], key=lambda i: len(found[i]))
                yield [
                    [found[i] for i in chosen[at : at + together]] for at in range(0, len(chosen), together)
                ]

    def _rollouts(self, prompts: Sequence[Prompt], arithmetic: Arithmetic) -> list[Rollout]:
        """Sampled answers with their advantages, these whitened over all of them."""
        import torch

        settings = self.settings
        with torch.no_grad(), arithmetic():
            said = self._say(prompts, _SAMPLED)
            log_probs, values = self._read(said.sequences)
            base = self._base_log_probs(said.sequences)
        earned = [
            reward - (0.0 if ended else settings.missing_end_penalty)
            for reward, ended in zip(said.rewards, said.ended, strict=True)
        ]
        per_token = [
            advantages.token_rewards(reward, now, before, settings.kl_weight)
            for reward, now, before in zip(earned, log_probs, base, strict=True)
        ]
        found = [
            advantages.advantages(reward, value, settings.gamma, settings.gae_lambda)
            for reward, value in zip(per_token, values, strict=True)
        ]
        self._round = {
            "reward": sum(said.rewards) / len(prompts),
            "kl_nats": sum(float((n - b).sum()) for n, b in zip(log_probs, base, strict=True)) / len(prompts),
            "answer_tokens": sum(len(s.answer) for s in said.sequences) / len(prompts),
        }
        return [
            Rollout(sequence.prompt, sequence.answer, now, value, white, advantage + value)
            for sequence, now, value, white, advantage in zip(
                said.sequences, log_probs, values, advantages.whitened(found), found, strict=True
            )
        ]

    def _say(self, prompts: Sequence[Prompt], temperature: float) -> Said:
        """Answer the prompts and have the answers judged."""
        self.model.eval()
        ends = chat.end_ids(self.tokenizer)
        with packed.unpacked(self.model):
            answers = generation.generate(
                self.model,
                [prompt.prompt for prompt in prompts],
                ends,
                self.settings.max_new_tokens,
                len(prompts),
                temperature=temperature,
            )
        texts = [self.tokenizer.decode(a.tokens, skip_special_tokens=True).strip() for a in answers]
        ended = [answer.ended for answer in answers]
        judged = self._judge([prompt.messages for prompt in prompts], texts, ended)
        sequences = [
            Encoded(prompt.prompt, answer.chosen) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return Said(sequences, ended, judged)

    def _read(self, sequences: Sequence[Encoded], model: Any = None) -> tuple[list[Any], list[Any]]:
        """Log-probability of each answer token and the value before it, by answer; of the base, no values."""
        import torch

        reading = model or self.model
        _, head, cap = causal.body_and_head(reading)
        states, targets = causal.answer_states(reading, sequences, self.tokenizer.pad_token_id)
        lengths = [len(sequence.answer) for sequence in sequences]
        log_probs = -token_cross_entropy(states, head, cap, targets)
        if not hasattr(reading, "value_head"):
            return list(log_probs.split(lengths)), []
        with torch.autocast(states.device.type, enabled=False):
            values = reading.value_head(states.float())[:, 0]
        return list(log_probs.split(lengths)), list(values.split(lengths))

    def _base_log_probs(self, sequences: Sequence[Encoded]) -> list[Any]:
        if self._base is not None:
            return self._read(sequences, self._base)[0]
        with self.model.disable_adapter():
            return self._read(sequences)[0]

    def summed_loss(self, batch: Sequence[Prompt] | Sequence[Rollout], label_smoothing: float) -> Any:
        """See Objective: of answers the losses of PPO; of prompts, what their greedy answers cost."""
        import torch

        self.model.eval()
        said = [each for each in batch if isinstance(each, Rollout)]
        if not said:
            return self._cost([each for each in batch if isinstance(each, Prompt)])
        log_probs, values = self._read([Encoded(each.prompt, each.answer) for each in said])
        policy, value, outside = advantages.losses(
            torch.cat(log_probs), torch.cat(values), said, self.settings
        )
        self.note(
            policy_loss=float(policy.detach().sum()),
            value_loss=float(value.detach().sum()),
            clipped_fraction=float(outside.sum()),
        )
        return (policy + self.settings.value_weight * value).sum()

    def _cost(self, prompts: Sequence[Prompt]) -> Any:
        """The reward of greedy answers and what their distance from the base costs, the sign turned round."""
        import torch

        said = self._say(prompts, _GREEDY)
        now, base = self._read(said.sequences)[0], self._base_log_probs(said.sequences)
        apart = sum(float((n - b).sum()) for n, b in zip(now, base, strict=True))
        self.note(
            reward=sum(said.rewards),
            kl_nats=apart,
            answer_tokens=float(sum(len(sequence.answer) for sequence in said.sequences)),
        )
        return torch.tensor(self.settings.kl_weight * apart - sum(said.rewards))

    def notes(self) -> dict[str, float]:
        """See Objective; and of the answers that were sampled for this step."""
        return {**super().notes(), **self._round}

    def template_probe(self) -> dict[str, Any] | None:
        """See Objective."""
        return chat.probe(self.tokenizer)
