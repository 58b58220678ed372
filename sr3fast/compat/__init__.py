"""Doors to other people's code and files."""
