"""The built-in ``tcp`` transfer channel: bytes between two processes' regions over sockets."""
