"""Turn conversations into tokens and the ranges of tokens that are trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lightning_pmss.datamodules.continuations import chained, decoded
from lightning_pmss.datamodules.conversations.formats import Side
from lightning_pmss.datamodules.conversations.messages import BadRowError
from lightning_pmss.datamodules.conversations.turns import TurnFinder
from lightning_pmss.datamodules.prompts import own_prefix, tokenizer_spec

if TYPE_CHECKING:
    from datasets import Dataset

TrainOn = Literal["assistant", "last", "each", "all"]
_CACHE_FORMAT = 2  # part of the names of cached files: raise it when the output of `ConversationEncoder` changes


@dataclass
class ConversationEncoder:
    """Turns a batch of rows into token ids; a picklable callable for ``datasets.map``.

    A conversation ends with the token that ends its last turn: text that a template adds behind it is left out, since nothing
    behind the last answer is trained or asked. Tokens are those of the whole rendered text, with a border where each answer
    begins (`lightning_pmss.datamodules.continuations`), so that a mask never covers a part of a token.

    Args:
        tokenizer: A tokenizer, with a chat template if there are messages.
        train_on: "assistant": all turns of the assistant; "last" and "each": the last one; "all": everything.
        max_length: Leave the earliest exchanges out until a conversation has so few tokens; null: leave none out.
        skip: Return what is wrong with a row in the column ``error`` instead of raising it.
    """

    tokenizer: Any
    train_on: TrainOn = "assistant"
    max_length: int | None = None
    skip: bool = False
    _finder: TurnFinder | None = field(default=None, repr=False, compare=False)

    @property
    def finder(self) -> TurnFinder:
        """Finds turns; made when the first conversation needs it."""
        if self._finder is None:
            self._finder = TurnFinder(self.tokenizer)
        return self._finder

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return for each row:

        * ``input_ids`` and ``trained``, the borders of the trained ranges of tokens: [start, stop, start, stop, ...],
        * ``prompt_length``, the number of tokens in front of the last answer, and ``prompt``, their text,
        * ``target``, the last answer, ``length``, ``cut``, the number of messages left out, and ``error``,
        * for preferences also ``rejected_ids`` and ``rejected_trained``; ``length`` is then that of the longer one.
        """
        made = [self._row(where, json.loads(row)) for where, row in zip(batch["where"], batch["row"], strict=True)]
        return {name: [row[name] for row in made] for name in made[0]}

    def _row(self, where: str, sides: list[Side]) -> dict[str, Any]:
        try:
            train_on = self.train_on if len(sides) == 1 or self.train_on == "all" else "last"
            first, *second = self._sides(sides, train_on)
        except BadRowError as error:
            if not self.skip:
                raise BadRowError(f"{where}: {error}") from error
            first, *second = [{**_NOTHING, "error": str(error)} for _ in sides]
        if second:
            first |= {"rejected_ids": second[0]["input_ids"], "rejected_trained": second[0]["trained"]}
            first["length"] = max(first["length"], second[0]["length"])
        return first

    def _sides(self, sides: Sequence[Side], train_on: TrainOn) -> list[dict[str, Any]]:
        """Return the columns of each text. Both of a pair lose the same exchanges, so that they answer the same turns."""
        left_out = 0
        while True:
            rows = [self.side(side, train_on) for side in sides]
            fits = self.max_length is None or max(row["length"] for row in rows) <= self.max_length
            shorter = [_without_first_exchange(side) for side in sides]
            if fits or None in shorter:
                return [{**row, "cut": left_out} for row in rows]
            left_out += len(sides[0]["messages"]) - len(shorter[0]["messages"])
            sides = shorter

    def side(self, side: Side, train_on: TrainOn) -> dict[str, Any]:
        """Return the columns of one text, whole.

        Raises:
            BadRowError: If it cannot be rendered or masked exactly; the message says what to do and has no place.
        """
        if "text" in side:
            return self._plain(side["prompt"], side["text"], train_on)
        return self._chat(side["messages"], side["tools"], train_on)

    def _chat(self, messages: list[dict[str, Any]], tools: list[Any] | None, train_on: TrainOn) -> dict[str, Any]:
        last = len(messages) - 1
        if train_on == "last" and not messages[last].get("weight", 1):
            raise BadRowError(
                "the last turn has weight 0, so nothing of this row is trained. Leave the row out, or give --data.train_on"
                " assistant."
            )
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [place for place in answers if messages[place].get("weight", 1)] if train_on == "assistant" else []
        places = wanted if wanted[-1:] == [last] else [*wanted, last]
        text, turns = self.finder.find(messages, places, tools)
        borders = [0, *(turn.start for turn in turns), turns[-1].stop]
        pieces = [text[start:stop] for start, stop in zip(borders, borders[1:], strict=False)]
        (tokens,) = chained(self.tokenizer, [pieces])
        ids = list(tokens[0])
        ranges: dict[int, tuple[int, int]] = {}
        for place, turn, piece in zip(places, turns, tokens[1:], strict=True):
            end_id = self.finder.own[turn.mark]
            marks = text.count(turn.mark, turn.start, turn.stop)
            ends = [number for number, token in enumerate(piece, 1) if token == end_id]
            if len(ends) < marks:
                raise BadRowError(
                    f"the tokenizer reads {turn.mark!r}, which ends the assistant's turn, as other tokens than {end_id}. Give a"
                    " tokenizer that has it as a special token."
                )
            ranges[place] = (len(ids), len(ids) + ends[marks - 1])
            ids += piece
        begin = self.tokenizer.bos_token_id
        if begin is not None and ids[:2] == [begin, begin]:
            raise BadRowError(
                f"the conversation begins with two tokens {self.tokenizer.bos_token!r}: the chat template adds it. Take it"
                " out of the data."
            )
        trained = [ranges[place] for place in (places if train_on != "assistant" else wanted)]
        said = messages[-1]["content"] or text[turns[-1].start : turns[-1].stop].removesuffix(turns[-1].mark)
        return {
            **_NOTHING,
            "input_ids": ids,
            "trained": [0, len(ids)] if train_on == "all" else [border for pair in trained for border in pair],
            "prompt": text[: turns[-1].start],
            "prompt_length": ranges[last][0],
            "target": said,
            "length": len(ids),
        }

    def _plain(self, prompt: str, text: str, train_on: TrainOn) -> dict[str, Any]:
        (parts,) = chained(self.tokenizer, [[prompt, text]])
        prefix, end = own_prefix(self.tokenizer), self.tokenizer.eos_token_id
        start, rest = (list(part) for part in parts)
        if (start + rest)[: len(prefix)] != prefix:
            start = prefix + start
        if end is not None and rest[-1:] != [end]:
            rest.append(end)
        ids = start + rest
        return {
            **_NOTHING,
            "input_ids": ids,
            "trained": [0 if train_on == "all" or not prompt else len(start), len(ids)],
            "prompt": decoded(self.tokenizer, start) if prompt else "",
            "prompt_length": len(start) if prompt else 0,
            "target": text,
            "length": len(ids),
        }

    def fingerprint(self, rows: Sequence[str]) -> str:
        """Return a hash of rows and all that determines their tokens; equal in every process."""
        settings = [
            _CACHE_FORMAT,
            tokenizer_spec(self.tokenizer),
            self.tokenizer.chat_template,
            {name: str(value) for name, value in self.tokenizer.special_tokens_map.items()},
            self.train_on,
            self.max_length,
            own_prefix(self.tokenizer),
        ]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for row in rows:
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()[:32]


def last_tokens(data: Dataset) -> frozenset[int]:
    """Return the last tokens of all rows that `ConversationEncoder` made, without reading the others."""
    found: set[int] = set()
    for part in data.data.column("input_ids").chunks:
        borders = part.offsets.to_numpy()
        stops = borders[1:][borders[1:] > borders[:-1]]
        found.update(part.values.take(stops - 1).unique().to_pylist())
    return frozenset(found)


_NOTHING: dict[str, Any] = {
    "input_ids": [],
    "trained": [],
    "prompt": "",
    "prompt_length": 0,
    "target": "",
    "length": 0,
    "cut": 0,
    "error": "",
}


def _without_first_exchange(side: Side) -> Any:
    """Return a conversation without the turns from the first user's to the second one; ``None`` if there is no second."""
    messages = side.get("messages", [])
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return {**side, "messages": [*messages[: asked[0]], *messages[asked[1] :]]} if len(asked) > 1 else None
