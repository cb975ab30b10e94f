"""The codecs on a GPU, in Triton: streams of docs/codec-format.md. **Not run on hardware.**

`decoder` and `encoder` are what a caller uses. They need torch and triton, so nothing imports them
before a GPU is asked for.
"""
