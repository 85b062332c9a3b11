"""Samplers of Optuna, with a random state of its own for each trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lightning_pmss.search.space import Space


class SamplerPerTrial(BaseSampler):
    """Makes a sampler for each trial, seeded by the trial's number: two workers never draw from the same random state.

    Args:
        make: Makes a sampler from a seed.
        seed: Seed of the search.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._sampler = make(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Make the trial's sampler."""
        state = np.random.SeedSequence([self._seed, trial.number]).generate_state(1)
        self._sampler = self._make(int(state[0]))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Of the trial's sampler."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Of the trial's sampler."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Of the trial's sampler."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """Of the trial's sampler."""
        self._sampler.after_trial(study, trial, state, values)


def _tpe(space: Space) -> Callable[[int], BaseSampler]:
    grouped = len(space.methods) > 1  # options of one method are drawn together, as far as trials have that method

    def make(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return TPESampler(multivariate=True, constant_liar=True, group=grouped, seed=seed)

    return make


SAMPLERS: dict[str, Callable[[Space], Callable[[int], BaseSampler]]] = {
    "tpe": _tpe,
    "random": lambda space: lambda seed: RandomSampler(seed=seed),
}


def sampler(name: str, space: Space, seed: int) -> BaseSampler:
    """Make the sampler of a search.

    Args:
        name: ``tpe`` or ``random``.
        space: The search space.
        seed: Of the search.
    """
    return SamplerPerTrial(SAMPLERS[name](space), seed)
