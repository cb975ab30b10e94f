"""The ``lm://`` store: a server that needs nothing else, and its client.

`plugin` is what core finds, `command` is ``lmcache_server``. `protocol` and `greeting` are the wire
format, byte by byte, and `inventory` is what `administration` asks for operators. On the server's
side, `server` has threads that run a `session` for each client; what it holds is in `values`, which
lie in an `arena`. On the client's side, `backend` asks a few `connection`s, which begin with a
`handshake`; `outgoing` and `incoming` move values over a `line`. Nothing
but `plugin` and `config` is imported before somebody configures or starts it.
"""
