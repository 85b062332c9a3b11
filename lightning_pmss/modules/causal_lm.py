"""`CausalLMModule`: any Hugging Face causal language model, trained on responses, evaluated by loss and text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_pmss.distributed.model_built import model_built
from lightning_pmss.evaluation.answering import AnswerBy, Answering
from lightning_pmss.evaluation.generation import Generation
from lightning_pmss.evaluation.identity import digest, max_over_ranks, model_hash
from lightning_pmss.evaluation.journal import Existing, Journal
from lightning_pmss.evaluation.likelihood import IGNORED
from lightning_pmss.evaluation.run import TextEvaluation, select
from lightning_pmss.layers.parts import is_sharded
from lightning_pmss.modules import buffers
from lightning_pmss.modules.chunked_loss import check_chunk, check_model, chunked_losses
from lightning_pmss.modules.hub import announce_zero3, checkpoint_activations, load_causal_lm, load_tokenizer
from lightning_pmss.modules.packed import check_packing
from lightning_pmss.modules.quantisation import Quantisation, check_quantisation
from lightning_pmss.modules.reloading import Reloading
from lightning_pmss.modules.schedule import SCHEDULES, schedule_factor
from lightning_pmss.modules.sharded import build_on_rank_zero
from lightning_pmss.modules.token_mean import TokenMean
from lightning_pmss.modules.token_weighted import TokenWeighted


class CausalLMModule(Reloading, TokenWeighted):
    """Fine-tunes a causal language model on the responses of prompt and response pairs.

    `configure_model` loads the model and its tokenizer, so that a strategy can shard and a callback can change it afterwards.
    Under FSDP2 rank 0 alone loads, and every rank gets its shards; under ZeRO-3 transformers partitions while it loads. All
    parameters that require grad are trained.

    A training batch is a dict of ``input_ids``, ``attention_mask`` and ``labels``, int64 [B, T], right padded, with the
    label -100 on prompt and padding; packed batches have ``position_ids`` in place of the mask, which restart where an
    example begins. For generation an evaluation batch has in addition ``prompt_ids`` and ``prompt_mask``, int64 [B, P],
    left padded, ``id``, int64 [B] (negative: computed, not scored), ``prompt`` and ``target``, lists of B strings, and
    perhaps ``end_id``, int64 [B], a token that ends texts too. Without them only the loss is computed.

    A step's gradient is that of the mean over the response tokens of all its batches and ranks (`TokenWeighted`).
    Logged: ``train/loss``, the mean over those of the last batch on this rank; ``val/loss`` and ``test/loss``, the mean over
    all of the split; ``val/exact_match`` and ``test/exact_match``, where texts are generated and a metric is given.

    ``test`` puts each batch of answers on the disk as it comes, and goes on where it was stopped if it is started again with
    the same model, options and folder (``predictions_dir``).

    Args:
        model_name_or_path: Folder of the model, or its id on the model hub.
        optimizer: Makes the optimizer from the parameters that require grad.
        warmup_ratio: Share of the optimizer steps in which the learning rate rises.
        lr_schedule: Schedule of the learning rate after the warm-up.
        dtype: Of the weights: ``"auto"`` (the checkpoint's), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        gradient_checkpointing: Recompute activations in the backward pass (non-reentrant). It works only while the
            model is in train mode, in which transformers does not load it.
        max_new_tokens: Limit of the generated text.
        metric: Scores texts: ``update(preds: list[str], targets: list[str])``, ``compute()`` to a scalar or a dict of
            scalars, and ``score(pred, target)`` to a number for one example (1 is correct).
        generate_in: Stages in which texts are generated: ``"test"``, ``"validate"``, both or none.
        predictions_dir: Folder of ``predictions-<stage>.jsonl``; by default the trainer's log folder.
        revision: Of the model on the hub: branch, tag or commit.
        num_beams: 1: greedy. More: beam search with as many hypotheses.
        stop: A generated text ends before the first of these strings.
        answer_by: "generation", or "likelihood": the likeliest of the labels that the prompt offers; for data with labels
            and a metric that knows them (`CommonsenseAccuracy`).
        existing_predictions: How ``test`` treats predictions in its folder. "resume" skips questions that the same model
            answered with the same options, and refuses predictions of another run; "replace" begins anew.
        loss_chunk: The logits of at most so many tokens exist at a time (`chunked_loss`), such as 1024; None: of the whole
            batch. The loss is the same.
        quantisation: Keep the linear layers' weights in codes: ``"nf4"`` or ``"fp4"`` (4 bits, bitsandbytes), ``"int8"``
            (bitsandbytes) or ``"torchao-int8"``; one device or DDP. See `modules.quantisation`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        model_name_or_path: str,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0),
        warmup_ratio: float = 0.03,
        lr_schedule: Literal["cosine", "linear", "constant"] = "cosine",
        dtype: str = "auto",
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 256,
        metric: Metric | None = None,
        generate_in: Sequence[Literal["validate", "test"]] = ("test",),
        predictions_dir: str | None = None,
        revision: str | None = None,
        num_beams: int = 1,
        stop: Sequence[str] = (),
        answer_by: AnswerBy = "generation",
        existing_predictions: Existing = "resume",
        loss_chunk: int | None = None,
        quantisation: Quantisation | None = None,
    ) -> None:
        given = locals()
        super().__init__()
        # No save_hyperparameters: LightningCLI would let those of a checkpoint silently override what is typed beside
        # --ckpt_path. The configuration of a run is in the config.yaml of its log folder.
        self.keep_arguments(given)
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={warmup_ratio!r} is a share of the steps; type a number in [0, 1).")
        if lr_schedule not in SCHEDULES:
            raise ValueError(f"lr_schedule={lr_schedule!r} is not known; choose one of {list(SCHEDULES)}.")
        if existing_predictions not in ("resume", "replace"):
            raise ValueError(
                f"existing_predictions={existing_predictions!r} is not known; choose 'resume' or 'replace'."
            )
        check_chunk(loss_chunk)
        check_quantisation(quantisation)
        stages = [generate_in] if isinstance(generate_in, str) else list(generate_in)
        if unknown := sorted(set(stages) - {"validate", "test"}):
            raise ValueError(
                f"generate_in names {unknown}; type 'validate', 'test' or both (predict always generates)."
            )
        self.model_name_or_path, self.revision = model_name_or_path, revision
        self.optimizer = optimizer
        self.warmup_ratio, self.lr_schedule = warmup_ratio, lr_schedule
        self.dtype_name = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.loss_chunk, self.quantisation = loss_chunk, quantisation
        self.max_new_tokens = max_new_tokens
        self.answering = Answering(Generation(max_new_tokens, num_beams, stop), answer_by, metric)
        self.existing_predictions: Existing = existing_predictions
        self.generate_in, self.predictions_dir = stages, predictions_dir
        self.model: Any = None
        self.tokenizer: Any = None
        self.metric = metric
        if metric is not None:
            metric.sync_on_compute = False  # it is fed with the texts of all processes, see `_finish_texts`
        self.mean_loss = nn.ModuleDict({name: TokenMean() for name in ("val", "test")})
        self._texts = TextEvaluation(metric)
        self._ends: frozenset[int] = frozenset()
        self._written: set[Path] = set()

    # -- building ------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load model and tokenizer, once.

        Raises:
            FileNotFoundError: If they cannot be found; the message says what to type.
        """
        if self.model is not None:
            return
        self.tokenizer = load_tokenizer(self.model_name_or_path, revision=self.revision)
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            mesh = strategy.device_mesh["data_parallel"]
            self.model = build_on_rank_zero(self._load_alone, mesh, strategy.root_device)
        elif isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
            self._zero3 = announce_zero3(strategy)
            self.model = self._load()
            buffers.recompute_buffers_after_zero_init(self.model)
        else:
            self.model = self._load()
        if isinstance(strategy, FSDPStrategy):
            # On the instance: DeepSpeed warns about every class that overrides this hook.
            self.configure_gradient_clipping = self._clip_sharded  # type: ignore[method-assign]
            buffers.keep_buffers_under_fsdp1(strategy)
        if self.loss_chunk is not None:
            check_model(self.model)
        if self.gradient_checkpointing:
            checkpoint_activations(self.model)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalLMModule:
        with buffers.computed_buffers_kept(self.model):
            return super()._apply(fn, recurse)

    def _load(self) -> nn.Module:
        return load_causal_lm(
            self.model_name_or_path,
            dtype=self.dtype_name,
            quantisation=self.quantisation,
            strategy=None if self._trainer is None else self.trainer.strategy,
            revision=self.revision,
        )

    def _load_alone(self) -> nn.Module:
        """Load the model on one rank, and run the callbacks on it."""
        self.model = self._load()
        model_built(self, everywhere=False)
        model, self.model = self.model, None
        return model

    def _clip_sharded(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by FSDP1's own norm over all ranks; Lightning refuses to clip by norm under FSDP1."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            root: Any = self.trainer.strategy.model
            root.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """Make the optimizer of all parameters that require grad, and the schedule, stepped with every optimizer step.

        Raises:
            RuntimeError: If no parameter requires grad.
            ValueError: If the schedule needs the number of steps and the training has no end.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise RuntimeError(
                f"No parameter of {self.model_name_or_path!r} requires grad, so nothing would be trained. Add the "
                "callback that makes parameters trainable (PMSSCallback), or call requires_grad_(True) on some."
            )
        optimizer = self.optimizer(parameters)
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total) and (self.lr_schedule != "constant" or self.warmup_ratio):
            raise ValueError(
                f"lr_schedule={self.lr_schedule!r} with warmup_ratio={self.warmup_ratio} needs the number of steps, "
                "and the Trainer has none. Set max_steps or max_epochs, or lr_schedule='constant' and warmup_ratio=0."
            )
        warmup = math.ceil(self.warmup_ratio * total) if self.warmup_ratio else 0
        factor = partial(schedule_factor, kind=self.lr_schedule, warmup_steps=warmup, total_steps=total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- loss ----------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Logits [B, T, vocabulary] of int64 `input_ids` [B, T]."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options).logits

    def response_loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross entropy of the response tokens.

        Returns:
            The mean over the batch's response tokens (float32 scalar, 0 where there is none) and their number (int64
            scalar): the weight of the batch in a mean over several.
        """
        sums, counts = self.example_losses(batch)
        tokens = counts.sum()
        return sums.sum() / tokens.clamp(min=1), tokens

    def example_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropy over the response tokens of each row, float32 [B], and their number, int64 [B]."""
        packed = {}
        if "position_ids" in batch:  # several examples per row: positions restart at each example
            check_packing(self.model)
            packed["position_ids"] = batch["position_ids"]
        mask = batch.get("attention_mask") if packed else batch["attention_mask"]
        run = partial(self, batch["input_ids"], mask, **packed)
        # The logits at t are for the token at t + 1. Shifting the labels spares a copy of the much larger logits.
        labels = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
        if self.loss_chunk is None:
            logits = run().flatten(0, 1)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
        else:
            losses = chunked_losses(run, self.model, labels, IGNORED, self.loss_chunk)
        return losses.view_as(labels).sum(1), (labels != IGNORED).sum(1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The batch's part of the step's loss, see `TokenWeighted`. Logged as ``train/loss``: the mean of this batch alone."""
        sums, counts = self.example_losses(batch)
        total, tokens = sums.sum(), counts.sum()
        mean = total / tokens.clamp(min=1)
        self.log("train/loss", mean, on_step=True, on_epoch=False, prog_bar=True, batch_size=len(batch["input_ids"]))
        return self.step_loss(total, tokens)

    def _evaluate(self, batch: dict[str, Any], name: Literal["val", "test"], stage: str) -> None:
        mean: Any = self.mean_loss[name]
        if stage not in self.generate_in or "prompt_ids" not in batch:
            sums, tokens = self.example_losses(batch)
            with torch.inference_mode(False):
                mean.update(sums.sum() / tokens.sum().clamp(min=1), tokens.sum())
            return
        stored, missing = self._texts.split(batch)
        losses = [(row["loss"], row["tokens"]) for row in stored]
        # If forward passes are collectives, a rank with all questions answered computes along and drops the result.
        if max_over_ranks(len(missing), self.model, self.device):
            asked = select(batch, missing) if missing else batch
            sums, tokens = self.example_losses(asked)
            rows = self._answers(asked)
            means = zip((sums / tokens.clamp(min=1)).tolist(), tokens.tolist(), strict=True)
            new = [{**row, "loss": loss, "tokens": n} for row, (loss, n) in zip(rows, means, strict=True)]
            if missing:
                self._texts.add(new)
                losses += [(row["loss"], row["tokens"]) for row in new]
        with torch.inference_mode(False):
            for loss, n in losses:
                # Under bf16-true the default dtype is bfloat16 here.
                mean.update(torch.tensor(loss, dtype=torch.float32), torch.tensor(n))
        self._texts.show(self.trainer)

    def _log_evaluation(self, name: Literal["val", "test"], stage: str) -> None:
        mean: Any = self.mean_loss[name]
        # Leave inference mode: metric states created inside it are inference tensors and could not be updated by a later
        # validation inside fit.
        with torch.inference_mode(False):
            self.log(f"{name}/loss", mean.compute(), prog_bar=True)
            mean.reset()
        for key, value in self._finish_texts(stage).items():
            self.log(f"{name}/{key}", value, prog_bar=True)

    # The four hooks differ only in the name under which they log.

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and, where asked, texts of one batch."""
        self._evaluate(batch, "val", "validate")

    def on_validation_epoch_end(self) -> None:
        """Log the means over the split."""
        self._log_evaluation("val", "validate")

    def on_test_start(self) -> None:
        """Look for answers of an earlier start of this evaluation.

        Raises:
            ValueError: If predictions of another run are in the folder.
        """
        folder = self._predictions_folder()
        if folder is None or "test" not in self.generate_in:
            return
        identity = self.answering.to_dict() | {
            "model": model_hash(self.model),
            "tokenizer": digest(sorted(self.tokenizer.get_vocab().items())),
            "precision": str(self.trainer.precision),
        }
        # Predictions that this object wrote itself, before training for example, are replaced.
        existing = "replace" if folder in self._written else self.existing_predictions
        journal = Journal(folder, "test", identity, existing)
        self._texts = TextEvaluation(self.metric, journal)
        if journal.done:
            rank_zero_info(f"{len(journal.done)} answers of this run are in {folder} and are not computed again.")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and, where asked, texts of one batch."""
        self._evaluate(batch, "test", "test")

    def on_test_epoch_end(self) -> None:
        """Log the means over the split."""
        self._log_evaluation("test", "test")

    # -- texts ---------------------------------------------------------------------------------------------------

    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor) -> list[str]:
        """Continuation of each prompt, as text without special tokens and outer white space.

        Args:
            prompt_ids: int64 [B, P], left padded.
            prompt_mask: int64 [B, P], 0 on padding.
        """
        return self.answering.generation.texts(
            self.model, self.tokenizer, prompt_ids, prompt_mask, in_step=is_sharded(self.model), ends=self._ends
        )

    def _answers(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        self._ends = frozenset(batch["end_id"].tolist()) if "end_id" in batch else frozenset()
        return self.answering.records(self.model, self.tokenizer, batch, self.generate)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        """Texts of one batch; they are also written to ``predictions-predict.jsonl``.

        Raises:
            ValueError: If the batch holds no prompts.
        """
        if "prompt_ids" not in batch:
            raise ValueError(
                f"predict needs batches with `prompt_ids` and `prompt_mask`, this one has {sorted(batch)}. "
                "Give the DataModule a predict_dataloader that collates prompts."
            )
        rows = self._answers(batch)
        self._texts.add([row for row in rows if row["id"] >= 0])
        return [row["output"] for row in rows]

    def on_predict_epoch_end(self) -> None:
        """Write the texts."""
        self._finish_texts("predict")

    def _predictions_folder(self) -> Path | None:
        """Folder of the predictions, on every rank; None in a trial run, which writes no files."""
        log_dir = self.trainer.log_dir  # read on every process: it is a broadcast
        trial = self.trainer.sanity_checking or getattr(self.trainer, "fast_dev_run", False)
        return None if trial else Path(self.predictions_dir or log_dir or self.trainer.default_root_dir).expanduser()

    def _finish_texts(self, stage: str) -> dict[str, Tensor]:
        """Write the answers gathered since the last call and return their scores."""
        folder = self._predictions_folder()
        texts, self._texts = self._texts, TextEvaluation(self.metric)
        if folder is not None and texts.journal is not None:
            self._written.add(folder)
        return texts.finish(folder, stage, first=self.trainer.is_global_zero)
