"""What is stored.

Its shape, its name, its bytes. No I/O but reading a model's files for their digest.
"""
