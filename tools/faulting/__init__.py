"""What `tools/fault_harness.py` is made of.

`content` says what each key's bytes are, `kinds` which faults there are, `plugin` puts them around
real plugins, `seam` below the filesystem backend, `link` between a client and its server, `places`
are the tiers with their servers and what is done to these, `canary` tells lateness from a busy
machine, `storm` is one round of it all, `rest` what must be left afterwards, `work` the process
that goes from round to round on one place, and `findings` what was seen.
"""
