"""What several test files share; tests/README.md lists it."""
