"""Encodes and decodes documents and frames. These modules use no files, no clock and no locks."""
