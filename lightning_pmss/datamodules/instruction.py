"""Make padded batches of tokens from questions and responses, with the loss on the response only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_pmss.datamodules.base import SPLITS, TokenisedDataModule
from lightning_pmss.datamodules.base import Split as Split
from lightning_pmss.datamodules.cache import encode
from lightning_pmss.datamodules.collate import IGNORED as IGNORED
from lightning_pmss.datamodules.collate import Batch as Batch
from lightning_pmss.datamodules.collate import InstructionCollator as InstructionCollator
from lightning_pmss.datamodules.options import check_instruction_options
from lightning_pmss.datamodules.options import check_int as check_int
from lightning_pmss.datamodules.prompts import STYLES, PromptEncoder, PromptStyle, check_examples, load_tokenizer
from lightning_pmss.datamodules.prompts import Example as Example
from lightning_pmss.datamodules.splits import draw_shots, group_numbers, hold_out, read_shots

if TYPE_CHECKING:
    from datasets import Dataset


class InstructionDataModule(TokenisedDataModule):
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
        shots: Source of the worked examples: "train", drawn by ``split_seed``, none of them evaluated; or a file of fixed ones,
            with the columns question and response.
        ignore_columns: Columns of the data that may be filled though nothing reads them. Any other such column is an
            error that names it.
        split_seed: Seed of what is held out and of the worked examples; ``seed`` if null. With one ``split_seed``, runs of
            different ``seed`` train on different examples, in different orders, and validate on the same ones.
        train_limit_by: "kind" keeps the shares of the kinds of examples among the ``train_limit`` chosen ones: the type of the
            answer (DROP), the task (commonsense), the type (MetaMathQA, MATH), the story (arithmetic).

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
        split_seed: int | None = None,
        train_limit_by: str | None = None,
    ) -> None:
        check_instruction_options(type(self).__name__, tuple(self.styles), self.few_shot, locals())
        super().__init__(
            tokenizer,
            batch_size,
            eval_batch_size,
            max_length,
            train_limit,
            val_limit,
            test_limit,
            val_size,
            seed,
            num_workers,
            cache_dir,
            too_long,
            packing,
            ignore_columns,
            split_seed,
            train_limit_by,
        )
        self.prompt_style = prompt_style
        self.loss_on = loss_on
        self.num_shots = num_shots
        self.shots = shots
        self._encoders: dict[str, PromptEncoder] = {}
        self._texts: dict[Split, list[Example] | None] = {}

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
    @override
    def tokenizer(self) -> Any:
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
    @override
    def end_ids(self) -> frozenset[int]:
        return frozenset({self.end_id})

    @property
    @override
    def uses_chat_template(self) -> bool:
        return self.prompt_style == "chat"

    @property
    def _style(self) -> PromptStyle:
        return self.styles.get(self.prompt_style, PromptStyle(self.plain_template))

    def _shots(self) -> tuple[Example, ...]:
        if not self.num_shots or self.shots != "train":
            return read_shots(self.shots, self.num_shots, self.ignore_columns) if self.num_shots else ()
        train, val, test = (self._examples(split) or [] for split in SPLITS)
        left, held = hold_out(group_numbers(train), 0 if val else int(self.val_size), self.split_seed)
        return draw_shots((train[row] for row in left), [*(train[row] for row in held), *val, *test], self.num_shots)

    def _examples(self, split: Split) -> list[Example] | None:
        if split not in self._texts:
            self._texts[split] = self.load_examples(split)
            check_examples(type(self).__name__, split, self._texts[split] or ())
        return self._texts[split]

    @override
    def _make(self, split: Split, ids: Sequence[int] | None) -> Dataset | None:
        examples = self._examples(split)
        if examples is None:
            return None
        if split == "train" and ids is None:
            self._kind_of = [example.kind for example in examples]
        if ids is not None:
            examples = [examples[place] for place in ids]
        encoder = self.encoder if split == "train" and ids is None else self.eval_encoder
        return encode(examples, encoder, self.cache_dir, split, ids)

    @override
    def _forget_texts(self) -> None:
        self._texts.clear()

    @override
    def _evaluated_rows(self, held: list[int]) -> Dataset | None:
        if not held or self.eval_encoder == self.encoder:
            return None
        return self._encode("train", held)

    @override
    def _fitting(self, train: Dataset, order: list[int]) -> list[int]:
        if self.too_long != "cut_prompt":
            return super()._fitting(train, order)
        # An example whose response leaves no room for a prompt is left out even so.
        lengths, prompts = train["length"][:], train["prompt_length"][:]
        least = len(self.encoder.prefix) + 1
        fitting = [index for index in order if lengths[index] - prompts[index] + least <= self.max_length]
        self._count_cut("train", sum(lengths[index] > self.max_length for index in fitting), len(order))
        return fitting

    @override
    def _check_prompts(self, data: Dataset, split: Split) -> None:
        if self.too_long == "cut_prompt":
            long = sum(length > self.max_length for length in data["prompt_length"][:])
            self._count_cut(split, long, len(data))
        else:
            super()._check_prompts(data, split)

    @override
    def _shorter(self, context: int) -> str:
        fewer = " or fewer --data.num_shots" if self.num_shots else ""
        return f"Give --data.too_long cut_prompt and --data.max_length {context}{fewer}."

    def _count_cut(self, split: Split, count: int, total: int) -> None:
        self.cut[split] = count
        if count:
            rank_zero_warn(
                f"{count} of {total} prompts of the {split} set lose their beginning, to fit into max_length"
                f" {self.max_length} tokens. Raise --data.max_length to keep them whole."
            )

    @override
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
