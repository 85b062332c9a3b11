"""The configurations that `enough` writes make every data module of this library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lightning_pmss.cli.lightning import DataCLI
from lightning_pmss.datamodules.base import TokenisedDataModule
from tests.enough.conftest import Enough

ROWS = {  # a data set's rows, its module's options, and the kinds that subsets keep
    "GSM8KDataModule": (lambda n: {"query": f"{n}?", "response": "The answer is: 1", "type": "AB"[n % 2]}, [], "kind"),
    "DROPDataModule": (
        lambda n: {"passage": f"P{n}", "question": "Q?", "answer": {"number": "1"} if n % 3 else {"spans": ["a"]}}, [], "kind",
    ),
    "CommonsenseDataModule": (
        lambda n: {
            "instruction": ("Please choose the correct solution to the question",
                            "Please answer the following question with true or false")[n % 2] + f": {n}",
            "input": "", "output": ("solution1", "true")[n % 2], "answer": ("solution1", "true")[n % 2],
        }, [], "kind",
    ),
    "ChatDataModule": (lambda n: {"prompt": f"Q{n}", "completion": "A", "topic": "ab"[n % 2]}, ["--by=topic"], "topic"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_nested_subsets_and_the_same_validation(enough: Enough, name: str) -> None:
    row, more, kind = ROWS[name]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row(n))}\n" for n in range(40)))
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["data"] = {"class_path": name, "init_args": {"path": "rows.jsonl", "val_size": 8, "cache_dir": "cache"}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert enough("--sizes=6,12", "--seeds=2", *more) == 0
    chosen = {}
    for run in ("n6-seed0", "n12-seed0", "n6-seed1"):
        module = DataCLI(["fit", "--config", f"study/{run}/run.yaml"]).datamodule
        assert isinstance(module, TokenisedDataModule)
        module.setup("fit")
        assert module.train_limit_by == kind
        assert len(module.kinds) == 2
        chosen[run] = [set(module.data[split]["id"][:]) for split in ("train", "val")]
    (small, val), (large, same), (other, again) = chosen.values()
    assert small < large
    assert (len(small), len(large)) == (6, 12)
    assert small != other
    assert val == same == again
    assert not val & large
