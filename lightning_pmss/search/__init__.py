"""Bayesian search over options of the command line, whose trials stop at a fraction of the training."""
