"""The eight commonsense tasks in the form of LLM-Adapters (Hu et al. 2023).

BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge and OpenBookQA are rows of ``instruction``, ``input`` (empty),
``output`` ("the correct answer is <label>") and ``answer``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from lightning_pmss.datamodules.columns import Format, filled, text
from lightning_pmss.datamodules.commonsense_hub import hub_rows
from lightning_pmss.datamodules.instruction import Example, InstructionDataModule, Split
from lightning_pmss.datamodules.rows import (
    Row,
    existing,
    load_hub_rows,
    looks_like_file,
    read_json,
    read_rows,
    split_file,
)
from lightning_pmss.metrics.commonsense import TASK_LABELS, TASKS

# The tasks that begin like this. The last three share one form; SIQA has it too, with three answers.
_OPENINGS = {
    "Please answer the following question with true or false": ("boolq",),
    "Please choose the correct solution to the question": ("piqa",),
    "Please choose the correct ending to complete the given sentence": ("hellaswag",),
    "Please choose the correct answer to fill in the blank": ("winogrande",),
    "Please choose the correct answer to the question": ("social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa"),
}


_FORMAT = Format("LLM-Adapters", ("instruction", "output", "answer"), reads=("input", "task"))


def possible_tasks(instruction: str) -> tuple[str, ...]:
    """Return the tasks that an instruction of LLM-Adapters may belong to; none for a foreign text."""
    return next((tasks for opening, tasks in _OPENINGS.items() if instruction.startswith(opening)), ())


def _example(where: str, row: Any, task: str | None, ignored: Sequence[str] = ()) -> Example:
    row = _FORMAT.check(where, row, ignored)
    instruction, output, label = (text(where, row, column) for column in ("instruction", "output", "answer"))
    if filled(row.get("input")) and "input" not in ignored:
        raise ValueError(
            f"{where}: the input is {str(row['input'])[:40]!r}; in the commonsense data it is empty. Put what it says into"
            " the instruction, or leave it out on purpose: --data.ignore_columns '[input]'."
        )
    possible = (task,) if task is not None else possible_tasks(instruction)
    label = label.strip()
    labels = [name for name in possible if label in TASK_LABELS[name]]
    if not labels:
        allowed = TASK_LABELS[possible[0]] if possible else ("none: the instruction is of no known task",)
        raise ValueError(f"{where}: the answer is {label!r}, not one of {', '.join(allowed)}.")
    if not output.strip().rstrip(".").endswith(label):
        raise ValueError(f"{where}: the output {output[-40:]!r} does not end in the answer {label!r}.")
    # "other" if the text does not identify the task: the metric then finds the labels by the gold label.
    name = possible[0] if len(possible) == 1 else "other"
    return Example(instruction.strip(), output.strip(), [name, label], kind=name)


class CommonsenseDataModule(InstructionDataModule):
    """The eight commonsense tasks in LLM-Adapters' form, to train on together and to test on one by one.

    The target of an example (in ``batch["target"]``) is the pair of its task and its label, as `CommonsenseAccuracy` takes it.

    The literature's protocol trains on Commonsense170K, with the loss on the prompt too (``loss_on: all``), prompt
    style "llm_adapters", 256 tokens at most, and holds out 120 rows. Its BoolQ has no passage (closed book).

    Args:
        tokenizer: Folder or hub id of the model's tokenizer.
        path: Training data: hub id, ``commonsense_170k.json``, another file of such rows, or a folder with
            ``<task>/train.json`` (then each row's task is known).
        test_path: Folder with ``<task>/test.json`` (``dataset/`` of ``AGI-Edgerunners/LLM-Adapters``), or one file.
            Null: ``path``, if it is a folder with test files; else the tasks' own validation or test sets from the hub,
            put into LLM-Adapters' form.
        tasks: Tasks to train and to test on. Null: all eight.
        max_length: As in the base.
        **kwargs: Arguments of `InstructionDataModule`.

    Raises:
        FileNotFoundError: If a path looks like a path and nothing is there.
        ValueError: If a task is unknown, a file is not in LLM-Adapters' form (names file and row), or a subset of tasks
            is asked of a file that does not identify the tasks.
        ConnectionError: If the data cannot be had from the hub.
    """

    plain_template: ClassVar[str] = "{question}\nAnswer:"
    few_shot: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: str,
        path: str = "zwhe99/commonsense_170k",
        test_path: str | None = None,
        tasks: Sequence[str] | None = None,
        max_length: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length, **kwargs)
        unknown = [task for task in tasks or () if task not in TASKS]
        if isinstance(tasks, str) or unknown or (tasks is not None and not tasks):
            raise ValueError(
                f"`CommonsenseDataModule(tasks={tasks!r})`: give a list of some of {', '.join(TASKS)}, for example"
                " --data.tasks '[boolq, piqa]', or null for all eight."
            )
        self.path = path
        self.test_path = test_path
        self.tasks = TASKS if tasks is None else tuple(task for task in TASKS if task in tasks)

    @override
    def load_examples(self, split: Split) -> list[Example] | None:
        """Return the checked examples of ``split``, task by task if the data separates them."""
        if split == "val":
            return None
        examples = self._train() if split == "train" else self._test()
        if not examples:
            raise ValueError(f"No {split} examples of {', '.join(self.tasks)} in {self.path}.")
        return examples

    def _train(self) -> list[Example]:
        remedy = (
            "Give --data.path commonsense_170k.json, a folder with <task>/train.json, or a hub id such as"
            " zwhe99/commonsense_170k."
        )
        if not looks_like_file(self.path):
            files = "--data.path commonsense_170k.json (ft-training_set of github.com/AGI-Edgerunners/LLM-Adapters)."
            return self._mixed(load_hub_rows(self.path, "train", [{}], files), None)
        path = Path(self.path).expanduser()
        if path.is_dir():
            return self._per_task(path, "train", remedy)
        return self._mixed(list(read_rows(existing(path, remedy))), path)

    def _test(self) -> list[Example]:
        remedy = "Give --data.test_path a folder with <task>/test.json, such as dataset/ of LLM-Adapters."
        given = self.test_path
        if given is None:
            own = Path(self.path).expanduser()
            if not own.is_dir():
                return [
                    _example(where, row, task)
                    for task in self.tasks
                    for where, row in hub_rows(task, self.ignore_columns)
                ]
            given = self.path
        path = Path(given).expanduser()
        if path.is_dir():
            return self._per_task(path, "test", remedy)
        return self._mixed(list(read_rows(existing(path, remedy))), path)

    def _per_task(self, folder: Path, stem: str, remedy: str) -> list[Example]:
        return [
            _example(where, row, task, self.ignore_columns)
            for task in self.tasks
            for where, row in read_rows(split_file(folder / task, [stem], remedy))
        ]

    def _mixed(self, rows: list[Row], path: Path | None) -> list[Example]:
        """Return the examples of the wanted tasks from rows of several."""
        named = self._named_tasks(rows, path)
        examples = []
        for (where, row), name in zip(rows, named, strict=True):
            example = _example(where, row, name, self.ignore_columns)
            possible = (name,) if name is not None else possible_tasks(example.question)
            wanted = [task in self.tasks for task in possible]
            if any(wanted) and not all(wanted):
                raise ValueError(
                    f"{where}: this row may belong to {', '.join(possible)}; the file does not tell them apart, and"
                    f" only {', '.join(self.tasks)} are asked for. Ask for all four of these tasks, give the rows a"
                    " column 'task', or give --data.path a folder with <task>/train.json."
                )
            if all(wanted):
                examples.append(example)
        return examples

    @staticmethod
    def _named_tasks(rows: list[Row], path: Path | None) -> list[str | None]:
        """Return each row's task from its column 'task' or from ``<file>_tasks.json``, a list beside the file."""
        beside = None if path is None else path.with_name(f"{path.stem}_tasks.json")
        names = [row.get("task") if isinstance(row, Mapping) else None for _, row in rows]
        if beside is not None and beside.is_file():
            names = read_json(beside)
            if not isinstance(names, list) or len(names) != len(rows):
                raise ValueError(f"{beside}: expected a list with the tasks of the {len(rows)} rows of {path}.")
        for (where, _), name in zip(rows, names, strict=True):
            if name is not None and name not in TASKS:
                raise ValueError(f"{where}: unknown task {name!r}; the tasks are {', '.join(TASKS)}.")
        return names
