"""The peers: other stores that keep the same records and totals durably. Each has its own module.

A peer is a context manager that takes an empty directory, starts what it needs there, gives what each thread or process
opens for itself, and stops everything at its end. It raises ``LeftOutError`` where something is not installed.
"""
