"""PMSS (arXiv 2409.16722): ``W' = W + s C U R`` with columns and rows of W."""
