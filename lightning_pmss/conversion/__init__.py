"""Conversion of a model by a config: targets, names, report."""
