"""From a model and a configuration to a converted model: targets, names, report."""
