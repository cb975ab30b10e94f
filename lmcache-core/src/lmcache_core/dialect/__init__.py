"""How LMCache writes its configuration: flat keys, old names of keys, variables.

A plugin like others: core knows `lmcache_core.config.dialect.Dialect`, and none of these names. The
table is imported when a configuration is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache_core.contracts.hookspecs import hookimpl

if TYPE_CHECKING:
    from lmcache_core.config.dialect import Dialect


@hookimpl
def lmcache_dialects() -> Sequence[Dialect]:
    from lmcache_core.dialect.keys import FlatKeys

    return [FlatKeys()]
