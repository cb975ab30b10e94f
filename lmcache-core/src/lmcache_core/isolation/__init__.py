"""Runs storage backends and transfer channels in processes of their own, where they can't hurt an
engine.

Some client libraries crash, block for ever or leak. A backend whose descriptor says ``isolated``
(or whose section does) is created and called in a child process. The child maps the same host
memory, so values aren't copied on the way. One that dies, hangs or grows too large is killed and
replaced; meanwhile everything in it is a miss.

    backend    the parent's side: an ordinary `StorageBackend`, and when to start again
    process    one child: its start, calls to it, what it prints, its end
    scratch    shared room for values that don't lie in host memory for chunks
    wire       what crosses, as plain data
    child      the child's side; ``python -m lmcache_core.isolation.child``
    channel, channel_child    the same two for a transfer channel

Plugins know nothing of all this.
"""
