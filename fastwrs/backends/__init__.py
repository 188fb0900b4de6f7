"""The backends, one module each: the only files that know how a kernel is called.

Only ``fastwrs.dispatch`` imports them.
"""
