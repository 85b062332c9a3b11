"""Lightning checkpoints of a converted module: what they hold, how they are checked, restored and extracted."""
