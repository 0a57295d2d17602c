"""Published methods put together from the ops: each a short module to read, use or copy."""
