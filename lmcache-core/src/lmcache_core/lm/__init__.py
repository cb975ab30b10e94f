"""The ``lm://`` store: a server that needs nothing else, and its client.

`protocol` is the wire format, byte by byte. `server`, `session`, `values` and
`arena` are one side of it, `backend`, `connection` and `stream` the other.
Nothing here is imported before somebody configures or starts it.
"""
