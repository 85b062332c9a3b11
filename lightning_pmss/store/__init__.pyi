from .json_text import json_value, parse_json, read_json
from .records import Record, TensorRecord, checked
from .tensors import (
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
from .unreadable import refuse_unreadable
from .yaml_text import read_yaml

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
    "read_yaml",
    "refuse_odd_type",
    "refuse_unreadable",
    "why_no_index",
]
