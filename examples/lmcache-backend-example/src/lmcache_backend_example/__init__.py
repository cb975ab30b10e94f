"""Keeps LMCache's chunks in a SQLite file: an example of somebody else's backend."""
