"""What a plugin is.

Base classes, descriptors and hooks. Says what is called when; calls nothing.
"""
