"""The same run under every strategy: losses, gradients, checkpoints, resume, results, evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from lightning_pmss import load_adapter, merge
from lightning_pmss.checkpoints.extract import extract_files
from lightning_pmss.conversion.convert import adapted_layers
from tests.distributed.launch import launch, per_strategy, ranks
from tests.distributed.script import EXAMPLES, LENGTH, VOCABULARY, base_model
from tests.distributed.strategies import NAMES

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SHARDED = [name for name in NAMES if name not in ("ddp", "zero2")]
REFUSES_TO_EVALUATE = dict.fromkeys(
    ("fsdp1", "fsdp1-full"),
    "was wrapped by FSDP in an earlier Trainer call, and Lightning cannot wrap it again. Evaluate inside `fit`"
    " (validation), or build a fresh module",
)
REFUSES_TO_TEST = {"zero3": "DeepSpeed cannot load a ZeRO-3 checkpoint for `test`. Evaluate right after `fit`"}
COMPILED = ("ddp", "fsdp2", "zero2")
WEIGHTS_ONLY = ("ddp", "fsdp1", "fsdp1-full", "fsdp2", "fsdp2-full", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Strategy -> folder with all its runs, made once by one launch."""
    parent = tmp_path_factory.mktemp("strategies")

    def launched(name: str) -> Path:
        folder = parent / name
        dropout = {"callback": {"dropout": 0.3}, "steps": 6}
        tasks = [
            {"folder": "whole", "steps": 6, "then": "validate", "raises": REFUSES_TO_EVALUATE.get(name)},
            {"folder": "dropout", **dropout},
            {"folder": "resumed", **dropout, "checkpoint": str(folder / "dropout" / "saved" / "step=4.ckpt")},
            {"folder": "differ", "differ": True, "steps": 1},
            {
                "folder": "by path",
                "only": "test",
                "checkpoint": str(folder / "whole" / "saved" / "step=6.ckpt"),
                "raises": REFUSES_TO_TEST.get(name),
            },
            {
                "folder": "other indices",
                "steps": 6,
                "checkpoint": str(folder / "whole" / "saved" / "step=4.ckpt"),
                "callback": {"selection": "random", "seed": 1},
            },
            {"folder": "init", "late": name.startswith("fsdp2"), "steps": 2, "head": True},
        ]
        if name in COMPILED:
            tasks += [
                {"folder": "compiled", "compiled": True, "steps": 6},
                {"folder": "plain again", "steps": 6, "checkpoint": str(folder / "compiled" / "saved" / "step=4.ckpt")},
                {
                    "folder": "compiled again",
                    "compiled": True,
                    "steps": 6,
                    "checkpoint": str(folder / "whole" / "saved" / "step=4.ckpt"),
                },
            ]
        if name in WEIGHTS_ONLY:
            tasks.append({"folder": "weights", "weights_only": True, "steps": 2})
        if name in ("fsdp1", "fsdp2"):
            raw = {"callback": {"coordinates": "raw", "scale": 1.0}}  # the file keeps scale * V: the stamps themselves
            tasks.append({"folder": "stamp", "stamp": True, "steps": 2, **raw})
            stamped = str(folder / "stamp" / "saved" / "step=2.ckpt")
            tasks.append({"folder": "stamped", "steps": 3, "checkpoint": stamped, **raw})
        if name in ("fsdp1", "fsdp2", "zero3"):
            tasks.append({"folder": "beside", "steps": 2, "callback": {"merge_on_save": "checkpoint"}})
        launch(
            "tests.distributed.script",
            [t | {"strategy": name, "folder": str(folder / str(t["folder"]))} for t in tasks],
        )
        return folder

    return per_strategy(launched)


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_ddp(runs: Any, name: str) -> None:
    expected, found = ranks(runs("ddp") / "whole"), ranks(runs(name) / "whole")
    for rank in (0, 1):
        assert len(found[rank]["losses"]) == 6
        assert found[rank]["losses"] == pytest.approx(expected[rank]["losses"], rel=1e-5)
    assert found[0]["losses"] != found[1]["losses"]  # each rank saw its own share


@pytest.mark.parametrize("name", NAMES)
def test_only_u_trains_and_frozen_weights_get_no_gradients(runs: Any, name: str) -> None:
    for rank in ranks(runs(name) / "whole"):
        assert rank["frozen_gradients"] == 0
        assert rank["trained"] == sorted(f"net.blocks.{i}.{w}.core.weight" for i in range(3) for w in ("up", "down"))


@pytest.mark.parametrize("name", NAMES)
def test_indices_are_equal_on_all_ranks_under_rank_dependent_seeds(runs: Any, name: str) -> None:
    first, second = ranks(runs(name) / "differ")
    assert len(first["indices"]) == 6
    assert first["indices"] == second["indices"]


@pytest.mark.parametrize("name", NAMES)
def test_resume_equals_never_stopped(runs: Any, name: str) -> None:
    whole, resumed = ranks(runs(name) / "dropout"), ranks(runs(name) / "resumed")
    for rank in (0, 1):
        assert resumed[rank]["losses"] == whole[rank]["losses"][4:]  # to the last bit
        assert resumed[rank]["updates"] == whole[rank]["updates"]


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_hold_the_adapter_alone(runs: Any, name: str) -> None:
    path = runs(name) / "whole" / "saved" / "step=4.ckpt"
    if path.is_file():
        keys = set(torch.load(path)["state_dict"])
    elif name.startswith("zero"):
        keys = set(torch.load(next(path.glob("checkpoint/*model_states.pt")), weights_only=False)["module"])
    else:
        metadata = FileSystemReader(path).read_metadata().state_dict_metadata
        kind = "model." if name.startswith("fsdp1") else "state_dict."
        keys = {k.removeprefix(kind) for k in metadata if k.startswith(kind)}
    parts = ("core.weight", "rows", "cols")
    assert keys == {f"net.blocks.{i}.{w}.{p}" for i in range(3) for w in ("up", "down") for p in parts}


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_weights_only_checkpoints_hold_the_adapter_alone(runs: Any, name: str) -> None:
    path = runs(name) / "weights" / "saved" / "step=2.ckpt"
    if path.is_file():
        state = torch.load(path)
        assert "optimizer_states" not in state
        assert not [k for k in state["state_dict"] if not k.endswith(("core.weight", "rows", "cols"))]
    else:
        base = sum(p.nbytes for p in base_model().parameters())
        written = sum(f.stat().st_size for f in path.rglob("*") if f.suffix in (".distcp", ".pt"))
        trained = 6 * 8 * 8 * 4
        assert written < base + 3 * trained  # pickled headers and indices, but not the base and its copy per rank
        names = b"".join(f.read_bytes() for f in path.rglob("*") if f.is_file())
        assert b"core.weight" in names
        assert b"embed.weight" not in names
        assert b"norm.weight" not in names


@pytest.mark.parametrize("name", NAMES)
def test_adapter_and_merged_model(runs: Any, name: str, tmp_path: Path) -> None:
    folder = runs(name) / "whole"
    expected = ranks(runs("ddp") / "whole")[0]["updates"]
    for rank in ranks(folder):
        for layer, update in rank["updates"].items():
            assert torch.tensor(update).norm() > 1e-3
            torch.testing.assert_close(torch.tensor(update), torch.tensor(expected[layer]), rtol=1e-3, atol=1e-5)
    model = torch.nn.Module()
    model.net = base_model()
    load_adapter(model, folder / "out" / "adapter")
    for layer, module in adapted_layers(model).items():
        torch.testing.assert_close(module.core_update(), torch.tensor(ranks(folder)[0]["updates"][layer]))
    with torch.no_grad():
        adapted = model.net(tokens())
        merge(model)
        assert not torch.allclose(adapted, base_model()(tokens()), atol=1e-3)
        plain = torch.nn.Module()
        plain.net = base_model()
        plain.load_state_dict(load_file(folder / "out" / "merged" / "model.safetensors"))
        torch.testing.assert_close(plain.net(tokens()), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSES_TO_EVALUATE])
def test_evaluation_after_fit(runs: Any, name: str) -> None:
    expected, found = ranks(runs("ddp") / "whole"), ranks(runs(name) / "whole")
    for rank in (0, 1):
        assert expected[rank]["scores"]
        assert found[rank]["scores"] == pytest.approx(expected[rank]["scores"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_init_and_a_head_that_trains_in_full(runs: Any, name: str) -> None:
    expected, found = ranks(runs("ddp") / "init"), ranks(runs(name) / "init")
    assert found[0]["losses"] == pytest.approx(expected[0]["losses"], rel=1e-5)
    assert found[0]["trained"][-2:] == ["net.head.bias", "net.head.weight"]
    state = load_file(runs(name) / "init" / "out" / "adapter" / "adapter_model.safetensors")
    assert state["net.head.weight"].shape == (VOCABULARY, 32)
    assert not torch.equal(state["net.head.weight"], base_model().head.weight)
    reference = load_file(runs("ddp") / "init" / "out" / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(state["net.head.weight"], reference["net.head.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_adapter_that_fit_wrote(runs: Any, name: str, tmp_path: Path) -> None:
    """Bit for bit, from one process that knows nothing of the strategy."""
    save_file(base_model().state_dict(), tmp_path / "base.safetensors")
    for run in ("init", "weights") if name in WEIGHTS_ONLY else ("init",):
        folder = runs(name) / run
        extract_files(folder / "saved" / "step=2.ckpt", tmp_path / "base.safetensors", tmp_path / run, progress=False)
        one, other = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / run, folder / "out" / "adapter"))
        assert set(one) == set(other)
        assert all(torch.equal(value, other[key]) for key, value in one.items())
        configs = [(f / "adapter_config.json").read_text() for f in (tmp_path / run, folder / "out" / "adapter")]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2", "zero2", "zero3"])
def test_a_part_of_a_folder_that_changed_is_named(runs: Any, name: str, tmp_path: Path) -> None:
    save_file(base_model().state_dict(), tmp_path / "base.safetensors")
    folder = Path(shutil.copytree(runs(name) / "init" / "saved" / "step=2.ckpt", tmp_path / "a.ckpt"))
    parts = [path for path in folder.rglob("*") if path.is_file() and path.name != "pmss.json" and path.stat().st_size]
    assert len(parts) >= 4
    for part in parts:
        content = part.read_bytes()
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{part.relative_to(folder).as_posix()} is not what it was"):
            extract_files(folder, tmp_path / "base.safetensors", tmp_path / "out", progress=False)
        part.write_bytes(content)
    parts[0].unlink()
    with pytest.raises(ValueError, match="is not complete: it has no"):
        extract_files(folder, tmp_path / "base.safetensors", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_what_each_rank_holds_of_u_survives(runs: Any, name: str) -> None:
    stamped = ranks(runs(name) / "stamped")
    values = [{v for part in rank["parts"].values() for v in part} for rank in stamped]
    assert values == [{1.0}, {2.0}]
    state = load_file(runs(name) / "stamp" / "out" / "adapter" / "adapter_model.safetensors")
    for key in (k for k in state if k.endswith(".U")):
        assert state[key].flatten().tolist() == [1.0] * 32 + [2.0] * 32


@pytest.mark.parametrize("name", [*REFUSES_TO_EVALUATE, *REFUSES_TO_TEST])
def test_what_a_strategy_cannot_do_is_refused(runs: Any, name: str) -> None:
    runs(name)  # `launch` compares the messages of every rank with "raises"


@pytest.mark.parametrize("name", SHARDED)
def test_layers_can_be_read_whole(runs: Any, name: str) -> None:
    model = torch.nn.Module()
    model.net = base_model()
    load_adapter(model, runs(name) / "whole" / "out" / "adapter")
    for layer, module in adapted_layers(model).items():
        expected = sum(float(part.double().sum()) for part in module.slices())
        assert ranks(runs(name) / "whole")[1]["sums"][layer] == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSES_TO_TEST])
def test_a_checkpoint_is_evaluated_by_path(runs: Any, name: str) -> None:
    for expected, found in zip(ranks(runs("ddp") / "whole"), ranks(runs(name) / "by path"), strict=True):
        assert found["scores"] == pytest.approx(expected["scores"], rel=1e-5)


@pytest.mark.parametrize("name", COMPILED)
def test_checkpoints_of_compiled_and_plain_modules_are_the_same(runs: Any, name: str) -> None:
    for folder in ("compiled", "plain again", "compiled again"):
        for expected, found in zip(ranks(runs(name) / "whole"), ranks(runs(name) / folder), strict=True):
            assert found["losses"] == expected["losses"][-len(found["losses"]) :]
            assert found["updates"] == expected["updates"]


@pytest.mark.parametrize("name", NAMES)
def test_indices_of_a_checkpoint_replace_those_selected_now(runs: Any, name: str) -> None:
    for expected, found in zip(ranks(runs(name) / "whole"), ranks(runs(name) / "other indices"), strict=True):
        assert "error" not in found
        assert found["indices"] == expected["indices"]
        assert found["losses"] == pytest.approx(expected["losses"][4:], rel=1e-5)


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2", "zero3"])
def test_merged_model_beside_each_checkpoint(runs: Any, name: str) -> None:
    folder = runs(name) / "beside"
    assert sorted(p.name for p in (folder / "saved").iterdir()) == ["step=2-merged", "step=2.ckpt"]
    beside = load_file(folder / "saved" / "step=2-merged" / "model.safetensors")
    final = load_file(folder / "out" / "merged" / "model.safetensors")
    assert beside.keys() == final.keys() == {f"net.{k}" for k in base_model().state_dict()}
    assert all(torch.equal(beside[k], final[k]) for k in beside)
