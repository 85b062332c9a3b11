"""Stop a training on Ctrl-C or SIGTERM between two optimizer steps, at the same step on all processes.

Lightning raises KeyboardInterrupt at any point of the program, and each process checks SIGTERM alone. Neither allows an exact
checkpoint, and several processes can save nothing at all, since each waits in another collective.
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
    """Signal handlers that record a request to stop, and the points at which the training stops.

    A second Ctrl-C stops at once. Handlers that are neither Python's nor Lightning's are left alone.

    Args:
        label: Name of the method, for messages.

    Attributes:
        requested: The signal received; None without one.
        agreed: Whether all processes stop, so that collectives are possible.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.requested: signal.Signals | None = None
        self.agreed = False
        self._before: dict[signal.Signals, Any] = {}
        self._process = 0
        self._speaks = False

    @property
    def name(self) -> str:
        """Name of the signal, for messages."""
        return _NAMES.get(self.requested, "another process") if self.requested else "another process"

    def watch(self, trainer: L.Trainer) -> None:
        """Install the handlers; call it in ``on_train_start``, after Lightning has installed its own."""
        self.requested, self.agreed = None, False
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows no handlers there; Lightning installs none either
        self._process, self._speaks = os.getpid(), trainer.is_global_zero
        lightning_s = trainer._signal_connector._original_handlers  # the handlers before Lightning's
        for number in _SIGNALS:
            if lightning_s.get(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Restore the former handlers."""
        while self._before:
            number, handler = self._before.popitem()
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's forked worker, which its parent ends
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.requested is not None and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        if self.requested is None and self._speaks:
            again = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
            name = _NAMES[signal.Signals(number)]
            text = f"\n{name}: {self.label} stops after this step and saves what was trained.{again}\n"
            os.write(2, text.encode())  # print is not re-entrant
        self.requested = self.requested or signal.Signals(number)

    def after_batch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop after a complete optimizer step, not between accumulated batches."""
        loop = trainer.fit_loop.epoch_loop
        if module.automatic_optimization and loop._should_accumulate():
            return
        if not self.agreed:
            wanted = self.requested is not None
            # Host and device synchronise here, once per optimizer step; Lightning's check does so in each batch.
            self.agreed = (
                trainer.strategy.reduce_boolean_decision(wanted, all=False) if trainer.world_size > 1 else wanted
            )
        if self.agreed and not loop._is_training_done:
            # Lightning stops when all callbacks have handled this step. At the end of an epoch it would stop after counting
            # the epoch, from where it cannot resume; the stop then waits for a validation or the next step.
            trainer._signal_connector.received_sigterm = True

    def before_validation(self, trainer: L.Trainer) -> None:
        """Stop before a validation, which a resumed run then does."""
        if self.agreed and not trainer.sanity_checking and not _has_all_steps(trainer):
            raise SIGTERMException

    def in_validation(self, trainer: L.Trainer) -> None:
        """Stop inside a validation; several processes complete it first, since their batches may differ in number."""
        alone = trainer.world_size == 1 and not trainer.sanity_checking
        if self.requested is not None and alone and not _has_all_steps(trainer):
            self.agreed = True
            raise SIGTERMException

    def mark(self, exception: BaseException, trainer: L.Trainer) -> None:
        """Set the exit status of the signal; Lightning exits with 0 after SIGTERM."""
        # Another status than 0 in a launched process kills the others, which may still be writing.
        if isinstance(exception, SIGTERMException) and self.agreed and trainer.is_global_zero:
            exception.code = 1 if self.requested is signal.SIGINT else 128 + signal.SIGTERM


def _has_all_steps(trainer: L.Trainer) -> bool:
    """Whether ``max_steps`` is reached: a run resumed from there would not validate, so the validation is completed."""
    return 0 <= trainer.max_steps <= trainer.global_step
