"""S3-FIFO, an eviction policy. `plugin` is what lmcache-core finds."""
