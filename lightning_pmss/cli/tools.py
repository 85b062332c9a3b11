"""The tools beside Lightning's commands, ``python -m lightning_pmss merge ...``, each with a parser of its own.

A tool takes its part of the command line. It says what is wrong by ValueError, OSError or ModuleNotFoundError, which
`run_tool` turns into one line and exit code 2. Each imports what it needs once its options are parsed, so that ``--help`` is
quick.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from lightning_pmss.cli.debugging import debugging

PROGRAM = "python -m lightning_pmss"
_BASE = "folder of the base model (safetensors), or a safetensors file with a state dict"
_PEFT_TYPES = {"native": True, "lora": False}
_CKPT = "checkpoint of a run with PMSSCallback: a file, or a folder of FSDP or DeepSpeed"


def _parser(name: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"{PROGRAM} {name}", description=TOOLS[name][1])


def _merge(args: Sequence[str]) -> None:
    parser = _parser("merge")
    parser.add_argument("--base", required=True, metavar="MODEL_DIR", help=_BASE)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--adapter", metavar="ADAPTER_DIR", help="adapter folder")
    source.add_argument("--ckpt", metavar="FILE", help=f"in place of an adapter: {_CKPT}")
    parser.add_argument("--output", required=True, metavar="MERGED_DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    parser.add_argument("--dtype", help="dtype of the written weights, such as bfloat16 (default: the base's)")
    parser.add_argument("--max-shard-size", help="largest size of one weights file, such as 5GB (default: 5GB)")
    chosen = {key: value for key, value in vars(parser.parse_args(args)).items() if value is not None}

    from lightning_pmss.checkpoints.extract import merge_checkpoint
    from lightning_pmss.files.merged import merge_files

    print(merge_checkpoint(**chosen) if "ckpt" in chosen else merge_files(**chosen))


def _extract(args: Sequence[str]) -> None:
    parser = _parser("extract")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help=_CKPT)
    parser.add_argument("--base", required=True, metavar="MODEL_DIR", help=_BASE)
    parser.add_argument("--output", required=True, metavar="ADAPTER_DIR", help="adapter folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    given = vars(parser.parse_args(args))

    from lightning_pmss.checkpoints.extract import extract_files

    print(extract_files(**given))


def _select(args: Sequence[str]) -> None:
    from lightning_pmss.cli.options import Options, refuse_others
    from lightning_pmss.methods.pmss.config import PMSSConfig

    parser = _parser("select")
    parser.add_argument("--model", required=True, metavar="MODEL_DIR", help="Folder of the model (safetensors).")
    parser.add_argument("--output", required=True, metavar="FILE", help="Skeleton file to write (.safetensors).")
    parser.add_argument("--overwrite", action="store_true", help="Replace the file, or unfinished work, if it exists.")
    parser.add_argument("--workers", type=int, metavar="N", help="Matrices at a time (default: the CPU cores at hand)")
    parser.add_argument("--architecture", metavar="CLASS", help="Class of transformers (default: config.json's)")
    parser.add_argument(
        "--method",
        default=PMSSConfig.method,
        help="pmss, curlora, or lora_xs: singular vectors, by rank and targets only (default: %(default)s). Defaults below are"
        " PMSS's; the others have those of their configurations.",
    )
    options = Options(PMSSConfig, PMSSConfig.skeleton_options())
    options.add_to(parser)
    given = vars(parser.parse_args(args))
    name, chosen = given.pop("method"), options.take(given)

    from lightning_pmss.files.select import select_files
    from lightning_pmss.methods import METHODS

    known = {name: method.config_class for name, method in METHODS.items() if method.config_class.per_matrix}
    if name not in known:
        raise ValueError(f"--method {name} has no skeleton; type one of {', '.join(known)}.")
    refuse_others(name, chosen, known[name].skeleton_options())
    print(select_files(config=known[name](**chosen), **given))


def _estimate(args: Sequence[str]) -> None:
    from lightning_pmss.cli.estimate import run

    run(_parser("estimate"), args)


def _compare(args: Sequence[str]) -> None:
    from lightning_pmss.evaluation.bootstrap import CONFIDENCE, RESAMPLES

    parser = _parser("compare")
    parser.add_argument("a", metavar="A.jsonl", help="predictions of one model (predictions-test.jsonl)")
    parser.add_argument("b", metavar="B.jsonl", help="predictions of another model on the same questions")
    parser.add_argument("--ignore-prompts", action="store_true", help="prompts may differ; ids and targets may not")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="of intervals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = vars(parser.parse_args(args))
    as_json = options.pop("json")

    from lightning_pmss.evaluation.compare import compare_files

    found = compare_files(**options)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)


def _export(args: Sequence[str]) -> None:
    parser = _parser("export")
    parser.add_argument(
        "--format",
        required=True,
        help="peft: a folder that peft loads onto the base. vllm: a LoRA, of fused experts with the names that vLLM has for"
        " single ones",
    )
    parser.add_argument(
        "--as",
        dest="native",
        choices=_PEFT_TYPES,
        help="native: peft's own type of the method (LoRA, MiSS, BAT, HiRA). lora: a LoRA, which vLLM reads, too (default:"
        " native where peft has it and --rank is not given, else lora)",
    )
    parser.add_argument("--base", required=True, metavar="MODEL_DIR", help="folder of the base model (safetensors)")
    parser.add_argument("--adapter", required=True, metavar="ADAPTER_DIR", help="adapter folder")
    parser.add_argument("--output", required=True, metavar="LORA_DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    parser.add_argument("--rank", type=int, metavar="N", help="cut to this rank by singular values (default: exact)")
    parser.add_argument("--dtype", help="dtype of the factors, such as bfloat16 (default: float32)")
    given = vars(parser.parse_args(args))
    native = _PEFT_TYPES.get(given.pop("native"))

    from lightning_pmss.files.lora import export_files

    print(export_files(**given, native=native, announce=lambda line: print(line, flush=True)))


def _import(args: Sequence[str]) -> None:
    parser = _parser("import")
    parser.add_argument("--format", required=True, help="peft: a folder of LoRA, MiSS, Bone or HiRA, as peft writes it")
    parser.add_argument("--input", required=True, metavar="LORA_DIR", help="folder to read")
    parser.add_argument("--base", required=True, metavar="MODEL_DIR", help=_BASE)
    parser.add_argument("--output", required=True, metavar="ADAPTER_DIR", help="adapter folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    given = vars(parser.parse_args(args))

    from lightning_pmss.files.lora_import import import_files

    print(import_files(**given))


def _combine(args: Sequence[str]) -> None:
    parser = _parser("combine")
    parser.add_argument("--base", required=True, metavar="MODEL_DIR", help="folder of the base model (safetensors)")
    parser.add_argument(
        "--adapters", required=True, nargs="+", metavar="ADAPTER_DIR", help="two adapter folders or more"
    )
    parser.add_argument(
        "--rule", required=True, help="lego, cat, svd, linear, ties, dare_linear, dare_ties, magnitude_prune"
    )
    parser.add_argument("--output", required=True, metavar="ADAPTER_DIR", help="adapter folder to write")
    parser.add_argument("--rank", type=int, metavar="N", help="rank of the result, for lego and svd")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="one per adapter (default: 1 each)")
    parser.add_argument(
        "--density", type=float, metavar="D", help="share of entries kept, for ties, dare_* and magnitude_prune"
    )
    parser.add_argument("--seed", type=int, default=0, help="of lego's k-means and dare's draws (default: %(default)s)")
    parser.add_argument("--units", metavar="HOW", help="what lego clusters: aligned (default), raw or normalised units")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    given = vars(parser.parse_args(args))

    from lightning_pmss.named.combine_files import combine_files

    print(combine_files(**given))


def _inspect(args: Sequence[str]) -> None:
    parser = _parser("inspect")
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help="adapter folder")
    parser.add_argument(
        "--base", metavar="MODEL_DIR", help="folder of the base model: norms and spectra of the updates"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with all singular values")
    given = parser.parse_args(args)

    from lightning_pmss.inspect.inspection import inspect_adapter

    found = inspect_adapter(given.adapter, given.base, progress=True)
    print(json.dumps(found.to_dict(), indent=2) if given.json else found)


def _report(args: Sequence[str]) -> None:
    parser = _parser("report")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="log folder of a run, such as runs/quickstart/version_0")
    parser.add_argument("--output", metavar="FILE", help="page to write (default: report.html in the run's folder)")
    parser.add_argument(
        "--base", metavar="MODEL_DIR", help="folder of the base model (default: the adapter's, if here)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the page if it exists")
    given = vars(parser.parse_args(args))

    from lightning_pmss.inspect import write_report

    page = write_report(**given, announce=lambda line: print(f"not on the page: {line}", file=sys.stderr))
    print(f"written: {page}")


def _chat(args: Sequence[str]) -> None:
    from lightning_pmss.cli.chat import run_chat

    run_chat(_parser("chat"), args)


def _generate(args: Sequence[str]) -> None:
    from lightning_pmss.cli.chat import run_generate

    run_generate(_parser("generate"), args)


def _preview(args: Sequence[str]) -> None:
    from lightning_pmss.cli.preview import run

    run(_parser("preview"), args)


def _enough(args: Sequence[str]) -> None:
    from lightning_pmss.cli.enough import run

    run(_parser("enough"), args)


def _tune(args: Sequence[str]) -> None:
    from lightning_pmss.cli.tune import run

    run(_parser("tune"), args)


def _doctor(args: Sequence[str]) -> None:
    from lightning_pmss.doctor.examination import SECONDS, examine

    parser = _parser("doctor")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time limit of each trial (default: %(default)s)"
    )
    given = parser.parse_args(args)
    if not given.seconds > 0:
        raise ValueError(f"--seconds {given.seconds:g}: give a number above 0.")

    found = examine(
        seconds=given.seconds, announce=lambda name: print(f"trying {name} ...", file=sys.stderr, flush=True)
    )
    print(json.dumps(found.to_dict(), indent=2) if given.json else found)
    if not found.healthy:
        raise SystemExit(1)


def _lm_eval(args: Sequence[str]) -> None:
    parser = _parser("lm_eval")
    parser.usage = f"{PROGRAM} lm_eval --model lightning_pmss --model_args pretrained=DIR,adapter=DIR --tasks TASK ..."
    parser.epilog = (
        "Every option is the harness's own; `lm_eval run --help` lists them, such as --batch_size, --device, --limit, "
        "--num_fewshot, --include_path, --output_path and --log_samples. `lm_eval ls tasks` lists the tasks."
    )
    _, given = parser.parse_known_args(args)

    from lightning_pmss.harness import run

    run(given)


TOOLS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "select": (
        _select,
        "derive frozen tensors (rows and columns, singular vectors) of a model on disk into a skeleton file",
    ),
    "merge": (_merge, "write base + adapter, or base + checkpoint, as a plain model folder, shard by shard"),
    "extract": (_extract, "write a checkpoint's adapter folder, without the program that trained it"),
    "export": (_export, "write an adapter for peft: as peft's own type of its method, or as a LoRA"),
    "combine": (_combine, "combine several adapters of one base into one LoRA adapter"),
    "import": (_import, "write an adapter folder of peft (LoRA, MiSS, HiRA) as one of this library"),
    "inspect": (_inspect, "what an adapter changes, layer by layer: norms, effective ranks, singular values"),
    "report": (
        _report,
        "one self-contained HTML page of a run: curves, the update by layer, spectra, scores, settings",
    ),
    "estimate": (_estimate, "memory per device, host memory and file sizes of a run, from config.json alone"),
    "chat": (_chat, "talk to a model in the terminal, with one adapter or several, switched by name"),
    "generate": (_generate, "answer a file of prompts in batches; a stopped run continues"),
    "preview": (
        _preview,
        "training data as the model will see it: tokens, loss mask, lengths, steps; without the model",
    ),
    "enough": (
        _enough,
        "how much data pays: runs on nested subsets of growing size, and a saturating curve through their scores",
    ),
    "tune": (
        _tune,
        "search learning rate, rank and other options: trials stop early, the best ones are trained to the end",
    ),
    "doctor": (_doctor, "versions, devices, missing extras, and whether bf16, compile and DeepSpeed work here"),
    "lm_eval": (_lm_eval, "lm-evaluation-harness, with the model class lightning_pmss: a base with an adapter"),
    "compare": (_compare, "two predictions files: bootstrap interval of the difference, McNemar's exact test"),
}


def run_tool(name: str, *args: str) -> None:
    """Run one of `TOOLS` with its part of the command line.

    Raises:
        SystemExit: With code 2, after a message on stderr, if what was typed cannot be done.
    """
    try:
        TOOLS[name][0](args)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        if debugging():
            raise
        print(f"{PROGRAM} {name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
