"""Conformance kits for plugin authors: subclass one, give its fixtures, run pytest.

* `storage.StorageBackendTests`
* `serde.SerdeTests`
* `connector.EngineConnectorTests`
* `transfer.TransferChannelTests`

Need pytest (``pip install lmcache-core[testing]``) and no plugin of it. Don't
override a test to skip it: mark it ``xfail(strict=True, reason=…)``, so that the
exception to the contract shows.
"""
