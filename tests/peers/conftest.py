"""Keeps doctest collection from importing the peers into pytest: the scripts here are run, not imported."""

collect_ignore_glob = ["*.py"]
