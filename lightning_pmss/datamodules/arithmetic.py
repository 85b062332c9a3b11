"""Arithmetic word problems in GSM8K's format, generated from a seed.

A first run needs no download, and its exact match is meaningful: no calculation of the test set occurs in training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import override

from lightning_pmss.datamodules.instruction import Example, InstructionDataModule, Split, check_int

_NAMES = [
    "Ann",
    "Ben",
    "Clara",
    "David",
    "Ella",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Victor",
]
_ITEMS = [
    "apples",
    "books",
    "buttons",
    "cards",
    "coins",
    "cups",
    "eggs",
    "flowers",
    "keys",
    "marbles",
    "nuts",
    "pears",
    "pens",
    "plums",
    "shells",
    "stamps",
]

# The generator gives up after so many draws without a new problem; about one draw in ten hits a test calculation.
_PATIENCE = 20_000

# Of ten calculations one is for the test set and one for validation.
_BUCKETS: dict[int, Split] = {0: "test", 1: "val"}

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x // y,
}


@dataclass(frozen=True)
class _Template:
    """One kind of problem.

    ``steps`` contains per step the operation, its right operand ("b" or "c"; the left one is "a", then the result so
    far), and the sentence around the calculation. ``largest`` bounds a, b and c; for a division a is made divisible.
    The numbers are small because the model of the quickstart is: with 135 M parameters it still gets many held-out
    calculations wrong. Still smaller ones scored lower in a single trial of each (one seed, 100 problems).
    """

    question: str
    steps: tuple[tuple[str, str, str], ...]
    largest: tuple[int, ...]


_TEMPLATES: dict[int, tuple[_Template, ...]] = {
    1: (
        _Template(
            "{name} has {a} {item} and buys {b} more. How many {item} does {name} have now?",
            (("+", "b", "{name} now has {calculation} {item}."),),
            (40, 9),
        ),
        _Template(
            "{name} sees {a} {item} on the table and {b} on the floor. How many {item} does {name} see in all?",
            (("+", "b", "{name} sees {calculation} {item}."),),
            (40, 9),
        ),
        _Template(
            "{name} had {a} {item} and gave {b} of them to {friend}. How many {item} does {name} have left?",
            (("-", "b", "{name} has {calculation} {item} left."),),
            (40, 9),
        ),
        _Template(
            "{name} has {a} {item}. {friend} has {b} fewer. How many {item} does {friend} have?",
            (("-", "b", "{friend} has {calculation} {item}."),),
            (40, 9),
        ),
        _Template(
            "{name} packs {a} {item} into each of {b} boxes. How many {item} does {name} pack?",
            (("*", "b", "{name} packs {calculation} {item}."),),
            (10, 10),
        ),
        _Template(
            "{name} collects {a} {item} every day. How many {item} does {name} collect in {b} days?",
            (("*", "b", "{name} collects {calculation} {item}."),),
            (10, 10),
        ),
        _Template(
            "{name} finds {a} {item} and {friend} finds {b}. How many {item} do they find together?",
            (("+", "b", "Together they find {calculation} {item}."),),
            (40, 9),
        ),
    ),
    2: (
        _Template(
            "{name} has {c} {item} and buys {b} bags of {a} {item} each. How many {item} does {name} have now?",
            (
                ("*", "b", "The bags hold {calculation} {item}."),
                ("+", "c", "{name} now has {calculation} {item}."),
            ),
            (10, 9, 9),
        ),
        _Template(
            "{name} fills {b} boxes with {a} {item} each and sells {c} of the {item}. How many {item} are left?",
            (
                ("*", "b", "The boxes hold {calculation} {item}."),
                ("-", "c", "After the sale {calculation} {item} are left."),
            ),
            (10, 9, 9),
        ),
        _Template(
            "{name} has {a} {item}, finds {b} more and gives {c} to {friend}. How many {item} does {name} keep?",
            (
                ("+", "b", "{name} first has {calculation} {item}."),
                ("-", "c", "{name} keeps {calculation} {item}."),
            ),
            (30, 9, 9),
        ),
        _Template(
            "{name} had {a} {item}, lost {b} and then got {c} from {friend}. How many {item} does {name} have now?",
            (
                ("-", "b", "After the loss {name} has {calculation} {item}."),
                ("+", "c", "{name} now has {calculation} {item}."),
            ),
            (30, 9, 9),
        ),
        _Template(
            "{name} puts {a} red and {b} green {item} into a bag and fills {c} such bags. How many {item} are in them?",
            (
                ("+", "b", "One bag holds {calculation} {item}."),
                ("*", "c", "The bags hold {calculation} {item}."),
            ),
            (9, 9, 6),
        ),
        _Template(
            "{name} shares {a} {item} equally among {b} friends. {friend}, one of them, eats {c}. How many {item} does"
            " {friend} have left?",
            (
                ("/", "b", "Each friend gets {calculation} {item}."),
                ("-", "c", "{friend} has {calculation} {item} left."),
            ),
            (10, 9, 8),
        ),
    ),
}


def _solve(template: _Template, numbers: dict[str, int]) -> list[tuple[str, int]] | None:
    """Return each step's calculation and result, ``None`` where one is not positive."""
    steps, value = [], numbers["a"]
    for operation, operand, _ in template.steps:
        calculation = f"{value} {operation} {numbers[operand]}"
        value = _OPERATIONS[operation](value, numbers[operand])
        if value < 1:
            return None
        steps.append((calculation, value))
    return steps


def calculation_split(template_steps: list[tuple[str, int]]) -> Split:
    """Return the split that a calculation belongs to, whatever the seed, the story and the order of its summands.

    Args:
        template_steps: Each step's calculation, such as "4 * 6", and its result.
    """
    parts = []
    for calculation, _ in template_steps:
        left, operation, right = calculation.split()
        if operation in "+*" and int(left) > int(right):
            left, right = right, left
        parts.append(left + operation + right)
    digest = hashlib.blake2b(";".join(parts).encode(), digest_size=8).digest()
    return _BUCKETS.get(int.from_bytes(digest, "big") % 10, "train")


def generate(split: Split, size: int, seed: int = 0, steps: int = 1, annotations: bool = False) -> list[Example]:
    """Return ``size`` different problems of ``split``; the same ones for the same arguments.

    Args:
        split: "train", "val" or "test". Their calculations are disjoint, also between different seeds.
        size: Number of problems.
        seed: Seed of the choice.
        steps: Calculations per problem, 1 or 2.
        annotations: Put GSM8K's calculator annotations ``<<4*6=24>>`` into the answers.

    Raises:
        ValueError: If there are not as many different problems.
    """
    rng = random.Random(f"{seed}/{split}/{steps}")
    templates = _TEMPLATES[steps]
    problems: dict[str, Example] = {}
    attempts, last = 0, 0
    while len(problems) < size:
        attempts = attempts + 1 if len(problems) == last else 0
        last = len(problems)
        if attempts > _PATIENCE:
            raise ValueError(
                f"Found only {len(problems)} different problems for the {split} set; ask for fewer than {size}."
            )
        number = len(problems) % len(templates)  # all kinds equally often
        template = templates[number]
        numbers = {key: rng.randint(2, top) for key, top in zip("abc", template.largest, strict=False)}
        if template.steps[0][0] == "/":
            numbers["a"] *= numbers["b"]
        solution = _solve(template, numbers)
        if solution is None or calculation_split(solution) != split:
            continue
        name, friend = rng.sample(_NAMES, 2)
        words = {"name": name, "friend": friend, "item": rng.choice(_ITEMS)}
        question = template.question.format(**words, **numbers)
        lines = []
        for (_, _, sentence), (calculation, result) in zip(template.steps, solution, strict=True):
            mark = f"<<{calculation.replace(' ', '')}={result}>>" if annotations else ""
            lines.append(sentence.format(**words, calculation=f"{calculation} = {mark}{result}"))
        answer = "\n".join([*lines, f"#### {solution[-1][1]}"])
        problems.setdefault(question, Example(question, answer, kind=f"story {number + 1}"))
    examples = list(problems.values())
    rng.shuffle(examples)
    return examples


class ArithmeticDataModule(InstructionDataModule):
    """Generated arithmetic word problems in GSM8K's format: question, worked answer, last line ``#### N``.

    The three sets share no calculation: a hash of the calculation itself, such as "4 * 6 = 24, 24 + 5 = 29", fixes its set.
    So a model cannot score by having seen the sum in another story, and test sets stay unseen whatever ``data_seed`` a
    model was trained with.

    Args:
        tokenizer: Folder or hub id of the model's tokenizer.
        steps: Calculations per problem: 1 or 2 (harder).
        train_size: Problems to train on.
        val_size: Problems to validate on; 0 turns validation off.
        test_size: Problems to test on.
        annotations: Put GSM8K's calculator annotations ``<<4*6=24>>`` into the answers.
        data_seed: Seed of the problems. ``seed`` is that of their order in training.
        **kwargs: Arguments of `InstructionDataModule`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        tokenizer: str,
        steps: Literal[1, 2] = 1,
        train_size: int = 2000,
        val_size: int = 100,
        test_size: int = 200,
        annotations: bool = False,
        data_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, val_size=val_size, **kwargs)
        owner = type(self).__name__
        if steps not in (1, 2):
            raise ValueError(f"`{owner}(steps={steps!r})`: give --data.steps 1 or --data.steps 2.")
        check_int(owner, "train_size", train_size, 1)
        check_int(owner, "test_size", test_size, 1)
        check_int(owner, "data_seed", data_seed, 0)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        self.steps = steps
        self.annotations = annotations
        self.data_seed = data_seed

    @override
    def load_examples(self, split: Split) -> list[Example]:
        """Generate the problems of ``split``."""
        return generate(split, self.sizes[split], self.data_seed, self.steps, self.annotations)
