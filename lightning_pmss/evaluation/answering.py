"""Answer a batch of questions, by generated text or by the likeliest of the offered labels, and record the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_pmss.evaluation.answers import examine
from lightning_pmss.evaluation.generation import Generation
from lightning_pmss.evaluation.identity import max_over_ranks
from lightning_pmss.evaluation.likelihood import candidates, choose, log_likelihoods
from lightning_pmss.evaluation.run import question

AnswerBy = Literal["generation", "likelihood"]


@dataclass(frozen=True)
class Answering:
    """Options by which an evaluation answers questions.

    Args:
        generation: Options of the generation.
        by: "generation" or "likelihood".
        metric: Metric that scores texts, or None.

    Raises:
        ValueError: ``by`` is unknown, or is "likelihood" without a metric.
    """

    generation: Generation
    by: AnswerBy
    metric: Any

    def __post_init__(self) -> None:
        if self.by not in ("generation", "likelihood"):
            raise ValueError(f"answer_by={self.by!r} is not known; choose 'generation' or 'likelihood'.")
        if self.by == "likelihood" and self.metric is None:
            raise ValueError("answer_by='likelihood' needs a metric that knows the labels: CommonsenseAccuracy.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that determine the answers of a given model."""
        return {"answer_by": self.by} | (self.generation.to_dict() if self.by == "generation" else {})

    def records(
        self, model: Any, tokenizer: Any, batch: dict[str, Any], generate: Callable[[Tensor, Tensor], list[str]]
    ) -> list[dict[str, Any]]:
        """Make one record per example of a batch; call it on every rank if the model is sharded.

        Args:
            model: A causal language model of transformers.
            tokenizer: Its tokenizer.
            batch: See `CausalLMModule`.
            generate: Function from left-padded prompts and their mask to texts.
        """
        if self.by == "likelihood":
            answers = self._choices(model, tokenizer, batch)
        else:
            texts = generate(batch["prompt_ids"], batch["prompt_mask"])
            pairs = zip(texts, batch["target"], strict=True)
            answers = [{"output": text, **examine(self.metric, text, target)} for text, target in pairs]
        numbers = batch["id"].tolist()
        return [
            {"id": number, **question(batch, place), **answer}
            for place, (number, answer) in enumerate(zip(numbers, answers, strict=True))
        ]

    def _choices(self, model: Any, tokenizer: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
        options = candidates(self.metric, tokenizer, batch)
        ids, mask = batch["prompt_ids"], batch["prompt_mask"]
        # An example with fewer labels than others repeats its first one.
        turns = [
            [list(labels)[turn if turn < len(labels) else 0] for labels in options]
            for turn in range(max_over_ranks(max(map(len, options)), model, ids.device))
        ]
        tokens = [[labels[name] for labels, name in zip(options, names, strict=True)] for names in turns]
        values = log_likelihoods(model, ids, mask, tokens, tokenizer.pad_token_id).tolist()
        found: list[dict[str, tuple[float, int]]] = [{} for _ in options]
        for names, responses, row in zip(turns, tokens, values, strict=True):
            for place, name in enumerate(names):
                found[place].setdefault(name, (row[place], len(responses[place])))
        return [self._choice(values, target) for values, target in zip(found, batch["target"], strict=True)]

    def _choice(self, values: dict[str, tuple[float, int]], target: Any) -> dict[str, Any]:
        likeliest, normalised = choose(values)
        scores = examine(self.metric, likeliest, target)
        scores["score_normalised"] = examine(self.metric, normalised, target)["score"]
        return {"output": likeliest, **scores, "likelihoods": {k: list(v) for k, v in values.items()}}
