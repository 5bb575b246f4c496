"""Texts that are read once: compressed, and kept in a file that questions are answered from."""
