"""Read files that may be damaged, foreign or edited by hand: each refusal is one sentence, and no input causes a crash.

Every reader builds on this room: of adapter folders, skeleton files, checkpoints, indices of shards, a model's ``config.json``.
A `Record` beside each reader defines the required content of its files.
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
