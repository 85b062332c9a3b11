"""Read files that may be damaged, foreign or edited by hand: each refusal is one sentence, and no input is a crash.

The ground of every reader: an adapter folder, a skeleton file, a checkpoint, an index of shards, a model's ``config.json``.
What a file of one kind has to hold is written down beside its reader, as a `Record`.
"""

from lightning_pmss.store.json_text import json_value, parse_json, read_json
from lightning_pmss.store.records import Record, TensorRecord, checked
from lightning_pmss.store.tensors import (
    check_index,
    check_sums,
    describe_tensors,
    get_tensor,
    misfit,
    not_finite,
    open_tensors,
    read_tensors,
    refuse_odd_type,
    why_no_index,
)
from lightning_pmss.store.unreadable import refuse_unreadable

__all__ = [
    "Record",
    "TensorRecord",
    "check_index",
    "check_sums",
    "checked",
    "describe_tensors",
    "get_tensor",
    "json_value",
    "misfit",
    "not_finite",
    "open_tensors",
    "parse_json",
    "read_json",
    "read_tensors",
    "refuse_odd_type",
    "refuse_unreadable",
    "why_no_index",
]
