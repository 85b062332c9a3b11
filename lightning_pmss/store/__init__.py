"""Read files that may be damaged, foreign or edited by hand: each refusal is one sentence, and no input causes a crash.

Every reader builds on this room: of adapter folders, skeleton files, checkpoints, indices of shards, a model's ``config.json``.
A `Record` beside each reader defines the required content of its files.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
