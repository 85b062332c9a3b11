"""Answer a file of prompts in batches; a stopped run continues."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lightning_pmss.chat.model import ChatModel
from lightning_pmss.chat.options import AnswerOptions, FileOptions, ModelOptions
from lightning_pmss.chat.prompts import Prompt, read_prompts
from lightning_pmss.evaluation.identity import digest, model_hash
from lightning_pmss.evaluation.journal import Journal
from lightning_pmss.evaluation.records import PredictionRecord, read_records, to_line, write_records
from lightning_pmss.store.disk import refuse_special


class FileAnswer(PredictionRecord):
    """A line of unfinished work; ``id`` is the prompt's number in the file."""

    id: int
    run: str


def answer_file(files: FileOptions, options: ModelOptions, answers: AnswerOptions) -> None:
    """Answer the prompts of a file, in its order.

    With an output each batch is put on the disk when it has been computed, into a folder beside the output; the same
    command continues there. Without one, answers are printed as they come.

    Raises:
        FileExistsError: The output exists, or another process writes it.
        FileNotFoundError: A file or folder is missing.
        ValueError: A prompt that is none or is too long, unfinished work of another run, or what `ChatModel` refuses.
        KeyboardInterrupt: Ctrl-C; its note says how to continue.
    """
    if len(options.adapter) > 1:
        raise ValueError("generate answers with one adapter; run it once for each.")
    prompts = read_prompts(files.prompts)
    output = None if files.output is None else Path(files.output).expanduser()
    if output is not None:
        _check_output(output, Path(files.prompts).expanduser(), files.overwrite)
    model = ChatModel(options)
    texts = [_text(model, prompt, files.prompts) for prompt in prompts]
    rows = model.tokens(texts)
    _check_lengths(model, rows, prompts, files.prompts, answers.max_new_tokens)
    places = list(range(len(rows)))
    if output is not None:
        places.sort(key=lambda place: -len(rows[place]))  # the longest first, so that little is padded
    batches = [places[start : start + files.batch_size] for start in range(0, len(places), files.batch_size)]
    journal = None if output is None else _journal(output, model, texts, files, answers)
    done: dict[int, dict[str, Any]] = {} if journal is None else dict(journal.done)
    if done:
        print(f"{len(done)} of {len(prompts)} answers are here from an earlier start.", file=sys.stderr)
    try:
        with tqdm(total=len(prompts), unit="answer", file=sys.stderr, disable=None) as bar:
            for number, batch in enumerate(batches):
                if any(place not in done for place in batch):
                    # Drawn tokens depend on the batch alone, so a continued run gives the texts of one that was not stopped.
                    torch.manual_seed(int(digest([answers.seed, number]), 16))
                    said = model.answer([rows[place] for place in batch], answers)
                    new: list[dict[str, Any]] = [
                        {"id": p, "prompt": texts[p], "output": t} for p, t in zip(batch, said, strict=True)
                    ]
                    if journal is not None:
                        journal.append([row for row in new if row["id"] not in done])
                    done |= {row["id"]: row for row in new if row["id"] not in done}
                    if output is None:
                        print("".join(to_line(_line(prompts[p], done[p])) for p in batch), end="", flush=True)
                bar.update(len(batch))
    except KeyboardInterrupt as stopped:
        if output is not None:
            stopped.add_note(f"{len(done)} of {len(prompts)} answers are kept; the same command continues.")
        raise
    finally:
        if journal is not None:
            journal.close()
    if output is not None and journal is not None:
        write_records([_line(prompt, done[place]) for place, prompt in enumerate(prompts)], output)
        journal.remove()
        print(f"{len(prompts)} answers written to {output}")


def _line(prompt: Prompt, row: dict[str, Any]) -> dict[str, Any]:
    return {"id": prompt.id, "prompt": row["prompt"], "output": row["output"]}


def _text(model: ChatModel, prompt: Prompt, path: str) -> str:
    try:
        return model.prompt(prompt.messages)
    except ValueError as error:
        raise ValueError(f"{path} line {prompt.line}: {error}") from error


def _check_output(output: Path, prompts: Path, overwrite: bool) -> None:
    refuse_special(output)
    if not output.exists():
        return
    if output.samefile(prompts):
        raise FileExistsError(f"--output {output} is the file of prompts; name another file.")
    if not overwrite:
        raise FileExistsError(f"{output} exists. To replace it give --overwrite, or name another file.")
    try:
        read_records(output)
    except ValueError:
        raise FileExistsError(f"{output} is no file of answers, so it is not replaced. Name another file.") from None


def _check_lengths(model: ChatModel, rows: Sequence[list[int]], prompts: Sequence[Prompt], path: str, new: int) -> None:
    for row, prompt in zip(rows, prompts, strict=True):
        if not row:
            raise ValueError(f"{path} line {prompt.line}: the tokenizer has no tokens for this prompt.")
        if model.context is not None and len(row) + new > model.context:
            fits = model.context - len(row)
            remedy = f"give at most --max-new-tokens {fits}, or shorten it" if fits > 0 else "shorten it"
            raise ValueError(
                f"{path} line {prompt.line}: the prompt has {len(row)} tokens and its answer up to {new}, and the model reads"
                f" {model.context}; {remedy}."
            )


def _journal(
    output: Path, model: ChatModel, texts: Sequence[str], files: FileOptions, answers: AnswerOptions
) -> Journal:
    identity = {
        "model": model_hash(model.model),
        "tokenizer": digest(sorted(model.tokenizer.get_vocab().items())),
        "prompts": digest([model.options.plain, *texts]),
        "max_new_tokens": answers.max_new_tokens,
        "stop": list(answers.stop),
        **answers.sampling(),
    }
    if answers.sampling():
        identity |= {"seed": answers.seed, "batch_size": files.batch_size}
    place = output.with_name(f"{output.name}.unfinished")
    words: dict[str, Any] = {"elsewhere": "another --output", "anew": "--overwrite", "kind": FileAnswer}
    identity = json.loads(json.dumps(identity))
    try:
        return Journal(place, "generate", identity, **words)
    except ValueError:
        if not files.overwrite:
            raise
    return Journal(place, "generate", identity, "replace", **words)
