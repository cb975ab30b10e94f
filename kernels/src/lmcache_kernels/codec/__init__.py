"""Serdes that make chunks smaller, or unreadable to others. See docs/codec-format.md."""
