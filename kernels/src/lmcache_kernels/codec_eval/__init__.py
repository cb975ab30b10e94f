"""`lmcache codec`: calibrates profiles of a model, and measures what codecs do to it.

Needs torch and transformers (`pip install lmcache-kernels[eval]`); nothing else imports it.
"""
