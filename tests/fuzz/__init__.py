"""Seeded mutations of files that anybody may have written: no traceback, no hang, nothing half changed.

`PMSS_FUZZ=2000` makes them long; a failure names its seed, and `PMSS_FUZZ_FIRST=<seed> PMSS_FUZZ=1` runs that one again.
"""
