"""Make padded batches of tokens from questions and responses, with the loss on the response only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pmss.datamodules.cache import encode
from lightning_pmss.datamodules.collate import IGNORED as IGNORED
from lightning_pmss.datamodules.collate import Batch as Batch
from lightning_pmss.datamodules.collate import InstructionCollator as InstructionCollator
from lightning_pmss.datamodules.options import check_instruction_options
from lightning_pmss.datamodules.options import check_int as check_int
from lightning_pmss.datamodules.packing import PackedCollator, PackingReport, pack_rows
from lightning_pmss.datamodules.prompts import STYLES, PromptEncoder, PromptStyle, check_examples, load_tokenizer
from lightning_pmss.datamodules.prompts import Example as Example
from lightning_pmss.datamodules.sampler import (
    LengthGroupedSampler,
    ResumableDataLoader,
    ShardSampler,
    TrainerProgress,
    WithFillers,
)
from lightning_pmss.datamodules.splits import draw_shots, group_numbers, hold_out, read_shots

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "val", "test"]
_SPLITS: tuple[Split, ...] = ("train", "val", "test")


class InstructionDataModule(L.LightningDataModule):
    """Base of data modules for instruction tuning; a subclass provides the questions and responses.

    A batch is a dictionary of

    * ``input_ids``, ``attention_mask``, ``labels``: int64 ``[B, T]``, padded on the right; the labels are -100 on padding
      and, unless ``loss_on`` is "all", on the prompt, and include the token that ends the response,
    * in evaluation also ``prompt_ids``, ``prompt_mask``: int64 ``[B, P]``, padded on the left; ``id``: int64 ``[B]``,
      the row's number in the source (for a validation set held out from the training rows: its number there);
      ``end_id``: int64 ``[B]``, that token; ``prompt``: list of texts; ``target``: list of gold targets, texts or
      lists of texts.

    Texts are tokenised once, by ``datasets.map`` into its cache; later runs with the same texts and tokenizer read
    them from there. Training batches contain examples of similar length, in an order that depends on ``seed`` and the
    epoch alone, and resume exactly (`ResumableDataLoader`).
    A response is never cut, and nothing is cut silently. Examples longer than ``max_length`` are left out of training: a
    warning reports how many, and ``dropped`` has the numbers. Evaluation keeps all examples whole, so that scores are over
    the whole set. ``too_long`` offers other treatments. A packed training batch has ``position_ids`` in place of
    ``attention_mask`` (`lightning_pmss.datamodules.packing`).

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
        val_size: Examples held out from the training rows (chosen by ``seed``) where the data has no validation set;
            where several share a passage, whole passages, and so a few more. 0 turns validation off.
        seed: Seed of the split and of the order of training.
        num_workers: Worker processes per loader.
        cache_dir: Folder for tokenised data; the one of ``datasets`` if null.
        loss_on: "response", or "all" to train on the prompt as well (as LLM-Adapters does). Evaluation losses are over
            the response either way.
        too_long: Treatment of examples longer than ``max_length``. "drop": leave them out of training, keep them whole in
            evaluation. "cut_prompt": keep the end of the prompt; in training prompt and response are fitted to
            ``max_length``, in evaluation the prompt alone is. A warning reports how many; ``cut`` has the numbers. "error":
            refuse them.
        packing: Train on rows of several examples, at most ``max_length`` tokens together, that do not see each other;
            ``batch_size`` is then a number of rows. ``packing_report`` reports the padding saved.
        num_shots: Worked examples in front of each question in evaluation. They are part of the prompt.
        shots: Source of the worked examples: "train", drawn by ``seed``, none of them evaluated; or a file of fixed ones,
            with the columns question and response.
        ignore_columns: Columns of the data that may be filled though nothing reads them. Any other such column is an
            error that names it.

    Raises:
        ValueError: If an argument is out of range, or if no training example is short enough.
    """

    plain_template: ClassVar[str] = "Question: {question}\nAnswer:"
    styles: ClassVar[dict[str, PromptStyle]] = STYLES
    """The prompt styles by name, besides "plain" and "chat"."""
    few_shot: ClassVar[bool] = True
    """Whether worked examples can be put in front of questions."""

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
        packing: bool = False,
        num_shots: int = 0,
        shots: str = "train",
        ignore_columns: str | Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_instruction_options(type(self).__name__, tuple(self.styles), self.few_shot, locals())
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
        self.packing = packing
        self.num_shots = num_shots
        self.shots = shots
        self.ignore_columns = (ignore_columns,) if isinstance(ignore_columns, str) else tuple(ignore_columns)
        self.tokenizer_name = tokenizer
        self.data: dict[Split, Dataset] = {}
        """The tokenised splits that :meth:`setup` has made."""
        self.dropped = 0
        """Training examples left out because they are longer than ``max_length``."""
        self.cut: dict[Split, int] = {}
        """Examples per split whose prompt is cut to ``max_length``, where ``too_long`` says so."""
        self.packing_report: PackingReport | None = None
        """What packing saves, once there is a training loader."""
        self._encoders: dict[str, PromptEncoder] = {}
        self._texts: dict[Split, list[Example] | None] = {}
        self._prepared: dict[tuple[Split, tuple[int, ...] | None], Dataset | None] = {}

    @abstractmethod
    def load_examples(self, split: Split) -> list[Example] | None:
        """Return the examples of ``split``, ``None`` if the data has no such split. Keep no state on ``self``."""

    @property
    def encoder(self) -> PromptEncoder:
        """The prompt format of training with its tokenizer, loaded at first use."""
        if "train" not in self._encoders:
            tokenizer = load_tokenizer(self.tokenizer_name)
            style = self._style
            ends = style.lead, style.tail
            self._encoders["train"] = PromptEncoder(tokenizer, self.prompt_style, style.template, *ends)
        return self._encoders["train"]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of training, loaded at first use."""
        return self.encoder.tokenizer

    @property
    def eval_encoder(self) -> PromptEncoder:
        """The prompt format of evaluation, with its worked examples."""
        if "eval" not in self._encoders:
            style = self._style
            template = style.eval_template or style.template
            self._encoders["eval"] = replace(self.encoder, template=template, shots=self._shots())
        return self._encoders["eval"]

    @property
    def end_id(self) -> int:
        """The token that ends each response; generation stops at it too."""
        return self.encoder.end_id

    @property
    def _style(self) -> PromptStyle:
        return self.styles.get(self.prompt_style, PromptStyle(self.plain_template))

    def _shots(self) -> tuple[Example, ...]:
        if not self.num_shots or self.shots != "train":
            return read_shots(self.shots, self.num_shots, self.ignore_columns) if self.num_shots else ()
        train, val, test = (self._examples(split) or [] for split in _SPLITS)
        left, held = hold_out(group_numbers(train), 0 if val else self.val_size, self.seed)
        return draw_shots((train[row] for row in left), [*(train[row] for row in held), *val, *test], self.num_shots)

    @override
    def prepare_data(self) -> None:
        """Load, check and tokenise everything once per node, into the cache that all ranks then read."""
        self._prepared.clear()
        made: dict[Any, Dataset | None] = {(split, None): self._encode(split) for split in _SPLITS}
        train = made["train", None]
        if train is not None and made["val", None] is None:
            held = hold_out(train["group"][:], self.val_size, self.seed)[1]
            made["train", tuple(held)] = self._evaluated_rows(held)
        self._prepared = made  # `setup` on this process would read and hash all texts once more
        self._texts.clear()

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
        self._texts.clear()

    def _setup_fit(self) -> None:
        train, val = self._encode("train"), self._encode("val")
        if not train:
            raise ValueError(f"`{type(self).__name__}` has no training examples; give it data with a training split.")
        order, held = hold_out(train["group"][:], 0 if val is not None else self.val_size, self.seed)
        if val is None:
            if not order:
                raise ValueError(
                    f"`val_size` is {self.val_size}, but there are only {len(train)} training rows to hold it out from"
                    f" (whole passages, where rows share one); give --data.val_size below {len(train)}."
                )
            val = self._evaluated_rows(held) or train.select(held)
        lengths, prompts = train["length"][:], train["prompt_length"][:]
        if self.too_long == "cut_prompt":  # an example whose response leaves no room for a prompt is left out even so
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

    def _evaluated_rows(self, held: list[int]) -> Dataset | None:
        """Return held-out rows with the prompt of evaluation, ``None`` if it is that of training."""
        if not held or self.eval_encoder == self.encoder:
            return None
        return self._encode("train", held)

    def _evaluated(self, data: Dataset, split: Split) -> Dataset:
        """Return the part of an evaluation set that ``split`` is limited to, its long prompts cut or refused."""
        limit = self.limits[split]
        data = data if limit is None else data.select(range(min(limit, len(data))))
        if not len(data):
            return data
        lengths = data["prompt_length"][:]
        long = [length for length in lengths if length > self.max_length]
        if long and self.too_long == "error":
            raise ValueError(
                f"{len(long)} of {len(data)} prompts of the {split} set are longer than max_length {self.max_length}"
                f" tokens; raise --data.max_length to {max(long)} or give --data.too_long drop (which leaves evaluation"
                " prompts whole)."
            )
        if self.too_long == "cut_prompt":
            self._count_cut(split, len(long), len(data))
        else:
            context = self.encoder.tokenizer.model_max_length
            beyond = sum(length > context for length in lengths)
            if beyond:
                rank_zero_warn(
                    f"{beyond} of {len(data)} prompts of the {split} set are longer than the {context} tokens that the"
                    f" model takes; their answers will be poor. Give --data.too_long cut_prompt and --data.max_length"
                    f" {context}{' or fewer --data.num_shots' if self.num_shots else ''}."
                )
        return data

    def _count_cut(self, split: Split, count: int, total: int) -> None:
        self.cut[split] = count
        if count:
            rank_zero_warn(
                f"{count} of {total} prompts of the {split} set lose their beginning, to fit into max_length"
                f" {self.max_length} tokens. Raise --data.max_length to keep them whole."
            )

    def _examples(self, split: Split) -> list[Example] | None:
        if split not in self._texts:
            self._texts[split] = self.load_examples(split)
            check_examples(type(self).__name__, split, self._texts[split] or ())
        return self._texts[split]

    def _encode(self, split: Split, ids: Sequence[int] | None = None) -> Dataset | None:
        """Return a split as tokens, all rows for its own use or only ``ids`` for evaluation; from the cache if it can."""
        key = (split, None if ids is None else tuple(ids))
        if key in self._prepared:
            return self._prepared.pop(key)
        examples = self._examples(split)
        if examples is None:
            return None
        if ids is not None:
            examples = [examples[place] for place in ids]
        encoder = self.encoder if split == "train" and ids is None else self.eval_encoder
        return encode(examples, encoder, self.cache_dir, split, ids)

    def _replicas(self) -> dict[str, int]:
        """The number of ranks that share the data, and this one's number."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return dict(kwargs) if kwargs else {"num_replicas": 1, "rank": 0}

    def _collator(self, evaluation: bool = False) -> InstructionCollator:
        pad = self.encoder.tokenizer.pad_token_id
        return InstructionCollator(
            self.end_id if pad is None else int(pad),
            evaluation,
            loss_on_prompt=self.loss_on == "all" and not evaluation,
            max_length=self.max_length if self.too_long == "cut_prompt" else None,
            prefix=len(self.encoder.prefix),
            end_id=self.end_id,
        )

    @override
    def train_dataloader(self) -> ResumableDataLoader[Any]:
        rows: Any = self.data["train"]
        lengths = [min(length, self.max_length) for length in rows["length"][:]]
        collator: Any = self._collator()
        if self.packing:
            packed = pack_rows(rows, lengths, self.max_length, self.batch_size, self.seed, **self._replicas())
            rows, sampler, self.packing_report = packed
            collator = PackedCollator(collator)
            rank_zero_info(str(self.packing_report))
        else:
            sampler = LengthGroupedSampler(lengths, self.batch_size, self.seed, **self._replicas())
        return ResumableDataLoader(
            cast("torch.utils.data.Dataset[Any]", rows),
            sampler=sampler,
            progress=TrainerProgress(self.trainer) if self.trainer is not None else None,
            seed=self.seed,
            batch_size=self.batch_size,
            collate_fn=collator,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _eval_dataloader(self, split: Split, by_length: bool = True) -> DataLoader[Any]:
        data = self.data[split]
        # Sorted by length, a limited number of batches would be the longest examples: no fair sample. Of the Trainer's
        # limits the float 1.0 is all batches, the integer 1 one batch.
        limit = getattr(self.trainer, f"limit_{split}_batches", 1.0)  # without a Trainer: all
        whole = isinstance(limit, float) and limit == 1.0
        lengths = data["prompt_length"][:] if by_length and whole else None
        return DataLoader(
            WithFillers(data),
            sampler=ShardSampler(len(data), **self._replicas(), fill=self._in_step(), lengths=lengths),
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
        return self._eval_dataloader("test", by_length=False)  # `predict` returns results in the order of the loader
