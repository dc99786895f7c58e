"""What tests, demo, benchmark and guide run on: private servers, a stand-in for Iterable, main.py as a process."""
