"""Published methods in terms of sparsekit's ops: short modules to read, run and change."""
