"""Conformance kits for plugin authors: subclass one, give its fixtures, run pytest.

* `storage.StorageBackendTests`
* `serde.SerdeTests`
* `connector.EngineConnectorTests`
* `transfer.TransferChannelTests`
* `policy.CachePolicyTests`

`simulated_memory` drives a policy without a planner, for its tests and for traces.

And what the kits can't ask, because it is about who calls a plugin: `faults` and `faulty`, plugins
that fail when they are told to.

The kits need pytest (``pip install lmcache-core[testing]``) and no plugin of it. Don't
override a test to skip it: mark it ``xfail(strict=True, reason=…)``, so that the
exception to the contract shows.
"""
