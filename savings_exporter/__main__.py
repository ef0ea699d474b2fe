"""``python -m savings_exporter``."""

from savings_exporter.cli import main

main()
