"""TOUCH. One file = one outside thing; no decisions. They know policy's data and errors, and nothing above."""
