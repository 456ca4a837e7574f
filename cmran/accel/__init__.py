"""Fast paths. Each module names the portable operation that it replaces and falls back to it elsewhere."""
