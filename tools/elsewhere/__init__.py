"""Other runtimes: their environments, the scripts that run in them, and the files they are given."""
