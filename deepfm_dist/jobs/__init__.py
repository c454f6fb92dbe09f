"""One function per command: it does the work and returns its result, which the caller shows."""
