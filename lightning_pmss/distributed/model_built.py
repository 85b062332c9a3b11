"""`model_built`: the moment in ``configure_model`` at which callbacks may change the model before it is sharded."""

from __future__ import annotations

import lightning as L


def model_built(module: L.LightningModule, *, everywhere: bool = True) -> None:
    """Tell the Trainer's callbacks that the layers exist and are not sharded yet.

    Lightning has no hook between building and sharding inside ``configure_model``; under FSDP2 this call is that hook.
    Every callback with a method ``on_model_built(trainer, module, everywhere)`` is called; `PMSSCallback` converts the
    model there.
    Without a Trainer (``load_from_checkpoint``) nothing happens.

    Args:
        module: The LightningModule itself.
        everywhere: Whether every rank has built the model and makes this call. If not, only one has, the others will get
            what it has made of it, and the callbacks must not communicate.

    Example::

        def configure_model(self):
            if self.model is not None:
                return
            self.model = build()
            model_built(self)
            for block in self.model.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    """
    if module._trainer is None:
        return
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if (told := getattr(callback, "on_model_built", None)) is not None:
            told(module.trainer, module, everywhere)
