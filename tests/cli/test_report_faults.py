"""A run's folder with damaged files: each fault is told in its place on the page, and the rest is shown."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_pmss.cli import main
from lightning_pmss.inspect import read_run, write_report
from tests.fuzz.test_run_folders import run as run_folder

pytest.importorskip("matplotlib")
run = run_folder  # the fixture


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """A copy of it, with a base of its own."""
    shutil.copytree(run.parent / "base", tmp_path / "base")
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    about = copied / "adapter" / "adapter_config.json"
    about.write_text(about.read_text().replace(str(run.parent / "base"), str(tmp_path / "base")))
    return copied


def sections(folder: Path, *, write: bool = True) -> dict[str, str]:
    """Title -> content of the page, which is written unless it is there."""
    page = (write_report(folder) if write else folder / "report.html").read_text(encoding="utf-8")
    parts = re.split(r"<h2>(.*?)</h2>", page)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_sound_folder(folder: Path) -> None:
    found = sections(folder)
    assert sum("<svg" in content for content in found.values()) == 6
    assert not [title for title, content in found.items() if "Not " in content]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.csv", "step,loss\n1,x\n", "metrics.csv, line 2: .*could not convert.*Correct or remove"),
        ("metrics.csv", "loss\n1\n", "line 1: .*its names lack `step`"),
        ("metrics.csv", "step,a,a\n1,1,1\n", "line 1: .*or one occurs twice"),
        ("metrics.csv", "step,a\n1,1,1\n", "line 2: .*3 fields, the first line has 2"),
        ("metrics.csv", f"step,a\n{10**400},1\n", "line 2: .*is not a number of steps"),
        ("metrics.csv", "step,a\n-1,1\n", "line 2: .*-1 is not a number of steps"),
        ("metrics.csv", f"step,a\n{'9' * 5000},1\n", "line 2: .*Exceeds the limit"),
        ("metrics.csv", f"step,a\n1,{'9' * 200000}\n", "field larger than field limit"),
        ("metrics.csv", "step\n\xff\n", "metrics.csv is not text: byte 5 is not UTF-8"),
        ("config.yaml", "\xff", "config.yaml is not text: byte 0 is not UTF-8"),
        ("summary-test.json", "[]", "summary-test.json does not contain a JSON object"),
        ("summary-test.json", "[" * 5000, "nested too deeply"),
        ("summary-test.json", '{"scores": [1]}', "`scores` should be a valid dictionary"),
        ("summary-test.json", '{"scores": {"a": {"mean": "x", "low": 0, "high": 1, "n": 2}}}', "`scores.a.mean`"),
        ("summary-test.json", '{"scores": {"a": {"mean": NaN}}}', "NaN is not a number of JSON"),
        ("adapter/adapter_config.json", "[", "is not readable JSON"),
        ("adapter/adapter_config.json", "[]", "does not contain a JSON object"),
        ("adapter/adapter_config.json", '{"versions": {"a": 1}}', "`versions.a`"),
    ],
)
def test_each_fault_is_one_sentence(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text, encoding="latin-1")
    found = read_run(folder)
    assert list(found.faults) == [name]
    assert re.search(message, found.faults[name])
    assert found.faults[name].isprintable()


@pytest.mark.parametrize(
    ("name", "text", "title", "message", "pictures"),
    [
        ("metrics.csv", "step,loss\n1,x\n", "Curves", "metrics.csv, line 2: ", 2),
        ("config.yaml", "\xff", "Configuration", "config.yaml is not text", 6),
        ("summary-test.json", "[]", "Scores: test", "summary-test.json does not contain a JSON object", 6),
        ("adapter/adapter_config.json", "[", "The update", "is not readable JSON", 4),
        ("adapter/adapter_config.json", "{}", "The update", "does not describe an adapter of lightning-pmss", 4),
        ("adapter/adapter_model.safetensors", "x", "The update", "is not a complete safetensors file", 4),
    ],
)
def test_a_damaged_file_becomes_a_note_in_its_place(
    folder: Path, name: str, text: str, title: str, message: str, pictures: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_text(text, encoding="latin-1")
    main(["report", str(folder)])
    said = capsys.readouterr()
    assert re.search(f"not on the page: {title}: .*{message}", said.err)
    assert "written: " in said.out
    found = sections(folder, write=False)
    assert re.search(message, found[title])
    assert "<svg" not in found[title]
    assert sum("<svg" in content for content in found.values()) == pictures


@pytest.mark.parametrize("name", ["metrics.csv", "summary-test.json"])
def test_where_nothing_is_left_the_fault_is_the_error(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code == 2
    assert f"{name} is a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("fault", ["nan", "index", "cut", "shape"])
def test_a_bad_base_costs_its_own_section_alone(folder: Path, tmp_path: Path, fault: str) -> None:
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    if fault == "nan":
        tensors["0.weight"].fill_(float("nan"))
    elif fault == "shape":
        tensors["0.weight"] = torch.zeros(3, 3)
    save_file(tensors, weights)
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-3])
    elif fault == "index":
        weights.rename(weights.with_name("x"))
        (tmp_path / "base" / "model.safetensors.index.json").write_text("[" * 5000)
    found = sections(folder)
    update = found["The update, layer by layer"]
    assert f"Without the base {tmp_path / 'base'}: " in update
    assert "norm of s U" in update  # of the adapter alone
    assert "<svg" in update
    assert "Spectrum of the update" not in found
    assert "<svg" in found["Loss"]


def test_an_infinite_weight_that_the_adapter_does_not_read(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    row = next(n for n in range(16) if n not in stored["0.rows"].tolist())
    column = next(n for n in range(12) if n not in stored["0.cols"].tolist())
    tensors["0.weight"][row, column] = float("inf")
    save_file(tensors, weights)
    assert "<svg" in sections(folder)["Spectrum of the update"]


def test_a_base_that_was_typed_must_be_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        write_report(folder, base=tmp_path / "nowhere")
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "name", [r"val/$\frac$", "val/$x$", "val/$", r"val/\$a$", "_val", "val/--><script>", "val/\u2603"]
)
def test_names_stand_in_the_picture_as_they_are(tmp_path: Path, name: str) -> None:
    name = name if name.startswith("val/") else f"val/{name}"
    (tmp_path / "metrics.csv").write_text(f'step,"{name}",val/_x\n1,0.5,0.1\n2,0.6,0.2\n', encoding="utf-8")
    picture = sections(tmp_path)["Scores in validation"]
    assert "Not drawn" not in picture
    assert "<script" not in picture
    # matplotlib draws letters as paths, and notes each text in a comment: `--` is not allowed in those.
    noted = re.findall("<!-- (.*?) -->", picture)
    assert (
        any(text.replace("&gt;", ">").replace("&lt;", "<").replace("- ", "-") == name for text in noted) or "--" in name
    )
    assert "val/_x" in noted


def test_many_names_and_points_stay_a_page(tmp_path: Path) -> None:
    names = [f"val/{n}" for n in range(500)]
    lines = [",".join(["step", "train/loss", *names])]
    lines += [
        ",".join(map(str, [step, 1 / (step + 1), *(["0.5"] * 500 if step % 2500 == 0 else [""] * 500)]))
        for step in range(5000)
    ]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    found = sections(tmp_path)
    assert "The first 12 of 500." in found["Scores in validation"]
    assert len(found["Loss"]) < 300_000
    assert read_run(tmp_path).curves["train/loss"][-1] == (4999, 1 / 5000)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"\xef\xbb\xbfstep,epoch,train/loss\r\n0,0,1.5\r\n1,0,1.25\r\n2,")
    assert read_run(tmp_path).curves == {"train/loss": [(0, 1.5), (1, 1.25)]}


def test_sizes_follow_no_links(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "w").write_bytes(b"1234")
    (tmp_path / "merged" / "itself").symlink_to(tmp_path / "merged")
    (tmp_path / "big").write_bytes(bytes(10**6))
    (tmp_path / "merged" / "out").symlink_to(tmp_path / "big")
    assert read_run(tmp_path).sizes["merged"] < 10**4


def test_a_summary_of_a_name_that_a_terminal_would_act_on(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    scores = {"a\n\x1b[31m": {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 3}}
    (tmp_path / "summary-x\ny.json").write_text(json.dumps({"scores": scores}))
    found = sections(tmp_path)
    assert r"a\n\x1b[31m" in found[r"Scores: x\ny"]
