"""Sharded layers: over which process groups they are sharded, and the norms of whole layers.

Norms of local shards are combined by one all-reduce.
"""
