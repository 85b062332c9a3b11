"""`ChatDataModule`: conversations of one's own from files in the layouts that are in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_pmss.datamodules.base import Split, TokenisedDataModule
from lightning_pmss.datamodules.cache import tokenised
from lightning_pmss.datamodules.conversations.collate import ConversationCollator
from lightning_pmss.datamodules.conversations.encoder import ConversationEncoder, TrainOn, last_tokens
from lightning_pmss.datamodules.conversations.formats import COLUMNS, Layout, Side
from lightning_pmss.datamodules.conversations.options import PLAIN, check_chat_options
from lightning_pmss.datamodules.conversations.reading import Rows, dumped, read_split, split_rows
from lightning_pmss.datamodules.conversations.templates import REMEDY, use_template
from lightning_pmss.datamodules.prompts import load_tokenizer
from lightning_pmss.datamodules.rows import looks_like_file

if TYPE_CHECKING:
    from datasets import Dataset


class ChatDataModule(TokenisedDataModule):
    """Conversations, instructions, plain texts or preferences from your own files, with the loss on the assistant's turns.

    The layout of each file is recognised by the columns of its first row, and reported:

    =====================  ======================================  =========================================================
    layout                 columns                                 others that are read
    =====================  ======================================  =========================================================
    messages (OpenAI)      messages: role, content, tool_calls     tools, system; in a message reasoning_content, weight
    ShareGPT               conversations: from, value              tools, system
    Alpaca                 instruction, output                     input, system, history
    prompt and completion  prompt, completion                      system, tools; both may be lists of messages
    plain texts            text
    preferences            prompt, chosen, rejected                system, tools; texts, or lists of messages
    =====================  ======================================  =========================================================

    The text is that of the tokenizer's chat template, or of the one given. The mask is exact: a trained turn begins where
    generation would begin, and its last trained token is the one that ends the turn. Where a template has ``{% generation %}``
    marks they are read; any other template is rendered message by message, and refused if a part is no beginning of the whole.

    A training batch has ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[B, T]``, an evaluation batch in addition
    ``prompt_ids``, ``prompt_mask``, ``id``, ``end_id``, ``prompt`` and ``target`` for the last answer, as
    `InstructionDataModule` has them (plain texts: ``id`` only). A batch of preferences has ``chosen`` and ``rejected``, each
    such a batch, with the loss on the last answer. Evaluation losses are over the same tokens as training losses.

    Args:
        tokenizer: Folder or hub id of the model's tokenizer.
        path: A file to train on (JSONL, JSON, parquet or CSV), a folder with train, validation and test files, or a hub id.
        val_path: File, folder or hub id to validate on. Null: the folder's, or held out from training.
        test_path: File, folder or hub id to test on. Null: the folder's.
        split: Split of ``path`` on the hub, such as "train" or "train[:1000]".
        val_split: Split to validate on, on the hub. Null: none, or of ``val_path`` "validation".
        test_split: Split to test on, on the hub. Null: none, or of ``test_path`` "test".
        template: Name of a chat template ("chatml", "llama3", "gemma", "alpaca", "vicuna" or "zephyr") or a Jinja file.
            "plain" joins prompt and completion as they are. Null: the tokenizer's; a tokenizer without one is refused.
        train_on: "assistant": the loss is on all turns of the assistant (but those of weight 0). "last": on the last one.
            "each": one example per turn, as it would be generated, for templates that render earlier turns otherwise. "all":
            on everything.
        columns: Our names of columns -> those of your file, such as ``{instruction: question, output: answer}``.
        roles: Further names of roles -> "system", "user", "assistant" or "tool", such as ``{customer: user}``.
        on_bad_row: "error": refuse the first bad row, by file and line. "skip": leave bad rows out; a warning reports how many,
            and ``skipped`` has what is wrong with each.
        max_length: Longest training example in tokens.
        val_size: Conversations held out for validation (chosen by ``seed``) where there is no validation file; below 1 a
            share of them, at least one. 0 turns validation off.
        too_long: Treatment of examples longer than ``max_length``. "drop": leave them out of training, keep them whole in
            evaluation. "cut_turns": leave out the earliest exchanges of a conversation, never the system turn and never a part
            of a message. A warning reports how many. "error": refuse them.
        **kwargs: Arguments of `TokenisedDataModule`; here ``train_limit_by`` names a column of the file, such as "source".

    Raises:
        FileNotFoundError: If ``path`` looks like a path and nothing is there.
        ValueError: If a row is bad, or a template does not fit; names file and line, and what to do.
        ConnectionError: If the data cannot be had from the hub.
    """

    def __init__(
        self,
        tokenizer: str,
        path: str,
        val_path: str | None = None,
        test_path: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        template: str | None = None,
        train_on: TrainOn = "assistant",
        columns: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        max_length: int = 2048,
        val_size: int | float = 0.05,
        too_long: Literal["drop", "cut_turns", "error"] = "drop",
        **kwargs: Any,
    ) -> None:
        check_chat_options(type(self).__name__, {**locals(), **kwargs})
        super().__init__(tokenizer, max_length=max_length, val_size=val_size, too_long=too_long, **kwargs)
        self.paths: dict[Split, str | None] = {"train": path, "val": val_path, "test": test_path}
        self.splits: dict[Split, str | None] = {"train": split, "val": val_split, "test": test_split}
        self.template = template
        self.train_on: TrainOn = train_on
        self.on_bad_row = on_bad_row
        by = self.train_limit_by
        unread = () if by is None or by in COLUMNS or by in (columns or {}).values() else (by,)
        ignored = (*self.ignore_columns, *unread)
        self.layout = Layout(dict(columns or {}), dict(roles or {}), ignored, template == PLAIN)
        self.skipped: dict[Split, list[str]] = {}
        """What is wrong with the rows of each split that are left out, where ``on_bad_row`` says so."""
        self._tokenizer: Any = None
        self._wheres: dict[Split, list[str]] = {}
        self._rendered = False

    @property
    @override
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    @property
    @override
    def uses_chat_template(self) -> bool:
        return self._rendered

    @property
    @override
    def end_ids(self) -> frozenset[int]:
        return last_tokens(self.data["train"]) if "train" in self.data else frozenset()

    def _read(self, split: Split) -> Rows | None:
        """Return the rows of a split, ``None`` if the data has no such split."""
        path, name = self.paths[split] or self.paths["train"], self.splits[split]
        assert path is not None
        if looks_like_file(path) and name is not None and (split, name) != ("train", "train"):
            option = "split" if split == "train" else f"{split}_split"
            instead = "--data.train_limit N for a part of it" if split == "train" else f"--data.{split}_path FILE"
            raise ValueError(
                f"--data.{option} {name} names a split on the hub, and {path} is a file or folder here. Give {instead}."
            )
        if split != "train" and self.paths[split] is None and name is None and not _is_folder(path):
            return None
        skipped: list[str] | None = [] if self.on_bad_row == "skip" else None
        option = f"{split}_path" if split != "train" and self.paths[split] is not None else "path"
        found = split_rows(path, split, name or _HUB_NAMES[split], option, skipped)
        kind = self.train_limit_by if split == "train" else None
        return None if found is None else read_split(*found, self.layout, skipped, kind)

    @override
    def _make(self, split: Split, ids: Sequence[int] | None) -> Dataset | None:
        rows = self._read(split)
        if rows is None:
            return None
        assert rows.kind is not None
        name, chat = rows.kind.format.name, "messages" in rows.sides[0][0]
        if self.packing and len(rows.sides[0]) > 1:
            raise ValueError(f"{rows.source}: rows of preferences cannot be packed; give --data.packing false.")
        if chat and self.template == PLAIN:
            raise ValueError(f"{rows.source}: --data.template plain has no form for {name}; give {REMEDY}.")
        self._rendered |= chat and split == "train"
        form = use_template(self.tokenizer, self.template) if chat else "the texts as they are"
        examples = [
            (group, where, sides)
            for group, (where, row) in enumerate(zip(rows.wheres, rows.sides, strict=True))
            for sides in (_each(row) if self.train_on == "each" else [row])
        ]
        encoder = ConversationEncoder(
            self.tokenizer,
            self.train_on,
            self.max_length if self.too_long == "cut_turns" else None,
            self.on_bad_row == "skip",
        )
        loss: str = _LOSS["last"] if len(rows.sides[0]) > 1 and self.train_on != "all" else _LOSS[self.train_on]
        way = f", found by {encoder.finder.way}" if chat else ""
        rank_zero_info(
            f"{rows.source}: {len(rows.sides)} rows of {name}; {form}; loss on {loss if chat else 'them'}{way}."
        )
        wheres, texts = [where for _, where, _ in examples], [dumped(sides) for *_, sides in examples]
        columns: dict[str, list[Any]] = {
            "id": list(range(len(examples))),
            "group": [group for group, *_ in examples],
            "where": wheres,
            "row": texts,
        }
        data = tokenised(columns, encoder, ["where", "row"], encoder.fingerprint(texts), self.cache_dir, split)
        self._wheres[split] = wheres
        if split == "train":
            self._kind_of = [rows.kinds[group] for group, *_ in examples] if rows.kinds else ()
        return self._good(data, rows, split)

    def _good(self, data: Dataset, rows: Rows, split: Split) -> Dataset:
        """Return the rows that could be rendered; report the others, and those that are cut."""
        errors = data["error"][:]
        bad = [f"{self._wheres[split][place]}: {error}" for place, error in enumerate(errors) if error]
        if bad and self.on_bad_row == "error":  # cached by a run that skipped them
            raise ValueError(bad[0])
        if bad:
            data = data.select([place for place, error in enumerate(errors) if not error])
        self.skipped[split] = [*rows.skipped, *bad]
        if self.skipped[split]:
            total = len(errors) + len(rows.skipped)
            rank_zero_warn(
                f"{len(self.skipped[split])} of {total} rows of {rows.source} are bad and skipped, the first one:"
                f" {self.skipped[split][0]}"
            )
        if not len(data):
            raise ValueError(f"{rows.source}: all rows are bad, the first one: {self.skipped[split][0]}")
        self.cut[split] = sum(count > 0 for count in data["cut"][:])
        if self.cut[split]:
            rank_zero_warn(
                f"{self.cut[split]} of {len(data)} conversations of {rows.source} lose their earliest exchanges, to fit into"
                f" max_length {self.max_length} tokens. Raise --data.max_length to keep them whole."
            )
        return data

    @override
    def _held_size(self, rows: int) -> int:
        if isinstance(self.val_size, int) or self.val_size == 0:
            return int(self.val_size)
        return max(1, round(self.val_size * rows))

    @override
    def _place(self, number: int) -> str:
        return self._wheres["train"][number]

    @override
    def _shorter(self, context: int) -> str:
        return f"Give --data.too_long cut_turns and --data.max_length {context}."

    @override
    def _collator(self, evaluation: bool = False) -> ConversationCollator:
        pad = self.tokenizer.pad_token_id
        end = self.tokenizer.eos_token_id
        return ConversationCollator(next((int(token) for token in (pad, end) if token is not None), 0), evaluation)


_HUB_NAMES: dict[Split, str] = {"train": "train", "val": "validation", "test": "test"}
_LOSS: dict[TrainOn, str] = {
    "assistant": "the assistant's turns",
    "last": "the last answer",
    "each": "the last answer, one example per answer",
    "all": "everything",
}


def _is_folder(path: str) -> bool:
    return Path(path).expanduser().is_dir()


def _each(sides: list[Side]) -> list[list[Side]]:
    """Return one example for each trained turn of the assistant in a conversation."""
    if len(sides) > 1 or "messages" not in sides[0]:
        return [sides]
    messages = sides[0]["messages"]
    ends = [n for n, each in enumerate(messages, 1) if each["role"] == "assistant" and each.get("weight", 1)]
    return [[{**sides[0], "messages": messages[:end]}] for end in ends]
