"""The norm of every layer, whole even where the tensor at hand is a shard of it.

Finds which parameters are sharded and over which process groups; their norms are added up by one all-reduce.
"""
