"""Helpers for the tests, by subject."""
