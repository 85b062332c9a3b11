"""Instruction data
================

Questions and responses to padded batches of tokens, with the loss on the response only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pmss.datamodules.collate import IGNORED as IGNORED
from lightning_pmss.datamodules.collate import Batch as Batch
from lightning_pmss.datamodules.collate import InstructionCollator as InstructionCollator
from lightning_pmss.datamodules.prompts import STYLES, PromptEncoder, PromptStyle
from lightning_pmss.datamodules.prompts import Example as Example
from lightning_pmss.datamodules.sampler import (
    LengthGroupedSampler,
    ResumableDataLoader,
    ShardSampler,
    TrainerProgress,
    WithFillers,
)

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "val", "test"]
_SPLITS: tuple[Split, ...] = ("train", "val", "test")


def check_int(owner: str, name: str, value: int | None, least: int, *, optional: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least ``least`` (or None where ``optional``)."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = f"an integer of at least {least}" + (" or null" if optional else "")
        raise ValueError(f"`{owner}({name}={value!r})`: give {kind}, for example --data.{name} {max(least, 1)}.")


def check_choice(owner: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        told = " or ".join(f"--data.{name} {choice}" for choice in choices)
        raise ValueError(f"`{owner}({name}={value!r})`: give {told}.")


class InstructionDataModule(L.LightningDataModule):
    """Base of data modules for instruction tuning: a subclass says where question and response come from.

    A batch is a dictionary of

    * ``input_ids``, ``attention_mask``, ``labels``: int64 ``[B, T]``, padded on the right; the labels are -100 on padding
      and, unless ``loss_on`` is "all", on the prompt, and include the response's end-of-sequence token,
    * in evaluation also ``prompt_ids``, ``prompt_mask``: int64 ``[B, P]``, padded on the left; ``id``: int64 ``[B]``,
      the row's number in the source (for a validation set held out from the training rows: its number there);
      ``prompt``: list of texts; ``target``: list of what answers are scored against, texts or lists of texts.

    Texts are tokenised once, by ``datasets.map`` into its cache; later runs with the same texts and tokenizer read
    them from there. Training batches hold examples of similar length, in an order that depends on ``seed`` and the
    epoch alone, and resume exactly (:class:`~lightning_pmss.datamodules.sampler.ResumableDataLoader`).
    A response is never cut, and nothing is cut silently: what is longer than ``max_length`` is left out of training,
    counted in ``dropped`` and warned of; evaluation keeps all examples whole, so that scores are over the whole set.
    ``too_long`` has the other ways.

    Args:
        tokenizer: Folder or hub id of the model's tokenizer.
        batch_size: Examples per training batch and device.
        eval_batch_size: Examples per evaluation batch and device; ``batch_size`` if null.
        max_length: Longest training example, prompt and response together, in tokens.
        prompt_style: "plain" ("Question: ...", newline, "Answer:"), "chat" (the tokenizer's chat template), or, byte for
            byte as in the literature, "llm_adapters" or "metamath" (which evaluate with another prompt than they train
            with); a data module may have more.
        train_limit: Train on that many examples (chosen by ``seed``); on all if null.
        val_limit: Validate on that many examples, the first ones; on all if null.
        test_limit: Test on that many examples, the first ones; on all if null.
        val_size: Examples held out from the training rows (chosen by ``seed``) where the data has no validation set.
            0 turns validation off.
        seed: Seed of the split and of the order of training.
        num_workers: Worker processes per loader.
        cache_dir: Folder for tokenised data; the one of ``datasets`` if null.
        loss_on: "response", or "all" to train on the prompt as well (as LLM-Adapters does). Evaluation losses are over
            the response either way.
        too_long: What happens to examples longer than ``max_length``. "drop": left out of training, kept whole in
            evaluation. "cut_prompt": the *beginning* of the prompt is cut, in evaluation of prompts that are longer by
            themselves; counted in ``cut`` and warned of. "error": refused.

    Raises:
        ValueError: If an argument is out of range, or if no training example is short enough.

    """

    plain_template: ClassVar[str] = "Question: {question}\nAnswer:"
    styles: ClassVar[dict[str, PromptStyle]] = STYLES
    """The prompt styles by name, besides "plain" and "chat"."""

    def __init__(
        self,
        tokenizer: str,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 512,
        prompt_style: str = "plain",
        train_limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        val_size: int = 200,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        loss_on: Literal["response", "all"] = "response",
        too_long: Literal["drop", "cut_prompt", "error"] = "drop",
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
        check_choice(owner, "prompt_style", prompt_style, ("plain", *self.styles, "chat"))
        check_choice(owner, "loss_on", loss_on, ("response", "all"))
        check_choice(owner, "too_long", too_long, ("drop", "cut_prompt", "error"))
        if (prompt_style, too_long) == ("chat", "cut_prompt"):
            raise ValueError(
                f"`{owner}`: cutting the beginning of a chat would cut its template; with --data.prompt_style chat give"
                " --data.too_long drop or a larger --data.max_length."
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
        self.loss_on = loss_on
        self.too_long = too_long
        self.tokenizer_name = tokenizer
        self.data: dict[Split, Dataset] = {}
        """The tokenised splits that :meth:`setup` has made."""
        self.dropped = 0
        """Training examples left out because they are longer than ``max_length``."""
        self.cut: dict[Split, int] = {}
        """Examples per split whose prompt is cut to ``max_length``, where ``too_long`` says so."""
        self._encoders: tuple[PromptEncoder, PromptEncoder] | None = None

    @abstractmethod
    def load_examples(self, split: Split) -> list[Example] | None:
        """Return the examples of ``split``, ``None`` where the data has no such split. Keeps no state on ``self``."""

    @property
    def encoder(self) -> PromptEncoder:
        """The prompt format of training with its tokenizer, loaded at first use."""
        return self._load_encoders()[0]

    @property
    def eval_encoder(self) -> PromptEncoder:
        """The prompt format of evaluation."""
        return self._load_encoders()[1]

    def _load_encoders(self) -> tuple[PromptEncoder, PromptEncoder]:
        if self._encoders is None:
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name)
            except Exception as error:
                raise ValueError(
                    f"Could not load the tokenizer {self.tokenizer_name!r} ({error}). Give the folder of a model with"
                    " its tokenizer files, or a hub id, as --data.tokenizer."
                ) from error
            plain = PromptStyle(self.plain_template)
            style = self.styles.get(self.prompt_style, plain)
            templates = style.template, style.eval_template or style.template
            train, evaluation = (
                PromptEncoder(tokenizer, self.prompt_style, template, style.lead, style.tail) for template in templates
            )
            self._encoders = train, evaluation
        return self._encoders

    @override
    def prepare_data(self) -> None:
        """Load, check and tokenise everything once per node, into the cache that all ranks then read."""
        sizes = {split: None if (data := self._encode(split)) is None else len(data) for split in _SPLITS}
        if sizes["train"] is not None and sizes["val"] is None:
            self._held_out(sizes["train"])

    @override
    def setup(self, stage: str | None = None) -> None:
        """Make the splits that ``stage`` needs."""
        if stage in ("fit", "validate", None) and "train" not in self.data:
            self._setup_fit()
        if stage in ("test", "predict", None) and "test" not in self.data:
            test = self._encode("test")
            if test is None:
                raise ValueError(f"`{type(self).__name__}` has no test examples; give it data with a test split.")
            self.data["test"] = self._evaluated(test, "test")

    def _setup_fit(self) -> None:
        train, val = self._encode("train"), self._encode("val")
        if train is None:
            raise ValueError(f"`{type(self).__name__}` has no training examples; give it data with a training split.")
        order = self._order(len(train))
        if val is None:
            if self.val_size >= len(train):
                raise ValueError(
                    f"`val_size` is {self.val_size}, but there are only {len(train)} training rows to hold it out from;"
                    f" give --data.val_size below {len(train)}."
                )
            val = self._held_out(len(train)) or train.select(sorted(order[: self.val_size]))
            order = order[self.val_size :]
        lengths, prompts = train["length"][:], train["prompt_length"][:]
        if self.too_long == "cut_prompt":  # a response that leaves no room for a prompt is left out all the same
            least = len(self.encoder.prefix) + 1
            fitting = [index for index in order if lengths[index] - prompts[index] + least <= self.max_length]
            self._count_cut("train", sum(lengths[index] > self.max_length for index in fitting), len(order))
        else:
            fitting = [index for index in order if lengths[index] <= self.max_length]
        self.dropped = len(order) - len(fitting)
        if self.dropped and self.too_long == "error":
            first = min(index for index in order if lengths[index] > self.max_length)
            raise ValueError(
                f"{self.dropped} of {len(order)} training examples are longer than max_length {self.max_length} tokens,"
                f" row {train['id'][first]} the first with {lengths[first]}; raise --data.max_length to {max(lengths)}"
                " or give --data.too_long drop."
            )
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
        self.data["val"] = self._evaluated(val, "val")

    def _order(self, size: int) -> list[int]:
        """Return the order in which training rows are held out for validation, then chosen for training."""
        return torch.randperm(size, generator=torch.Generator().manual_seed(self.seed)).tolist()

    def _held_out(self, size: int) -> Dataset | None:
        """Return the held-out rows with the prompt of evaluation, ``None`` where that is the one of training."""
        if not self.val_size or self.eval_encoder == self.encoder:
            return None
        return self._encode("train", sorted(self._order(size)[: self.val_size]))

    def _evaluated(self, data: Dataset, split: Split) -> Dataset:
        """Return the part of an evaluation set that ``split`` is limited to, its long prompts dealt with."""
        limit = self.limits[split]
        data = data if limit is None else data.select(range(min(limit, len(data))))
        if not len(data):
            return data
        long = [length for length in data["prompt_length"][:] if length > self.max_length]
        if long and self.too_long == "error":
            raise ValueError(
                f"{len(long)} of {len(data)} prompts of the {split} set are longer than max_length {self.max_length}"
                f" tokens; raise --data.max_length to {max(long)} or give --data.too_long drop (which leaves evaluation"
                " prompts whole)."
            )
        if self.too_long == "cut_prompt":
            self._count_cut(split, len(long), len(data))
        return data

    def _count_cut(self, split: Split, count: int, total: int) -> None:
        self.cut[split] = count
        if count:
            rank_zero_warn(
                f"{count} of {total} prompts of the {split} set lose their beginning, to fit into max_length"
                f" {self.max_length} tokens. Raise --data.max_length to keep them whole."
            )

    def _encode(self, split: Split, ids: Sequence[int] | None = None) -> Dataset | None:
        """Return a split as tokens, from the cache where it has been tokenised before.

        Args:
            split: all rows, for its own use;
            ids: only these, for evaluation.

        """
        import datasets

        examples = self.load_examples(split)
        if examples is None:
            return None
        if ids is not None:
            examples = [examples[place] for place in ids]
        encoder = self.encoder if split == "train" and ids is None else self.eval_encoder
        fingerprint = encoder.fingerprint(examples, ids)
        folder = Path(self.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "lightning_pmss")
        folder.mkdir(parents=True, exist_ok=True)
        rows = {
            "id": list(range(len(examples)) if ids is None else ids),
            "question": [example.question for example in examples],
            "response": [example.response for example in examples],
            "target": [example.response if example.target is None else example.target for example in examples],
        }
        return datasets.Dataset.from_dict(rows).map(
            encoder,
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

    def _collator(self, evaluation: bool = False) -> InstructionCollator:
        tokenizer = self.encoder.tokenizer
        return InstructionCollator(
            int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id),
            evaluation,
            loss_on_prompt=self.loss_on == "all" and not evaluation,
            max_length=self.max_length if self.too_long == "cut_prompt" else None,
            prefix=len(self.encoder.prefix),
        )

    @override
    def train_dataloader(self) -> ResumableDataLoader[Any]:
        data = self.data["train"]
        lengths = [min(length, self.max_length) for length in data["length"][:]]
        sampler = LengthGroupedSampler(lengths, self.batch_size, self.seed, **self._replicas())
        return ResumableDataLoader(
            cast("torch.utils.data.Dataset[Any]", data),
            sampler=sampler,
            progress=TrainerProgress(self.trainer) if self.trainer is not None else None,
            seed=self.seed,
            batch_size=self.batch_size,
            collate_fn=self._collator(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _eval_dataloader(self, split: Split) -> DataLoader[Any]:
        data = self.data[split]
        return DataLoader(
            WithFillers(data),
            sampler=ShardSampler(len(data), **self._replicas(), fill=self._in_step()),
            batch_size=self.eval_batch_size,
            collate_fn=self._collator(evaluation=True),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),  # else each validation would move the global state
        )

    def _in_step(self) -> bool:
        """Whether the ranks must do equally many batches, because each forward pass is a collective."""
        return self.trainer is not None and isinstance(
            self.trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
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
