"""The peers: other ways to keep the same records and totals durably, a module each.

A peer is a context manager that takes an empty directory, starts what it needs there, gives what each thread or process
opens for itself, and stops everything at its end. It raises ``LeftOutError`` where something is not installed.
"""
