"""The faults that are injected, the tests that show what happens, and the page that is written from both."""
