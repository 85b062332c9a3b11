"""CURLoRA (Fawi, arXiv 2408.14572): PMSS with the weakest columns and rows, drawn at random, in raw coordinates.

``W' = W + s C U R``: U is trained from zero. Columns and rows are drawn with a probability that falls with their squared norm,
without replacement and from a seed, and the file stores them. The original draws with replacement and does not store what it
drew. Its code also adds 0.001 to each share of the squared norm, which makes the draw nearly uniform; this is the paper's
formula.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_pmss.methods.choices import one_of
from lightning_pmss.methods.documentation import inherit_options
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.method import PMSS


@inherit_options(PMSSConfig)
@dataclass(frozen=True)
class CURLoRAConfig(PMSSConfig):
    """Options of CURLoRA: those of PMSS, of which columns, selection and coordinates are fixed.

    Args:
        rank: Rows and columns drawn per layer.
        columns: ``"selected"``.
        selection: ``"inverse_norm"``.
        coordinates: ``"raw"``: what is trained is U itself.
        scale: Factor s of the update, or ``"auto"`` as in PMSS.

    Raises:
        ValueError: See `PMSSConfig`.
    """

    method = "curlora"
    rank: int = 16
    columns: str = field(default="selected", metadata=one_of("selected"))
    selection: str = field(default="inverse_norm", metadata=one_of("inverse_norm"))
    coordinates: str = field(default="raw", metadata=one_of("raw"))
    scale: float | str = 1.0

    def card(self) -> str:
        """The update, and what it is bound to."""
        return (
            "`W' = W + C (s U) R`: C and R are weak columns and rows of the base's own weights, drawn at random and stored as"
            " indices; U was trained (CURLoRA, arXiv 2408.14572, with lightning-pmss). It means nothing on other weights, and"
            " loading on them is refused."
        )


class CURLoRA(PMSS):
    """PMSS under the options of CURLoRA."""

    config_class = CURLoRAConfig
    doing = "drawing rows and columns"
    variants = ()
