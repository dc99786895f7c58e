"""Private servers, a stand-in for Iterable, and main.py as a process, for tests."""
