"""The problems that ``scripts/sanitize.py`` runs: a module per operator, named like it.

Each has ``problems()``, which yields them, and ``check(problem)``, which runs one and returns what
is wrong with its result, or None.
"""
