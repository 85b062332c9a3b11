"""Fixtures and settings of all tests: no hub, caches in a temporary folder, tiny models and tokenizers of our own."""

from __future__ import annotations

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

REPOSITORY = Path(__file__).resolve().parent.parent

# `huggingface_hub` and `datasets` read these once, at import, so they are set before any test module is collected.
_CACHE = tempfile.TemporaryDirectory(prefix="pmss-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_DATASETS_CACHE"] = str(Path(_CACHE.name) / "datasets")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it at import; several tests run at a time

# DeepSpeed compiles an operation here. A folder for each process that runs tests: `tests.distributed.launch` says why.
_EXTENSIONS = REPOSITORY / ".pytest_cache" / "torch_extensions" / os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ["TORCH_EXTENSIONS_DIR"] = str(_EXTENSIONS)

# A shell starts background jobs with Ctrl-C ignored, which the processes of the tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Sentences that the byte-level tokenizer of the tests learns its few merges from.
_CORPUS = [
    "Question: Ann has 3 boxes with 4 pens each. How many pens does Ann have?\nAnswer: 3 * 4 = 12\n#### 12",
    "Question: Tom had 17 eggs and sold 5. How many eggs are left?\nAnswer: 17 - 5 = 12 eggs are left.\n#### 12",
    "Question: A train travels 60 miles in one hour. How far does it go in 3 hours?\nAnswer: 60 * 3 = 180\n#### 180",
]


def pytest_unconfigure(config: pytest.Config) -> None:
    _CACHE.cleanup()


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Say how many tests were skipped and why: a clean clone skips whatever needs real data or models."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons: Counter[str] = Counter()
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    terminalreporter.section("skipped tests")
    terminalreporter.write_line(f"{len(skipped)} skipped")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"  {count} x {reason}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real data and models (``PMSS_SHARED``, else ``../shared`` beside the repository)."""
    folder = Path(os.environ.get("PMSS_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("needs real data: no folder ../shared beside the repository and PMSS_SHARED is not set")
    return folder


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder with the small data files that are committed with the tests."""
    return REPOSITORY / "tests" / "fixtures"


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a byte-level BPE tokenizer of 320 tokens; pad is eos (as in SmolLM2), with a chat template, no bos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end, padding_side="left")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer LLaMA (hidden 32, tied head, grouped-query attention) with ``tiny_tokenizer``."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny_llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _unchanged_thread_count() -> Iterator[None]:
    """Give every test the thread count that the run started with, whatever the test before it set."""
    import torch

    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
