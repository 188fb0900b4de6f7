"""The version of fastwrs, written once."""

__version__ = "0.1.0"
