"""Ctrl-C and SIGTERM end a training between two optimizer steps, at the same one on all processes.

Lightning raises KeyboardInterrupt wherever the program happens to be, and looks at SIGTERM on each process for itself. From
either nothing exact can be saved, and with several processes nothing at all: each waits for the others somewhere else.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class GracefulStop:
    """Handlers that note a signal, and the moments at which it is obeyed.

    A second Ctrl-C stops at once, as without us. Handlers that are not Python's or Lightning's own are left alone.

    Attributes:
        requested: The signal that came; None so far.
        agreed: All processes stop: what follows may be a collective.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.agreed = False
        self._before: dict[signal.Signals, Any] = {}
        self._process = 0
        self._speaks = False

    @property
    def name(self) -> str:
        """How the user calls what stopped the training."""
        return _NAMES.get(self.requested, "another process") if self.requested else "another process"

    def watch(self, trainer: L.Trainer) -> None:
        """Install the handlers; call it in ``on_train_start``, when Lightning has installed its own."""
        self.requested, self.agreed = None, False
        if threading.current_thread() is not threading.main_thread():
            return  # signals cannot be handled there, and Lightning does not either
        self._process, self._speaks = os.getpid(), trainer.is_global_zero
        lightning_s = trainer._signal_connector._original_handlers  # what was there before Lightning
        for number in _SIGNALS:
            if lightning_s.get(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Put the former handlers back."""
        while self._before:
            number, handler = self._before.popitem()
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, forked since: its parent ends it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.requested is not None and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        if self.requested is None and self._speaks:
            again = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
            text = (
                f"\n{_NAMES[signal.Signals(number)]}: PMSS stops after this step and saves what was trained.{again}\n"
            )
            os.write(2, text.encode())  # a print may be what was interrupted
        self.requested = self.requested or signal.Signals(number)

    def after_batch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Obey after a whole optimizer step: gradients that are still being accumulated are in no checkpoint."""
        loop = trainer.fit_loop.epoch_loop
        if module.automatic_optimization and loop._should_accumulate():
            return
        if not self.agreed:
            wanted = self.requested is not None
            # A device that is ahead of its host waits here, once per optimizer step; Lightning lets it wait in each batch.
            self.agreed = (
                trainer.strategy.reduce_boolean_decision(wanted, all=False) if trainer.world_size > 1 else wanted
            )
        if self.agreed and not loop._is_training_done:
            # Obeyed by Lightning when all callbacks have had this step. At the end of an epoch it would be obeyed after the
            # epoch was counted, from where Lightning cannot resume: then in validation, or after the next step.
            trainer._signal_connector.received_sigterm = True

    def before_validation(self, trainer: L.Trainer) -> None:
        """Obey before a validation, which a resumed run makes up for."""
        if self.agreed and not trainer.sanity_checking and not _has_all_steps(trainer):
            raise SIGTERMException

    def in_validation(self, trainer: L.Trainer) -> None:
        """Obey in the middle of a validation; with several processes it has to end, as their batches may differ."""
        alone = trainer.world_size == 1 and not trainer.sanity_checking
        if self.requested is not None and alone and not _has_all_steps(trainer):
            self.agreed = True
            raise SIGTERMException

    def mark(self, exception: BaseException, trainer: L.Trainer) -> None:
        """Let the process end with the status that the signal stands for; Lightning's is 0 after SIGTERM."""
        # A launched process that does not end with 0 has the others killed, which may still be writing.
        if isinstance(exception, SIGTERMException) and self.agreed and trainer.is_global_zero:
            exception.code = 1 if self.requested is signal.SIGINT else 128 + signal.SIGTERM


def _has_all_steps(trainer: L.Trainer) -> bool:
    """Whether ``max_steps`` are done: a run that goes on from there would not validate, so this validation is let end."""
    return 0 <= trainer.max_steps <= trainer.global_step
