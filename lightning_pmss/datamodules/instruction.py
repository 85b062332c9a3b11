"""Instruction data
================

Questions and responses to padded batches of tokens, with the loss on the response only.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pmss.datamodules.sampler import (
    LengthGroupedSampler,
    ResumableDataLoader,
    ShardSampler,
    TrainerProgress,
)

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "val", "test"]
Batch = dict[str, Any]

IGNORED = -100
_CACHE_FORMAT = 1  # goes into the names of cached files: raise it when `PromptEncoder` changes what it writes


class Example(NamedTuple):
    """One example before tokenisation."""

    question: str
    response: str


def check_int(owner: str, name: str, value: int | None, least: int, *, optional: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least ``least`` (or None where ``optional``)."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = f"an integer of at least {least}" + (" or null" if optional else "")
        raise ValueError(f"`{owner}({name}={value!r})`: give {kind}, for example --data.{name} {max(least, 1)}.")


@dataclass
class PromptEncoder:
    """Turns a batch of question and response texts into token ids; a picklable callable for ``datasets.map``.

    Prompt and response are tokenised apart and then joined, so that the boundary of the loss is exact and the prompt
    has the same tokens in training and in generation.

    Args:
        tokenizer: a tokenizer with an end-of-sequence token.
        style: "plain" fills ``template``, and the response starts with a blank; "chat" applies the chat template.
        template: the prompt of the plain style, with ``{question}`` in it.

    """

    tokenizer: Any
    style: Literal["plain", "chat"]
    template: str

    def __post_init__(self) -> None:
        name = getattr(self.tokenizer, "name_or_path", "")
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer {name!r} has no end-of-sequence token, so no response would ever end.")
        if self.style == "chat" and not self.tokenizer.chat_template:
            raise ValueError(f"The tokenizer {name!r} has no chat template; use --data.prompt_style plain.")
        # What the tokenizer itself puts in front of a text (a beginning-of-sequence token, or nothing).
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        self.prefix: list[int] = full[: starts[0]] if starts else []

    def prompt(self, question: str) -> str:
        """Return the prompt text of ``question``, without tokens that only the plain style's prefix adds."""
        if self.style == "plain":
            return self.template.format(question=question)
        messages = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns prompt, target, prompt_ids, response_ids (ends with eos) and length."""
        prompts = [self.prompt(question) for question in batch["question"]]
        blank, prefix = (" ", self.prefix) if self.style == "plain" else ("", [])
        prompt_ids = self._ids(prompts)
        response_ids = self._ids([blank + response for response in batch["response"]])
        prompt_ids = [prefix + ids for ids in prompt_ids]
        response_ids = [[*ids, self.tokenizer.eos_token_id] for ids in response_ids]
        return {
            "prompt": prompts,
            "target": batch["response"],
            "prompt_ids": prompt_ids,
            "response_ids": response_ids,
            "length": [len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True)],
        }

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def fingerprint(self, examples: Sequence[Example]) -> str:
        """Return a hash of the texts and of all that decides their tokens; equal in every process."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            spec: Any = [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        else:
            spec = json.loads(backend.to_str())
            # A tokenizer remembers the padding and truncation of its last call. They are off here.
            spec.pop("padding", None)
            spec.pop("truncation", None)
        settings = [
            _CACHE_FORMAT,
            spec,
            self.style,
            self.tokenizer.chat_template if self.style == "chat" else self.template,
            self.prefix,
            self.tokenizer.eos_token_id,
        ]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for example in examples:
            digest.update(json.dumps(example).encode())
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class InstructionCollator:
    """Pads rows of token ids to a batch; see :class:`InstructionDataModule` for what is in it.

    Args:
        pad_id: token put on padding. It may be a real token too: padding is known by the masks and labels alone.
        evaluation: add what generation and scoring need.

    """

    pad_id: int
    evaluation: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        whole = [row["prompt_ids"] + row["response_ids"] for row in rows]
        labels = [[IGNORED] * len(row["prompt_ids"]) + row["response_ids"] for row in rows]
        batch: Batch = {
            "input_ids": self._pad(whole, self.pad_id),
            "attention_mask": self._pad([[1] * len(ids) for ids in whole], 0),
            "labels": self._pad(labels, IGNORED),
        }
        if self.evaluation:
            prompts = [row["prompt_ids"] for row in rows]
            batch["prompt_ids"] = self._pad(prompts, self.pad_id, left=True)
            batch["prompt_mask"] = self._pad([[1] * len(ids) for ids in prompts], 0, left=True)
            batch["id"] = torch.tensor([row["id"] for row in rows], dtype=torch.int64)
            batch["prompt"] = [row["prompt"] for row in rows]
            batch["target"] = [row["target"] for row in rows]
        return batch

    @staticmethod
    def _pad(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
        width = max(map(len, rows))
        fills = [[value] * (width - len(row)) for row in rows]
        padded = [fill + row if left else row + fill for row, fill in zip(rows, fills, strict=True)]
        return torch.tensor(padded, dtype=torch.int64)


class InstructionDataModule(L.LightningDataModule):
    """Base of data modules for instruction tuning: a subclass says where question and response come from.

    A batch is a dictionary of

    * ``input_ids``, ``attention_mask``, ``labels``: int64 ``[B, T]``, padded on the right; the labels are -100 on the
      prompt and on padding, and include the response's end-of-sequence token,
    * in evaluation also ``prompt_ids``, ``prompt_mask``: int64 ``[B, P]``, padded on the left; ``id``: int64 ``[B]``,
      the row's number in the source (for a validation set held out from the training rows: its number there);
      ``prompt``, ``target``: lists of texts.

    Texts are tokenised once, by ``datasets.map`` into its cache; later runs with the same texts and tokenizer read
    them from there. Training batches hold examples of similar length, in an order that depends on ``seed`` and the
    epoch alone, and resume exactly (:class:`~lightning_pmss.datamodules.sampler.ResumableDataLoader`).
    Nothing is ever cut: a training example that is longer than ``max_length`` is left out, counted in ``dropped`` and
    warned of; evaluation keeps all examples whole, so that scores are over the whole set.

    Args:
        tokenizer: Folder or hub id of the model's tokenizer.
        batch_size: Examples per training batch and device.
        eval_batch_size: Examples per evaluation batch and device; ``batch_size`` if null.
        max_length: Longest training example, prompt and response together, in tokens.
        prompt_style: "plain" ("Question: ...", newline, "Answer:") or "chat" (the tokenizer's chat template).
        train_limit: Train on that many examples (chosen by ``seed``); on all if null.
        val_limit: Validate on that many examples, the first ones; on all if null.
        test_limit: Test on that many examples, the first ones; on all if null.
        val_size: Examples held out from the training rows (chosen by ``seed``) where the data has no validation set.
            0 turns validation off.
        seed: Seed of the split and of the order of training.
        num_workers: Worker processes per loader.
        cache_dir: Folder for tokenised data; the one of ``datasets`` if null.

    Raises:
        ValueError: If an argument is out of range, or if no training example is short enough.

    """

    plain_template: ClassVar[str] = "Question: {question}\nAnswer:"

    def __init__(
        self,
        tokenizer: str,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 512,
        prompt_style: Literal["plain", "chat"] = "plain",
        train_limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        val_size: int = 200,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2), ("seed", seed, 0)):
            check_int(owner, name, value, least)
        for name, value, least in (("val_size", val_size, 0), ("num_workers", num_workers, 0)):
            check_int(owner, name, value, least)
        limits = {"train_limit": train_limit, "val_limit": val_limit, "test_limit": test_limit}
        for name, limit in {"eval_batch_size": eval_batch_size, **limits}.items():
            check_int(owner, name, limit, 1, optional=True)
        if prompt_style not in ("plain", "chat"):
            raise ValueError(
                f"`{owner}(prompt_style={prompt_style!r})`: give --data.prompt_style plain or --data.prompt_style chat."
            )
        self.save_hyperparameters(logger=False)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_length = max_length
        self.limits: dict[Split, int | None] = {"train": train_limit, "val": val_limit, "test": test_limit}
        self.val_size = val_size
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.prompt_style = prompt_style
        self.tokenizer_name = tokenizer
        self.data: dict[Split, Dataset] = {}
        """The tokenised splits that :meth:`setup` has made."""
        self.dropped = 0
        """Training examples left out because they are longer than ``max_length``."""
        self._encoder: PromptEncoder | None = None

    @abstractmethod
    def load_examples(self, split: Split) -> list[Example] | None:
        """Return the examples of ``split``, ``None`` where the data has no such split. Keeps no state on ``self``."""

    @property
    def encoder(self) -> PromptEncoder:
        """The prompt format with its tokenizer, loaded at first use."""
        if self._encoder is None:
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name)
            except Exception as error:
                raise ValueError(
                    f"Could not load the tokenizer {self.tokenizer_name!r} ({error}). Give the folder of a model with"
                    " its tokenizer files, or a hub id, as --data.tokenizer."
                ) from error
            self._encoder = PromptEncoder(tokenizer, self.prompt_style, self.plain_template)
        return self._encoder

    @override
    def prepare_data(self) -> None:
        """Load, check and tokenise everything once per node, into the cache that all ranks then read."""
        splits: tuple[Split, ...] = ("train", "val", "test")
        for split in splits:
            self._encode(split)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Make the splits that ``stage`` needs."""
        if stage in ("fit", "validate", None) and "train" not in self.data:
            self._setup_fit()
        if stage in ("test", "predict", None) and "test" not in self.data:
            test = self._encode("test")
            if test is None:
                raise ValueError(f"`{type(self).__name__}` has no test examples; give it data with a test split.")
            self.data["test"] = self._first(test, "test")

    def _setup_fit(self) -> None:
        train, val = self._encode("train"), self._encode("val")
        if train is None:
            raise ValueError(f"`{type(self).__name__}` has no training examples; give it data with a training split.")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        if val is None:
            if self.val_size >= len(train):
                raise ValueError(
                    f"`val_size` is {self.val_size}, but there are only {len(train)} training rows to hold it out from;"
                    f" give --data.val_size below {len(train)}."
                )
            val = train.select(sorted(order[: self.val_size]))
            order = order[self.val_size :]
        lengths = train["length"][:]
        fitting = [index for index in order if lengths[index] <= self.max_length]
        self.dropped = len(order) - len(fitting)
        if not fitting:
            raise ValueError(
                f"All {len(order)} training examples are longer than max_length {self.max_length} (the shortest has"
                f" {min(lengths)} tokens, the longest {max(lengths)}); raise --data.max_length."
            )
        if self.dropped:
            rank_zero_warn(
                f"{self.dropped} of {len(order)} training examples are longer than max_length {self.max_length} tokens"
                f" and are left out (the longest has {max(lengths)}). Raise --data.max_length to train on them."
            )
        self.data["train"] = train.select(sorted(fitting[: self.limits["train"]]))
        self.data["val"] = self._first(val, "val")

    def _first(self, data: Dataset, split: Split) -> Dataset:
        limit = self.limits[split]
        return data if limit is None else data.select(range(min(limit, len(data))))

    def _encode(self, split: Split) -> Dataset | None:
        """Return a whole split as tokens, from the cache where it has been tokenised before."""
        import datasets

        examples = self.load_examples(split)
        if examples is None:
            return None
        fingerprint = self.encoder.fingerprint(examples)
        folder = Path(self.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "lightning_pmss")
        folder.mkdir(parents=True, exist_ok=True)
        questions, responses = zip(*examples, strict=True) if examples else ((), ())
        rows = {"id": list(range(len(examples))), "question": list(questions), "response": list(responses)}
        return datasets.Dataset.from_dict(rows).map(
            self.encoder,
            batched=True,
            remove_columns=["question", "response"],
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=fingerprint,  # `datasets` would hash the tokenizer, whose state changes when it is used
            desc=f"Tokenising {split}",
        )

    def _replicas(self) -> dict[str, int]:
        """The number of ranks that share the data, and this one's number."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return dict(kwargs) if kwargs else {"num_replicas": 1, "rank": 0}

    def _pad_id(self) -> int:
        tokenizer = self.encoder.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    @override
    def train_dataloader(self) -> ResumableDataLoader[Any]:
        data = self.data["train"]
        sampler = LengthGroupedSampler(data["length"][:], self.batch_size, self.seed, **self._replicas())
        return ResumableDataLoader(
            cast("torch.utils.data.Dataset[Any]", data),
            sampler=sampler,
            progress=TrainerProgress(self.trainer) if self.trainer is not None else None,
            seed=self.seed,
            batch_size=self.batch_size,
            collate_fn=InstructionCollator(self._pad_id()),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _eval_dataloader(self, split: Split) -> DataLoader[Any]:
        data = self.data[split]
        return DataLoader(
            cast("torch.utils.data.Dataset[Any]", data),
            sampler=ShardSampler(len(data), **self._replicas()),
            batch_size=self.eval_batch_size,
            collate_fn=InstructionCollator(self._pad_id(), evaluation=True),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),  # else each validation would move the global state
        )

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._eval_dataloader("val") if len(self.data["val"]) else []

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_dataloader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self._eval_dataloader("test")
