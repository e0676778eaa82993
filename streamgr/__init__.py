"""streamgr: a streaming generative recommender, exactly once from broker offset to served weights."""

__version__ = "0.1.0"
