"""``python -m lightning_pmss``."""

from lightning_pmss.cli import main

# Guarded: Lightning's launchers and data workers import this module again.
if __name__ == "__main__":
    main()
