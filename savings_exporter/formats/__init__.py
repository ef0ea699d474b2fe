"""Bytes of documents and frames to values of the model and back: no file, no clock, no lock."""
