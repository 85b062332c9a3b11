"""Talk to a model in the terminal, and answer a file of prompts, with one adapter or several."""
