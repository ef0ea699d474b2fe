"""The version of this code. The package's metadata takes it from here."""

VERSION = "0.1.0"
