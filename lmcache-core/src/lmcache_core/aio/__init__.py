"""Event loops, threads, sockets, and calls that end by their deadline. Nothing of chunks."""
