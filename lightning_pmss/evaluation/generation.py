"""Generate texts up to a stop string, greedily or by beam search, in which each text is independent of its batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lightning_pmss.datamodules.chat import end_of_turn


@dataclass(frozen=True)
class Generation:
    """Options of generation without sampling.

    Args:
        max_new_tokens: Largest number of generated tokens.
        num_beams: 1: greedy. More: beam search with this many hypotheses, ranked by mean log-probability.
        stop: Strings that end a text; the text is cut before the first of them.

    Raises:
        ValueError: An argument is out of its range.
    """

    max_new_tokens: int = 256
    num_beams: int = 1
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name in ("max_new_tokens", "num_beams"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={list(self.stop)!r} contains an empty text, at which every answer would end.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "stop": list(self.stop)}

    @torch.no_grad()
    def texts(
        self,
        model: Any,
        tokenizer: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        in_step: bool = False,
        ends: Iterable[int] = (),
        settings: Mapping[str, Any] | None = None,
        streamer: Any = None,
    ) -> list[str]:
        """Generate the continuation of each prompt, without special tokens and outer white space.

        Args:
            model: A causal language model of transformers.
            tokenizer: Its tokenizer.
            prompt_ids: int64 [B, P], left padded.
            prompt_mask: int64 [B, P], 0 on padding.
            in_step: Whether each forward pass is a collective: a rank whose texts have ended continues until all have.
            ends: Further tokens that end a text, besides `eos_ids`, for data with its own tokenizer.
            settings: Settings of the generation config in place of the greedy ones, such as those of sampling.
            streamer: Streamer of transformers that gets the tokens of one prompt as they come.
        """
        eos, width = sorted({*eos_ids(model, tokenizer), *ends}), prompt_ids.shape[1]
        # All options are set, because the model's own generation config (sampling, penalties) replaces None.
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "num_beams": self.num_beams,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "length_penalty": 1.0,
            "early_stopping": False,
            "no_repeat_ngram_size": 0,
            "eos_token_id": eos,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = GenerationConfig(**options | dict(settings or {}))
        more: dict[str, Any] = {}
        if self.stop:
            more["stopping_criteria"] = StoppingCriteriaList([_StopStrings(tokenizer, self.stop, width, eos)])
        tokens = model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            generation_config=config,
            synced_gpus=in_step,
            streamer=streamer,
            **more,
        )
        return [cut(_decode(tokenizer, row, eos), self.stop).strip() for row in tokens[:, width:].tolist()]


def cut(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string in it."""
    return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=len(text))]


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the generation config's, the tokenizer's, and the end of a turn in its chat template."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    own = (tokenizer.eos_token_id, end_of_turn(tokenizer))
    return sorted({int(token) for token in (*ids, *own) if token is not None})


def _decode(tokenizer: Any, row: list[int], eos: Sequence[int]) -> str:
    # A finished row may be padded with eos: cut at the first one, do not strip tokens.
    end = next((place for place, token in enumerate(row) if token in eos), len(row))
    return str(tokenizer.decode(row[:end], skip_special_tokens=True))


class _StopStrings(StoppingCriteria):
    """Stop rows that contain a stop string after the prompt.

    transformers' ``stop_strings`` matches the spelling of single tokens; this class searches the decoded text, as `cut` does.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int, eos: Sequence[int]) -> None:
        self.tokenizer, self.stop, self.width, self.eos = tokenizer, stop, width, eos
        # Tokens to decode for finding a stop string at the end: one per byte, and some that may decode to nothing.
        self.tail = max(len(word.encode()) for word in stop) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        rows = input_ids[:, self.width :]
        done = [self._stops(row) for row in rows.tolist()]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def _stops(self, row: list[int]) -> bool:
        if not any(word in self.tokenizer.decode(row[-self.tail :], skip_special_tokens=True) for word in self.stop):
            return False
        text = _decode(self.tokenizer, row, self.eos)  # the tail alone may decode to something else
        return any(word in text for word in self.stop)
